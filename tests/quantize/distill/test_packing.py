"""Packed rows: a row's loss and gradients are those of its samples, each by itself."""

import contextlib
import itertools

import pytest
import torch

from calibrate.samples import Sample, Skipped
from calibrate.sources.synthetic.kinds import draw
from checkpoint.faults import BadInput
from quantize.distill import packing
from quantize.distill.dataset import TrainingDataset
from quantize.distill.fused import convolved_row
from quantize.distill.loss import hidden_states, loss_sum, replaced_head
from quantize.distill.packing import Packed, groups_of_similar, kept_apart
from quantize.distill.rows import (
    IGNORE,
    answer_only,
    joined_row,
    packed_rows,
)
from quantize.distill.student import own_embeddings, trainable
from tests.quantize.distill.distilling import (  # noqa: F401
    VIDEO,
    Small,
    one_thread,
    sample_row,
    small_plan,
    text_sample,
)

# The longest one is longer than a chunk of the scan, the next two share a group.
SAMPLES = [text_sample(0), text_sample(4), draw("chart", 5, 0), text_sample(2, "Word and word")]


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory):
    return Small(tiny, tmp_path_factory.mktemp("packing"), noise=0.3)


def media_samples():
    """Pictures and clips between texts, and a sample without an answer."""
    question = Sample("question", text_sample(7).messages, "test")
    kinds = ["video_static", "images", "video_event"]
    return [text_sample(3), *(draw(kind, 5, 1) for kind in kinds), question, text_sample(5)]


def loss_and_gradients(small, rows, is_taught=True):
    """Sum of the loss over the rows, in nats, and the gradients of all that trains, by name."""
    student = small.student
    total = 0.0
    with trainable(student, small.trained), kept_apart(student):
        for row in rows:
            embeds = row["inputs_embeds"]
            packed = Packed(row["lengths"]) if len(row["lengths"]) > 1 else None
            theirs = None
            if is_taught:
                with torch.no_grad():
                    theirs = hidden_states(small.teacher, embeds, packed)

            def loss_of(ours, theirs=theirs, row=row):
                head = small.teacher.lm_head.weight
                return loss_sum(ours, theirs, row["labels"], head, weights=row["weights"])

            with contextlib.ExitStack() as stack:
                stack.enter_context(replaced_head(student, loss_of))
                stack.enter_context(own_embeddings(student, row["text_ids"]))
                loss = student(inputs_embeds=embeds, use_cache=False, packed=packed).logits
            loss.backward()
            total += loss.item()
        gradients = {}
        for name, weight in small.trained.weights.items():
            if weight.parameter.grad is not None:
                gradients[name] = weight.parameter.grad.clone()
        small.undo_trainable()
    return total, gradients


def largest_difference(found, expected):
    """The largest distance of a gradient from the expected one, as a share of its norm."""
    assert expected
    assert found.keys() == expected.keys()
    differences = []
    for name, gradient in expected.items():
        distance = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        differences.append(distance.item())
    return max(differences)


def test_a_row_has_the_loss_and_the_gradients_of_its_samples(small):
    rows = [small.row(sample) for sample in SAMPLES]
    apart, own = loss_and_gradients(small, rows)
    together, packed = loss_and_gradients(small, [joined_row(rows)])
    assert together == pytest.approx(apart, rel=2e-3)
    assert largest_difference(packed, own) < 0.05
    # Without the places of the samples they see each other, and this shows.
    crossing = joined_row(rows) | {"lengths": (sum(joined_row(rows)["lengths"]),)}
    leaked, wrong = loss_and_gradients(small, [crossing])
    assert abs(leaked - apart) > 10 * abs(together - apart)
    assert largest_difference(wrong, own) > 0.2


def test_a_row_convolved_as_a_whole_has_the_loss_and_the_gradients_of_its_samples(
    small, monkeypatch
):
    """As on a GPU, but not compiled, and the scan still takes the samples one by one."""
    rows = [small.row(sample) for sample in SAMPLES]
    apart, own = loss_and_gradients(small, rows)
    monkeypatch.setattr(packing, "find_mamba_kernels", lambda: None)
    monkeypatch.setattr(packing, "compiled_convolution", lambda: convolved_row)
    monkeypatch.setattr(packing, "_scan_of_row", packing._scan)
    together, packed = loss_and_gradients(small, [joined_row(rows)])
    assert together == pytest.approx(apart, rel=2e-3)
    assert largest_difference(packed, own) < 0.08


@pytest.mark.parametrize("is_taught", [True, False])
@pytest.mark.parametrize("prompt_weight", [0.0, 0.1, 1.0])
def test_a_row_of_texts_pictures_and_clips_has_the_loss_of_its_samples(
    small, is_taught, prompt_weight
):
    rows = []
    for sample in media_samples():
        options = {"max_length": 4096, "prompt_weight": prompt_weight}
        rows.append(sample_row(small.model, small.checkpoint, sample, **options))
    apart, own = loss_and_gradients(small, rows, is_taught)
    together, packed = loss_and_gradients(small, [joined_row(rows)], is_taught)
    assert together == pytest.approx(apart, rel=2e-3)
    assert largest_difference(packed, own) < 0.05
    # Held out, answers count alone, and a question without an answer whole.
    held_out = [answer_only(row) for row in rows]
    apart, _ = loss_and_gradients(small, held_out, is_taught)
    together, _ = loss_and_gradients(small, [joined_row(held_out)], is_taught)
    assert together == pytest.approx(apart, rel=2e-3)


def test_samples_of_similar_length_are_computed_together_and_little_is_padded():
    lengths = [100, 10, 95, 11, 9, 300, 12]
    groups = groups_of_similar(lengths)
    assert sorted(index for group in groups for index in group) == list(range(7))
    assert groups[:2] == [[5], [0, 2]]
    for group in groups:
        tokens = [lengths[index] for index in group]
        assert max(tokens) * len(tokens) <= 1.25 * sum(tokens)


def test_what_is_computed_apart_returns_to_its_place_and_sees_only_its_sample():
    lengths = (3, 1, 4)
    row = torch.arange(1.0, 9.0)[None, None]  # [1, 1, length]
    sums = Packed(lengths).apart(lambda values: values.cumsum(2), [row], dim=2, result_dim=2)
    assert sums.tolist() == [[[1, 3, 6, 4, 5, 11, 18, 26]]]


def test_attention_that_would_not_be_kept_apart_is_refused(small, monkeypatch):
    monkeypatch.setattr(small.student.config, "_attn_implementation_internal", "eager")
    with pytest.raises(RuntimeError, match="attention is eager, not sdpa"):
        with kept_apart(small.student):
            pass


def sample_of(length):
    return {
        "inputs_embeds": torch.zeros(1, length, 2),
        "text_ids": torch.ones(1, length, dtype=torch.int64),
        "labels": torch.ones(1, length, dtype=torch.int64),
        "weights": torch.ones(1, length),
        "lengths": (length,),
        "answer_length": 1,
    }


def test_rows_are_filled_with_whole_samples_in_their_order():
    rows = list(packed_rows(map(sample_of, [4, 5, 2, 10, 1]), 10))
    assert [row["lengths"] for row in rows] == [(4, 5), (2,), (10,), (1,)]
    # Nothing predicts the first token of a sample.
    assert rows[0]["labels"].tolist() == [[IGNORE, 1, 1, 1, IGNORE, 1, 1, 1, 1]]


def packed_dataset(**options):
    samples = [text_sample(number) for number in range(7)]

    def embed(sample):
        return sample_of(2 + int(sample.id.removeprefix("text-")) % 3)

    skipped = Skipped(0)
    defaults = {"rates": (0.0,), "held_out": 1, "seed": 0, "skipped": skipped, "pack_length": 6}
    return TrainingDataset(
        lambda skipped: iter(samples), lambda sample, rate: sample, embed, **(defaults | options)
    )


def test_a_packed_step_says_where_the_next_one_begins_and_is_resumed_there():
    rows = list(itertools.islice(packed_dataset(step_rows=2), 4))
    assert [row["lengths"] for row in rows] == [(4, 2), (3,), (4, 2), (3,)]
    assert [row["next_position"] for row in rows] == [3, 3, 6, 6]
    resumed = packed_dataset(step_rows=2)
    resumed.start = 3
    (again, _) = itertools.islice(resumed, 2)
    assert again["position"] == rows[2]["position"]


def test_a_row_without_room_for_the_longest_sample_is_refused(tiny, tmp_path):
    what = "a row of 100 tokens has no room for a sample of 4096"
    with pytest.raises(BadInput, match=what):
        small_plan(tiny, tmp_path, pack_length=100)


def test_the_plan_counts_the_activations_of_a_row(tiny, tmp_path):
    whole = small_plan(tiny, tmp_path, max_length=1024)
    packed = small_plan(tiny, tmp_path, max_length=1024, pack_length=8192)
    assert packed.peak_bytes > 4 * whole.peak_bytes


def test_prompts_count_as_much_as_they_are_given_and_samples_without_an_answer_whole(small):
    sample = text_sample(3)
    whole = small.row(sample)
    length = whole["answer_length"]
    assert bool((whole["weights"] == 1).all())
    options = {"max_length": 4096, "prompt_weight": 0.25}
    row = sample_row(small.model, small.checkpoint, sample, **options)
    assert row["weights"][0, -length:].tolist() == [1.0] * length
    assert set(row["weights"][0, :-length].tolist()) == {0.25}
    question = Sample("1", sample.messages, "test")
    unanswered = sample_row(small.model, small.checkpoint, question, **options)
    assert bool((unanswered["weights"] == 1).all())


def test_the_loss_is_weighted_token_by_token():
    torch.manual_seed(0)
    head = torch.randn(9, 4)
    ours = torch.randn(1, 6, 4)
    labels = torch.randint(0, 9, (1, 6))
    plain = [loss_sum(ours, None, only(labels, place), head) for place in range(1, 6)]
    weights = torch.tensor([[9.0, 0.0, 0.5, 1.0, 0.25, 1.0]])
    expected = sum(loss * weights[0, place] for place, loss in enumerate(plain, 1))
    assert loss_sum(ours, None, labels, head, weights=weights) == pytest.approx(expected.item())


def only(labels, place):
    kept = torch.full_like(labels, IGNORE)
    kept[:, place] = labels[:, place]
    return kept
