"""QAT, the comparison: cross-entropy of the samples' own tokens through distillation's trainer,
guards and resuming.
"""

import itertools

import pytest
import torch

from quantize.distill.rows import IGNORE
from quantize.distill.student import trainable
from tests.quantize.distill.distilling import (  # noqa: F401
    Small,
    computed_as_in_training,
    mixture,
    one_thread,
    with_a_blank,
)


def repeated():
    """A text and a picture, then both with another blank again and again: trained on nearly what is
    held out, the score falls on any CPU's arithmetic.
    """
    held_out = list(itertools.islice(mixture(), 2))
    trained = list(map(with_a_blank, held_out))
    return itertools.chain(held_out, itertools.cycle(trained))


def qat(tiny, directory, **options):
    settings = {"loss": "cross_entropy", "learning_rate": 3e-4}
    return Small(tiny, directory, repeated, **(settings | options))


@computed_as_in_training()
def cross_entropy(small, samples, answers=False):
    """Independent of the trainer: mean over all tokens but visual placeholders, or answers' alone,
    in nats.
    """
    total = 0.0
    count = 0
    for row in map(small.row, samples):
        with torch.no_grad():
            output = small.student(inputs_embeds=row["inputs_embeds"], use_cache=False)
        log_probabilities = output.logits[0, :-1].double().log_softmax(-1)
        targets = row["labels"][0, 1:]
        kept = (targets != IGNORE).nonzero().flatten()
        if answers:
            kept = kept[-row["answer_length"] :]
        total -= float(log_probabilities[kept, targets[kept]].sum())
        count += len(kept)
    return total / count


@pytest.fixture(scope="module")
def done(one_thread, tiny, tmp_path_factory):  # noqa: F811
    small = qat(tiny, tmp_path_factory.mktemp("qat"))
    samples = list(itertools.islice(repeated(), 4))
    small.ptq_held_out = cross_entropy(small, samples[:2], answers=True)
    with trainable(small.student, small.trained):
        small.first_loss = cross_entropy(small, samples[2:])
    small.undo_trainable()
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


class Killed(Exception):
    """Stands for a kill behind a checkpoint."""


def test_killed_behind_its_first_and_last_checkpoint_and_resumed_it_ends_with_the_same_weights(
    done, tiny, tmp_path
):
    recorded = []

    def kill(step):
        recorded.append(step)
        raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            qat(tiny, tmp_path, record=kill).run()
    assert recorded == [1, 2]
    again = qat(tiny, tmp_path, record=kill)
    assert again.run() == done.result
    assert recorded == [1, 2], "a finished training is not repeated"
    for name, weight in again.trained.weights.items():
        assert torch.equal(weight.parameter, done.trained.weights[name].parameter), name
