"""Serves a checkpoint with vLLM: BF16, FP8, NVFP4 or mixed, with Efficient Video Sampling (EVS).

    python -m serve DIR                                  # q from the checkpoint's manifest, else
    0.75
    python -m serve DIR --video-pruning-rate 0.9 --port 8001
    python -m serve DIR --dry-run                        # print the vllm command and what it would
    say
    python -m serve DIR -- --max-num-seqs 32             # anything vLLM takes; it wins over ours

It runs from either environment and finds vLLM's (see serve/environment.py), reads the precision
from DIR's config.json, checks what vLLM would stumble over, and stays in front of the server until
Ctrl-C. Exit status: 0 stopped as asked, 1 vLLM died, 2 bad input. On a CPU everything runs,
quantized layers on slow reference kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

from checkpoint.config import read_config
from checkpoint.faults import main
from serve.command import adopt, build_environment, quant_algo
from serve.environment import ServeEnvironment, find_environment
from serve.preflight import preflight
from serve.process import ServerDied, death_message, full_command, running_server
from serve.settings import ServeSettings, served


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve",
        description=(__doc__ or "").splitlines()[0],
        epilog="Everything after -- goes to vllm serve as it is.",
    )
    default = ServeSettings()
    parser.add_argument("directory", metavar="DIR", type=Path, help="checkpoint directory")
    parser.add_argument(
        "--video-pruning-rate", metavar="Q", type=float, help="EVS rate in [0, 1); 0 turns it off"
    )
    parser.add_argument("--max-model-len", metavar="N", type=int, help="longest sequence in tokens")
    parser.add_argument(
        "--max-frames", metavar="N", type=int, help=f"most frames of a clip ({default.max_frames})"
    )
    parser.add_argument(
        "--fps", metavar="F", type=float, help=f"frames sampled a second ({default.fps:g})"
    )
    parser.add_argument(
        "--max-images",
        metavar="N",
        type=int,
        help=f"most images of a prompt ({default.max_images})",
    )
    parser.add_argument("--host", help=f"address to listen on ({default.host})")
    parser.add_argument("--port", type=int, help=f"TCP port, 0 for any free one ({default.port})")
    parser.add_argument(
        "--gpu-memory-utilization", metavar="F", type=float, help="share of GPU memory to take"
    )
    parser.add_argument(
        "--tensor-parallel-size", metavar="N", type=int, help="GPUs to split the weights over"
    )
    parser.add_argument(
        "--allowed-local-media-path", metavar="PATH", type=Path, help="directory for file:// URLs"
    )
    parser.add_argument(
        "--log", type=Path, help="file for vLLM's output (one in the temporary directory)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command, start nothing")
    return parser


def split_extra(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our arguments, and those after the first `--`."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _run(arguments: list[str] | None = None) -> int:
    ours, extra = split_extra(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(ours)
    names = {field.name for field in dataclasses.fields(ServeSettings)}
    found = served(
        options.directory, {key: value for key, value in vars(options).items() if key in names}
    )
    settings = adopt(found.settings, extra)
    environment = find_environment()
    if found.gate_passed is False:
        print(
            f"warning: {options.directory} failed its accuracy gate; serving it all the same",
            file=sys.stderr,
        )
    if options.dry_run:
        print(_shell_line(options.directory, settings, environment, extra))
        return 0
    # Also SIGINT: a shell starts background jobs with it ignored, and they would never stop.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        with running_server(options.directory, settings, extra, options.log, environment) as server:
            algo = quant_algo(read_config(options.directory)) or "BF16"
            rate = server.settings.video_pruning_rate
            evs = f"EVS drops {rate:.0%} of a clip's visual tokens" if rate else "EVS off"
            print(f"{server.model} ({algo}, {evs}) at {server.url}")
            print(f"log: {server.log}   stop with Ctrl-C", flush=True)
            status = server.process.wait()
            raise ServerDied(death_message(server.log, f"vLLM ended with status {status}"))
    except ServerDied as died:
        print(f"error: {died}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 0


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    # The way of Ctrl-C, so that the with blocks take vLLM down.
    raise KeyboardInterrupt


def _shell_line(
    directory: Path, settings: ServeSettings, environment: ServeEnvironment, extra: list[str]
) -> str:
    config = preflight(directory, dataclasses.replace(settings, port=0), environment)
    variables = [
        f"{key}={value}" for key, value in build_environment(config, environment.device).items()
    ]
    return " ".join([*variables, shlex.join(full_command(directory, settings, environment, extra))])


if __name__ == "__main__":
    main(_run)
