"""The training dataset: what is held out, which process takes what, where it begins again, and what
the loss counts.
"""

import itertools
import random
from dataclasses import replace

import pytest
import torch

from calibrate.prompts import build_prompt
from calibrate.samples import Sample, Skipped
from calibrate.sources.synthetic.kinds import MIXED, draw, synthetic
from checkpoint.faults import BadInput, Fault
from checkpoint.native import load_model
from checkpoint.opened import open_bf16
from checkpoint.processes import Processes
from checkpoint.video import Video
from quantize.distill.dataset import TrainingDataset
from quantize.distill.rows import (
    IGNORE,
    answer_only,
    ends_with_nothing,
    with_answer,
)
from tests.quantize.distill.distilling import sample_row, text_sample, wait_until

SECOND = Processes(1, 2)


@pytest.fixture(scope="module")
def checkpoint(tiny):
    return open_bf16(tiny)


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint)


def numbered(number, content=None, **fields):
    """A sample that says its number, or something else."""
    text = f"Say {number}." if content is None else content
    return Sample(str(number), [{"role": "user", "content": text}], "test", **fields)


def five():
    return map(numbered, range(5))


def named(sample, rate):
    """A stand-in for a row; sample n has n + 1 tokens."""
    return {
        "name": sample.id,
        "rate": rate,
        "labels": torch.zeros(1, int(sample.id) + 1),
        "lengths": (int(sample.id) + 1,),
        "answer_length": 0,
    }


def dataset(samples=five, embed=named, rates=(0.5,), bad_rows=None, **options):
    """A dataset of `samples()`, or of `bad_rows(skipped)`, which leaves rows out."""
    skipped = Skipped(options.pop("max_skipped", 0), repeats=True)
    defaults = {"held_out": 2, "seed": 1, "skipped": skipped}
    return TrainingDataset(
        bad_rows or (lambda skipped: samples()),
        lambda sample, rate: (sample, rate),
        lambda prepared: embed(*prepared),
        rates,
        **(defaults | options),
    )


def taken(dataset, count):
    rows = itertools.islice(dataset, count)
    return [(row["position"], row["name"]) for row in rows]


def names(dataset, count):
    return "".join(row["name"] for row in itertools.islice(dataset, count))


def test_the_held_out_samples_are_never_trained_on_and_the_others_come_again():
    assert [row["name"] for row in dataset().held_out()] == ["1", "0"]
    assert taken(dataset(), 7) == list(enumerate("2342342"))


def test_processes_share_a_step_and_a_resumed_dataset_continues_where_it_was():
    both = [taken(dataset(processes=Processes(index, 2)), 4) for index in (0, 1)]
    assert sorted(both[0] + both[1]) == taken(dataset(), 8)
    resumed = dataset(processes=SECOND)
    resumed.start = both[1][1][0] + 1
    assert taken(resumed, 2) == both[1][2:]


def test_a_step_comes_longest_first_and_the_next_begins_after_all_of_it():
    rows = list(itertools.islice(dataset(step_rows=4), 8))
    assert "".join(row["name"] for row in rows) == "4322" + "4332"
    assert [row["next_position"] for row in rows] == [4] * 4 + [8] * 4
    resumed = dataset(step_rows=4)
    resumed.start = 4
    assert names(resumed, 4) == "4332"


@pytest.fixture(scope="module")
def lengths(checkpoint):
    """Tokens of mixed documents, tables, charts, pictures, clips and texts, as they would be
    trained on.
    """
    found = []
    for sample in synthetic(MIXED, 42, 0):
        prompt = build_prompt(
            with_answer(sample), checkpoint.config, checkpoint.tokenizer, Video(pruning_rate=0.75)
        )
        found.append(prompt.length)
    return found


def waiting(lengths, count, step_rows):
    """Share of the time that `count` processes in step wait for the longest sample among them, for
    steps of 128 samples in all.
    """
    drawn = random.Random(0).choices(lengths, k=5 * 128)
    message = {"role": "user", "content": "x"}
    samples = [Sample(str(length - 1), [message], "test") for length in drawn]
    parts = []
    for index in range(count):
        part = dataset(
            lambda: iter(samples),
            processes=Processes(index, count),
            step_rows=step_rows,
            held_out=0,
        )
        parts.append(itertools.islice(part, len(drawn) // count))
    busy = 0
    total = 0
    for together in zip(*parts):
        tokens = [row["labels"].numel() for row in together]
        busy += sum(tokens)
        total += count * max(tokens)
    return 1 - busy / total


@pytest.mark.parametrize(("count", "share"), [(1, 0.0), (2, 0.15), (4, 0.3), (8, 0.45)])
def test_no_step_is_mostly_waiting_for_its_longest_sample(lengths, count, share):
    assert waiting(lengths, count, step_rows=128 // count) <= share
    assert waiting(lengths, count, step_rows=1) > share or count == 1  # as they come


def test_a_rate_is_drawn_for_each_position_in_whatever_process():
    rates = (0.0, 0.5, 0.9)
    whole = [row["rate"] for row in itertools.islice(dataset(rates=rates), 30)]
    assert set(whole) == set(rates)
    second = itertools.islice(dataset(rates=rates, processes=SECOND), 15)
    assert [row["rate"] for row in second] == whole[1::2]


def bad(*ids):
    """Stands in for embedding, of which some samples are incapable."""

    def embed(sample, rate):
        if sample.id in ids:
            raise BadInput(Fault(sample.id, "is bad"))
        return named(sample, rate)

    return embed


def test_a_bad_sample_is_replaced_by_the_next_and_counted_once_however_often_it_comes():
    lenient = dataset(embed=bad("3"), max_skipped=1)
    assert names(lenient, 6) == "242424"
    assert lenient.skipped.samples == 1
    with pytest.raises(BadInput, match="is bad"):
        taken(dataset(embed=bad("3")), 6)


def test_rows_that_are_no_samples_count_with_those_that_cannot_be_embedded():
    def four(skipped):
        """One of five rows is no sample, in every pass."""
        skipped.add(Fault("rows.jsonl: line 9", "is not JSON"))
        return itertools.islice(five(), 1, None)

    lenient = dataset(bad_rows=four, embed=bad("2"), held_out=1, max_skipped=2)
    assert names(lenient, 6) == "343434"
    assert lenient.skipped.samples == 2
    with pytest.raises(BadInput, match="3 samples cannot be used, at most 2 may be skipped"):
        names(dataset(bad_rows=four, embed=bad("2", "4"), held_out=1, max_skipped=2), 6)


def test_rows_that_are_no_samples_count_at_their_turn_however_far_the_thread_has_read():
    def four(skipped):
        yield from itertools.islice(five(), 4)
        skipped.add(Fault("rows.jsonl: line 5", "is not JSON"))
        yield numbered(5)

    ahead = dataset(bad_rows=four, embed=bad("2"), max_skipped=1, step_rows=1)
    rows = iter(ahead)
    assert next(rows)["name"] == "3"
    wait_until(lambda: ahead._ahead._decoded.qsize() == 16)
    assert ahead.skipped.samples == 1
    with pytest.raises(BadInput, match="2 samples cannot be used, at most 1 may be skipped"):
        next(rows)
    ahead.close()


def test_bad_rows_without_end_are_given_up():
    def endless(skipped):
        yield from five()
        for line in itertools.count(6):
            skipped.add(Fault(f"rows.jsonl: line {line}", "is not JSON"))

    rows = iter(dataset(bad_rows=endless, max_skipped=7, step_rows=1))
    assert [next(rows)["name"] for _ in range(3)] == ["2", "3", "4"]
    with pytest.raises(BadInput, match="8 samples cannot be used, at most 7 may be skipped"):
        next(rows)


def test_samples_without_an_answer_are_counted_and_said(caplog):
    def embed(sample, rate):
        return named(sample, rate) | {"answer_length": int(sample.id == "3")}

    some = dataset(embed=embed)
    with caplog.at_level("WARNING", logger="hybridquant"):
        some.held_out()
        names(some, 7)
        some.warn_of_unanswered()
    assert caplog.messages == [
        "2 of 2 held-out samples have no answer: they are judged on their prompts",
        "2 of 3 training samples have no answer: only their prompts are learnt",
    ]


@pytest.mark.parametrize("processes", [Processes(), SECOND, Processes(2, 3)])
def test_when_every_sample_is_bad_the_run_stops_instead_of_looking_for_ever(processes):
    hopeless = dataset(embed=bad("2", "3", "4"), max_skipped=9, processes=processes)
    with pytest.raises(BadInput, match=r"hold no usable sample to train on.*\n.*is bad"):
        taken(hopeless, 1)
    with pytest.raises(BadInput, match=r"hold no usable held-out sample.*\n.*is bad"):
        dataset(embed=bad("0", "1"), max_skipped=9).held_out()


def test_a_bad_sample_takes_no_other_of_the_same_id_with_it():
    """Rows of a picture often have the picture's id."""
    rows = [numbered(1, "held out"), numbered(1, "long"), numbered(1, "a"), numbered(1, "b")]

    def embed(sample, rate):
        text = sample.messages[0]["content"]
        if text == "long":
            raise BadInput(Fault(sample.where, "is too long"))
        return named(sample, rate) | {"name": text}

    lenient = dataset(lambda: iter(rows), embed, held_out=1, max_skipped=1)
    assert names(lenient, 4) == "abab"
    assert len(lenient.answered) == 2


def test_a_resumed_run_takes_a_sample_that_was_too_long_at_another_rate():
    """A clip has fewer tokens at a higher rate. What an earlier position has drawn is not known
    to a run that begins behind it.
    """

    def embed(sample, rate):
        if sample.id == "3" and rate == 0.0:
            raise BadInput(Fault(sample.where, f"is too long at {rate}"))
        return named(sample, rate)

    def course(start):
        part = dataset(embed=embed, rates=(0.0, 0.9), max_skipped=1)
        part.start = start
        return taken(part, 60 - start)

    whole = course(0)
    used = [position for position, name in whole if name == "3"]
    assert 0 < len(used) < 20
    assert course(10) == [taken for taken in whole if taken[0] >= 10][: 60 - 10]


def test_every_rate_is_tried_before_the_samples_are_given_up():
    def embed(sample, rate):
        if rate < 0.9:
            raise BadInput(Fault(sample.where, "is too long"))
        return named(sample, rate)

    long = dataset(embed=embed, rates=(0.0, 0.1, 0.2, 0.9), max_skipped=4, held_out=1)
    assert len(taken(long, 20)) == 20
    assert long.skipped.samples == 4


def test_what_is_held_out_is_not_trained_on_in_other_rows_either(caplog):
    """The best step would be chosen by samples that were learnt by heart."""
    rows = [
        numbered(0, "one", answer="1"),
        numbered(1, "two", answer="2"),
        numbered(2, "three", answer="3"),
        numbered(3, "one", answer="1"),
        numbered(4, "one", answer="another"),
        replace(with_answer(numbered(5, "two", answer="2")), answer=None),
    ]
    with caplog.at_level("WARNING", logger="hybridquant"):
        assert names(dataset(lambda: iter(rows)), 4) == "2424"
    (message,) = caplog.messages
    assert message.startswith("test: sample 3: says the same as a held-out sample")
    copies = [*rows[:2], rows[3], rows[3]]
    with pytest.raises(BadInput, match="no sample that says anything but the 2 held out"):
        next(iter(dataset(lambda: iter(copies))))


def test_an_endless_source_of_what_is_held_out_is_given_up(monkeypatch):
    monkeypatch.setattr("quantize.distill.dataset._MOST_LEFT_OUT", 5)
    rows = [numbered(0, "one"), numbered(1, "two")]

    def endless():
        yield from [*rows, numbered(2, "three"), *rows, *rows]
        yield from [numbered(3, "four")]
        yield from itertools.cycle(rows)

    given_up = iter(dataset(endless))
    assert [next(given_up)["name"] for _ in range(2)] == ["2", "3"]
    with pytest.raises(BadInput, match="no sample that says anything but the 2 held out"):
        next(given_up)


def test_too_few_samples_are_refused_instead_of_waited_for():
    with pytest.raises(BadInput, match="hold no sample beyond the 5 held out"):
        next(iter(dataset(held_out=5)))


@pytest.mark.parametrize("kind", ["chart", "video_static", "text"])
def test_a_batch_is_one_sample_without_padding_and_every_text_token_counts(model, checkpoint, kind):
    sample = draw(kind, 5, 2)
    row = sample_row(model, checkpoint, sample)
    length = row["labels"].shape[1]
    assert row["inputs_embeds"].shape[:2] == (1, length)
    is_counted = row["labels"] != IGNORE
    counted = row["labels"][is_counted]
    assert checkpoint.config.image_token_id not in counted.tolist()
    assert sample.answer in checkpoint.tokenizer.decode(counted)
    # EVS leaves a clip of 4 frames one frame's worth.
    per_tile = checkpoint.config.tokens_per_tile
    visual = {"chart": per_tile, "video_static": per_tile, "text": 0}
    assert int((~is_counted).sum()) == visual[kind]
    embeddings = model.get_input_embeddings()
    assert torch.equal(row["inputs_embeds"][is_counted], embeddings(counted))


@pytest.mark.parametrize("think", ["/no_think", "/think"])
def test_held_out_the_answer_alone_counts_whether_or_not_the_model_thinks(model, checkpoint, think):
    sample = draw("chart", 5, 2)
    system = {"role": "system", "content": think}
    sample = replace(sample, messages=[system, *sample.messages[1:]])
    row = sample_row(model, checkpoint, sample)
    (held,) = dataset(lambda: iter([sample]), lambda *_: row, held_out=1).held_out()
    counted = held["labels"][held["labels"] != IGNORE]
    # Where the model thinks, the template opens a thought that the answer's turn ends at once.
    text = checkpoint.tokenizer.decode(counted).removeprefix("</think>")
    assert text == f"{sample.answer}\n<SPECIAL_12>\n"
    assert (row["labels"] != IGNORE).sum() > len(counted), "training still counts every token"


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_held_out_a_sample_without_an_answer_or_a_question_counts_whole(model, checkpoint, role):
    sample = Sample("1", [{"role": role, "content": "Nothing is asked."}], "test")
    row = sample_row(model, checkpoint, sample)
    assert torch.equal(answer_only(row)["labels"], row["labels"])


def test_the_answer_becomes_the_assistants_turn_once():
    sample = with_answer(text_sample(1))
    assert sample.messages[-1] == {"role": "assistant", "content": "Answer 1."}
    assert with_answer(sample) == sample


@pytest.mark.parametrize("answer", ["", "  ", "\n\t"])
def test_an_empty_expected_answer_is_none(model, checkpoint, answer):
    sample = replace(text_sample(1), answer=answer)
    assert with_answer(sample) == sample
    assert sample_row(model, checkpoint, sample)["answer_length"] == 0


@pytest.mark.parametrize("content", ["", " \n", [{"type": "text", "text": " "}]])
def test_a_turn_of_the_assistant_that_says_nothing_is_refused(model, checkpoint, content):
    messages = [*text_sample(1).messages, {"role": "assistant", "content": content}]
    with pytest.raises(BadInput, match="sample 1: ends with an empty answer"):
        sample_row(model, checkpoint, Sample("1", messages, "test"))
    called = messages[-1] | {"tool_calls": [{"function": {"name": "f"}}]}
    assert not ends_with_nothing(Sample("1", [*messages[:-1], called], "test"))


def test_an_answer_of_one_token_counts(model, checkpoint):
    sample = replace(text_sample(1), answer="7")
    row = sample_row(model, checkpoint, sample, prompt_weight=0.0)
    counted = row["weights"][0].nonzero().flatten()
    text = checkpoint.tokenizer.decode(row["labels"][0, counted])
    assert text.removeprefix("</think>") == "7\n<SPECIAL_12>\n"
    assert len(counted) == row["answer_length"]
