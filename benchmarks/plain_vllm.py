"""Runs the launch post's own command on a directory, with nothing of ours in front, and asks.

    python -m benchmarks.plain_vllm DIR --json FILE
    python -m benchmarks.plain_vllm DIR --json FILE --vllm="--load-format dummy"    # no weights

The command is `vllm serve DIR --trust-remote-code --video-pruning-rate 0`, with `--quantization
modelopt` for FP8 and `modelopt_fp4` for NVFP4; plug-ins are switched off. What is asked: text, a
page, two pictures, a clip, and a prompt longer than a block of the cache, twice: the second time
its beginning comes from vLLM's prefix cache. Media are drawn, and go as data URLs with OpenAI's
client, as in the post. Where the weights are random, answers mean nothing, but must be there.

Exit status: 0 everything was answered, 1 something was not; with --right also if an answer is
wrong, which the tiny checkpoint's exports must not be.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.decode import STOCK_VARIABLES
from benchmarks.paired_servers import Asker, Side, started
from benchmarks.parts import write_json
from benchmarks.serving import read_log
from checkpoint.command import command_parser, parse_command
from checkpoint.config import read_config
from checkpoint.faults import main
from checkpoint.log import get_logger
from checkpoint.video import Video
from serve.ask import RequestRefused, ask, content_parts
from serve.demo import COLOURS, draw_page, draw_square, draw_video, questions
from serve.environment import find_environment
from serve.own_server import OwnServer
from serve.precision import precision_name
from serve.settings import ServeSettings
from serve.vllm_log import death_message

logger = get_logger(__name__)

PLAIN = "plain"

QUANTIZATION = {"FP8": "modelopt", "NVFP4": "modelopt_fp4"}
"""Value of --quantization in the post, by precision; BF16 and others have none."""

EXPECTED = {"list": "208", "page": "K7XP2", "two images": "2", "video": "7"}
"""What a right answer contains, by title of `serve.demo.questions`."""

LONG_LINES = 260
"""Lines of the long prompt: about 6,000 tokens where every character is one, more than three blocks
of the 12B's cache."""

LONG = ("long prompt", "long prompt again")

_BLOCK = re.compile(r"[Ss]etting attention block size to (\d+)")


def command_flags(directory: Path, rate: float = 0) -> list[str]:
    """Return the post's flags for a directory and an EVS rate."""
    flags = ["--trust-remote-code"]
    quantization = QUANTIZATION.get(precision_name(read_config(directory)))
    if quantization is not None:
        flags += ["--quantization", quantization]
    return [*flags, "--video-pruning-rate", f"{rate:g}"]


def stock_side(
    name: str,
    directory: Path,
    rate: float,
    media: Path,
    flags: Sequence[str],
    variables: Mapping[str, str] | None = None,
) -> Side:
    """Return stock vLLM with the post's flags, asked what ours is asked.

    Args:
        name: Of the server.
        directory: A checkpoint.
        rate: Of EVS.
        media: Folder that it may read.
        flags: More flags.
        variables: More environment variables.
    """
    video = Video()
    sampling = {"video": {"fps": video.fps, "num_frames": video.max_frames}}
    seen = ["--media-io-kwargs", json.dumps(sampling), "--allowed-local-media-path", str(media)]
    given = (*command_flags(directory, rate), *seen, *flags)
    return Side(name, directory, given, {}, STOCK_VARIABLES | dict(variables or {}), is_plain=True)


def long_prompt() -> str:
    """Return a text of many different lines and a question about one of them."""
    lines = [f"Line {number}: {number * 7919 % 10007}." for number in range(LONG_LINES)]
    return "\n".join([*lines, "What does the last line say?"])


def asked(asker: Asker, scratch: Path, max_tokens: int, keep: Callable[[Any], None]) -> Any:
    """Ask everything, one question after another.

    Args:
        asker: The server.
        scratch: Where media are drawn.
        max_tokens: Most tokens of an answer.
        keep: Called with everything so far after each question.

    Returns:
        By title the answer with its numbers of tokens, or `error`; `died` where vLLM ended.
    """
    images = [scratch / "page.png", *(scratch / f"{colour}.png" for colour in COLOURS)]
    draw_page(images[0])
    for path, colour in zip(images[1:], COLOURS):
        draw_square(path, colour)
    video = scratch / "clip.mp4"
    draw_video(video)
    prompts = dict(questions(images, video))
    long = content_parts([long_prompt()])
    # The clip comes last: on a CPU, vLLM 0.32 does not survive it.
    clip = prompts.pop("video")
    prompts |= dict.fromkeys(LONG, long)
    prompts["video"] = clip
    reached = OwnServer(asker.url)
    client = reached.client(timeout=300)
    model = reached.served_name()
    found: dict[str, Any] = {}
    for title, parts in prompts.items():
        logger.info("%s", title)
        try:
            found[title] = dataclasses.asdict(ask(client, model, parts, max_tokens))
        except RequestRefused as refused:
            found[title] = {"error": str(refused)}
        found[title]["server_lives"] = reached.is_healthy()
        keep(found)
        if not found[title]["server_lives"]:
            break
    for title in prompts:
        found.setdefault(title, {"error": "not asked: the server has ended"})
    return found


def faults_of(found: dict[str, Any], must_be_right: bool) -> list[str]:
    """Return what is missing or wrong among the answers.

    Args:
        found: From `asked`.
        must_be_right: Whether the answers mean something.
    """
    faults = []
    for title, answer in found.items():
        if "error" in answer:
            faults.append(f"{title}: {answer['error']}")
        elif not answer["server_lives"]:
            faults.append(f"{title}: the server ended")
    first, second = (found[title].get("text") for title in LONG)
    if must_be_right:
        for title, part in EXPECTED.items():
            text = found[title].get("text")
            if text is not None and part not in text:
                faults.append(f"{title}: {text!r:.80} does not contain {part}")
        if first != second:
            faults.append(f"the long prompt is answered otherwise the second time: {second!r:.80}")
    return faults


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.plain_vllm", __doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="a checkpoint")
    parser.add_argument("--json", type=Path, required=True, help="the result file")
    parser.add_argument("--vllm", default="", metavar="FLAGS", help="more flags of vllm serve")
    parser.add_argument("--max-tokens", type=int, default=32, help="of an answer (default: 32)")
    parser.add_argument("--seconds", type=float, default=420, help="to start (default: 420)")
    parser.add_argument("--right", action="store_true", help="answers must be right")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status.

    Raises:
        BadInput: The directory has faults.
    """
    options = parse_command(_parser(), arguments)
    environment = find_environment()
    flags = [*command_flags(options.directory), *shlex.split(options.vllm)]
    side = Side(
        PLAIN, options.directory, tuple(flags), variables={"VLLM_PLUGINS": ""}, is_plain=True
    )
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.plain_vllm", *arguments]),
        "directory": options.directory.name,
        "line": shlex.join(["vllm", "serve", options.directory.name, *flags]),
        "device": environment.device.name,
        "vllm": environment.version,
    }

    def keep(found: dict[str, Any]) -> None:
        write_json(options.json, result | {"answers": found})

    keep({})  # A file that cannot be written is found before the server starts.
    with (
        tempfile.TemporaryDirectory() as scratch,
        started([side], ServeSettings(), environment, options.seconds) as (askers, failed),
    ):
        if failed:
            result["not_started"] = failed[PLAIN]
            keep({})
            return 1
        asker = askers[PLAIN]
        found = asked(asker, Path(scratch), options.max_tokens, keep)
        log = asker.log_text()
        block = _BLOCK.search(log)
        result |= read_log(log) | {
            "seconds_to_start": asker.seconds_to_start,
            "block_tokens": int(block[1]) if block else None,
        }
        faults = faults_of(found, options.right)
        result["faults"] = faults
        if any(not answer.get("server_lives", True) for answer in found.values()) and asker.log:
            result["died"] = death_message(asker.log, "vLLM ended").splitlines()[0]
    keep(found)
    print(json.dumps(found, indent=1))
    for fault in faults:
        logger.error("%s", fault)
    return 1 if faults else 0


if __name__ == "__main__":
    main(lambda: run(sys.argv[1:]))
