"""The trainer: its schedule, what it resumes with, and what it leaves of the libraries."""

import errno
import logging
import math
import os
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, TrainingArguments, modeling_utils

from checkpoint.native import load_model
from quantize.distill import checkpoints
from quantize.distill.trainer import (
    DistillationArguments,
    DistillationTrainer,
    training_arguments,
)
from tests.quantize.distill.distilling import Small, one_thread, small_plan  # noqa: F401


def test_the_schedule_is_adamws_with_a_warm_up_and_a_cosine_and_evaluations_as_far_apart_as_given(
    tiny, tmp_path, monkeypatch
):
    groups = {}
    names = set()
    step = DistillationTrainer.training_step

    def watched(self, *arguments):
        optimizer = self.optimizer.optimizer
        names.add(type(optimizer).__name__)
        groups[self.state.global_step] = dict(optimizer.param_groups[0])
        return step(self, *arguments)

    monkeypatch.setattr(DistillationTrainer, "training_step", watched)
    settings = {"steps": 6, "warmup": 1 / 3, "learning_rate": 1e-5, "save_every": 3}
    result = Small(tiny, tmp_path, **settings).run()
    cosine = [(1 + math.cos(math.pi * part / 4)) / 2 for part in (0, 1, 2, 3)]
    rates = [group["lr"] for group in groups.values()]
    assert rates == pytest.approx([1e-5 * share for share in (0, 0.5, *cosine)])
    assert names == {"AdamW"}
    for group in groups.values():
        assert group["betas"] == (0.9, 0.999)
        assert group["weight_decay"] == 0.05
    assert [number for number, _ in result.held_out] == [0, 3, 6]


@pytest.mark.parametrize(("steps", "warmup", "expected"), [(1, 0.99, 0), (1, 0, 0), (4, 0.99, 3)])
def test_a_warm_up_leaves_steps_to_train_in(tiny, tmp_path, steps, warmup, expected):
    """The first step of a warm-up has the rate 0."""
    plan = small_plan(tiny, tmp_path, steps=steps, warmup=warmup)
    assert training_arguments(plan).warmup_steps == expected


def fill(*_, **__):
    """Write as torch does to a disk that is full."""
    with Path("/dev/full").open("wb") as file:
        torch.save(torch.zeros(10_000), file.name)


@pytest.mark.parametrize(("free", "number"), [(0, errno.ENOSPC), (10**12, errno.EIO)])
def test_a_checkpoint_that_torch_cannot_write_is_an_error_of_the_system(
    tiny, tmp_path, monkeypatch, free, number
):
    """torch.save raises "unexpected pos 64 vs 0" on a full disk."""
    with pytest.raises(RuntimeError, match=r"unexpected pos|PytorchStreamWriter"):
        fill()
    monkeypatch.setattr(DistillationTrainer, "_save_optimizer_and_scheduler", fill)
    small = Small(tiny, tmp_path, steps=1, batch=1)
    monkeypatch.setattr("quantize.distill.checkpoints.free_bytes", lambda path: free)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        small.run()
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "distill"))


class Killed(Exception):
    """Stands for a kill behind a checkpoint."""


def kill(step):
    raise Killed


def test_every_whole_checkpoint_is_recorded_and_only_the_newest_kept(tiny, tmp_path):
    recorded = []

    def record(step):
        assert (tmp_path / "distill" / f"checkpoint-{step}" / "trainer_state.json").exists()
        recorded.append(step)

    Small(tiny, tmp_path, record=record).run()
    assert recorded == [1, 2]
    kept = {path.name for path in (tmp_path / "distill").iterdir()}
    assert kept - {".partial", "best.safetensors"} == {"checkpoint-2"}


@pytest.mark.parametrize("size", [1, 2**16, 2**16 + 1, 5 * 2**16 + 7, 2**20])
def test_every_byte_of_a_small_file_is_hashed_and_of_a_large_one_some(tmp_path, size):
    path = tmp_path / "optimizer.pt"
    content = bytes(size)
    path.write_bytes(content)
    digest = checkpoints._digest(path)
    for place in {0, size // 3, size // 2, size - 2**16 // 2, size - 1}:
        if place >= 0:
            path.write_bytes(content[:place] + b"x" + content[place + 1 :])
            assert checkpoints._digest(path) != digest
    path.write_bytes(content[:-1])
    assert checkpoints._digest(path) != digest


def test_a_large_file_is_hashed_from_its_beginning_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_PIECES", 3)
    path = tmp_path / "optimizer.pt"
    content = bytes(20 * 2**16)
    path.write_bytes(content)
    digest = checkpoints._digest(path)
    for place in (0, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:place] + b"x" + content[place + 1 :])
        assert checkpoints._digest(path) != digest
    path.write_bytes(content + b"x")
    assert checkpoints._digest(path) != digest


def test_a_resumed_run_keeps_the_ranges_it_began_with(tiny, tmp_path):
    """A GPU may calibrate another bit the second time; the weights were trained under the first."""

    def range_of(small):
        return small.student.get_submodule("model.layers.0.mixer.in_proj.input_quantizer").amax

    first = Small(tiny, tmp_path, learning_rate=1e-5, record=kill)
    with pytest.raises(Killed):
        first.run()
    second = Small(tiny, tmp_path, learning_rate=1e-5)
    range_of(second).mul_(1 + 2**-7)
    assert second.run().steps == 2
    assert torch.equal(range_of(second), range_of(first))


def test_what_a_killed_run_has_written_in_part_is_not_resumed_from(tiny, tmp_path):
    with pytest.raises(Killed):
        Small(tiny, tmp_path, record=kill).run()
    partial = tmp_path / "distill" / ".partial" / "checkpoint-2"
    partial.mkdir()
    (partial / "trainer_state.json").write_text("{")
    (tmp_path / "distill" / ".best.safetensors.partial").write_bytes(b"half")
    recorded = []
    result = Small(tiny, tmp_path, record=recorded.append).run()
    assert recorded == [2]
    assert [step for step, _ in result.losses] == [1, 2]
    assert [step for step, _ in result.held_out] == [0, 1, 2]


def test_what_modelopt_prints_is_logged_and_what_it_replaces_is_restored(
    tiny, tmp_path, capsys, caplog
):
    caplog.set_level(logging.DEBUG, logger="hybridquant")
    owners = (PreTrainedModel, modeling_utils)
    before = [dict(vars(owner)) for owner in owners]
    small = Small(tiny, tmp_path, steps=1, batch=1)
    small.run()
    assert capsys.readouterr().out == ""
    assert any(line.startswith("ModelOpt: Saved modelopt state") for line in caplog.messages)
    for owner, attributes in zip(owners, before):
        for name, value in attributes.items():
            assert vars(owner)[name] is value, name
    # Under ModelOpt's from_pretrained this fails with "stat: path should be string".
    load_model(small.checkpoint)


def test_several_gpus_without_a_launcher_are_one_gpu(tmp_path, monkeypatch):
    """transformers would take DataParallel, under which ModelOpt's quantizers are replicated."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert TrainingArguments(output_dir=str(tmp_path)).n_gpu == 4
    assert DistillationArguments(output_dir=str(tmp_path)).n_gpu == 1
    assert DistillationArguments(output_dir=str(tmp_path), use_cpu=True).n_gpu == 0
