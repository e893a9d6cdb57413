"""A training run is logged, saved and resumed, and ends with a checkpoint in the released layout.

Real steps take too long on a CPU, so the losses are replaced by one of two matrices.
"""

import json

import pytest
import torch

from checkpoint.faults import BadInput
from checkpoint.opened import open_bf16
from tiny.training import loop
from tiny.training.data import LENGTHS
from tiny.training.settings import Settings
from tiny.training.trainer import Trainer


def settings(out, **changed):
    given = {
        "out": out,
        "seed": 0,
        "steps": 2,
        "minutes": 1000.0,
        "pause_after": 1000.0,
        "tokens": 1,
        "workers": 0,
        "device": "cpu",
        "compiled": False,
    }
    return Settings(**(given | changed))


@pytest.fixture
def batches(monkeypatch):
    """The batches that a run has trained on."""
    trained = []

    def losses(self, batch, rate):
        trained.append(batch)
        moved_by_muon = self.optimizers["muon"].param_groups[0]["params"][0]
        moved_by_adam = self.model.language_model.lm_head.weight
        loss = moved_by_muon.square().mean() + moved_by_adam.square().mean()
        right = torch.ones(batch.questions, dtype=torch.bool)
        return torch.stack([loss, loss, loss, loss, loss]), right

    monkeypatch.setattr(Trainer, "losses", losses)
    monkeypatch.setattr(loop, "drawn_items", lambda directory, workers: [])
    monkeypatch.setattr(loop, "evaluated", lambda losses, items, visual_id: {"text": 0.5})
    return trained


def test_a_paused_run_is_resumed_and_ends_with_a_checkpoint(tmp_path, batches):
    out = tmp_path / "run"
    assert loop.train(settings(out, pause_after=0.0)) is None
    assert batches == []
    assert (out / "state.pt").exists()
    open_bf16(out / "so-far")

    with pytest.raises(BadInput, match="give another output"):
        loop.train(settings(out, seed=1))

    evaluation = loop.train(settings(out))
    assert evaluation["step"] == 2
    assert evaluation["accuracy"] == {"text": 0.5}
    assert json.loads((out / "evaluation.json").read_text()) == evaluation
    assert len(batches) == 2
    assert all(batch.tokens.shape[1] in LENGTHS for batch in batches)
    lines = (out / "log.jsonl").read_text().splitlines()
    assert len(lines) == 1
    line = json.loads(lines[0])
    assert line["step"] == 2
    assert line["done"] == 1.0
    assert set(line["accuracy"].values()) == {1.0}
    open_bf16(out / "checkpoint")

    with pytest.raises(BadInput, match="exists already"):
        loop.train(settings(out))
