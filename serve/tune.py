"""Tunes vLLM's Mamba state update for a checkpoint on this machine's GPU.

    python -m serve.tune DIR                          # about a minute and a half
    python -m serve.tune DIR --out FOLDER --json tune.json
    python -m serve.tune DIR --state float32,float16 --batch-sizes 1,8,64

Times the kernel with each launch configuration, as vLLM runs it while decoding, compares its
answers, and writes the fastest by batch size into a file that vLLM reads. Without --out that is a
folder of the user's cache, where `hybridquant serve` finds it; with it, start vLLM with
VLLM_TUNED_CONFIG_FOLDER=FOLDER. Nothing else should run on the GPU meanwhile.

Configurations depend on the GPU and on the sizes of a head, not on the number of heads: one file
serves every number of GPUs that the model is split over.

Exit status: 0 written, 1 the kernel could not be timed, 2 bad input.

The file of --json holds what serve/tune_kernel.py found: torch, triton, vllm, gpu, and by type of
the state a list of {batch, key, default, chosen, times_faster, state_gb_per_s, first_us}.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint import atomic
from checkpoint.command import command_parser, parse_command
from checkpoint.config import CheckpointConfig, read_config
from checkpoint.faults import (
    BadInput,
    Fault,
    main,
    raise_if_any,
    raise_on_termination,
    shortened,
)
from checkpoint.log import get_logger
from serve.environment import ServeEnvironment, find_environment
from serve.guard import die_with_parent
from serve.state_update import (
    DEFAULT_STATE,
    FOLDER_VARIABLE,
    Layer,
    file_name,
    mamba_layer,
    own_folder,
)

logger = get_logger("serve.tune")

KERNEL = Path(__file__).with_name("tune_kernel.py")

STATES = ("float32", "float16", "bfloat16")

BATCHES = (64, 1, 32, 8, 128, 16, 256, 2, 4, 48, 96, 24, 12, 192, 384, 512)
"""Batch sizes that are tuned, the most important first: time may not suffice for all."""

LARGEST_BATCH = 4096

SECONDS = 90.0

IMPORT_SECONDS = 240.0
"""What importing vLLM and the last batch size may take beyond the given time."""

FREE_SHARE = 0.9
"""Share of the GPU's memory that is free where nothing else runs."""


class TuneFailed(Exception):
    """The kernel could not be timed; the message has the cause."""


def parse_batches(text: str) -> list[int]:
    """Parse `1,8,64`; a size that is given twice counts once.

    Raises:
        BadInput: A part is not a number from 1 to 4,096.
    """
    found: list[int] = []
    for part in text.split(","):
        word = part.strip()
        if not (word.isascii() and word.isdecimal()) or not 1 <= int(word) <= LARGEST_BATCH:
            remedy = f"numbers from 1 to {LARGEST_BATCH}, such as 1,8,64"
            raise BadInput(Fault("--batch-sizes", f"is {shortened(text, 80)!r}", remedy))
        if int(word) not in found:
            found.append(int(word))
    return found


def parse_states(text: str) -> list[str]:
    """Parse `float32,float16`.

    Raises:
        BadInput: A part is not a type of the state, or both of 16 bits are named.
    """
    found = [part.strip() for part in text.split(",")]
    unknown = [part for part in found if part not in STATES]
    if unknown:
        what = f"names {shortened(unknown[0], 80)!r}"
        raise BadInput(Fault("--state", what, f"choose from {', '.join(STATES)}"))
    if {"float16", "bfloat16"} <= set(found):
        what = "names both types of 16 bits, for which vLLM has one file"
        raise BadInput(Fault("--state", what, "give one of them"))
    return list(dict.fromkeys(found))


def gpu_faults(environment: ServeEnvironment) -> list[Fault]:
    """Return a fault where there is no GPU to tune for."""
    device = environment.device
    if device.kind == "cuda":
        return []
    what = f"needs a GPU, and vLLM {environment.version} runs on a CPU here"
    if device.kind == "none":
        what = "needs a GPU, and this machine has none that vLLM could use"
    return [Fault("hybridquant tune", what, "run it on the machine that serves")]


def measure(
    layer: Layer,
    states: Sequence[str],
    batches: Sequence[int],
    seconds: float,
    environment: ServeEnvironment,
) -> dict[str, Any]:
    """Time the kernel in the serve environment, and return what `serve/tune_kernel.py` found.

    Args:
        layer: The model's Mamba layers.
        states: Types of the state.
        batches: Batch sizes, the most important first.
        seconds: Time after which no further batch size is begun.
        environment: Where vLLM is.

    Raises:
        TuneFailed: It ended with an error, or not at all.
    """
    with tempfile.TemporaryDirectory(prefix="hybridquant-tune-") as name:
        scratch = Path(name)
        result = scratch / "result.json"
        request = layer._asdict() | {
            "states": list(states),
            "batches": list(batches),
            "seconds": seconds,
            "result": str(result),
        }
        atomic.write_json(scratch / "request.json", request)
        variables = dict(os.environ)
        # vLLM's own choice is what a configuration must beat.
        variables.pop(FOLDER_VARIABLE, None)
        # Nothing of serve/ is to hide a module of vLLM.
        variables |= {"PYTHONSAFEPATH": "1", "VLLM_NO_USAGE_STATS": "1"}
        command = [str(environment.python), str(KERNEL), str(scratch / "request.json")]
        ending = _run(command, variables, scratch / "log", seconds + IMPORT_SECONDS)
        found: dict[str, Any] = {}
        if result.exists():
            found = json.loads(result.read_text(encoding="utf-8"))
        log_lines = (scratch / "log").read_text("utf-8", "replace").strip().splitlines()
    if not ending:
        return found
    reason = found.get("error") or (log_lines[-1] if log_lines else "no reason was given")
    message = f"timing the kernel {ending}: {shortened(reason)}"
    if not _batches(found):
        raise TuneFailed(message)
    # What was measured before it ended is worth keeping.
    logger.warning("%s; what was found before is written", message)
    return found | {"error": message}


def _run(command: Sequence[str], variables: Mapping[str, str], log: Path, seconds: float) -> str:
    """Run a command, and return why it failed; "" when it did not.

    Args:
        command: The command line.
        variables: Its environment.
        log: Takes what it prints.
        seconds: Time after which it is ended.
    """
    with log.open("wb") as file:
        try:
            done = subprocess.run(
                command,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                timeout=seconds,
                preexec_fn=die_with_parent,
            )
        except subprocess.TimeoutExpired:
            return f"did not end within {seconds:.0f} s"
    return f"ended with status {done.returncode}" if done.returncode else ""


def _batches(found: Mapping[str, Any]) -> list[Any]:
    """All measured batch sizes, of all types of the state."""
    batches = []
    for of_state in found.get("states", {}).values():
        batches += of_state["batches"]
    return batches


def configuration(of_state: Mapping[str, Any], triton: str) -> dict[str, Any]:
    """Return the content of vLLM's file: by batch × heads, how the kernel is launched.

    Args:
        of_state: What was found for one type of the state.
        triton: Version that it was measured with; vLLM keeps it for the reader.
    """
    content: dict[str, Any] = {"triton_version": triton}
    for entry in sorted(of_state["batches"], key=lambda entry: entry["key"]):
        rows, warps = entry["chosen"]["launch"].split("x")
        content[str(entry["key"])] = {"BLOCK_SIZE_M": int(rows), "num_warps": int(warps)}
    return content


def write_files(found: Mapping[str, Any], layer: Layer, folder: Path) -> list[Path]:
    """Write a file for each type of the state that was measured, and return them."""
    written = []
    for state, of_state in found.get("states", {}).items():
        if not of_state["batches"]:
            continue
        # The name that vLLM itself gave: it is the one that it will look for.
        path = folder / file_name(layer, found["device_name"], state)
        atomic.write_json(path, configuration(of_state, found["triton"]))
        written.append(path)
    return written


def report(found: Mapping[str, Any]) -> str:
    """Return a line for each measured batch size."""
    lines = []
    for state, of_state in found.get("states", {}).items():
        for entry in sorted(of_state["batches"], key=lambda entry: entry["batch"]):
            default, chosen = entry["default"], entry["chosen"]
            lines.append(
                f"{state}, {entry['batch']:4d} requests: {default['us']:8.1f} µs "
                f"({default['launch']}) -> {chosen['us']:8.1f} µs ({chosen['launch']}), "
                f"{entry['times_faster']:.2f} times as fast"
            )
        for batch, reason in of_state["left_out"].items():
            lines.append(f"{state}, {int(batch):4d} requests: {reason}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("serve.tune", __doc__)
    parser.add_argument("directory", metavar="DIR", type=Path, help="checkpoint directory")
    out_help = "where the files go (default: a folder of the user's cache)"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=out_help)
    state_help = f"types of the state: {', '.join(STATES)} (default: {DEFAULT_STATE})"
    parser.add_argument("--state", default=DEFAULT_STATE, metavar="TYPE,…", help=state_help)
    sizes_help = "requests that decode at once, the most important first (default: 1 to 512)"
    parser.add_argument("--batch-sizes", metavar="N,…", help=sizes_help)
    seconds_help = f"time after which no further size is begun (default: {SECONDS:.0f})"
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="S", help=seconds_help)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times there")
    return parser


def run(arguments: Sequence[str], environment: ServeEnvironment | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        arguments: The command line without the program's name.
        environment: Where vLLM is; found when None.

    Raises:
        BadInput: With the faults of the options, the directory, the folder or the machine.
    """
    raise_on_termination()
    options = parse_command(_parser(), arguments)
    config, batches, states = _checked(options)
    environment = environment or find_environment()
    raise_if_any(gpu_faults(environment))
    folder = options.out or own_folder()
    atomic.check_writable(folder)
    if options.json:
        atomic.check_result_file(options.json)
    device = environment.device
    if device.gpus and device.gpus[0].free < FREE_SHARE * device.gpus[0].memory:
        logger.warning("%s is in use: the times may be of other programs", device.gpus[0].name)
    layer = mamba_layer(config)
    logger.info("heads of %d × %d on %s", layer.head_dim, layer.state_size, device.name)
    try:
        found = measure(layer, states, batches, options.seconds, environment)
    except TuneFailed as failed:
        logger.error("%s", failed)
        return 1
    if options.json:
        command = ["python", "-m", "serve.tune", *arguments]
        atomic.write_json(options.json, {"command": " ".join(command)} | found)
    print(report(found))
    written = write_files(found, layer, folder)
    for path in written:
        print(path)
    if options.out:
        print(f"{FOLDER_VARIABLE}={folder.resolve()} makes vLLM use it")
    return 0 if written and "error" not in found else 1


def _checked(options: argparse.Namespace) -> tuple[CheckpointConfig, list[int], list[str]]:
    """Return the checkpoint's configuration, batch sizes and types of the state.

    Raises:
        BadInput: With every fault of the options and the directory.
    """
    faults: list[Fault] = []
    config: CheckpointConfig | None = None
    batches = list(BATCHES)
    states: list[str] = []
    try:
        config = read_config(options.directory)
    except BadInput as bad:
        faults += bad.faults
    try:
        if options.batch_sizes is not None:
            batches = parse_batches(options.batch_sizes)
    except BadInput as bad:
        faults += bad.faults
    try:
        states = parse_states(options.state)
    except BadInput as bad:
        faults += bad.faults
    if not 1 <= options.seconds < float("inf"):
        faults.append(Fault("--seconds", f"is {options.seconds}", "give 1 or more"))
    raise_if_any(faults)
    assert config is not None
    return config, batches, states


if __name__ == "__main__":
    main(lambda: run(sys.argv[1:]))
