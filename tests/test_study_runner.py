"""Runs of the study: kept, resumed, never repeated, never mixed."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("scipy", reason="needs the extra `study`")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

from bnext import cli, data
from bnext.study import experiments, runner
from bnext.study.experiment import QUICK

# The smallest of the experiments: 5 arms.
NAME = "running-statistics"
COMMAND = [sys.executable, "-m", "bnext", "study", "--quick", "--only", NAME, "--no-progress"]
RUNS = 5 * 6


def lines(path):
    return path.read_text("utf-8").splitlines()


def test_a_study_that_is_killed_goes_on_without_repeating_a_run(tmp_path, capsys):
    kept = tmp_path / "runs.jsonl"
    command = [*COMMAND, "--jobs", "1", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    try:
        for _ in range(600):
            time.sleep(0.05)
            if kept.exists() and len(lines(kept)) >= 4:
                break
        process.kill()
        process.communicate()
        before = lines(kept)
        assert 4 <= len(before) < RUNS
        # The workers notice and end, too.
        for _ in range(100):
            if not _alive(process.pid):
                break
            time.sleep(0.05)
        assert not _alive(process.pid)
    finally:
        if _alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    torn = before[0][:50]  # as if the kill had come in the middle of a line
    with open(kept, "a") as file:
        file.write(torn)
    options = [*command[3:-4], "--jobs", "2", "--out", str(tmp_path)]
    assert cli.main(options) == 0
    assert f"{len(before)} are done already" in capsys.readouterr().out
    after = lines(kept)
    assert after[: len(before)] == before
    assert after[len(before)] == torn
    keys = [json.loads(line)["key"] for line in after if line != torn]
    assert len(keys) == len(set(keys)) == RUNS
    assert sorted(os.listdir(tmp_path)) == ["report.html", "results.json", "runs.csv", "runs.jsonl"]
    # Once more: nothing to do, the same files.
    page = (tmp_path / "report.html").read_bytes()
    assert cli.main(options) == 0
    assert f"{RUNS} are done already" in capsys.readouterr().out
    assert lines(kept) == after
    assert (tmp_path / "report.html").read_bytes() == page


def _alive(group):
    """Whether a process group has a process that is not a zombie."""
    for entry in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        try:
            fields = pathlib.Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
        except (OSError, UnicodeDecodeError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False


@pytest.fixture
def pretend(monkeypatch):
    """Runs in this process that take no time and only say what they were asked for."""
    done = []

    def all_of_them(left, dataset, processes):
        for job in left:
            done.append(job)
            yield job, ({"test_accuracy": float(len(done))}, 0.0)

    monkeypatch.setattr(runner, "_all", all_of_them)
    return done


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def execute(dataset, out, seeds=6, scale=QUICK, name=NAME):
    chosen = [experiments.registry()[name]]
    return runner.execute(
        chosen, dataset, scale, seeds=seeds, out=out, progress=False, log=lambda line: None
    )


def test_seeds_are_added_to(tmp_path, digits, pretend):
    first = execute(digits, tmp_path, seeds=6)
    more = execute(digits, tmp_path, seeds=8)
    assert len(pretend) == 5 * 8
    assert more[: len(first)] == first
    # Seed by seed, so that an interrupted study has all arms of the first seeds.
    assert [job.seed for job in pretend] == sorted(job.seed for job in pretend)


def test_results_of_another_version_are_not_mixed(tmp_path, digits, pretend, monkeypatch):
    old = execute(digits, tmp_path)
    monkeypatch.setattr(runner, "code_version", lambda name: "another")
    new = execute(digits, tmp_path)
    assert len(pretend) == 2 * RUNS
    assert {record["version"] for record in new} == {"another"}
    assert not {record["key"] for record in old} & {record["key"] for record in new}
    # Both stay in the file, and the old ones count again with the old code.
    monkeypatch.undo()
    kept = runner.Store(tmp_path / "runs.jsonl").records
    assert all(kept[record["key"]] == record for record in [*old, *new])


def test_results_of_other_data_or_settings_are_not_mixed(tmp_path, digits, pretend):
    execute(digits, tmp_path)
    x = digits.x_train + np.float32(1)
    other = data.Dataset("digits", x, digits.y_train, digits.x_test, digits.y_test, 10)
    execute(other, tmp_path)
    assert len(pretend) == 2 * RUNS
    execute(digits, tmp_path, scale=dataclasses.replace(QUICK, train=500))
    assert len(pretend) == 3 * RUNS
    execute(digits, tmp_path)
    assert len(pretend) == 3 * RUNS


def test_the_version_is_of_what_decides_a_run():
    names = list(experiments.registry())
    versions = {name: runner.code_version(name) for name in names}
    assert len(set(versions.values())) == len(names)  # each has code of its own


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        (("return x + 1", "return x + 2"), True),
        (("helper = 3", "helper = 4"), True),
        (("draws()", "draws_otherwise()"), False),
        (("judges()", "judges_otherwise()"), False),
        (("# a comment", "# another"), False),
        (('"""A docstring."""', '"""Another."""'), False),
        (("x + 1", "(x +\n        1)"), False),
    ],
)
def test_what_counts_as_a_change_of_an_experiment(tmp_path, change, counts):
    source = '''"""A docstring."""
helper = 3  # a comment
def run(x):
    """A docstring."""
    return x + 1
def plot():
    draws()
def contrasts():
    judges()
'''
    before, after = tmp_path / "before.py", tmp_path / "after.py"
    before.write_text(source)
    after.write_text(source.replace(*change))
    assert before.read_text() != after.read_text()
    meanings = [runner._meaning(path, runner._NOT_OF_A_RUN) for path in (before, after)]
    assert (meanings[0] != meanings[1]) is counts


def test_a_run_that_fails_is_named_and_the_others_are_kept(tmp_path, digits, monkeypatch):
    real = experiments.registry()[NAME]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from bnext import cli; import sys; sys.exit(cli.main(sys.argv[1:]))",
            *COMMAND[3:],
            *("--data", f"npz:{_too_small(tmp_path)}", "--jobs", "1", "--out", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"bnext: error: {real.name}, ")
    assert "Traceback" not in done.stderr


def _too_small(folder):
    """One sample of training."""
    path = folder / "small.npz"
    x = np.zeros((2, 4), np.float32)
    np.savez(path, x_train=x[:1], y_train=[0], x_test=x, y_test=[0, 0])
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing"], "--only: unknown experiment 'nothing'; known: learning-rate, "),
        (["--seeds", "5"], "--seeds: expected a whole number, 6 or more, got '5'"),
        (["--jobs", "0"], "--jobs: expected a whole number, 1 or more, got '0'"),
        (["--quick", "--data", "nothing"], "unknown data set 'nothing'"),
    ],
)
def test_wrong_options(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["study", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_list(capsys):
    assert cli.main(["study", "--list"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines()] == list(experiments.registry())
