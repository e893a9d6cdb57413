"""Runs a recipe: BF16 checkpoint in, verified and measured quantized checkpoint out; quantize/ has the front doors."""

from __future__ import annotations

import dataclasses
import functools

from rich.console import Console

from accuracy.agreement import compare, final_states
from accuracy.gate import Thresholds, judge, show
from calibrate.forward import embed_all, forward_loop
from calibrate.samples import Skipped
from checkpoint.config import read_config
from checkpoint.faults import raise_if_any
from checkpoint.files import check_weights, nonfinite_faults
from checkpoint.layout import language_model_linears, spec_bytes
from checkpoint.native import load_model, load_tokenizer
from checkpoint.writing import check_output
from export.load import load_exported
from export.manifest import Manifest, write_manifest
from export.verify import show_faults, verify
from export.write import output_specs, write_checkpoint
from quantize.algorithms import ALGORITHMS, algorithm_faults
from quantize.distill import distill
from quantize.policy import Rule, make_policy
from quantize.ptq import packed_linears, quantize_model
from quantize.student import frozen_copy
from recipes.inputs import distillation, open_checkpoint, pick_device, prompt_stream, versions
from recipes.schema import Recipe
from recipes.search import auto_faults, searched

_say = functools.partial(Console(stderr=True).print, highlight=False, soft_wrap=True)


def run(recipe: Recipe) -> int:
    """Run a recipe; returns 0 when everything is done and the gate passed, 1 for a fault or a missed gate.

    Raises:
        BadInput: With everything that is wrong with the input; nothing is left at the output.
    """
    # Check everything before the first weight is loaded.
    config = open_checkpoint(recipe)
    rules = [Rule(**rule.model_dump()) for rule in recipe.quantize.layers]
    policy = make_policy(rules, language_model_linears(config), recipe.quantize.kv_cache)
    algorithm, damping = recipe.quantize.algorithm, recipe.quantize.gptq_damping
    raise_if_any([*algorithm_faults(algorithm, policy, distils=recipe.distill is not None), *auto_faults(recipe)])
    source = check_weights(config, finite=False)
    size = spec_bytes(output_specs(config, policy, source.specs))
    check_output(recipe.output, size)
    tokenizer, device = load_tokenizer(config), pick_device(recipe.device)
    skipped = Skipped(recipe.calibrate.max_skipped)
    plan = distillation(recipe, config, policy, tokenizer, device)
    rate, served_rate = recipe.calibrate.video_pruning_rate, recipe.serve.video_pruning_rate
    samples = prompt_stream(recipe.calibrate, config, tokenizer, skipped, rate, recipe.calibrate.max_length)
    held_out = functools.partial(prompt_stream, recipe.accuracy, config, tokenizer, pruning_rate=served_rate)
    formats = ", ".join(f"{count} {format}" for format, count in policy.counts().items())
    _say(f"{config.directory}: {source.total_bytes / 1e9:.3f} GB → {recipe.output}: {size / 1e9:.3f} GB, {formats}")
    raise_if_any(nonfinite_faults(source))
    search = searched(recipe, config, policy, tokenizer, device)
    if search:
        policy = search.policy
        _say(f"chosen: {search}")
        raise_if_any(algorithm_faults(algorithm, policy, distils=False))

    # BF16 answers the held-out samples, is calibrated and quantized in place, and streams out.
    model = load_model(config, device)
    states = functools.partial(final_states, config=config, pruning_rate=served_rate)
    reference = states(model, held_out(skipped=Skipped()), describe="BF16 answers")
    teacher = frozen_copy(model.language_model) if plan and plan.taught else None
    total = recipe.calibrate.samples
    given = embed_all(model, samples, config, rate, total) if ALGORITHMS[algorithm].repeats else samples
    loop = functools.partial(forward_loop, model, given, config, rate, total=total)
    counts = quantize_model(model.language_model, policy, loop, algorithm, damping)
    _say(f"calibrated on {counts.samples} samples, {counts.tokens} tokens, skipped {skipped.samples}")
    for fault in skipped.faults:
        _say(f"skipped: {fault}")
    calibration = dataclasses.asdict(counts) | {"skipped": skipped.samples}
    recorded = recipe.model_dump(mode="json")
    manifest = Manifest(recorded, versions(), policy.counts(), calibration, recorded["serve"])
    if plan:
        distilled = distill(plan, model, teacher)
        if not plan.exports:  # one of several processes: the first goes on
            return 0
        _say(f"distilled: {distilled}")
        manifest = dataclasses.replace(manifest, distillation=dataclasses.asdict(distilled))
    packed = packed_linears(model.language_model, policy)
    write_checkpoint(config, source, policy, packed, recipe.output, manifest)
    if search:
        search.write(recipe.output)
    del model, packed, teacher
    if plan:
        plan.finish()

    # What is on disk is verified and measured, not what was in memory.
    faults = verify(recipe.output, config.directory)
    show_faults(recipe.output, faults)
    gate: dict[str, object] = {"passed": False, "missed": [str(fault) for fault in faults]}
    if not faults:
        exported = load_exported(read_config(recipe.output), device)
        answers = states(exported, held_out(skipped=Skipped()), describe="quantized answers")
        measured = compare(reference, answers, exported.language_model.lm_head, config.image_token_id)
        accuracy = recipe.accuracy
        verdict = judge(measured, Thresholds(accuracy.max_kl, accuracy.min_top1, accuracy.max_perplexity_ratio))
        show(verdict)
        gate = verdict.as_dict()
    write_manifest(recipe.output, dataclasses.replace(manifest, gate=gate))
    _say(f"{recipe.output}: {'done; next: python -m serve ' + str(recipe.output) if gate['passed'] else 'FAILED'}")
    return 0 if gate["passed"] else 1
