"""The training stream: what is held out, who takes what, where it begins again, and what the loss
counts.
"""

import itertools
import random
from dataclasses import replace

import pytest
import torch

from calibrate.prompts import build_prompt
from calibrate.samples import Sample
from calibrate.sources.synthetic.kinds import MIXED, draw, synthetic
from checkpoint.faults import BadInput, Fault
from checkpoint.native import load_tokenizer
from quantize.distill.batches import IGNORE, TrainingStream, answer_alone, batch_of, with_answer


def five():
    return iter(
        [Sample(str(number), [{"role": "user", "content": "x"}], "test") for number in range(5)]
    )


def named(sample, rate):
    """A stand-in for a batch; sample n has n + 1 tokens."""
    return {
        "name": sample.id,
        "rate": rate,
        "labels": torch.zeros(1, int(sample.id) + 1),
        "answer": 0,
    }


def stream(samples=five, embed=named, rates=(0.5,), **options):
    return TrainingStream(
        samples, embed, rates, **{"held_out": 2, "seed": 1, "max_skipped": 0, **options}
    )


def taken(stream, count):
    return [(int(batch["position"]), batch["name"]) for batch in itertools.islice(stream, count)]


def test_the_held_out_samples_are_never_trained_on_and_the_others_come_again():
    assert [batch["name"] for batch in stream().held_out()] == ["1", "0"]
    assert taken(stream(), 7) == list(enumerate("2342342"))


def test_processes_share_a_step_and_a_resumed_stream_goes_on_where_it_was():
    both = [taken(stream(rank=rank, ranks=2), 4) for rank in (0, 1)]
    assert sorted(both[0] + both[1]) == taken(stream(), 8)
    resumed = stream(rank=1, ranks=2)
    resumed.start = both[1][1][0] + 1
    assert taken(resumed, 2) == both[1][2:]


def test_a_step_comes_longest_first_and_the_next_begins_after_all_of_it():
    batches = list(itertools.islice(stream(step=4), 8))
    assert "".join(batch["name"] for batch in batches) == "4322" + "4332"
    assert [int(batch["next"]) for batch in batches] == [4] * 4 + [8] * 4
    resumed = stream(step=4)
    resumed.start = 4
    assert [batch["name"] for batch in itertools.islice(resumed, 4)] == list("4332")


@pytest.fixture(scope="module")
def lengths(tiny_config):
    """Tokens of mixed documents, tables, charts, pictures, clips and texts, as they would be
    trained on.
    """
    tokenizer, rate, found = load_tokenizer(tiny_config), 0.75, []
    for sample in synthetic(MIXED, 42, 0):
        prompt = build_prompt(with_answer(sample), tiny_config, tokenizer, pruning_rate=rate)
        clips = sum(
            run.end - run.start
            for item in prompt.media
            if item.kind == "video"
            for run in item.visual
        )
        found.append(len(prompt.token_ids) - int(rate * clips))
    return found


def waiting(lengths, processes, step):
    """Share of the time that processes in step wait for the longest sample among them, a step of
    128 in all.
    """
    drawn = random.Random(0).choices(lengths, k=5 * 128)
    samples = [
        Sample(str(length - 1), [{"role": "user", "content": "x"}], "test") for length in drawn
    ]
    parts = [
        stream(lambda: iter(samples), rank=rank, ranks=processes, step=step, held_out=0)
        for rank in range(processes)
    ]
    rounds = zip(*(itertools.islice(part, len(drawn) // processes) for part in parts))
    rows = [[batch["labels"].numel() for batch in row] for row in rounds]
    return 1 - sum(map(sum, rows)) / sum(processes * max(row) for row in rows)


@pytest.mark.parametrize(("processes", "share"), [(1, 0.0), (2, 0.15), (4, 0.3), (8, 0.45)])
def test_no_step_is_mostly_waiting_for_its_longest_sample(lengths, processes, share):
    assert waiting(lengths, processes, step=128 // processes) <= share
    assert waiting(lengths, processes, step=1) > share or processes == 1  # as they come


def test_a_rate_is_drawn_for_each_position_whoever_asks():
    rates = (0.0, 0.5, 0.9)
    whole = [batch["rate"] for batch in itertools.islice(stream(rates=rates), 30)]
    assert set(whole) == set(rates)
    half = [batch["rate"] for batch in itertools.islice(stream(rates=rates, rank=1, ranks=2), 15)]
    assert half == whole[1::2]


def test_a_bad_sample_is_replaced_by_the_next_and_counted_once_however_often_it_comes():
    def embed(sample, rate):
        if sample.id == "3":
            raise BadInput(Fault("3", "is bad"))
        return named(sample, rate)

    lenient = stream(embed=embed, max_skipped=1)
    assert [name for _, name in taken(lenient, 6)] == list("242424")
    assert lenient.skipped.samples == 1
    with pytest.raises(BadInput, match="is bad"):
        taken(stream(embed=embed), 6)


def test_too_few_samples_are_refused_rather_than_waited_for():
    with pytest.raises(BadInput, match="hold no sample beyond the 5 held out"):
        next(iter(stream(held_out=5)))


@pytest.mark.parametrize("kind", ["chart", "video_static", "text"])
def test_a_batch_is_one_sample_without_padding_and_every_text_token_counts(
    tiny_model, tiny_config, kind
):
    tokenizer = load_tokenizer(tiny_config)
    batch = batch_of(tiny_model, draw(kind, 5, 2), tiny_config, tokenizer, 0.9, 4096)
    length = batch["labels"].shape[1]
    assert batch["inputs_embeds"].shape[:2] == (1, length)
    counted = batch["labels"][batch["labels"] != IGNORE]
    assert tiny_config.image_token_id not in counted.tolist()
    assert draw(kind, 5, 2).answer in tokenizer.decode(counted)
    visual = int((batch["labels"] == IGNORE).sum())
    each = tiny_config.tokens_per_tile
    assert (
        visual == {"chart": each, "video_static": each, "text": 0}[kind]
    )  # a clip of 4 frames keeps one frame's worth
    embeddings = tiny_model.get_input_embeddings()
    assert torch.equal(batch["inputs_embeds"][batch["labels"] != IGNORE], embeddings(counted))


@pytest.mark.parametrize("think", ["/no_think", "/think"])
def test_held_out_the_answer_alone_counts_whether_or_not_the_model_thinks(
    tiny_model, tiny_config, think
):
    tokenizer, sample = load_tokenizer(tiny_config), draw("chart", 5, 2)
    sample = replace(sample, messages=[{"role": "system", "content": think}, *sample.messages[1:]])
    batch = batch_of(tiny_model, sample, tiny_config, tokenizer, 0.9, 4096)
    held = TrainingStream(
        lambda: iter([sample]), lambda *_: batch, (0.9,), held_out=1, seed=1, max_skipped=0
    ).held_out()
    counted = held[0]["labels"][held[0]["labels"] != IGNORE]
    # Where the model thinks, the template opens a thought that the answer's turn ends at once.
    assert tokenizer.decode(counted).removeprefix("</think>") == f"{sample.answer}\n<SPECIAL_12>\n"
    assert (batch["labels"] != IGNORE).sum() > len(counted), "training still counts every token"


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_held_out_a_sample_without_an_answer_or_a_question_counts_whole(
    tiny_model, tiny_config, role
):
    sample = Sample("1", [{"role": role, "content": "Nothing is asked."}], "test")
    batch = batch_of(tiny_model, sample, tiny_config, load_tokenizer(tiny_config), 0.0, 4096)
    assert torch.equal(answer_alone(batch)["labels"], batch["labels"])
