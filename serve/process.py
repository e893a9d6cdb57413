"""Starts vLLM, waits until it answers, and stops it with everything it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from checkpoint.config import read_config
from checkpoint.endpoint import KEY_VARIABLE
from checkpoint.faults import Fault, raise_if_any
from checkpoint.log import get_logger
from serve.command import build_command, build_environment
from serve.environment import ServeEnvironment, find_environment
from serve.own_server import OwnServer, own_server
from serve.plan import sequence_limit
from serve.preflight import free_port, preflight
from serve.settings import ServeSettings, override
from serve.vllm_flags import flags_after, setting_values, switched_on
from serve.vllm_log import blamed_flags, death_message, read_log

if TYPE_CHECKING:
    from openai import OpenAI

logger = get_logger(__name__)

GUARD = Path(__file__).with_name("guard.py")
"""The program that starts vLLM, and stops it when this process ends."""

GRACE_SECONDS = 10.0
"""Seconds between SIGTERM and SIGKILL."""

KILL_SECONDS = 10.0
"""Seconds that processes get to disappear after SIGKILL: the system may still free their memory."""

READY_SECONDS = 1800.0
"""Seconds that vLLM gets to answer."""

START_ATTEMPTS = 3
"""Times that vLLM is started while it ends because a port was taken."""

REPORT_SECONDS = 30.0
"""Seconds after which the stage of a starting vLLM is logged again."""

_STAGES = (
    ("Resolved architecture", "reading config"),
    ("Starting to load model", "loading weights"),
    ("Loading weights took", "profiling"),
    ("KV cache size", "preparing the engine"),
    ("init engine", "warming up"),
)
"""Text of vLLM's log by which its stages are told apart, oldest first."""

_TAKEN_PORT = "Address already in use"
"""What ends vLLM when a port that it has found free is taken before it listens there. It looks for
several, for its own processes, and another server that starts meanwhile finds the same ones.
"""

_ELSEWHERE = {"--uds", "--grpc", "--headless"}
"""Flags of vLLM: it listens at a socket of the file system, speaks gRPC alone, or is one of several
nodes that answers nobody."""


class ServerDied(Exception):
    """vLLM ended, or did not answer in time; the message holds the cause and the last lines of its
    log.

    Attributes:
        log: Its log, if it ended while it started.
    """

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log

    @property
    def port_was_taken(self) -> bool:
        """Whether vLLM ended because another process took a port first."""
        return _TAKEN_PORT in str(self).splitlines()[0]


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

    def client(self, timeout: float = 600.0) -> OpenAI:
        """Return an OpenAI client for the server; `timeout` is in seconds."""
        return own_server(self.settings).client(timeout)


class ServerProcess:
    """vLLM under its guard.

    Args:
        command: What is run.
        variables: Environment variables beside this process's own.
        log: File with everything vLLM prints.
        without: Variables of this process that it does not inherit.

    Attributes:
        log: The same file.
    """

    def __init__(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        log: Path,
        without: Collection[str] = (),
    ) -> None:
        self.log = log
        inherited = {name: value for name, value in os.environ.items() if name not in without}
        # The guard stops vLLM when our end of this pipe closes.
        lifeline, self._held = os.pipe()
        arguments = [sys.executable, str(GUARD), str(lifeline), str(GRACE_SECONDS), *command]
        try:
            with log.open("wb") as out:
                self._guard = subprocess.Popen(
                    arguments,
                    env=inherited | dict(variables),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    pass_fds=(lifeline,),
                    # A Ctrl-C in the terminal reaches this process alone, which then stops vLLM.
                    start_new_session=True,
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
        """Return the exit status of vLLM, or None while it runs."""
        return self._guard.poll()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for vLLM to end and return its exit status.

        Raises:
            subprocess.TimeoutExpired: It still runs after `timeout` seconds.
        """
        return self._guard.wait(timeout)

    def stop(self) -> int:
        """Stop vLLM: SIGTERM, a grace period, SIGKILL to the group. Return when nothing is left of
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
            # A kill of the guard itself ends the API server too, but leaves EngineCore, which
            # holds the GPU.
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
    """Send SIGKILL to every process of the session that the guard led, and wait until it is gone
    (on Linux; without /proc it finds none).
    """
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        members = list(session_members(leader))
        if not members:
            return
        for member in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        time.sleep(0.02)


def session_members(leader: int) -> Iterator[int]:
    """Yield the processes of a session that still run."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            # The name in parentheses may contain spaces.
            fields = stat.read_text().rpartition(")")[2].split()
            has_ended = fields[0] in ("Z", "X")
            if int(fields[3]) == leader and not has_ended:
                yield int(stat.parent.name)


@contextlib.contextmanager
def running_server(
    directory: str | Path,
    settings: ServeSettings | None = None,
    extra: Sequence[str] = (),
    log: Path | None = None,
    environment: ServeEnvironment | None = None,
    more_variables: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Serve `directory` for the length of a `with` block.

    Args:
        directory: A checkpoint, BF16 or quantized.
        settings: How to serve it; the defaults on a free port when None. The manifest is not read
            here: see `serve.settings.settings_for`.
        extra: More vLLM flags.
        log: Where vLLM's output goes; a file in the temporary directory when None.
        environment: Where vLLM is; found when None.
        more_variables: Environment variables for vLLM, beside those that it needs.

    Yields:
        The server, which answers.

    Raises:
        BadInput: The preflight finds faults, or a flag in `extra` ends vLLM.
        ServerDied: vLLM ends before it answers.
    """
    raise_if_any(_elsewhere_faults(extra))
    # The port to wait at is the one that vLLM will use.
    settings = override(settings or ServeSettings(port=0), setting_values(extra))
    environment = environment or find_environment()
    config = preflight(Path(directory), settings, environment, extra, log)
    variables = build_environment(config, settings, environment.device, extra)
    variables |= dict(more_variables or {})
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            server = _start(directory, settings, extra, log, environment, variables)
            break
        except ServerDied as died:
            if died.log is not None and not died.port_was_taken:
                raise_if_any(blamed_flags(died.log, extra))
            if not died.port_was_taken or attempt == START_ATTEMPTS:
                raise
            logger.warning("another process took a port that vLLM had chosen: starting it again")
    with server.process:
        yield server


def _elsewhere_faults(flags: Sequence[str]) -> Iterator[Fault]:
    """Yield faults of flags after which vLLM does not answer where it is waited for."""
    for flag in sorted(switched_on(flags) & _ELSEWHERE):
        what = "lets vLLM answer nowhere, or not by HTTP at a port, which is waited for"
        yield Fault(flag, what, "start vLLM by the line that --dry-run prints")


def _start(
    directory: str | Path,
    settings: ServeSettings,
    extra: Sequence[str],
    log: Path | None,
    environment: ServeEnvironment,
    variables: Mapping[str, str],
) -> Server:
    """Start vLLM once, and return it when it answers; otherwise nothing is left of it.

    Raises:
        ServerDied: vLLM ends before it answers.
    """
    if settings.port == 0:
        settings = override(settings, {"port": free_port(settings.host)})
    command = full_command(directory, settings, environment, extra)
    if settings.api_key is not None:
        variables = {**variables, KEY_VARIABLE: settings.api_key}  # others see a command line
    process = ServerProcess(command, variables, log or new_log(settings))
    try:
        reached = own_server(settings)
        wait_until_ready(process, reached, READY_SECONDS)
        name = reached.served_name()
    except BaseException:
        process.stop()
        raise
    return Server(f"{reached.url}/v1", name, process.log, settings, process)


def full_command(
    directory: str | Path,
    settings: ServeSettings,
    environment: ServeEnvironment,
    extra: Sequence[str] = (),
) -> list[str]:
    """Return `build_command`'s line for an environment's GPU.

    The command calls the interpreter, not the script `vllm`, whose first line names a path that may
    be wrong after its environment was moved.
    """
    limit = sequence_limit(read_config(directory), settings, environment, extra)
    if limit is not None:
        extra = flags_after(["--max-num-seqs", str(limit)], extra)
    command = build_command(directory, settings, environment.vllm, environment.device, extra)
    return [str(environment.python), "-m", "vllm.entrypoints.cli.main", *command[1:]]


def new_log(settings: ServeSettings) -> Path:
    """Create an empty log file in the temporary directory."""
    handle, name = tempfile.mkstemp(prefix=f"hybridquant-serve-{settings.port}-", suffix=".log")
    os.close(handle)
    return Path(name)


def wait_until_ready(process: ServerProcess, reached: OwnServer, seconds: float) -> None:
    """Wait until the server is healthy, and log how far vLLM is.

    Raises:
        ServerDied: vLLM ends, or does not answer within `seconds`.
    """
    started = time.monotonic()
    progress = _Progress()
    progress.report(0, process.log)
    while not reached.is_healthy():
        waited = time.monotonic() - started
        status = process.poll()
        if status is not None:
            what = f"vLLM ended with status {status} after {waited:.0f} s"
            raise ServerDied(death_message(process.log, what), process.log)
        if waited > seconds:
            what = f"vLLM did not answer within {seconds:.0f} s"
            raise ServerDied(death_message(process.log, what))
        progress.report(waited, process.log)
        time.sleep(0.5)


class _Progress:
    """Logs the stage of a starting vLLM: when it changes, and again after a while."""

    def __init__(self) -> None:
        self._stage = ""
        self._reported = 0.0

    def report(self, seconds: float, log: Path) -> None:
        stage = _stage(read_log(log))
        if stage != self._stage or seconds - self._reported >= REPORT_SECONDS:
            logger.info("starting vLLM: %s, %.0f s", stage, seconds)
            self._stage = stage
            self._reported = seconds


def _stage(log: str) -> str:
    """Return the latest stage that vLLM's log shows."""
    for mark, name in reversed(_STAGES):
        if mark in log:
            return name
    return "importing"
