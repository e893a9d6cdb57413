"""Shards written in place: the bytes of safetensors' own writer, whatever the order, and no record
of what failed.
"""

import json

import pytest
import torch
from safetensors.torch import save_file

from checkpoint.files import TensorFiles
from checkpoint.layout import TensorSpec
from checkpoint.shards import Shards, Writer

TENSORS = {
    "b.weight": torch.randn(3, 5).bfloat16(),
    "a.weight": torch.randn(4, 2).to(torch.float8_e4m3fn),
    "a.scale": torch.tensor(0.5),
    "packed": torch.arange(12, dtype=torch.uint8).reshape(3, 4),
    "ids": torch.arange(3),
}
DTYPES = {"b.weight": "BF16", "a.weight": "F8_E4M3", "a.scale": "F32", "packed": "U8", "ids": "I64"}
SPECS = {name: TensorSpec(tuple(tensor.shape), DTYPES[name]) for name, tensor in TENSORS.items()}


def test_the_bytes_are_those_of_safetensors_in_whatever_order_tensors_come(tmp_path):
    shards = Shards(tmp_path, SPECS, 10**6)
    shards.create()
    with Writer(shards) as writer:
        writer.copy(["ids", "packed"], TENSORS.__getitem__)
        for name in ("a.scale", "b.weight", "a.weight"):
            writer.put({name: TENSORS[name]})
    save_file(TENSORS, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_shards_are_read_back_tensor_by_tensor(tmp_path):
    shards = Shards(tmp_path, SPECS, 20)
    shards.create()
    with Writer(shards) as writer:
        writer.put(TENSORS)
    assert len(set(shards.weight_map.values())) > 2
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": shards.weight_map})
    )
    files = TensorFiles(tmp_path)
    for name, tensor in TENSORS.items():
        assert files.read(name).dtype == tensor.dtype
        assert torch.equal(
            files.read(name).reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        ), name


def test_opening_again_keeps_what_is_written(tmp_path):
    for name in TENSORS:  # a life each
        shards = Shards(tmp_path, SPECS, 10**6)
        shards.create()
        shards.write(name, TENSORS[name])
    save_file(TENSORS, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_nothing_is_recorded_after_a_write_that_failed(tmp_path, monkeypatch):
    shards, recorded = Shards(tmp_path, SPECS, 10**6), []
    shards.create()
    write = Shards.write

    def full(self, name, tensor):
        if name == "packed":
            raise OSError(28, "No space left on device", "packed")
        write(self, name, tensor)

    monkeypatch.setattr(Shards, "write", full)

    def write_all():
        with Writer(shards) as writer:
            for name in ("ids", "packed", "a.scale", "b.weight", "a.weight"):
                writer.put({name: TENSORS[name]}, then=lambda name=name: recorded.append(name))

    with pytest.raises(OSError, match="No space left"):
        write_all()
    assert recorded == ["ids"]


def test_a_tensor_of_another_shape_or_dtype_than_planned_is_a_defect(tmp_path):
    shards = Shards(tmp_path, SPECS, 10**6)
    shards.create()
    with pytest.raises(AssertionError, match=r"ids is torch.int64 \(4,\), planned I64 \(3,\)"):
        shards.write("ids", torch.arange(4))
    with pytest.raises(AssertionError, match="ids is torch"):
        shards.write("ids", torch.zeros(3))
