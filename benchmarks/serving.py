"""What vLLM makes of checkpoints: kernels of their linears, memory of their weights, answers to
prompts of every kind.

    python -m benchmarks.serving DIR DIR:emulation --json FILE [--vllm='--enforce-eager']

Serves each DIR as `python -m serve` does, with vLLM's linear backend as in `DIR:emulation`, and
asks serve.demo's questions about a list, a page, two images and a clip pruned by EVS. For a
checkpoint of random weights the answers say that it loads and computes; whether they are right is
for python -m accuracy and benchmarks.tiny_accuracy.
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
from checkpoint.config import read_config
from checkpoint.faults import Fault, main, raise_if_any
from pipeline.inputs import versions
from serve.ask import ask, connect
from serve.demo import COLOURS, draw_page, draw_square, draw_video, questions
from serve.environment import find_environment
from serve.process import running_server
from serve.settings import settings_for

_KERNEL = re.compile(r"(?:Using|Selected) (\w+Kernel) for ")
_WEIGHTS = re.compile(r"Model loading took ([\d.]+) GiB")


def said(log: str) -> dict[str, Any]:
    """Of vLLM's log: its kernels for quantized linears, and the weights' memory in GiB, None where
    it did not say.
    """
    weights = _WEIGHTS.search(log)
    return {
        "kernels": sorted(set(_KERNEL.findall(log))),
        "weights_gib": float(weights[1]) if weights else None,
    }


def vllm_version() -> str:
    """Of the environment that serves."""
    return ".".join(map(str, find_environment().vllm))


def measure(
    name: str, flags: Sequence[str], images: Sequence[Path], video: Path, max_tokens: int
) -> dict[str, Any]:
    """Serve one directory, ask, and tell what came: seconds until it answered, what its log said,
    each answer.

    Args:
        name: A directory, or `DIR:BACKEND`.
        flags: More flags of `vllm serve`.
        images: A page and two others.
        video: A clip.
        max_tokens: Most tokens of an answer.

    Raises:
        BadInput: The directory cannot be served.
        ServerDied: vLLM did not start.
        RequestRefused: It failed to answer.
    """
    directory, backend = parted(name)
    more = [*(["--linear-backend", backend] if backend else []), *flags]
    settings = settings_for(directory, {"port": 0}, more)
    start = time.monotonic()
    with running_server(directory, settings, more) as server:
        ready, client = time.monotonic() - start, connect(server.url)
        answers = {
            title: ask(client, server.model, parts, max_tokens)
            for title, parts in questions(images, video).items()
        }
        log = server.log.read_text(encoding="utf-8", errors="replace")
    return {
        "seconds_until_ready": round(ready, 1),
        "video_pruning_rate": settings.video.pruning_rate,
        **said(log),
        "answers": {title: dataclasses.asdict(answer) for title, answer in answers.items()},
    }


def parted(name: str) -> tuple[Path, str]:
    """Directory and linear backend, the latter empty, of `DIR` or `DIR:BACKEND`."""
    directory, _, backend = name.partition(":")
    return Path(directory), backend


def _run() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("directories", nargs="+", metavar="DIR[:BACKEND]")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--max-tokens", type=int, default=48, help="most tokens of an answer (48)")
    parser.add_argument(
        "--jobs", type=int, default=1, help="servers at once; --vllm then gives each its memory"
    )
    parser.add_argument(
        "--vllm", default="", metavar="FLAGS", help="more flags of vllm serve, in one word"
    )
    given = parser.parse_args()
    counts = {"--max-tokens": given.max_tokens, "--jobs": given.jobs}
    raise_if_any(
        Fault(name, f"is {count}", "give 1 or more") for name, count in counts.items() if count < 1
    )
    for name in given.directories:
        read_config(parted(name)[0])
    flags, environment = shlex.split(given.vllm), find_environment()
    parts = Parts(
        given.json.with_suffix(".partial.json"), {"flags": flags, "max_tokens": given.max_tokens}
    )
    with tempfile.TemporaryDirectory() as scratch:
        images = [Path(scratch) / f"{name}.png" for name in ("page", *COLOURS)]
        draw_page(images[0])
        for path in images[1:]:
            draw_square(path, path.stem)
        video = Path(scratch) / "clip.mp4"
        draw_video(video)
        ask_all = functools.partial(
            measure, flags=flags, images=images, video=video, max_tokens=given.max_tokens
        )
        found = parts.all(
            {name: functools.partial(ask_all, name) for name in given.directories}, given.jobs
        )
    shown = [
        f"--max-tokens={given.max_tokens}",
        f"--jobs={given.jobs}",
        *([f"--vllm={given.vllm}"] if flags else []),
    ]
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.serving", *given.directories, *shown]),
        "device": environment.device.name,
        "vllm": vllm_version(),
        "versions": versions(),
        "served": found,
    }
    write_json(given.json, result)
    parts.done()
    return 0


if __name__ == "__main__":
    main(_run)
