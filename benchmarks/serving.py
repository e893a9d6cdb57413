"""Serves checkpoints with vLLM: records the kernels, the memory of the weights, and answers.

    python -m benchmarks.serving DIR DIR:emulation --json FILE [--vllm='--enforce-eager']

Each DIR is served as `python -m serve` does; `DIR:BACKEND` chooses vLLM's linear backend. The
questions are those of serve.demo: about a list, a page, two images, and a clip that is pruned by
EVS. With a checkpoint of random weights the answers show that it loads and computes. Whether
answers are right is measured by `python -m accuracy` and `benchmarks.tiny_accuracy`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.parts import Parts, write_json
from checkpoint.command import command_parser, parse_command
from checkpoint.config import read_config
from checkpoint.faults import Fault, main, raise_if_any
from checkpoint.libraries import installed_versions
from serve.ask import ask
from serve.demo import COLOURS, draw_page, draw_square, draw_video, questions
from serve.environment import find_environment
from serve.process import running_server
from serve.settings import settings_for

# As vLLM 0.26 and 0.32 write them into their log.
_KERNEL = re.compile(r"(?:Using|Selected) (\w+Kernel) for ")
_WEIGHTS = re.compile(r"Model loading took ([\d.]+) GiB")


def read_log(log: str) -> dict[str, Any]:
    """Read the log of vLLM.

    Returns:
        `kernels`, the names of its kernels for quantized linears, and `weights_gib`, the memory of
        the weights in GiB, None if it is not logged.
    """
    weights = _WEIGHTS.search(log)
    return {
        "kernels": sorted(set(_KERNEL.findall(log))),
        "weights_gib": float(weights[1]) if weights else None,
    }


def split_backend(name: str) -> tuple[str, str]:
    """Split `NAME:BACKEND` into the name and vLLM's linear backend, empty if none is given."""
    name, _, backend = name.partition(":")
    return name, backend


def backend_flags(backend: str) -> list[str]:
    """Return the flags of `vllm serve` that choose a linear backend; none if it is empty."""
    if not backend:
        return []
    return ["--linear-backend", backend]


def vllm_version() -> str:
    """Return the version of vLLM in the environment that serves."""
    return find_environment().version


def measure(
    name: str, flags: Sequence[str], images: Sequence[Path], video: Path, max_tokens: int
) -> dict[str, Any]:
    """Serve one directory and ask every question.

    Args:
        name: A directory, or `DIR:BACKEND`.
        flags: More flags of `vllm serve`.
        images: A page and two others.
        video: A clip.
        max_tokens: Most tokens of an answer.

    Returns:
        Seconds until the server was ready, the EVS rate, what `read_log` returns, and the answers.

    Raises:
        BadInput: The directory cannot be served.
        ServerDied: vLLM did not start.
        RequestRefused: The server did not answer.
    """
    path, backend = split_backend(name)
    all_flags = [*backend_flags(backend), *flags]
    settings = settings_for(Path(path), {"port": 0}, all_flags)
    answers = {}
    start = time.monotonic()
    with running_server(Path(path), settings, all_flags) as server:
        ready = time.monotonic() - start
        client = server.client()
        for title, parts in questions(images, video).items():
            answer = ask(client, server.model, parts, max_tokens)
            answers[title] = dataclasses.asdict(answer)
        log = server.log.read_text(encoding="utf-8", errors="replace")
    return {
        "seconds_until_ready": round(ready, 1),
        "video_pruning_rate": settings.video.pruning_rate,
        **read_log(log),
        "answers": answers,
    }


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.serving", __doc__)
    parser.add_argument("directories", nargs="+", metavar="DIR[:BACKEND]")
    parser.add_argument("--json", type=Path, required=True, help="the result file")
    parser.add_argument("--max-tokens", type=int, default=48, help="most tokens of an answer (48)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="servers at the same time; --vllm must then limit the memory of each",
    )
    parser.add_argument(
        "--vllm", default="", metavar="FLAGS", help="more flags of vllm serve, in one word"
    )
    return parser


def _check(given: argparse.Namespace) -> None:
    """Check the options and that every directory is a checkpoint.

    Raises:
        BadInput: With every fault.
    """
    faults = []
    for option, count in (("--max-tokens", given.max_tokens), ("--jobs", given.jobs)):
        if count < 1:
            faults.append(Fault(option, f"is {count}", "give 1 or more"))
    raise_if_any(faults)
    for name in given.directories:
        read_config(split_backend(name)[0])


def _draw_media(folder: Path) -> tuple[list[Path], Path]:
    """Draw a page, one square per colour, and a clip."""
    page = folder / "page.png"
    draw_page(page)
    images = [page]
    for colour in COLOURS:
        square = folder / f"{colour}.png"
        draw_square(square, colour)
        images.append(square)
    video = folder / "clip.mp4"
    draw_video(video)
    return images, video


def _run() -> int:
    given = parse_command(_parser())
    _check(given)
    flags = shlex.split(given.vllm)
    environment = find_environment()
    settings = {"flags": flags, "max_tokens": given.max_tokens}
    parts = Parts(given.json.with_suffix(".partial.json"), settings)
    with tempfile.TemporaryDirectory() as scratch:
        images, video = _draw_media(Path(scratch))
        todo = {}
        for name in given.directories:
            todo[name] = functools.partial(
                measure, name, flags, images, video, max_tokens=given.max_tokens
            )
        found = parts.all(todo, given.jobs)
    options = [f"--max-tokens={given.max_tokens}", f"--jobs={given.jobs}"]
    if flags:
        options.append(f"--vllm={given.vllm}")
    command = ["python", "-m", "benchmarks.serving", *given.directories, *options]
    result = {
        "command": shlex.join(command),
        "device": environment.device.name,
        "vllm": vllm_version(),
        "versions": installed_versions(),
        "served": found,
    }
    write_json(given.json, result)
    parts.done()
    return 0


if __name__ == "__main__":
    main(_run)
