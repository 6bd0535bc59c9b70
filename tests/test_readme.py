"""The README's Python runs as it stands there, and its C++ is the example that is compiled."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run():
    assert len(blocks("python")) == 2
    names = {}
    for block in blocks("python"):
        exec(block, names)
    assert names["grads"].weight.shape == (16,)
    assert names["predictions"].shape == (32,)


def test_cpp_block_is_the_example():
    (block,) = blocks("cpp")
    example = (ROOT / "cpp/example/normalize.cpp").read_text()
    body = re.search(r"  const float x.*?batch_norm_forward\(args\);", example, re.DOTALL).group()
    assert body == re.search(
        r"  const float x.*?batch_norm_forward\(args\);", block, re.DOTALL
    ).group().replace("  // (4, 2)", "")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(name):
    text = (ROOT / name).read_text()
    paths = re.findall(r"`((?:cpp|python|tests|tools)/[\w./]+)`", text)
    paths += re.findall(r"\]\(([\w./]+)\)", text)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
