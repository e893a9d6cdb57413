"""Several servers on one machine, started at once and asked in turn.

On a GPU a plain server does not inherit OMP_NUM_THREADS from the benchmark; a side that is to have
it has it among its variables. Without it vLLM's API server resizes frames on one thread, which is
what a user gets who sets nothing; with it, on so many (vllm/utils/torch_utils.py,
set_default_torch_num_threads). On a CPU the variable is inherited: it keeps the threads of several
servers apart.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from checkpoint.faults import shortened
from checkpoint.log import get_logger
from serve.command import TORCH_THREADS, build_environment
from serve.environment import ServeEnvironment
from serve.own_server import OwnServer
from serve.preflight import free_port, preflight
from serve.process import ServerDied, ServerProcess, full_command, new_log, wait_until_ready
from serve.settings import ServeSettings, override
from serve.vllm_flags import setting_values

logger = get_logger(__name__)

START_SECONDS = 420.0

REQUEST_SECONDS = 300.0
"""Time after which an answer counts as missing."""

TEXT_IDS = range(20, 250)
"""Token ids that prompts of random tokens are drawn from: bytes, in every tokenizer of ours."""

Measured = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """One server of a comparison.

    Attributes:
        name: How results name it.
        directory: A checkpoint.
        flags: More flags of `vllm serve`.
        settings: Values of our settings, by dotted name.
        variables: Environment variables of its own.
        is_plain: Whether it is started as `vllm serve DIR FLAGS`, with nothing of ours in front;
            the settings are passed over then.
    """

    name: str
    directory: Path
    flags: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    is_plain: bool = False

    def described(self) -> dict[str, Any]:
        """Return what a result file says about it."""
        told = dataclasses.asdict(self)
        return told | {"directory": self.directory.name, "flags": " ".join(self.flags)}


class Asker:
    """One server that answers.

    Args:
        url: Its address, without `/v1`.
        log: What vLLM prints.
        seconds_to_start: From the command to the first answer.
    """

    def __init__(self, url: str, log: Path | None = None, seconds_to_start: float = 0) -> None:
        self.url = url
        self.log = log
        self.seconds_to_start = seconds_to_start
        self._model = OwnServer(url).served_name()

    def ask(self, kind: str, files: Sequence[Path], tokens: int) -> Measured:
        """Ask about media that the server reads itself.

        Args:
            kind: `image` or `video`.
            files: In a folder that the server may read.
            tokens: Tokens of the answer.

        Returns:
            `first`: seconds to the first token; `all`: seconds to the last; `prompt_tokens`;
            `begin`: when it was asked, by the machine's monotonic clock.

        Raises:
            OSError: It does not answer, refuses, or ends its answer with an error.
        """
        parts: list[Measured] = []
        for file in files:
            parts.append({"type": f"{kind}_url", f"{kind}_url": {"url": f"file://{file}"}})
        parts.append({"type": "text", "text": "What happens?"})
        body = {
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        start = time.monotonic()
        first = 0.0
        prompt_tokens = 0
        with self._post("chat/completions", body) as response:
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise OSError(f"the server ended its answer: {shortened(str(event['error']))}")
                if event["choices"] and not first and _has_token(event["choices"][0]):
                    first = time.monotonic() - start
                if event.get("usage"):
                    prompt_tokens = event["usage"]["prompt_tokens"]
        return {
            "begin": start,
            "first": first,
            "all": time.monotonic() - start,
            "prompt_tokens": prompt_tokens,
        }

    def complete(self, prompt: Sequence[int], tokens: int) -> float:
        """Let the server write exactly so many tokens after a prompt, and return the seconds.

        The answer comes in one piece, so that neither side spends time on its text.

        Args:
            prompt: Token ids.
            tokens: Tokens of the answer.

        Raises:
            OSError: It does not answer, refuses, or writes another number of tokens.
        """
        body = {"prompt": list(prompt), "max_tokens": tokens, "ignore_eos": True}
        start = time.perf_counter()
        with self._post("completions", body) as response:
            usage = json.load(response)["usage"]
        seconds = time.perf_counter() - start
        if (usage["prompt_tokens"], usage["completion_tokens"]) != (len(prompt), tokens):
            raise OSError(f"asked for {len(prompt)} and {tokens} tokens, got {usage}")
        return seconds

    def continue_text(self, text: str, tokens: int) -> list[str]:
        """Let the server continue a text greedily, and return its tokens, `token_id:N` each.

        Raises:
            OSError: It does not answer, or refuses.
        """
        body = {"prompt": text, "max_tokens": tokens, "ignore_eos": True, "logprobs": 0}
        with self._post("completions", body | {"return_tokens_as_token_ids": True}) as response:
            (choice,) = json.load(response)["choices"]
        return list(choice["logprobs"]["tokens"])

    def complete_all(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """Let the server write after all prompts at once, and return the seconds until the last
        has ended.

        Raises:
            OSError: As `complete`.
        """
        start = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            running = [pool.submit(self.complete, prompt, tokens) for prompt in prompts]
            for request in running:
                request.result()
        return time.perf_counter() - start

    def log_text(self) -> str:
        """Return what vLLM has printed."""
        if self.log is None:
            return ""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _post(self, path: str, body: Measured) -> Any:
        request = urllib.request.Request(
            f"{self.url}/v1/{path}",
            json.dumps({"model": self._model, "temperature": 0} | body).encode(),
            {"Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            return opener.open(request, timeout=REQUEST_SECONDS)
        except urllib.error.HTTPError as error:
            # Its own text is "Bad Request"; the reason is in the body.
            reason = error.read().decode(errors="replace")
            raise OSError(f"the server answered {error.code}: {shortened(reason)}") from None


def _has_token(choice: Measured) -> bool:
    """Return whether a streamed choice follows a token: the first one only names the role, and a
    token may have no text.
    """
    return bool(choice["delta"].get("content") or choice.get("finish_reason"))


def random_prompts(count: int, tokens: int, seed: int) -> list[list[int]]:
    """Return prompts of so many token ids that no two seeds have in common."""
    drawn = random.Random(seed)
    return [drawn.choices(TEXT_IDS, k=tokens) for _ in range(count)]


class _Prepared(NamedTuple):
    """How a server is started: its command, environment variables, those that it does not inherit,
    and settings.
    """

    command: list[str]
    variables: dict[str, str]
    without: tuple[str, ...]
    settings: ServeSettings


class Servers:
    """Servers of one machine that are started and stopped within a `with` block.

    Args:
        settings: Of those that are not plain; each gets a port of its own.
        environment: Where vLLM is.

    Attributes:
        askers: The servers that answer, by name.
        failed: Why others have not started, by name.
    """

    def __init__(self, settings: ServeSettings, environment: ServeEnvironment) -> None:
        self._settings = settings
        self._environment = environment
        self._processes: dict[str, ServerProcess] = {}
        self.askers: dict[str, Asker] = {}
        self.failed: dict[str, str] = {}

    def __enter__(self) -> Servers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop(list(self._processes))

    def start(self, sides: Sequence[Side], seconds: float = START_SECONDS) -> None:
        """Start servers at once, beside those that run, and wait until they answer.

        A server that ends, or does not answer in time, is named in `failed` and stopped.

        Args:
            sides: The servers.
            seconds: Time that they have until they answer.

        Raises:
            BadInput: The preflight finds faults of one; none is started then.
        """
        begun = time.monotonic()
        prepared = [self._prepared(side) for side in sides]
        urls = {}
        for side, command in zip(sides, prepared):
            self.failed.pop(side.name, None)
            urls[side.name] = self._launch(side, command)
        for side in sides:
            left = max(1.0, seconds - (time.monotonic() - begun))
            try:
                wait_until_ready(self._processes[side.name], OwnServer(urls[side.name]), left)
            except ServerDied as died:
                logger.error("%s: %s", side.name, died)
                self.stop([side.name])
                self.failed[side.name] = str(died)
                continue
            took = time.monotonic() - begun
            logger.info("%s answers after %.0f s", side.name, took)
            log = self._processes[side.name].log
            self.askers[side.name] = Asker(urls[side.name], log, round(took, 1))

    def stop(self, names: Sequence[str]) -> None:
        """Stop servers, all at once; names that do not run are passed over."""
        processes = [self._processes.pop(name) for name in names if name in self._processes]
        for name in names:
            self.askers.pop(name, None)
        if processes:
            with ThreadPoolExecutor(len(processes)) as pool:
                list(pool.map(ServerProcess.stop, processes))

    def _prepared(self, side: Side) -> _Prepared:
        """Return how a server is started.

        Raises:
            BadInput: The preflight finds faults.
        """
        environment = self._environment
        chosen = setting_values(side.flags) | dict(side.settings)
        own = override(self._settings, chosen | {"port": free_port("127.0.0.1")})
        config = preflight(side.directory, own, environment, side.flags)
        if side.is_plain:
            variables = {"VLLM_NO_USAGE_STATS": "1", "PYTHONSAFEPATH": "1"}
            command = plain_command(side, own.port, environment)
        else:
            variables = build_environment(config, own, environment.device, side.flags)
            command = full_command(side.directory, own, environment, side.flags)
        on_gpu = environment.device.kind == "cuda"
        without = (TORCH_THREADS,) if side.is_plain and on_gpu else ()
        return _Prepared(command, variables | dict(side.variables), without, own)

    def _launch(self, side: Side, prepared: _Prepared) -> str:
        """Start a server, and return its address."""
        log = new_log(prepared.settings)
        process = ServerProcess(prepared.command, prepared.variables, log, prepared.without)
        self._processes[side.name] = process
        return f"http://127.0.0.1:{prepared.settings.port}"


def measured_with(
    module: str, arguments: Sequence[str], environment: ServeEnvironment
) -> dict[str, Any]:
    """Return what a result file says about its command, the machine and vLLM.

    Args:
        module: The benchmark, as `decode`.
        arguments: Of the command.
        environment: Where vLLM is.
    """
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{module}", *arguments]),
        "device": environment.device.name,
        "cores": len(os.sched_getaffinity(0)),
        "vllm": environment.version,
        "plugin": environment.plugin,
    }


@contextlib.contextmanager
def started(
    sides: Sequence[Side],
    settings: ServeSettings,
    environment: ServeEnvironment,
    seconds: float = START_SECONDS,
) -> Iterator[tuple[dict[str, Asker], dict[str, str]]]:
    """Start servers at once, for the length of a `with` block.

    Args:
        sides: The servers.
        settings: As of `Servers`.
        environment: Where vLLM is.
        seconds: Time that they have until they answer.

    Yields:
        The servers that answer, by name, and why the others do not.

    Raises:
        BadInput: The preflight finds faults.
    """
    with Servers(settings, environment) as servers:
        servers.start(sides, seconds)
        yield servers.askers, servers.failed


def plain_command(side: Side, port: int, environment: ServeEnvironment) -> list[str]:
    """Return `vllm serve DIR FLAGS` on a port of this machine."""
    vllm = [str(environment.python), "-m", "vllm.entrypoints.cli.main", "serve"]
    return [*vllm, str(side.directory), "--host", "127.0.0.1", "--port", str(port), *side.flags]
