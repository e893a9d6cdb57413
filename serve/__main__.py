"""Serves a checkpoint with vLLM: BF16, FP8, NVFP4 or mixed, with Efficient Video Sampling (EVS).

    python -m serve DIR                                  # clips as DIR's manifest says
    python -m serve DIR --video-pruning-rate 0.9 --port 8001
    python -m serve DIR --dry-run                        # print the vllm command and start nothing
    python -m serve DIR -- --max-num-seqs 32             # any flag of vllm serve; it wins over ours

It runs from either environment and finds vLLM's (see serve/environment.py), lets vLLM's own parser
read its flags (about ten seconds, where there are any), checks what vLLM would fail on, and runs
the server until Ctrl-C. Where the manifest says how clips are seen, that is the default; serving
them otherwise is logged as a warning. Exit status: 0 stopped by the user, 1 vLLM ended by itself,
2 bad input. On a CPU everything runs, quantized layers on slow reference kernels.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from checkpoint.command import command_parser, parse_command
from checkpoint.config import CheckpointConfig, read_config
from checkpoint.endpoint import KEY_VARIABLE
from checkpoint.faults import main, raise_on_termination
from checkpoint.log import get_logger
from serve.command import build_environment
from serve.environment import ServeEnvironment, environment_and_flags
from serve.fast_video import FastVideo, fast_video_of
from serve.options import add_setting_options, given_settings
from serve.own_server import own_server
from serve.plan import serving_plan
from serve.precision import precision_name
from serve.preflight import checked_settings, preflight
from serve.process import Server, ServerDied, full_command, running_server
from serve.settings import ServeSettings, gate_passed, has_manifest, override
from serve.vllm_flags import named_flags
from serve.vllm_log import death_message
from serve.warm_up import warm_up

logger = get_logger("serve")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("serve", __doc__)
    parser.add_argument("directory", metavar="DIR", type=Path, help="checkpoint directory")
    add_setting_options(parser)
    log_help = "file for vLLM's output (default: one in the temporary directory)"
    parser.add_argument("--log", type=Path, metavar="FILE", help=log_help)
    parser.add_argument("--dry-run", action="store_true", help="print the command, start nothing")
    return parser


def split_extra(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return our arguments, and vLLM's: those after the first `--`."""
    arguments = list(arguments)
    if "--" not in arguments:
        return arguments, []
    position = arguments.index("--")
    return arguments[:position], arguments[position + 1 :]


def run(arguments: Sequence[str], environment: ServeEnvironment | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        arguments: The command line without the program's name.
        environment: Where vLLM is; found when None, and then its vLLM is asked about its flags.

    Raises:
        BadInput: With every fault of the directory and the settings.
    """
    stop_on_signals()
    ours, given = split_extra(arguments)
    options = parse_command(_parser(), ours)
    extra: Sequence[str] = given
    if environment is None:
        environment, (extra,) = environment_and_flags(given)
    overrides = given_settings(options)
    settings = checked_settings(options.directory, overrides, extra, environment)
    warn_about_gate(options.directory)
    if "--trust-remote-code" in named_flags(extra):
        logger.warning("--trust-remote-code: vLLM runs the Python files of %s", options.directory)
    fast_video = fast_video_of(environment)
    # In a dry run nothing will listen, so a port that is taken is no fault.
    checked = override(settings, {"port": 0}) if options.dry_run else settings
    config = preflight(options.directory, checked, environment, extra, options.log)
    for choice in serving_plan(config, settings, environment, extra):
        logger.info("%s", choice)
    if options.dry_run:
        print(shell_line(config, settings, environment, extra))
        return 0
    try:
        with running_server(options.directory, settings, extra, options.log, environment) as server:
            if environment.device.kind != "cpu" and server.settings.max_videos > 0:
                warm_up(own_server(server.settings), server.settings.video)
            print(_summary(options.directory, server, fast_video))
            print(f"log: {server.log}   stop with Ctrl-C", flush=True)
            status = server.process.wait()
            raise ServerDied(death_message(server.log, f"vLLM ended with status {status}"))
    except ServerDied as died:
        logger.error("%s", died)
        return 1
    except KeyboardInterrupt:
        logger.info("stopped")
        return 0


def warn_about_gate(directory: Path) -> None:
    """Log a warning for an export whose accuracy gate was missed or never measured."""
    if not has_manifest(directory):
        return
    passed = gate_passed(directory)
    if passed is None:
        logger.warning(
            "%s has not been verified and measured; run its quantize command again", directory
        )
    elif not passed:
        logger.warning("%s failed its accuracy gate and is served all the same", directory)


def stop_on_signals() -> None:
    """Let SIGINT, SIGTERM and SIGHUP end the command as Ctrl-C does, from now on, so that the with
    blocks stop vLLM, and the process that reads its flags.

    SIGINT too: a shell starts background jobs with it ignored, and they would never stop.
    """
    raise_on_termination()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _summary(directory: Path, server: Server, fast_video: FastVideo) -> str:
    precision = precision_name(read_config(directory))
    rate = server.settings.video.pruning_rate
    evs = f"EVS drops {rate:.0%} of a clip's visual tokens" if rate else "EVS off"
    return f"{server.model} ({precision}, {evs}, fast video {fast_video}) at {server.url}"


def shell_line(
    config: CheckpointConfig,
    settings: ServeSettings,
    environment: ServeEnvironment,
    extra: Sequence[str],
) -> str:
    """Return the command and its environment variables as a line for a shell."""
    variables = build_environment(config, settings, environment.device, extra)
    parts = [f"{name}={value}" for name, value in variables.items()]
    if settings.api_key is not None:
        parts.append(f'{KEY_VARIABLE}="${KEY_VARIABLE}"')
    parts.append(shlex.join(full_command(config.directory, settings, environment, extra)))
    return " ".join(parts)


if __name__ == "__main__":
    main(lambda: run(sys.argv[1:]))
