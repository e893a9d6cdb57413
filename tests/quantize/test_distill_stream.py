"""The training stream: what is held out, who takes what, where it begins again, and what the loss counts."""

import itertools

import pytest
import torch

from calibrate.samples import Sample
from calibrate.synthetic import draw
from checkpoint.faults import BadInput, Fault
from checkpoint.native import load_tokenizer
from quantize.training_stream import IGNORE, TrainingStream, batch_of


def five():
    return iter([Sample(str(number), [{"role": "user", "content": "x"}], "test") for number in range(5)])


def named(sample, rate):
    return {"name": sample.id, "rate": rate}


def stream(samples=five, embed=named, rates=(0.5,), **options):
    return TrainingStream(samples, embed, rates, **{"held_out": 2, "seed": 1, "max_skipped": 0, **options})


def taken(stream, count):
    return [(int(batch["position"]), batch["name"]) for batch in itertools.islice(stream, count)]


def test_the_held_out_samples_are_never_trained_on_and_the_others_come_again():
    assert [batch["name"] for batch in stream().held_out()] == ["0", "1"]
    assert taken(stream(), 7) == list(enumerate("2342342"))


def test_processes_share_a_step_and_a_resumed_stream_goes_on_where_it_was():
    both = [taken(stream(rank=rank, ranks=2), 4) for rank in (0, 1)]
    assert sorted(both[0] + both[1]) == taken(stream(), 8)
    resumed = stream(rank=1, ranks=2)
    resumed.start = both[1][1][0] + 1
    assert taken(resumed, 2) == both[1][2:]


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
def test_a_batch_is_one_sample_without_padding_and_every_text_token_counts(tiny_model, tiny_config, kind):
    tokenizer = load_tokenizer(tiny_config)
    batch = batch_of(tiny_model, draw(kind, 5, 2), tiny_config, tokenizer, 0.9, 4096)
    length = batch["labels"].shape[1]
    assert batch["inputs_embeds"].shape[:2] == (1, length)
    counted = batch["labels"][batch["labels"] != IGNORE]
    assert tiny_config.image_token_id not in counted.tolist()
    assert draw(kind, 5, 2).answer in tokenizer.decode(counted)
    visual = int((batch["labels"] == IGNORE).sum())
    assert visual == {"chart": 256, "video_static": 256, "text": 0}[kind]  # a clip of 4 frames keeps one frame's worth
    embeddings = tiny_model.get_input_embeddings()
    assert torch.equal(batch["inputs_embeds"][batch["labels"] != IGNORE], embeddings(counted))
