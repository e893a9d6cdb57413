"""The project's messages on stderr."""

import subprocess
import sys
from pathlib import Path

import pytest

import checkpoint

ROOMS = Path(checkpoint.__file__).parents[1]


@pytest.mark.parametrize(("level", "prefix"), [("info", ""), ("warning", "warning: ")])
def test_a_message_is_one_line_in_a_pipe_however_long(level, prefix):
    message = "x" * 100 + " " + "y" * 100
    code = (
        "from checkpoint.log import get_logger, set_up_logging; set_up_logging();"
        f"get_logger('test').{level}({message!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOMS, capture_output=True, text=True)
    assert done.stderr == f"{prefix}{message}\n"
    assert done.stdout == ""
