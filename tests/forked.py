"""Runs something in a copy of this process, which has imported torch and ModelOpt already.

What `python -m MODULE` does is done there, in a process of its own with its own signals, limits and
exit status; only the seven seconds that the imports take are not spent again. Each command is also
run by a real `python -m` somewhere in the tests.
"""

import os
import runpy
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import NoReturn

import torch


def run_forked(
    module: str, *arguments: object, prepare: Callable[[], None] | None = None
) -> CompletedProcess[str]:
    """Do what `python -m MODULE ARGUMENTS` does, and return the finished process.

    Args:
        module: What is run as the main module.
        arguments: Its command line.
        prepare: Called before it in the copy, for example to set a limit.
    """

    def run() -> None:
        sys.argv = [module, *map(str, arguments)]
        if prepare is not None:
            prepare()
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    return fork(run)


def fork(run: Callable[[], None]) -> CompletedProcess[str]:
    """Call `run` in a copy of this process, and return the copy when it has ended.

    It ends as a Python program does: with the status of `sys.exit`, or 1 and a traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        child = os.fork()
        if child == 0:
            _run_and_end(run, outputs)
        _, ended = os.waitpid(child, 0)
        status = os.waitstatus_to_exitcode(ended)
        stdout, stderr = (path.read_text(encoding="utf-8") for path in outputs)
    return CompletedProcess([], status, stdout, stderr)


def _run_and_end(run: Callable[[], None], outputs: list[Path]) -> NoReturn:
    """Call `run` with stdout and stderr in files, and end this process."""
    status = 1
    try:
        for number, path in enumerate(outputs, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8")
        sys.stderr = os.fdopen(2, "w", encoding="utf-8")
        # A fork leaves torch's thread pool behind; two threads that start a new one at once fail
        # an assertion.
        torch.set_num_threads(1)
        run()
        status = 0
    except SystemExit as ended:
        status = _exit_status(ended.code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # nothing of pytest's is torn down a second time


def _exit_status(code: object) -> int:
    """The exit status of `sys.exit(code)`."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code
    print(code, file=sys.stderr)
    return 1
