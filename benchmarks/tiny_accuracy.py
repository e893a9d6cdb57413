"""Measures the tiny checkpoint's accuracy: BF16, FP8, NVFP4 and distilled, in process and served.

    python -m benchmarks.tiny_accuracy --work out/tiny-table --json FILE
    python -m benchmarks.tiny_accuracy … --items 100 --variants fp8,nvfp4,nvfp4_qat,nvfp4_qad
    python -m benchmarks.tiny_accuracy … --split calibration --tasks text \\
        --variants nvfp4,nvfp4_qad@1e-3 distill.steps=80

Each form is made by its recipe in recipes/tiny/ and answers the same test items of the six tasks,
greedily. Differences from BF16 are paired, with 95 % intervals. BF16 also answers about clips that
are pruned by EVS. Something that is to be chosen, such as a learning rate, is chosen on the items
of another split. With 100 items, two forms and one server this takes 25 minutes on two CPU cores. A
GPU mostly waits, so give it several --jobs. The same command resumes a measurement that was
stopped; what is finished is kept in the folder of --work.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from benchmarks.parts import write_json
from benchmarks.serving import split_backend
from benchmarks.tiny_forms import VARIANTS, check_variants
from checkpoint.command import command_parser, parse_command
from checkpoint.faults import Fault, main, nearest, raise_if_any
from checkpoint.libraries import prepare_libraries
from tiny.tasks import SPLITS, TASKS, TEST_ITEMS, check_tasks


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.tiny_accuracy", __doc__)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for exports; those there are kept"
    )
    parser.add_argument("--json", type=Path, required=True, help="the result file")
    parser.add_argument("--tasks", default=",".join(TASKS), help="names, separated by commas")
    parser.add_argument("--items", type=int, default=TEST_ITEMS, help="items per task")
    parser.add_argument("--variants", default="fp8,nvfp4", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument(
        "--served",
        default="bf16",
        help="those of bf16 and the variants that vLLM serves too; nvfp4:emulation chooses the "
        "linear backend",
    )
    parser.add_argument(
        "--split",
        default="test",
        choices=SPLITS[1:],
        help="whose items; choose settings on another",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="processes that make forms and answer at the same time",
    )
    parser.add_argument(
        "--vllm", default="", metavar="FLAGS", help="more flags of vllm serve, in one word"
    )
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="fields of the recipe that distils"
    )
    return parser


def _check(given: argparse.Namespace, variants: Sequence[str], served: Sequence[str]) -> None:
    """Check the options that argparse does not check.

    Raises:
        BadInput: With the faults of one option.
    """
    forms = ["bf16", *variants]
    faults = []
    for name in served:
        if split_backend(name)[0] not in forms:
            what = f"{name!r} is not measured"
            faults.append(Fault("--served", what, nearest(name, forms)))
    if given.jobs < 1:
        faults.append(Fault("--jobs", f"is {given.jobs}", "give 1 or more"))
    raise_if_any(faults)


def _names(text: str) -> list[str]:
    """Split names that are separated by commas."""
    return [name for name in text.split(",") if name]


def _command(given: argparse.Namespace) -> str:
    """Return the command line of the measurement, without its paths."""
    options = [
        f"--split={given.split}",
        f"--tasks={given.tasks}",
        f"--items={given.items}",
        f"--variants={given.variants}",
        f"--served={given.served}",
    ]
    if given.vllm:
        options.append(f"--vllm={given.vllm}")
    command = ["python", "-m", "benchmarks.tiny_accuracy", *options, *given.settings]
    return shlex.join(command)


def _run() -> int:
    given = parse_command(_parser())
    variants = _names(given.variants)
    served = _names(given.served)
    tasks = _names(given.tasks)
    check_variants(variants)
    check_tasks(tasks)
    _check(given, variants, served)
    given.work.mkdir(parents=True, exist_ok=True)
    prepare_libraries()
    from benchmarks.tiny_table import measure

    measured = measure(
        given.work,
        variants,
        served,
        given.items,
        tasks=tasks,
        settings=given.settings,
        split=given.split,
        jobs=given.jobs,
        flags=shlex.split(given.vllm),
    )
    write_json(given.json, {"command": _command(given), **measured})
    return 0


if __name__ == "__main__":
    main(_run)
