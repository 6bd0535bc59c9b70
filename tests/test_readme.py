"""The Python of README and pages runs as it stands there; the README's C++ is the example."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # examples may write files
    names = {}
    for block in blocks(page, "python"):
        if re.search(r"^import .*\btorch\b", block, re.MULTILINE):
            pytest.importorskip("torch", reason="what follows on the page is about PyTorch")
        exec(block, names)


def test_cpp_block_is_the_example():
    (block,) = blocks("README.md", "cpp")
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
