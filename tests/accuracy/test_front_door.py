"""`python -m accuracy`: a mistake is one sentence, before anything large is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

import accuracy
from accuracy.__main__ import _parser, compared_video
from accuracy.suites.command import run_suite
from checkpoint.faults import BadInput

ROOT = Path(accuracy.__file__).parents[1]


def run(*arguments: object) -> tuple[int, str]:
    """Exit status and stderr."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "accuracy", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "import time" in done.stderr
    imported = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert not [line for line in imported if line.rpartition("|")[2].strip() == "torch"]
    others = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    return done.returncode, "\n".join(others)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "chrt"], "tasks: unknown task 'chrt' (did you mean chart?)"),
        (["--tasks", ","], "--tasks: names no task"),
        (["--items", "0"], "--items: is 0 (give at least 1)"),
        (
            ["--suite", "report", "--tasks", "chrtqa"],
            "--tasks: unknown task 'chrtqa' (did you mean chartqa?)",
        ),
        (["--suite", "report", "--limit", "0"], "--limit: is 0 (give at least 1)"),
        (["--limit", "3"], "--limit: is for published benchmarks (add --suite report, or"),
    ],
)
def test_a_mistake_is_reported_before_torch_is_imported(arguments, message, tiny):
    status, shown = run(tiny, "--reference", tiny, *arguments)
    assert status == 2
    assert shown.count("\n") == 0
    assert shown.startswith(f"error: {message}")


NOBODY = "http://127.0.0.1:9"
"""Nothing listens there."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "reprot"], "--suite: unknown suite 'reprot' (did you mean report?)"),
        (["--suite", "report", "--tasks", ","], "--tasks: names no task (choose from mmmu, "),
        (["--suite", "text", "--judge", "http://j"], "--judge: needs a model's name"),
        (["--suite", "report", "--evs-rates", "0,7"], "--evs-rates: is '0,7' (give rates from 0 "),
        (
            ["--suite", "report", "--evs-curve", "--endpoint", NOBODY],
            "--endpoint: has one EVS rate as long as it runs (leave it out: ",
        ),
        (
            ["--suite", "report", "--judge", NOBODY, "--judge-model", "j"],
            f"--judge {NOBODY}/v1/: no server answers: Connection error. (start the judge, or",
        ),
        (
            ["--suite", "report", "--tasks", "chartqa", "--own-data"],
            "chartqa: {data}/ChartQA_TEST.tsv: no such file (put your data there)",
        ),
        (["--suite", "report", "--json", "{data}/.."], "{data}/..: is a directory (give a file)"),
        (
            ["--suite", "text", "--tasks", "needle", "--endpoint", NOBODY],
            f"{NOBODY}/v1/: no server answers: Connection error. (start one: ",
        ),
    ],
)
def test_a_mistake_about_suites_is_one_sentence(arguments, message, tiny, tmp_path):
    (tmp_path / "data").mkdir()
    folders = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    arguments = [text.format(data=tmp_path / "data") for text in arguments]
    given = _parser().parse_args([str(tiny), "--reference", str(tiny), *arguments, *folders])
    with pytest.raises(BadInput) as caught:
        run_suite(given, compared_video)
    (fault,) = caught.value.faults
    assert str(fault).startswith(message.format(data=tmp_path / "data"))


def test_a_folder_that_is_no_checkpoint_is_refused_before_anything_is_asked(tiny, tmp_path):
    (tmp_path / "folder").mkdir()
    folders = ["--out", str(tmp_path / "out"), "--reference", str(tiny)]
    task = ["--suite", "text", "--tasks", "needle"]
    given = _parser().parse_args([str(tmp_path / "folder"), *folders, *task])
    with pytest.raises(BadInput, match=r"folder/config.json: no such file"):
        run_suite(given, compared_video)
