"""Runs a recipe: BF16 checkpoint in, verified and measured quantized checkpoint out; quantize/ has
the front doors.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil

from torch import nn

from accuracy.agreement import States, final_states
from calibrate.forward import embed_all, forward_loop
from calibrate.samples import Skipped
from checkpoint.config import read_config
from checkpoint.faults import raise_if_any
from checkpoint.files import check_weights, nonfinite_faults
from checkpoint.layout import language_model_linears
from checkpoint.memory import memory_advice
from checkpoint.native import load_model, load_tokenizer
from export.load import load_exported
from export.manifest import Manifest
from export.write import write_checkpoint
from pipeline.inputs import distillation, open_checkpoint, pick_device, prompt_stream, versions
from pipeline.plan import plan_run, written_before
from pipeline.search import auto_faults, searched
from pipeline.streaming import Job, run_streamed
from pipeline.verdict import conclude, say
from quantize.algorithms import ALGORITHMS, algorithm_faults
from quantize.distill.distillation import distill
from quantize.distill.student import frozen_copy
from quantize.policy import Rule, make_policy
from quantize.ptq import packed_linears, quantize_model
from recipes.schema import Recipe


@memory_advice(
    lambda: "the run ran out of memory", "end what else uses it, or give quantize.memory=stream"
)
def run(recipe: Recipe) -> int:
    """Run a recipe; returns 0 when everything is done and the gate passed, 1 for a fault or a
    missed gate.

    Raises:
        BadInput: With everything that is wrong with the input; nothing is left at the output.
    """
    # Check everything before the first weight is loaded.
    config = open_checkpoint(recipe)
    rules = [Rule(**rule.model_dump()) for rule in recipe.quantize.layers]
    policy = make_policy(rules, language_model_linears(config), recipe.quantize.kv_cache)
    algorithm, damping = recipe.quantize.algorithm, recipe.quantize.gptq_damping
    raise_if_any(
        [
            *algorithm_faults(algorithm, policy, distils=recipe.distill is not None),
            *auto_faults(recipe),
        ]
    )
    source = check_weights(config, finite=False)
    tokenizer, device = load_tokenizer(config), pick_device(recipe.device)
    skipped = Skipped(recipe.calibrate.max_skipped)
    plan = distillation(recipe, config, policy, tokenizer, device)
    rate, served_rate = recipe.calibrate.video_pruning_rate, recipe.serve.video_pruning_rate
    max_length = recipe.calibrate.max_length
    samples = functools.partial(
        prompt_stream, recipe.calibrate, config, tokenizer, pruning_rate=rate, max_length=max_length
    )
    held_out = functools.partial(
        prompt_stream, recipe.accuracy, config, tokenizer, pruning_rate=served_rate
    )
    prompts = samples(skipped=skipped)
    work = plan_run(recipe, config, policy, source, device, samples, plan)
    work.show()
    raise_if_any(nonfinite_faults(source))
    search = searched(recipe, config, policy, tokenizer, device)
    if search:
        policy = search.policy
        say(f"chosen: {search}")
        raise_if_any(algorithm_faults(algorithm, policy, distils=False))

    if work.streams:
        return run_streamed(
            Job(recipe, config, policy, source, device, samples, held_out, work.budget)
        )

    # BF16 answers the held-out samples, is calibrated and quantized in place, and streams out.
    model = load_model(config, device)
    states = functools.partial(final_states, config=config, pruning_rate=served_rate)
    reference = states(model, held_out(skipped=Skipped()), describe="BF16 answers")
    teacher = frozen_copy(model.language_model) if plan and plan.taught else None
    total = recipe.calibrate.samples
    given = (
        embed_all(model, prompts, config, rate, total) if ALGORITHMS[algorithm].repeats else prompts
    )
    loop = functools.partial(forward_loop, model, given, config, rate, total=total)
    counts = quantize_model(model.language_model, policy, loop, algorithm, damping)
    say(
        f"calibrated on {counts.samples} samples, {counts.tokens} tokens, skipped {skipped.samples}"
    )
    for fault in skipped.faults:
        say(f"skipped: {fault}")
    calibration = dataclasses.asdict(counts) | {"skipped": skipped.samples}
    recorded = recipe.model_dump(mode="json")
    manifest = Manifest(recorded, versions(), policy.counts(), calibration, recorded["serve"])
    if plan:
        distilled = distill(plan, model, teacher)
        if not plan.exports:  # one of several processes: the first goes on
            return 0
        say(f"distilled: {distilled}")
        manifest = dataclasses.replace(manifest, distillation=dataclasses.asdict(distilled))
    packed = packed_linears(model.language_model, policy)
    if written_before(recipe, plan):
        shutil.rmtree(recipe.output)
    write_checkpoint(config, source, policy, packed, recipe.output, manifest)
    if search:
        search.write(recipe.output)
    del model, packed, teacher

    def read_back() -> tuple[list[States], nn.Module]:
        exported = load_exported(read_config(recipe.output), device)
        answers = states(exported, held_out(skipped=Skipped()), describe="quantized answers")
        return answers, exported.language_model.lm_head

    status = conclude(recipe, config, manifest, lambda: reference, read_back, device)
    if plan:
        plan.finish()
    return status
