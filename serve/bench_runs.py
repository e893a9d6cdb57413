"""Sends requests to a server with the clients of `vllm bench serve`, and reads its metrics.

The requests are chat messages with images and clips in them; `serve/bench_client.py`, which runs in
the serve environment, hands them to vLLM.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.faults import shortened
from serve.environment import ServeEnvironment

CLIENT = Path(__file__).with_name("bench_client.py")

Messages = list[dict[str, Any]]


class BenchFailed(Exception):
    """A run of `vllm bench serve` gave no figures; the message has the cause."""


@dataclass(frozen=True)
class Target:
    """A server that is measured.

    Attributes:
        name: How results name it.
        url: Its root, without `/v1`.
        model: The name it serves.
        api_key: Its key; None if it wants none.
        is_own: Whether this process started it: its certificate is not checked then.
    """

    name: str
    url: str
    model: str
    api_key: str | None = None
    is_own: bool = True


@dataclass(frozen=True)
class Load:
    """What vLLM's client measured in one run; of the requests in the order sent.

    Attributes:
        ttft_ms: Time to the first token of each answered request, in milliseconds.
        tpot_ms: Time per further token of each answer of two tokens or more, in milliseconds.
        requests_per_s: Answered requests per second.
        output_tokens_per_s: Tokens of the answers per second.
        prompt_tokens: Of each request, after EVS; 0 where it failed.
        texts: The answer to each request; None where it failed.
        errors: What went wrong with the requests that failed, shortened.
    """

    ttft_ms: tuple[float, ...]
    tpot_ms: tuple[float, ...]
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens: tuple[int, ...]
    texts: tuple[str | None, ...]
    errors: tuple[str, ...]


def write_requests(path: Path, requests: Sequence[Messages]) -> None:
    """Write requests as `BenchClient.run` reads them."""
    with path.open("w", encoding="utf-8") as file:
        for messages in requests:
            file.write(json.dumps(messages) + "\n")


class BenchClient:
    """One process in the serve environment that makes all runs; it is started with the first.

    Args:
        environment: Where vLLM is.
        log: What vLLM's client prints.
    """

    def __init__(self, environment: ServeEnvironment, log: Path) -> None:
        self.log = log
        self._environment = environment
        self._process: subprocess.Popen[str] | None = None

    def run(
        self,
        target: Target,
        requests: Path,
        count: int,
        concurrency: int,
        output_tokens: int,
        ignore_eos: bool,
    ) -> Load:
        """Send requests, at most `concurrency` at a time, and wait for all answers.

        Args:
            target: The server.
            requests: A file of `write_requests`.
            count: How many of its requests are sent, from the first on.
            concurrency: Most requests at a time.
            output_tokens: Most tokens of an answer.
            ignore_eos: Whether each answer has exactly `output_tokens`, past the end that the model
                gives it.

        Raises:
            BenchFailed: No request was answered, or vLLM's client failed.
        """
        with tempfile.TemporaryDirectory() as scratch:
            result = Path(scratch) / "result.json"
            arguments = _arguments(target, requests, count, concurrency, output_tokens, result)
            if ignore_eos:
                arguments.append("--ignore-eos")
            self._send(arguments)
            measured = json.loads(result.read_text(encoding="utf-8"))
        return _load(measured, target)

    def _send(self, arguments: Sequence[str]) -> None:
        if self._process is None:
            self._process = self._started()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(arguments), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline().strip()
        if answer != "done":
            what = answer or "vLLM's client ended"
            raise BenchFailed(f"vllm bench serve: {shortened(what)} (see {self.log})")

    def _started(self) -> subprocess.Popen[str]:
        with self.log.open("wb") as out:
            return subprocess.Popen(
                [str(self._environment.python), str(CLIENT)],
                env=os.environ | client_variables(os.environ),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                text=True,
            )

    def stop(self) -> None:
        """End the process."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def bench_client(environment: ServeEnvironment) -> Iterator[BenchClient]:
    """Yield a client; its log is in the temporary directory."""
    handle, name = tempfile.mkstemp(prefix="hybridquant-bench-", suffix=".log")
    os.close(handle)
    client = BenchClient(environment, Path(name))
    try:
        yield client
    finally:
        client.stop()


def client_variables(inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables of the client's process that differ from ours."""
    unproxied = [inherited.get("no_proxy") or inherited.get("NO_PROXY") or ""]
    unproxied += ["localhost", "127.0.0.1", "::1"]
    return {
        # Nothing of the current directory or of serve/ is to hide a module of vLLM.
        "PYTHONSAFEPATH": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # vLLM's client sends this key to any server (0.32, endpoint_request_func.py). The key of
        # the server that is measured goes with each run.
        "OPENAI_API_KEY": "",
        # vLLM's client asks a proxy even for a server on this machine.
        "no_proxy": ",".join(filter(None, unproxied)),
    }


def _arguments(
    target: Target,
    requests: Path,
    count: int,
    concurrency: int,
    output_tokens: int,
    result: Path,
) -> list[str]:
    """The arguments of `vllm bench serve` for one run."""
    arguments = ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions"]
    arguments += ["--base-url", target.url, "--model", target.model]
    arguments += ["--dataset-name", "custom", "--dataset-path", str(requests)]
    arguments += ["--skip-tokenizer-init"]
    arguments += ["--num-prompts", str(count), "--max-concurrency", str(concurrency)]
    arguments += ["--custom-output-len", str(output_tokens)]
    arguments += ["--temperature", "0", "--disable-tqdm"]
    arguments += ["--save-result", "--save-detailed", "--result-filename", str(result)]
    if target.api_key is not None:
        arguments += ["--header", f"Authorization=Bearer {target.api_key}"]
    if target.is_own and target.url.startswith("https://"):
        arguments.append("--insecure")
    return arguments


def _load(measured: Mapping[str, Any], target: Target) -> Load:
    """Read a result file of `vllm bench serve`.

    vLLM summarizes the times of the first and of further tokens only where it has a tokenizer, so
    they are taken from the single requests; the time per further token is defined as in its
    `calculate_metrics`.

    Raises:
        BenchFailed: No request was answered.
    """
    errors = []
    ttft_ms = []
    tpot_ms = []
    prompt_tokens = []
    texts: list[str | None] = []
    for number, first in enumerate(measured["ttfts"]):
        if not first:
            error = measured["errors"][number] or "no reason was given"
            errors.append(shortened(error.strip()))
            prompt_tokens.append(0)
            texts.append(None)
            continue
        prompt_tokens.append(int(measured["input_lens"][number]))
        texts.append(measured["generated_texts"][number])
        ttft_ms.append(1000 * first)
        further_tokens = measured["output_lens"][number] - 1
        if further_tokens > 0:
            tpot_ms.append(1000 * sum(measured["itls"][number]) / further_tokens)
    if not ttft_ms:
        raise BenchFailed(f"{target.name} answered no request: {errors[0]}")
    return Load(
        ttft_ms=tuple(ttft_ms),
        tpot_ms=tuple(tpot_ms),
        requests_per_s=measured["request_throughput"],
        output_tokens_per_s=measured["output_throughput"],
        prompt_tokens=tuple(prompt_tokens),
        texts=tuple(texts),
        errors=tuple(errors),
    )
