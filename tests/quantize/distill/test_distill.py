"""Distillation: the loss it starts from, what it changes and what it leaves."""

import logging
import re

import pytest
import torch

from calibrate.forward import embed
from calibrate.prompts import build_prompt
from checkpoint.native import load_model
from quantize.distill.rows import IGNORE, with_answer
from quantize.distill.student import own_embeddings, trainable
from quantize.distill.trainer import DistillationTrainer
from quantize.distill.weights import ranges_of
from quantize.ptq import share_fused_scales
from tests.quantize.distill.distilling import (  # noqa: F401
    VIDEO,
    Small,
    computed_as_in_training,
    mixture,
    one_thread,
)


def log_probabilities(model, embeds):
    """Of the next token at every position, in float64."""
    return model(inputs_embeds=embeds[None], use_cache=False).logits[0].double().log_softmax(-1)


@computed_as_in_training()
def divergence(reference, small, samples, answers=False):
    """Mean KL divergence over text positions, or over answers'; independent of the trainer."""
    config, tokenizer = small.checkpoint.config, small.checkpoint.tokenizer
    total = torch.zeros(())
    count = 0
    for sample in samples:
        prompt = build_prompt(with_answer(sample), config, tokenizer, VIDEO)
        given = embed(small.model, prompt, config)
        text_ids = given.token_ids.masked_fill(given.token_ids == config.image_token_id, IGNORE)
        # Each model by its own embeddings, which may train.
        with torch.no_grad(), own_embeddings(reference, text_ids[None]):
            p = log_probabilities(reference, given.inputs_embeds)
        with own_embeddings(small.student, text_ids[None]):
            q = log_probabilities(small.student, given.inputs_embeds)
        counted = (given.token_ids[1:] != config.image_token_id).nonzero().flatten()
        if answers:
            # Without a system message the template opens a thought, which the answer ends.
            thought = "" if sample.messages[0]["role"] == "system" else "</think>"
            text = f"{thought}{sample.answer}\n<SPECIAL_12>\n"
            answer = tokenizer.encode(text, add_special_tokens=False)
            assert given.token_ids[-len(answer) :].tolist() == answer
            counted = counted[-len(answer) :]
        total = total + (p.exp() * (p - q)).sum(-1)[counted].sum()
        count += len(counted)
    return total / count


@pytest.fixture(scope="module", params=["fp8", "nvfp4"])
def done(request, one_thread, tiny, tmp_path_factory):  # noqa: F811
    """A run over a clip, a picture and texts, with what was known before it."""
    directory = tmp_path_factory.mktemp("qad")
    small = Small(tiny, directory, mixture, format=request.param, noise=0.3)
    small.bf16 = load_model(small.checkpoint).language_model
    share_fused_scales(small.student, small.plan.policy)  # PTQ's export has them so
    samples = list(mixture())
    with torch.no_grad():
        small.ptq_held_out = float(divergence(small.bf16, small, samples[:2], answers=True))
    trained = small.trained
    with trainable(small.student, trained):
        loss = divergence(small.bf16, small, samples[2:4])
        loss.backward()
        norms = [weight.parameter.grad.norm() for weight in trained.weights.values()]
        small.first_loss = float(loss.detach())
        small.first_norm = float(torch.stack(norms).norm())
    small.undo_trainable()
    small.probe = small.row(samples[2])["inputs_embeds"]
    small.teacher_before = small.teacher(inputs_embeds=small.probe).logits
    small.weights_before = small.values()
    small.ranges_before = {n: amax.clone() for n, amax in ranges_of(small.linears).items()}
    small.logged = []
    log = DistillationTrainer.log
    with pytest.MonkeyPatch.context() as patch:

        def kept(self, logs, *rest):
            small.logged.append(dict(logs))
            log(self, logs, *rest)

        patch.setattr(DistillationTrainer, "log", kept)
        small.result = small.run()
    return small


def test_the_held_out_kl_of_the_answers_at_step_0_is_the_ptq_models(done):
    assert done.result.held_out[0] == (0, pytest.approx(done.ptq_held_out, rel=1e-4))


def test_the_first_loss_and_gradient_are_those_of_the_mean_over_all_tokens_of_the_step(done):
    assert done.result.losses[0] == (1, pytest.approx(done.first_loss, rel=1e-4))
    norms = [logs["grad_norm"] for logs in done.logged if "grad_norm" in logs]
    assert norms[0] == pytest.approx(done.first_norm, rel=1e-2)


def test_distillation_brings_the_held_out_kl_down_and_keeps_the_best_step(done):
    kl = dict(done.result.held_out)
    assert kl[done.result.best_step] == min(kl.values()) < kl[0]
    hooks = []
    for linear in done.linears.values():  # the weights are float32 now, the matmuls stay in BF16
        hook = linear.weight_quantizer.register_forward_hook(lambda *given: given[2].bfloat16())
        hooks.append(hook)
    with torch.no_grad():
        now = divergence(done.bf16, done, list(mixture())[:2], answers=True)
    for hook in hooks:
        hook.remove()
    assert float(now) == pytest.approx(min(kl.values()), rel=1e-4)


def test_the_teachers_outputs_do_not_move(done):
    after = done.teacher(inputs_embeds=done.probe).logits
    assert torch.equal(after, done.teacher_before)
    assert torch.equal(after, done.bf16(inputs_embeds=done.probe).logits)


def test_only_the_weights_that_train_have_changed_and_no_range_has(done):
    changed = set()
    for name, values in done.values().items():
        if not torch.equal(values, done.weights_before[name]):
            changed.add(name)
    assert changed == done.trained_parameters
    after = ranges_of(done.linears)
    assert after.keys() == done.ranges_before.keys()
    assert len(after) == 2 * len(done.linears)
    for name, amax in done.ranges_before.items():
        assert torch.equal(after[name], amax), name


def test_the_linears_alone_train_on_request(tiny, tmp_path):
    small = Small(tiny, tmp_path, mixture, format="nvfp4", noise=0.3, train="linears")
    before = small.values()
    result = small.run()
    changed = {name for name, now in small.values().items() if not torch.equal(now, before[name])}
    assert changed == small.trained_parameters
    assert len(result.trained) == len(small.plan.policy.quantized)


def test_nvfp4_trains_with_checkpointed_layers_and_a_pattern_of_weights(tiny, tmp_path):
    settings = {"steps": 1, "train": "o*_proj", "gradient_checkpointing": True}
    small = Small(tiny, tmp_path, format="nvfp4", noise=0.3, **settings)
    assert {name.split(".")[-2] for name in small.plan.trained} == {"o_proj", "out_proj"}
    result = small.run()
    assert result.held_out[1][1] < result.held_out[0][1]


def test_a_weight_only_format_is_distilled_without_input_ranges(tiny, tmp_path):
    small = Small(tiny, tmp_path, mixture, format="nvfp4_weight_only", noise=0.3)
    ranges = ranges_of(small.linears)
    assert {name.rpartition("_proj.")[2] for name in ranges} == {"weight_quantizer.amax"}
    assert len(ranges) == len(small.linears)
    result = small.run()
    assert result.best_step > 0
    assert result.held_out[result.best_step][1] < result.held_out[0][1]


def test_q_k_and_v_train_under_the_ranges_that_they_will_share_when_served(tiny, tmp_path):
    small = Small(tiny, tmp_path, format="nvfp4", steps=1, batch=1)
    layer = small.checkpoint.config.pattern.index("*")
    mixer = small.student.get_submodule(f"model.layers.{layer}.mixer")
    quantizers = [mixer.q_proj, mixer.k_proj, mixer.v_proj]
    own = {float(linear.weight_quantizer.amax) for linear in quantizers}
    assert len(own) == 3
    seen = []
    hook = mixer.register_forward_pre_hook(
        lambda *_: seen.append({float(linear.weight_quantizer.amax) for linear in quantizers})
    )
    small.run()
    hook.remove()
    assert len(seen) > 2
    assert all(ranges == {max(own)} for ranges in seen)


def test_when_no_step_is_better_ptq_is_kept_and_the_log_shows_why(tiny, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="hybridquant")
    small = Small(tiny, tmp_path, steps=1, learning_rate=0.1)
    result = small.run()
    assert (result.best_step, result.trained) == (0, ())
    assert str(result).endswith("nats: PTQ's weights kept")
    held_out = dict(result.held_out)
    number = r"[\d.,]+"
    before, after = [line for line in caplog.messages if line.startswith("step ")]
    assert before == f"step 0 of 1: held-out KL {held_out[0]:.5f} nats"
    pattern = f"step 1 of 1: held-out KL {held_out[1]:.5f} nats, "
    pattern += f"step's {number}, {number} tokens/s"
    assert re.fullmatch(pattern, after)
    source = dict(load_model(small.checkpoint).language_model.named_parameters())
    for name, values in small.values().items():
        assert torch.equal(values, source[name].float()), name
