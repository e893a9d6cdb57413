"""Layer by layer: what is kept between layers, and which samples run together."""

import contextlib
import time
from types import SimpleNamespace

import pytest
import torch

from calibrate.activations import Activations, Budget
from calibrate.layerwise import Batching, runner
from checkpoint.layers import read_layers

HIDDEN = 8


@pytest.fixture
def store(tmp_path):
    """Seven samples of three lengths, the first two in memory, the others in a file."""
    with contextlib.closing(
        Activations(HIDDEN, "cpu", Budget(200), tmp_path / "spill")
    ) as activations:
        for number in range(7):
            activations.add(
                torch.full((3 + number % 3, HIDDEN), float(number), dtype=torch.bfloat16)
            )
        yield activations


def values(store) -> list[float]:
    return [float(sample.unique()) for sample in store.each()]


def test_samples_of_one_length_run_together_up_to_the_limit_and_each_once(store):
    seen = []
    for batch in store.batches(8):
        lengths = [store.lengths[index] for index in batch]
        assert len(set(lengths)) == 1
        assert sum(lengths) <= 8
        seen += batch
    assert sorted(seen) == list(range(7))
    assert store.batches(1) == [(2,), (5,), (1,), (4,), (0,), (3,), (6,)]


def test_every_sample_is_replaced_once_wherever_it_is_kept(store, tmp_path):
    assert (tmp_path / "spill").stat().st_size > 0
    for _ in range(3):
        store.replace(lambda inputs: inputs + 10, store.batches(8))
    assert values(store) == [30.0 + number for number in range(7)]


def test_the_first_layer_waits_for_what_is_still_being_written(tmp_path, monkeypatch):
    write = Activations._write

    def slow(*given):
        time.sleep(0.05)
        write(*given)

    monkeypatch.setattr(Activations, "_write", slow)
    with contextlib.closing(
        Activations(HIDDEN, "cpu", Budget(0), tmp_path / "slow")
    ) as activations:
        for number in range(4):
            activations.add(torch.full((3, HIDDEN), float(number), dtype=torch.bfloat16))
        activations.replace(lambda inputs: inputs + 10, activations.batches(3))
        assert values(activations) == [10.0, 11.0, 12.0, 13.0]


def test_what_was_saved_is_restored_in_memory_or_file(store, tmp_path):
    store.save(tmp_path / "saved")
    for budget in (0, 10**6):
        again = Activations(HIDDEN, "cpu", Budget(budget), tmp_path / "again")
        with contextlib.closing(again):
            again.restore(tmp_path / "saved", store.lengths)
            assert values(again) == list(range(7))
        assert not (tmp_path / "again").exists()


def test_layers_read_one_by_one_give_the_whole_models_states(tiny_checkpoint, tiny_model):
    size = tiny_checkpoint.config.hidden_size
    hidden = torch.randn(1, 70, size, dtype=torch.bfloat16)
    with torch.no_grad():
        whole = tiny_model.language_model.model(
            inputs_embeds=hidden, use_cache=False
        ).last_hidden_state
        for _, layer in read_layers(tiny_checkpoint, "cpu", tiny_checkpoint.tensors.read):
            hidden = runner(layer)(hidden)
        assert torch.equal(tiny_model.language_model.model.norm_f(hidden), whole)


class Layer(torch.nn.Module):
    """Stands for a block; `apart` makes a batch's numbers differ from one by one, as another kernel
    might.
    """

    def __init__(self, apart: float) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(HIDDEN, HIDDEN, dtype=torch.bfloat16)
        self.apart = apart

    def model(self, inputs_embeds, use_cache):
        inputs = inputs_embeds
        if len(inputs_embeds) > 1:
            inputs = inputs_embeds + self.apart
        hidden = inputs_embeds + 0 * self.linear(inputs)
        return SimpleNamespace(last_hidden_state=hidden)


@pytest.mark.parametrize(("apart", "largest"), [(0.0, 3), (0.5, 1)])
def test_samples_run_together_only_where_no_linear_sees_another_bit(store, apart, largest):
    """The outputs of both are equal: it is the linear's input that a range is taken from."""
    batches = Batching(100).batches(store, Layer(apart), "mlp")
    assert max(len(batch) for batch in batches) == largest
    assert sorted(sum(batches, ())) == list(range(7))
