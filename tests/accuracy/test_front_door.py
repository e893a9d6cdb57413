"""`python -m accuracy`: a mistake is one sentence, before anything large is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

import accuracy

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
        (["--suite", "text", "--judge", "http://j"], "--judge: needs a model's name"),
    ],
)
def test_a_mistake_is_reported_before_torch_is_imported(arguments, message, tiny):
    status, shown = run(tiny, "--reference", tiny, *arguments)
    assert status == 2
    assert shown.count("\n") == 0
    assert shown.startswith(f"error: {message}")
