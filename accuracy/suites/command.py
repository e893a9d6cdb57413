"""The options and the run of `python -m accuracy … --suite`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from accuracy.suites.asking import REASONING_OFF, REASONING_ON, Profile
from accuracy.suites.catalogue import SUITES, choose_tasks
from accuracy.suites.gate import data_folder
from accuracy.suites.harness import DataSource, HarnessFailed, Judge, find_python
from accuracy.suites.report import as_dict, show, show_curve, show_noise
from accuracy.suites.run import SuitePlan, open_suite
from accuracy.suites.serving import Model
from checkpoint.atomic import check_result_file, write_json
from checkpoint.endpoint import connect, first_model
from checkpoint.faults import BadInput, Fault, nearest, raise_if_any, shortened
from checkpoint.lock import locked_directory
from checkpoint.log import get_logger
from checkpoint.video import Video, parse_rates
from serve.process import ServerDied

logger = get_logger(__name__)

MAX_LOSS = 1.5


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of published suites."""
    group = parser.add_argument_group("published benchmarks (make setup-eval installs them)")
    suite_help = "run these in place of the exact tasks: report or text"
    group.add_argument("--suite", metavar="SUITE", help=suite_help)
    limit_help = "N items of each task, always the same"
    group.add_argument("--limit", type=int, metavar="N", help=limit_help)
    data_help = "folder of VLMEvalKit's tables (default: $LMUData, or ~/LMUData)"
    group.add_argument("--data", type=Path, metavar="FOLDER", help=data_help)
    own_help = "take data with other checksums than the published"
    group.add_argument("--own-data", action="store_true", help=own_help)
    tasks_help = "folder of lm-eval task files of your own"
    group.add_argument("--tasks-folder", type=Path, metavar="FOLDER", help=tasks_help)
    out_help = "answers and logs; the same command resumes there (default: out/suites)"
    group.add_argument("--out", type=Path, default=Path("out/suites"), help=out_help)
    group.add_argument("--think", action="store_true", help="let the models reason first")
    tokens_help = f"most tokens of an answer ({REASONING_OFF.max_tokens:,}; with --think "
    tokens_help += f"{REASONING_ON.max_tokens:,})"
    group.add_argument("--max-tokens", type=int, metavar="N", help=tokens_help)
    concurrency_help = "requests at a time (as many as keep the server busy)"
    group.add_argument("--concurrency", type=int, metavar="N", help=concurrency_help)
    loss_help = f"points that no task may lose, with 95 %% certainty ({MAX_LOSS})"
    group.add_argument("--max-loss", type=float, default=MAX_LOSS, metavar="POINTS", help=loss_help)
    judge_help = "endpoint of a judge model; without it MathVista and OCR-Reasoning are scored by "
    group.add_argument("--judge", metavar="URL", help=judge_help + "a rule, not comparable")
    group.add_argument("--judge-model", metavar="NAME", help="the judge's name there")
    evs_help = "also ask the video tasks at the EVS rates of the published figure"
    group.add_argument("--evs-curve", action="store_true", help=evs_help)
    rates_help = "other EVS rates for the curve, separated by commas"
    group.add_argument("--evs-rates", metavar="RATES", help=rates_help)
    endpoint_help = "a server that answers in place of BF16_DIR"
    group.add_argument("--reference-endpoint", metavar="URL", help=endpoint_help)
    noise_help = "also ask BF16's server twice and count different answers"
    group.add_argument("--noise-floor", action="store_true", help=noise_help)


def run_suite(
    arguments: argparse.Namespace, compared_video: Callable[[Path, float | None], Video]
) -> int:
    """Run the suite that the command line names.

    Args:
        arguments: Parsed, of `accuracy.__main__`.
        compared_video: Returns how clips are seen, from a directory and the rate that was given.

    Returns:
        0 when every gate passed; 1 when one did not, a server died twice or a harness failed.

    Raises:
        BadInput: With everything that is wrong with the command line or the data.
    """
    raise_if_any(_faults(arguments))
    plan = _plan_of(arguments, compared_video)
    if arguments.json:
        check_result_file(arguments.json)
    reference = Model(arguments.reference, arguments.reference_endpoint, arguments.api_key)
    variants = []
    for directory in arguments.directories:
        variants.append(Model(directory, arguments.endpoint, arguments.api_key))
    plan.out.mkdir(parents=True, exist_ok=True)
    try:
        with locked_directory(plan.out), open_suite(plan, arguments.reference) as run:
            compared = run.compare(reference, variants)
            show(compared, reference, plan.max_loss)
            noise = run.noise(reference) if arguments.noise_floor else []
            show_noise(noise)
            wants_curve = arguments.evs_curve or arguments.evs_rates is not None
            points = run.curve([reference, *variants]) if wants_curve else []
            if points:
                show_curve(points)
            outcome = as_dict(run, arguments.suite, reference, compared, noise, points)
    except (ServerDied, HarnessFailed) as failed:
        logger.error("%s", failed)
        logger.error("answers so far are kept in %s; the same command goes on from there", plan.out)
        return 1
    write_json(plan.out / f"{arguments.suite}.json", outcome)
    if arguments.json:
        write_json(arguments.json, outcome)
    return 0 if outcome["passed"] else 1


def _plan_of(
    arguments: argparse.Namespace, compared_video: Callable[[Path, float | None], Video]
) -> SuitePlan:
    """Return what the command line asks for.

    Raises:
        BadInput: It names no task, or a task that the suite does not have; or the harnesses are not
            installed.
    """
    names = [name for name in (arguments.tasks or "").split(",") if name]
    if arguments.tasks is not None and not names:
        choices = ", ".join(task.name for task in SUITES[arguments.suite])
        raise BadInput(Fault("--tasks", "names no task", f"choose from {choices}"))
    tasks = choose_tasks(arguments.suite, names)
    find_python()
    return SuitePlan(
        tasks=tasks,
        source=DataSource(
            data_folder(arguments.data),
            arguments.own_data,
            arguments.tasks_folder,
            arguments.limit,
        ),
        video=compared_video(arguments.directories[0], arguments.video_pruning_rate),
        profile=_profile(arguments),
        out=arguments.out,
        max_loss=arguments.max_loss,
        judge=_judge(arguments),
        repeats=2 if arguments.noise_floor else 1,
        concurrency=arguments.concurrency,
        rates=_rates(arguments.evs_rates),
    )


def options_without_suite(arguments: argparse.Namespace) -> Iterator[Fault]:
    """Yield a fault for each option of suites that was given without `--suite`."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    for name, default in vars(parser.parse_args([])).items():
        if getattr(arguments, name) != default:
            option = "--" + name.replace("_", "-")
            yield Fault(
                option, "is for published benchmarks", "add --suite report, or leave it out"
            )


def _faults(arguments: argparse.Namespace) -> Iterator[Fault]:
    if arguments.suite not in SUITES:
        what = f"unknown suite {shortened(arguments.suite, 80)!r}"
        yield Fault("--suite", what, nearest(arguments.suite, SUITES))
    for option, value in (
        ("--limit", arguments.limit),
        ("--max-tokens", arguments.max_tokens),
        ("--concurrency", arguments.concurrency),
    ):
        if value is not None and value < 1:
            yield Fault(option, f"is {value}", "give at least 1")
    if not 0 < arguments.max_loss < 100:
        yield Fault("--max-loss", f"is {arguments.max_loss}", "give points between 0 and 100")
    if (arguments.judge is None) != (arguments.judge_model is None):
        yield Fault("--judge", "needs a model's name", "give --judge URL and --judge-model NAME")
    if arguments.endpoint and len(arguments.directories) > 1:
        yield Fault("--endpoint", "answers in place of one directory", "give one directory")
    if arguments.evs_curve or arguments.evs_rates is not None:
        for option, url in (
            ("--endpoint", arguments.endpoint),
            ("--reference-endpoint", arguments.reference_endpoint),
        ):
            if url:
                what = "has one EVS rate as long as it runs"
                yield Fault(option, what, "leave it out: the directory is served at each rate")
    for path in (arguments.reference, *arguments.directories):
        if not path.is_dir():
            yield Fault(shortened(path), "is not a directory", "check the path")
    if arguments.judge is not None and arguments.judge_model is not None:
        yield from _judge_faults(arguments.judge)


def _judge_faults(url: str) -> tuple[Fault, ...]:
    """What is wrong with the judge, found before anything is asked for hours."""
    try:
        first_model(connect(url, os.environ.get("OPENAI_API_KEY", "none"), timeout=30))
    except BadInput as bad:
        remedy = "start the judge, or leave it out"
        return tuple(Fault(f"--judge {fault.where}", fault.what, remedy) for fault in bad.faults)
    return ()


def _profile(arguments: argparse.Namespace) -> Profile:
    profile = REASONING_ON if arguments.think else REASONING_OFF
    if arguments.max_tokens is None:
        return profile
    return Profile(profile.system, arguments.max_tokens, profile.thinks)


def _judge(arguments: argparse.Namespace) -> Judge | None:
    if arguments.judge is None:
        return None
    key = os.environ.get("OPENAI_API_KEY", "none")
    return Judge(arguments.judge, arguments.judge_model, key)


def _rates(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    return tuple(parse_rates(text, "--evs-rates"))
