"""Runs a recipe: BF16 checkpoint in; quantized, verified and measured checkpoint out.

Whole model or layer by layer, one process or many, with or without distillation: the steps are the
same. How a way carries them out is in pipeline/whole.py and pipeline/layer_by_layer.py.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from checkpoint.command import command_name
from checkpoint.log import get_logger
from checkpoint.memory import memory_advice
from checkpoint.opened import check_finite
from checkpoint.processes import joined_processes
from export.verify import show_faults, verification
from export.write import open_writer, write_companions
from pipeline.inputs import pick_device
from pipeline.job import Job, Way, make_manifest, open_job
from pipeline.measure import finish_manifest, gate_of_faults, measure
from pipeline.plan import choose_way, make_plan
from pipeline.search import choose_formats
from pipeline.suites import measure_suites, release_memory
from pipeline.times import Times
from recipes.schema import Recipe

logger = get_logger(__name__)


def run(recipe: Recipe) -> int:
    """Run a recipe.

    Returns:
        0 if everything is done and the gate passed, 1 for a fault or a missed gate.

    Raises:
        BadInput: With everything that is wrong with the input; nothing is left at the output.
    """
    outcome = run_until_measured(recipe)
    if outcome.is_first and outcome.passed and recipe.accuracy.suites is not None:
        # The models are gone by now: vLLM takes most of the GPU.
        release_memory()
        passed = measure_suites(recipe, outcome.reference)
    else:
        passed = outcome.passed
    if outcome.is_first:
        message = f"done; next: {command_name('serve')} {recipe.output}" if passed else "FAILED"
        logger.info("%s: %s", recipe.output, message)
    return 0 if passed else 1


@dataclass(frozen=True)
class Outcome:
    """How far a run has come when its output is written, verified and compared in process.

    Attributes:
        passed: Whether the gate passed; True on processes that do not measure.
        is_first: Whether this process measured.
        reference: BF16's directory.
    """

    passed: bool
    is_first: bool
    reference: Path


def run_until_measured(recipe: Recipe) -> Outcome:
    """Write, verify and measure the output; nothing of the models is left when it returns.

    All processes calibrate and train. The first one writes, and keeps the run's lock when it
    verifies and measures alone.
    """
    device = pick_device(recipe.device)
    with contextlib.ExitStack() as until_measured:
        with joined_processes(device) as processes:
            job = open_job(recipe, device, processes)
            plan = make_plan(job)
            plan.log(processes)
            times = Times()
            weights = check_finite(job.checkpoint)
            job = choose_formats(job)
            way = choose_way(plan, job)
            if processes.is_first:
                until_measured.enter_context(job.state.locked())
            with _resumable(job, way):
                if not job.state.is_written:
                    write_result(job, way, weights)
            times.end("calibrate, quantize and write")
        reference = job.checkpoint.directory
        if not processes.is_first:
            return Outcome(passed=True, is_first=False, reference=reference)
        with _resumable(job, way):
            passed = verify_and_measure(job, way, times)
        job.state.remove()
    return Outcome(passed, is_first=True, reference=reference)


def write_result(job: Job, way: Way, source_weights: Mapping[str, str]) -> None:
    """Calibrate, quantize and write; the output appears under its name when it is whole.

    Every process must call this, because each has a share of the samples; the first one writes.

    Args:
        job: The run.
        way: How it is carried out.
        source_weights: SHA-256 of the source's weight files, for the manifest.
    """
    if not job.processes.is_first:
        for _ in way.packed_layers(drain=lambda: None):
            pass
        return
    job.state.begin()
    with open_writer(job.checkpoint, job.policy, job.state.checkpoint, way.read) as writer:
        for layer in way.packed_layers(writer.drain):
            on_written = functools.partial(way.on_written, layer.index)
            writer.put(layer.index, layer.tensors(), on_written)
    manifest = make_manifest(job, way.record(), source_weights)
    write_companions(job.checkpoint, job.policy, job.state.checkpoint, manifest)
    if job.search is not None:
        job.search.write(job.state.checkpoint)
    job.state.publish()


def verify_and_measure(job: Job, way: Way, times: Times) -> bool:
    """Verify the written files and compare them with BF16; returns whether the gate passed.

    The manifest is written last, with the SHA-256 of every file.
    """
    output = job.recipe.output
    found = verification(output, job.checkpoint.directory, run_prompts=False)
    show_faults(output, found.faults)
    times.end("verify")
    if found.faults:
        gate = gate_of_faults(found.faults)
    else:
        gate = measure(job, way.reference, way.read_back)
        times.end("measure")
    finish_manifest(job, gate, found.digests, times)
    return gate["passed"] is True


@contextlib.contextmanager
def _resumable(job: Job, way: Way) -> Iterator[None]:
    """Turn a lack of memory into advice, and leave only a state that a later run can resume."""
    remedy = "end what else uses it, or give quantize.memory=layers; the same command resumes"
    if job.distillation is not None:
        remedy = "start more processes under FSDP2: see recipes/nvfp4_qad.yaml"
    try:
        with memory_advice(way.progress, remedy):
            yield
    except BaseException as error:
        if job.processes.is_first:
            job.state.remove_if_useless()
            if isinstance(error, KeyboardInterrupt):
                logger.warning("%s", job.state.how_to_resume())
        raise
