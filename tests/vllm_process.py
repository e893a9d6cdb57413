"""A process that has imported vLLM, for every script of the tests that runs in its environment.

Importing vLLM takes about ten seconds, and a server imports it three times.
"""

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from checkpoint.config import read_config
from serve.command import build_environment
from serve.environment import find_environment, find_python
from serve.process import full_command
from serve.settings import ServeSettings

PRELOADED = Path(__file__).with_name("preloaded_vllm.py")
ENGINE = Path(__file__).with_name("vllm_engine.py")


def without_python() -> dict[str, str]:
    """The environment without what would lead the other interpreter to this one's modules."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


class VllmProcess:
    """Runs scripts, each in a copy of one process that has imported vLLM."""

    def __init__(self, process: subprocess.Popen) -> None:
        self._process = process

    def run(
        self,
        script: Path,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
        stdin: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Do what `python SCRIPT ARGUMENTS` does, and return the finished process.

        Args:
            script: A file.
            arguments: Its command line.
            environment: All of its environment; `without_python()` when None.
            directory: Its working directory; a temporary one when None.
            stdin: What it may read.
        """
        with tempfile.TemporaryDirectory() as folder:
            streams = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
            for path in streams:
                path.touch()
            streams[0].write_text(stdin, encoding="utf-8")
            request = {
                "script": str(script),
                "arguments": [str(argument) for argument in arguments],
                "environment": dict(environment or without_python()),
                "directory": str(directory or folder),
                "streams": [str(path) for path in streams],
            }
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
            assert reply, "the process that has imported vLLM has ended"
            stdout, stderr = (path.read_text(encoding="utf-8") for path in streams[1:])
        return subprocess.CompletedProcess([str(script)], int(reply), stdout, stderr)

    def answer(
        self,
        checkpoint: Path,
        request: dict,
        settings: ServeSettings | None = None,
        more_variables: Mapping[str, str] | None = None,
    ) -> tuple[dict, str]:
        """What the engine that `hybridquant serve` starts answers, and what it prints meanwhile.

        Args:
            checkpoint: What is served.
            request: As in vllm_engine.py.
            settings: How it is served.
            more_variables: Environment variables for vLLM, beside those that it needs.
        """
        settings = settings or ServeSettings()
        found = find_environment()
        command = full_command(checkpoint, settings, found)
        variables = build_environment(read_config(checkpoint), settings, found.device)
        # One process instead of three.
        variables |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **(more_variables or {})}
        with tempfile.TemporaryDirectory() as folder:
            asked = Path(folder, "request.json")
            asked.write_text(json.dumps(request))
            arguments = [asked, *command[command.index("serve") :]]
            done = self.run(ENGINE, *arguments, environment=without_python() | variables)
        log = done.stdout + done.stderr
        assert done.returncode == 0, log[-4000:]
        return json.loads(done.stdout.splitlines()[-1]), log


@contextlib.contextmanager
def running_vllm_process() -> Iterator[VllmProcess]:
    """The process, for the length of a `with` block."""
    command = [str(find_python()), "-P", str(PRELOADED)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, text=True, env=without_python()
    ) as process:
        yield VllmProcess(process)
