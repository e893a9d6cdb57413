"""`quantize.auto`: scores the layers in each format and chooses the mix that fits a size."""

from __future__ import annotations

import dataclasses
import gc

from calibrate.forward import embed_all
from calibrate.samples import Skipped
from checkpoint.faults import raise_if_any
from checkpoint.log import get_logger
from checkpoint.native import load_model
from pipeline.inputs import prompts_of
from pipeline.job import Job
from quantize.algorithms import algorithm_faults
from quantize.sensitivity import search_formats

logger = get_logger(__name__)


def choose_formats(job: Job) -> Job:
    """Load BF16, score it on the first calibration samples and choose the mix of formats.

    Returns:
        The job with the chosen policy; unchanged for a recipe without `quantize.auto`, and for a
        result that is written already.

    Raises:
        BadInput: As `pipeline.inputs.prompts_of`.
    """
    recipe = job.recipe
    auto = recipe.quantize.auto
    if auto is None or job.state.is_written:
        return job
    section = recipe.calibrate.model_copy(update={"samples": auto.samples})
    skipped = Skipped(section.max_skipped)
    prompts = prompts_of(
        section, "calibrate", job.checkpoint, recipe.video, skipped, section.max_length
    )
    model = load_model(job.checkpoint, job.device)
    embedded = embed_all(model, prompts, job.checkpoint.config, auto.samples)
    found = search_formats(model.language_model, job.policy, embedded, auto.formats, auto.bits)
    del model
    gc.collect()  # ModelOpt's modules refer to each other, and the next model needs the memory
    logger.info("chosen: %s", found)
    raise_if_any(algorithm_faults(recipe.quantize.algorithm, found.policy, distils=False))
    return dataclasses.replace(job, policy=found.policy, search=found)
