"""Starts vLLM, waits until it answers, and takes it down again with everything it started."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from serve.command import adopt, build_command, build_environment
from serve.environment import ServeEnvironment, find_environment
from serve.preflight import free_port, preflight
from serve.settings import ServeSettings

GUARD = Path(__file__).with_name("guard.py")
GRACE_SECONDS = 10.0
READY_SECONDS = 1800.0
LAST_LINES = 12

# What of vLLM's log shows how far it is, oldest first.
_STAGES = (
    ("Resolved architecture", "reading config"),
    ("Starting to load model", "loading weights"),
    ("Loading weights took", "profiling"),
    ("KV cache size", "preparing the engine"),
    ("init engine", "warming up"),
)
_ERROR = re.compile(
    r"^(?:\([^)]*\) )?(?:ERROR [^\]]*\] )?((?:[A-Za-z_][\w.]*)?(?:Error|Exception|error): .+)$"
)


class ServerDied(Exception):
    """vLLM ended, or did not answer in time; the message holds the cause and the last lines of its
    log.
    """


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        url: Its OpenAI-compatible root, `http://127.0.0.1:8000/v1`.
        model: The name it serves the checkpoint under.
        log: File with everything vLLM prints.
        settings: What it was started with, the port filled in.
        process: The guard around vLLM; see `serve/guard.py`.
    """

    url: str
    model: str
    log: Path
    settings: ServeSettings
    process: ServerProcess


class ServerProcess:
    """vLLM under its guard.

    Attributes:
        log: File with everything vLLM prints.
    """

    def __init__(self, command: Sequence[str], variables: dict[str, str], log: Path) -> None:
        self.log = log
        lifeline, self._held = os.pipe()
        arguments = [sys.executable, str(GUARD), str(lifeline), str(GRACE_SECONDS), *command]
        try:
            with log.open("wb") as out:
                self._guard = subprocess.Popen(
                    arguments,
                    env=os.environ | variables,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    pass_fds=(lifeline,),
                    start_new_session=True,  # a Ctrl-C in the terminal comes to us alone, and we stop it in order
                )
        except BaseException:
            os.close(self._held)
            raise
        finally:
            os.close(lifeline)

    @property
    def pid(self) -> int:
        """Process id of the guard, the leader of the server's session."""
        return self._guard.pid

    def poll(self) -> int | None:
        """Exit status of vLLM, or None while it runs."""
        return self._guard.poll()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for vLLM to end; raises `subprocess.TimeoutExpired`."""
        return self._guard.wait(timeout)

    def stop(self) -> int:
        """Stop vLLM: SIGTERM, a grace period, SIGKILL to the group. Returns when nothing is left of
        it.
        """
        if self._held >= 0:
            os.close(self._held)
            self._held = -1
        try:
            return self._guard.wait(GRACE_SECONDS + 10)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            return self._guard.wait()
        finally:
            # Whoever kills the guard itself takes the API server with it, and leaves EngineCore
            # holding the GPU.
            _kill_session(self._guard.pid)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def _kill_session(leader: int) -> None:
    """SIGKILL to every process of the session that the guard led (Linux; elsewhere nothing is left
    to find).
    """
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = (
                stat.read_text().rpartition(")")[2].split()
            )  # the name before it may hold spaces
            if int(fields[3]) == leader:
                os.kill(int(stat.parent.name), signal.SIGKILL)


@contextlib.contextmanager
def running_server(
    directory: str | Path,
    settings: ServeSettings | None = None,
    extra: Sequence[str] = (),
    log: Path | None = None,
    environment: ServeEnvironment | None = None,
) -> Iterator[Server]:
    """Serve `directory` for the length of a `with` block.

    Args:
        directory: A checkpoint, BF16 or quantized.
        settings: How to serve it; the defaults on a free port when None.
        extra: More vLLM flags.
        log: Where vLLM's output goes; a file in the temporary directory when None.
        environment: Where vLLM is; found when None.

    Yields:
        The server, which answers.

    Raises:
        BadInput: When the preflight finds faults.
        ServerDied: When vLLM ends before it answers.
    """
    settings = adopt(settings or ServeSettings(port=0), extra)
    environment = environment or find_environment()
    config = preflight(Path(directory), settings, environment)
    if settings.port == 0:
        settings = dataclasses.replace(settings, port=free_port(settings.host))
    command = full_command(directory, settings, environment, extra)
    with ServerProcess(
        command, build_environment(config, environment.device), log or new_log(settings)
    ) as process:
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)
        url = f"http://{host}:{settings.port}"
        wait_until_ready(process, url, READY_SECONDS)
        yield Server(f"{url}/v1", served_name(url), process.log, settings, process)


def full_command(
    directory: str | Path,
    settings: ServeSettings,
    environment: ServeEnvironment,
    extra: Sequence[str] = (),
) -> list[str]:
    """`build_command`'s line with the interpreter in place of `vllm`: a script's first line may not
    move with it.
    """
    command = build_command(directory, settings, environment.vllm, environment.device, extra)
    return [str(environment.python), "-m", "vllm.entrypoints.cli.main", *command[1:]]


def new_log(settings: ServeSettings) -> Path:
    """An empty log file in the temporary directory."""
    handle, name = tempfile.mkstemp(prefix=f"hybridquant-serve-{settings.port}-", suffix=".log")
    os.close(handle)
    return Path(name)


def wait_until_ready(process: ServerProcess, url: str, seconds: float) -> None:
    """Wait for `url`/health, showing how far vLLM is.

    Raises:
        ServerDied: When vLLM ends, or does not answer within `seconds`.
    """
    started = time.monotonic()
    with _Progress() as progress:
        while not _get(f"{url}/health"):
            waited = time.monotonic() - started
            if (status := process.poll()) is not None:
                raise ServerDied(
                    death_message(
                        process.log, f"vLLM ended with status {status} after {waited:.0f} s"
                    )
                )
            if waited > seconds:
                raise ServerDied(
                    death_message(process.log, f"vLLM did not answer within {seconds:.0f} s")
                )
            progress.show(waited, process.log)
            time.sleep(0.5)


def served_name(url: str) -> str:
    """The first model name that a server at `url` (without /v1) lists.

    Raises:
        OSError: When it does not answer.
    """
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as response:
        return str(json.load(response)["data"][0]["id"])


def death_message(log: Path, what: str) -> str:
    """`what`, the first error in the log and its end; vLLM's last error only says "see root cause
    above".
    """
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [match[1] for line in lines if (match := _ERROR.match(line.rstrip()))]
    parts = [what + (f": {errors[0]}" if errors else "")]
    if lines:
        parts += [f"last lines of {log}:", *("  " + line for line in lines[-LAST_LINES:])]
    return "\n".join(parts)


def _get(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (OSError, urllib.error.URLError):
        return False


class _Progress:
    """One line, rewritten in place on a terminal, and written once a stage elsewhere."""

    def __init__(self) -> None:
        self._stage = ""
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> _Progress:
        return self

    def show(self, seconds: float, log: Path) -> None:
        text = log.read_text(encoding="utf-8", errors="replace")
        stage = next((name for mark, name in reversed(_STAGES) if mark in text), "importing")
        if self._terminal:
            print(
                f"\r\033[Kstarting vLLM: {stage}, {seconds:.0f} s",
                end="",
                file=sys.stderr,
                flush=True,
            )
        elif stage != self._stage:
            print(f"starting vLLM: {stage}, {seconds:.0f} s", file=sys.stderr, flush=True)
        self._stage = stage

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
