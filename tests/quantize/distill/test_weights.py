"""The state of a distillation: its space is asked for before training, and is what it then takes;
ranges are shared.
"""

import math
import shutil
from collections import namedtuple

import pytest
import torch

from checkpoint.faults import BadInput
from checkpoint.layout import language_model_linears
from quantize.distill import state as qad_state
from quantize.distill import trainer as qad_trainer
from quantize.distill.state import share_ranges, state_bytes
from tests.quantize.distill.distilling import Small, one_thread  # noqa: F401
from tiny.checkpoint import write_tiny

Usage = namedtuple("Usage", "total used free")


def test_a_disk_too_small_for_the_state_ends_the_run_before_training_with_the_figures(
    tiny_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(qad_state.shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 2_000_000))
    with pytest.raises(
        BadInput, match=r"\.out\.qad: the state needs 0\.\d\d GB while it runs, 0\.00 GB are free"
    ):
        Small(tiny_config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_an_earlier_run_has_left_counts_as_room(tmp_path, monkeypatch):
    (tmp_path / "weights").write_bytes(bytes(3_000_000))
    monkeypatch.setattr(qad_state.shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 2_000_000))
    assert not list(qad_state.space_faults(tmp_path, 3_500_000))
    assert len(list(qad_state.space_faults(tmp_path, 6_000_000))) == 1


def test_the_largest_state_is_what_was_asked_for(tmp_path, monkeypatch):
    # Random weights gain from a few steps; only what is better than PTQ is kept as the best.
    config = write_tiny(tmp_path / "bf16", trained=False)
    small, sizes = Small(config, tmp_path, steps=3, learning_rate=3e-5), []
    flush = qad_trainer.flush

    def measured(path):
        sizes.append(
            sum(file.stat().st_size for file in small.plan.directory.rglob("*") if file.is_file())
        )
        flush(path)

    monkeypatch.setattr(
        qad_trainer, "flush", measured
    )  # before a checkpoint is renamed and the older one removed
    monkeypatch.setattr(qad_state, "flush", measured)
    assert small.run().best_step > 0
    weights = sum(math.prod(linear.shape) for linear in language_model_linears(config))
    assert 0.98 < max(sizes) / state_bytes(weights) <= 1.02
    shutil.rmtree(small.plan.directory)


def shared(rank, rendezvous):
    torch.distributed.init_process_group(
        "gloo", init_method=rendezvous.as_uri(), rank=rank, world_size=2
    )
    model = torch.nn.Module()
    model.register_buffer("_amax", torch.tensor(1.0 + rank))
    model.register_buffer("other", torch.tensor(1.0 + rank))
    share_ranges(model)
    assert model._amax == 1.0
    assert model.other == 1.0 + rank


def test_every_process_takes_the_first_ones_ranges(tmp_path):
    """Each calibrates for itself, and GPUs may differ in a bit."""
    torch.multiprocessing.spawn(shared, (tmp_path / "rendezvous",), nprocs=2)
