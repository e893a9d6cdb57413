"""QAT, the comparison: cross-entropy of the samples' own tokens through distillation's trainer,
guards and resuming.
"""

import itertools
import math

import pytest
import torch

from checkpoint.faults import BadInput
from checkpoint.native import module_name
from quantize.distill.batches import IGNORE
from quantize.distill.state import weight_of
from quantize.distill.student import trainable
from quantize.distill.trainer import DistillationTrainer
from recipes.schema import load_recipe
from tests.quantize.distill.distilling import Small, mixture, one_thread  # noqa: F401
from tests.quantize.distill.test_distill_resume import RECIPE


def repeated():
    """A text and a picture again and again: trained on what is held out, the score falls on any
    CPU's arithmetic.
    """
    return itertools.cycle(list(itertools.islice(mixture(), 2)))


def qat(config, directory, **settings):
    return Small(
        config, directory, repeated, **{"loss": "cross_entropy", "learning_rate": 3e-4, **settings}
    )


def cross_entropy(small, samples, answers=False):
    """Independent of the trainer: mean over all tokens but visual placeholders, or answers' alone,
    in nats.
    """
    total, count = 0.0, 0
    for batch in map(small.batch, samples):
        with torch.no_grad():
            output = small.model.language_model(
                inputs_embeds=batch["inputs_embeds"], use_cache=False
            )
        logits, targets = output.logits[0, :-1].double(), batch["labels"][0, 1:]
        kept = (targets != IGNORE).nonzero().flatten()[-int(batch["answer"]) if answers else 0 :]
        total -= float(logits.log_softmax(-1)[kept, targets[kept]].sum())
        count += len(kept)
    return total / count


@pytest.fixture(scope="module")
def done(one_thread, tiny_config, tmp_path_factory):  # noqa: F811
    small = qat(tiny_config, tmp_path_factory.mktemp("qat"))
    samples = list(itertools.islice(repeated(), 4))
    small.ptq_held_out = cross_entropy(small, samples[:2], answers=True)
    linears = {
        name: small.model.language_model.get_submodule(module_name(name))
        for name in small.plan.trained
    }
    with trainable(small.model.language_model, linears):
        small.first_loss = cross_entropy(small, samples[2:])
    for linear in linears.values():
        weight_of(linear).data = weight_of(linear).data.bfloat16()
    small.result = small.run()
    return small


def test_the_held_out_score_is_cross_entropy_and_begins_at_the_ptq_models(done):
    assert done.result.loss == "cross-entropy"
    assert done.result.held_out[0] == (0, pytest.approx(done.ptq_held_out, rel=1e-4))


def test_the_first_loss_is_the_mean_over_all_tokens_of_the_step(done):
    assert done.result.losses[0] == (1, pytest.approx(done.first_loss, rel=1e-4))


def test_it_brings_the_held_out_cross_entropy_down_without_a_teacher(done):
    assert done.teacher is None
    score = dict(done.result.held_out)
    assert score[done.result.best_step] == min(score.values()) < score[0]
    assert str(done.result).startswith("held-out cross-entropy ")


def test_interrupted_and_taken_up_again_it_ends_with_the_same_weights(
    done, tiny_config, tmp_path, monkeypatch
):
    save = DistillationTrainer._save_checkpoint

    def interrupted(self, *arguments):
        save(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "_save_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            qat(tiny_config, tmp_path).run()
    again = qat(tiny_config, tmp_path)
    assert again.run() == done.result
    for name in done.plan.trained:
        ours, theirs = (
            small.model.language_model.get_submodule(module_name(name)) for small in (again, done)
        )
        assert torch.equal(weight_of(ours), weight_of(theirs))


def test_its_advice_names_its_own_score_and_the_learning_rate_first(
    tiny_config, tmp_path, monkeypatch
):
    total = DistillationTrainer._loss_sum
    monkeypatch.setattr(
        DistillationTrainer, "_loss_sum", lambda self, *a: total(self, *a) * math.nan
    )
    with pytest.raises(
        BadInput, match=r"held-out cross-entropy is nan.*lower distill\.learning_rate first"
    ):
        qat(tiny_config, tmp_path, steps=1).run()


def test_a_recipe_chooses_the_loss_and_distils_by_default():
    assert load_recipe(RECIPE).distill.loss == "kl"
    assert load_recipe(RECIPE, ["distill.loss=cross_entropy"]).distill.loss == "cross_entropy"
    with pytest.raises(BadInput, match=r"distill\.loss: 'mse': .*'kl' or 'cross_entropy'"):
        load_recipe(RECIPE, ["distill.loss=mse"])
