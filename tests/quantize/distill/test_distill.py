"""Distillation: the loss it starts from, what it changes and leaves, and each guard with what it
guards from.
"""

import math
import re

import pytest
import torch

from calibrate.forward import embed
from calibrate.prompts import build_prompt
from checkpoint.classes import modeling as modeling_nemotron_h
from checkpoint.faults import BadInput
from checkpoint.native import load_model, module_name
from quantize.distill import student as student_of
from quantize.distill.batches import with_answer
from quantize.distill.trainer import DistillationTrainer
from quantize.ptq import share_fused_scales
from tests.quantize.distill.distilling import Small, mixture, one_thread, said  # noqa: F401


def sums(reference, student, small, samples, answers=False):
    """Independent of the trainer: KL(reference ‖ student) summed over text positions, or answers',
    and their number.
    """
    total, count = torch.zeros(()), 0
    for sample in samples:
        prompt = build_prompt(with_answer(sample), small.config, small.tokenizer)
        given = embed(small.model, prompt, small.config, small.settings.video_pruning_rates[0])
        with torch.no_grad():
            p = (
                reference(inputs_embeds=given.inputs_embeds[None])
                .logits[0]
                .double()
                .log_softmax(-1)
            )
        q = (
            student(inputs_embeds=given.inputs_embeds[None], use_cache=False)
            .logits[0]
            .double()
            .log_softmax(-1)
        )
        counted = (given.token_ids[1:] != small.config.image_token_id).nonzero().flatten()
        if answers:
            thought = (
                "" if sample.messages[0]["role"] == "system" else "</think>"
            )  # opened by the template
            behind = small.tokenizer.encode(
                f"{thought}{sample.answer}\n<SPECIAL_12>\n", add_special_tokens=False
            )
            assert given.token_ids[-len(behind) :].tolist() == behind
            counted = counted[-len(behind) :]
        total = total + (p.exp() * (p - q)).sum(-1)[counted].sum()
        count += len(counted)
    return total, count


@pytest.fixture(scope="module", params=["fp8", "nvfp4"])
def done(request, one_thread, tiny_config, tmp_path_factory):  # noqa: F811
    """A run over a clip, a picture and texts, with what was known before it."""
    directory = tmp_path_factory.mktemp("qad")
    small = Small(
        tiny_config, directory, mixture, format=request.param, steps=2, learning_rate=1e-4
    )
    bf16, student = load_model(tiny_config).language_model, small.model.language_model
    share_fused_scales(student, small.plan.policy)  # PTQ's export has them so
    samples = list(mixture())
    with torch.no_grad():
        small.ptq_held_out = (lambda total, count: float(total) / count)(
            *sums(bf16, student, small, samples[:2], answers=True)
        )
    probe = small.batch(samples[2])["inputs_embeds"]
    small.teacher_before = small.teacher(inputs_embeds=probe).logits
    small.amax_before = {n: b.clone() for n, b in student.named_buffers() if n.endswith("_amax")}
    linears = {name: student.get_submodule(module_name(name)) for name in small.plan.trained}
    with student_of.trainable(student, linears):
        total, count = sums(bf16, student, small, samples[2:4])
        (total / count).backward()
        grads = [module._parameters["weight"].grad for module in linears.values()]
        small.first_norm, small.first_loss = (
            float(torch.stack([g.norm() for g in grads]).norm()),
            float(total.detach()) / count,
        )
    for module in linears.values():
        module._parameters["weight"].data = module._parameters["weight"].data.bfloat16()
        module._parameters["weight"].grad = None
    small.logged, log = [], DistillationTrainer.log
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            DistillationTrainer,
            "log",
            lambda self, logs, *a: (small.logged.append(dict(logs)), log(self, logs, *a)),
        )
        small.result = small.run()
    small.probe = probe
    return small


def test_the_held_out_kl_of_the_answers_at_step_0_is_the_ptq_models(done):
    assert done.result.held_out[0] == (0, pytest.approx(done.ptq_held_out, rel=1e-4))


def test_the_first_loss_and_gradient_are_those_of_the_mean_over_all_tokens_of_the_step(done):
    assert done.result.losses[0] == (1, pytest.approx(done.first_loss, rel=1e-4))
    assert next(logs["grad_norm"] for logs in done.logged if "grad_norm" in logs) == pytest.approx(
        done.first_norm, rel=1e-2
    )


def test_distillation_brings_the_held_out_kl_down_and_keeps_the_best_step(done):
    kl = dict(done.result.held_out)
    assert kl[done.result.best_step] == min(kl.values()) < kl[0]


def test_the_teachers_outputs_do_not_move(done, tiny_config):
    after = done.teacher(inputs_embeds=done.probe).logits
    assert torch.equal(after, done.teacher_before)
    assert torch.equal(
        after, load_model(tiny_config).language_model(inputs_embeds=done.probe).logits
    )


def test_only_the_weights_that_train_have_changed_and_no_range_has(done, tiny_config):
    source = dict(load_model(tiny_config).language_model.named_parameters())
    changed = {
        n
        for n, p in done.model.language_model.named_parameters()
        if not torch.equal(p.float(), source[n].float())
    }
    assert changed == {f"{module_name(name)}.weight" for name in done.plan.trained}
    after = {n: b for n, b in done.model.language_model.named_buffers() if n.endswith("_amax")}
    assert after.keys() == done.amax_before.keys()
    assert all(torch.equal(after[name], amax) for name, amax in done.amax_before.items())


def test_nvfp4_trains_with_checkpointed_layers_and_a_pattern_of_weights(tiny_config, tmp_path):
    small = Small(
        tiny_config,
        tmp_path,
        format="nvfp4",
        steps=1,
        train="o*_proj",
        gradient_checkpointing=True,
        learning_rate=1e-5,
    )
    result = small.run()
    assert {name.rpartition(".")[2] for name in small.plan.trained} == {"o_proj", "out_proj"}
    assert result.held_out[1][1] < result.held_out[0][1]


def fused(projected, *_, outproj_weight, **__):
    """Stands in for mamba_ssm's kernel: takes out_proj's weight as it is."""
    width = outproj_weight.shape[1]
    return torch.nn.functional.linear(projected[..., :width], outproj_weight.to(projected.dtype))


def test_the_fused_mamba_path_stays_shut(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(modeling_nemotron_h, "mamba2_split_conv1d_scan_combined", fused)
    result = Small(tiny_config, tmp_path, steps=1).run()
    assert result.losses[0][1] < 1


def test_a_quantizer_that_a_step_passes_by_stops_the_run_by_name(
    tiny_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(modeling_nemotron_h, "mamba2_split_conv1d_scan_combined", fused)
    monkeypatch.setattr(student_of, "unfuse_mamba", lambda model: [])
    with pytest.raises(
        RuntimeError, match=r"did not call .*layers\.0\.mixer\.out_proj\.input_quantizer"
    ):
        Small(tiny_config, tmp_path, steps=1).run()


@pytest.mark.parametrize(
    ("name", "trains", "message"),
    [
        ("model.layers.1.mixer.up_proj", False, r"no gradient at .*layers\.1\.mixer\.up_proj"),
        ("model.norm_f", True, r"one too many at .*norm_f\.weight"),
    ],
)
def test_a_gradient_that_is_missing_or_astray_stops_the_run(
    tiny_config, tmp_path, monkeypatch, name, trains, message
):
    def disturb(model):
        model.get_submodule(name)._parameters["weight"].requires_grad_(trains)
        return []

    monkeypatch.setattr(student_of, "unfuse_mamba", disturb)
    with pytest.raises(RuntimeError, match=message):
        Small(tiny_config, tmp_path, steps=1).run()


def test_a_range_that_moves_stops_the_run(tiny_config, tmp_path, monkeypatch):
    step = DistillationTrainer.training_step

    def moving(self, model, *arguments):
        model.model.layers[0].mixer.in_proj.input_quantizer._amax.mul_(2)
        return step(self, model, *arguments)

    monkeypatch.setattr(DistillationTrainer, "training_step", moving)
    with pytest.raises(RuntimeError, match=r"moved the ranges of .*in_proj\.input_quantizer"):
        Small(tiny_config, tmp_path, steps=1).run()


@pytest.mark.parametrize("patience", [1, 2])
def test_a_learning_rate_far_too_high_stops_the_run_with_advice(tiny_config, tmp_path, patience):
    with pytest.raises(
        BadInput, match=rf"above PTQ's .* nats {patience} times in a row.*learning_rate first"
    ):
        Small(tiny_config, tmp_path, steps=4, learning_rate=0.1, patience=patience).run()


def test_the_schedule_is_adamws_with_a_warm_up_and_a_cosine_and_evaluations_are_as_far_apart_as_asked(
    tiny_config, tmp_path, monkeypatch
):
    seen, step = {}, DistillationTrainer.training_step

    def watched(self, *arguments):
        optimizer = self.optimizer.optimizer
        seen[self.state.global_step] = optimizer.param_groups[0] | {
            "name": type(optimizer).__name__
        }
        return step(self, *arguments)

    monkeypatch.setattr(DistillationTrainer, "training_step", watched)
    result = Small(
        tiny_config, tmp_path, steps=6, warmup=1 / 3, learning_rate=1e-5, save_every=3
    ).run()
    cosine = [(1 + math.cos(math.pi * part / 4)) / 2 for part in (0, 1, 2, 3)]
    assert [group["lr"] for group in seen.values()] == pytest.approx(
        [1e-5 * share for share in (0, 0.5, *cosine)]
    )
    assert {(g["name"], g["betas"], g["weight_decay"]) for g in seen.values()} == {
        ("AdamW", (0.9, 0.999), 0.05)
    }
    assert [number for number, _ in result.held_out] == [0, 3, 6]


def test_q_k_and_v_train_under_the_ranges_that_they_will_share_when_served(
    tiny_config, tmp_path, monkeypatch
):
    seen, step = [], DistillationTrainer.training_step

    def watched(self, model, *arguments):
        seen.append(
            [
                float(getattr(model.model.layers[layer].mixer, name).weight_quantizer._amax)
                for name in names
            ]
        )
        return step(self, model, *arguments)

    layer, names = tiny_config.pattern.index("*"), ("q_proj", "k_proj", "v_proj")
    small = Small(tiny_config, tmp_path, format="nvfp4", steps=1, batch=1)
    mixer = small.model.language_model.model.layers[layer].mixer
    own = {float(getattr(mixer, name).weight_quantizer._amax) for name in names}
    monkeypatch.setattr(DistillationTrainer, "training_step", watched)
    small.run()
    assert len(own) == 3
    assert seen == [[max(own)] * 3]


def test_a_run_taken_up_again_keeps_the_ranges_it_began_with(tiny_config, tmp_path, monkeypatch):
    """A GPU may calibrate another bit the second time: what the weights were trained under counts."""
    step = DistillationTrainer.training_step

    def killed(self, *arguments):
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return step(self, *arguments)

    def range_of(small):
        return small.model.language_model.model.layers[0].mixer.in_proj.input_quantizer._amax

    first = Small(tiny_config, tmp_path, learning_rate=1e-5)
    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            first.run()
    second = Small(tiny_config, tmp_path, learning_rate=1e-5)
    range_of(second).mul_(1 + 2**-7)
    assert second.run().steps == 2
    assert torch.equal(range_of(second), range_of(first))


def test_nan_stops_the_run_with_advice(tiny_config, tmp_path, monkeypatch):
    total = DistillationTrainer._loss_sum
    monkeypatch.setattr(
        DistillationTrainer,
        "_loss_sum",
        lambda self, *a: total(self, *a) * (math.nan if self.model.training else 1),
    )
    with pytest.raises(BadInput, match=r"loss is nan after 0 steps.*learning_rate first"):
        Small(tiny_config, tmp_path, steps=1).run()


def test_nan_on_the_held_out_samples_stops_the_run_with_advice(tiny_config, tmp_path, monkeypatch):
    total = DistillationTrainer._loss_sum
    monkeypatch.setattr(
        DistillationTrainer, "_loss_sum", lambda self, *a: total(self, *a) * math.nan
    )
    with pytest.raises(BadInput, match=r"held-out KL is nan.*lower distill\.learning_rate first"):
        Small(tiny_config, tmp_path, steps=1).run()


def test_when_no_step_is_better_ptq_is_kept_and_the_log_shows_why(tiny_config, tmp_path, capsys):
    small = Small(tiny_config, tmp_path, steps=1, learning_rate=0.1)
    result = small.run()
    assert (result.best_step, result.trained) == (0, ())
    held_out, number = dict(result.held_out), r"[\d.,]+"
    before, after = (
        line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")
    )
    assert before == f"step 0 of 1: held-out KL {held_out[0]:.5f} nats"
    assert re.fullmatch(
        f"step 1 of 1: held-out KL {held_out[1]:.5f} nats, step's {number}, {number} tokens/s",
        after,
    )
    source = dict(load_model(tiny_config).language_model.named_parameters())
    after = small.model.language_model.named_parameters()
    assert all(torch.equal(parameter.float(), source[name].float()) for name, parameter in after)


def test_loading_a_checkpoint_still_works_after_modelopts_trainer(done, tiny_config):
    # ModelOpt's trainer patches from_pretrained for the whole process unless it is kept from it.
    load_model(tiny_config)


def test_faults_of_the_plan_are_named_together(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(BadInput) as caught:
        Small(tiny_config, tmp_path, train="lm_head", batch=4)
    assert [fault.where for fault in caught.value.faults] == [
        "distill.train",
        "distill.batch",
        "accelerate",
    ]


def test_the_answer_becomes_the_assistants_turn_once():
    sample = with_answer(said(1))
    assert sample.messages[-1] == {"role": "assistant", "content": "Answer 1."}
    assert with_answer(sample) == sample
