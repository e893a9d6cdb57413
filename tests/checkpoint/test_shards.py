"""One file per layer, written in threads: nothing is recorded that is not on the disk."""

import json
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.family import NEMOTRON_NANO_VL_V2
from checkpoint.files import TensorFiles
from checkpoint.layout import TensorSpec
from checkpoint.other_weights import INDEX
from checkpoint.shards import ShardWriter, plan_shards
from tests.editing import raw_bytes

LAYERS = 4
PREFIX = NEMOTRON_NANO_VL_V2.layers


def layer_tensors(layer):
    """A layer in the dtypes of all formats; `source` is a tensor that is not quantized."""
    return {
        f"{PREFIX}{layer}.source": torch.full((3, 5), float(layer)).bfloat16(),
        f"{PREFIX}{layer}.fp8": torch.randn(4, 2).to(torch.float8_e4m3fn),
        f"{PREFIX}{layer}.packed": torch.arange(12, dtype=torch.uint8).reshape(3, 4) + layer,
        f"{PREFIX}{layer}.scale": torch.tensor(0.5 + layer),
    }


OUTSIDE = {"mlp1.1.weight": torch.randn(6, 2).bfloat16(), "ids": torch.arange(3)}
BY_LAYER = [layer_tensors(layer) for layer in range(LAYERS)]
TENSORS = dict(OUTSIDE)
for _layer in BY_LAYER:
    TENSORS.update(_layer)
NAMES = {
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float32: "F32",
    torch.uint8: "U8",
    torch.int64: "I64",
}
SPECS = {}
for _name, _value in TENSORS.items():
    SPECS[_name] = TensorSpec(tuple(_value.shape), NAMES[_value.dtype])


@pytest.fixture
def shards():
    return plan_shards(SPECS, NEMOTRON_NANO_VL_V2)


def quantized(layer):
    """What a run puts for a layer: everything but what is copied from the source."""
    tensors = dict(BY_LAYER[layer])
    del tensors[f"{PREFIX}{layer}.source"]
    return tensors


def write_all(directory, shards, read=TENSORS.__getitem__):
    with ShardWriter(directory, shards, read) as writer:
        for layer in range(LAYERS):
            writer.put(layer, quantized(layer))


def test_every_layer_is_a_file_and_every_tensor_is_in_the_map_in_order(shards):
    assert list(shards.weight_map) == list(SPECS)
    assert [names for _, names in shards.layers] == [list(layer) for layer in BY_LAYER]
    files = [*shards.outside, *(file for file, _ in shards.layers)]
    assert files == [f"model-{number:05d}-of-00005.safetensors" for number in range(1, 6)]
    assert shards.total_bytes == sum(value.nbytes for value in TENSORS.values())


def test_tensors_outside_the_layers_are_divided_by_size(monkeypatch):
    monkeypatch.setattr("checkpoint.shards.OUTSIDE_BYTES", 24)
    shards = plan_shards(SPECS, NEMOTRON_NANO_VL_V2)
    assert list(shards.outside.values()) == [["mlp1.1.weight"], ["ids"]]
    assert shards.layers[0][0] == "model-00003-of-00006.safetensors"


def test_what_is_written_is_read_back_tensor_by_tensor(tmp_path, shards):
    write_all(tmp_path, shards)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": shards.weight_map}))
    files = TensorFiles(tmp_path)
    assert dict(files.specs) == SPECS
    for name, tensor in TENSORS.items():
        found = files.read(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(raw_bytes(found), raw_bytes(tensor)), name


def test_a_layers_file_is_that_of_safetensors_own_writer(tmp_path, shards):
    write_all(tmp_path, shards)
    for layer, (file, _) in enumerate(shards.layers):
        save_file(BY_LAYER[layer], tmp_path / "theirs", metadata={"format": "pt"})
        assert (tmp_path / file).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_bytes_are_counted_as_they_are_written(tmp_path, shards):
    counted = []
    with ShardWriter(tmp_path, shards, TENSORS.__getitem__, counted.append) as writer:
        for layer in range(LAYERS):
            writer.put(layer, quantized(layer))
    assert sum(counted) == shards.total_bytes


def test_a_resumed_run_keeps_the_files_outside_the_layers(tmp_path, shards):
    with ShardWriter(tmp_path, shards, TENSORS.__getitem__):
        pass
    (outside,) = shards.outside
    before = (tmp_path / outside).stat().st_mtime_ns
    read = []

    def remember(name):
        read.append(name)
        return TENSORS[name]

    write_all(tmp_path, shards, remember)
    assert (tmp_path / outside).stat().st_mtime_ns == before
    assert sorted(read) == [f"{PREFIX}{layer}.source" for layer in range(LAYERS)]


def test_what_a_killed_run_had_not_finished_is_removed(tmp_path, shards):
    (tmp_path / ".tmpLxktwa").write_bytes(b"half a file of safetensors' own writer")
    (tmp_path / ".model-00001-of-00004.safetensors.partial").write_bytes(b"half a file")
    write_all(tmp_path, shards)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_safetensors_still_writes_beside_its_file(tmp_path):
    """The trap above: once this fails, the guard of hidden `.tmp` files can go."""
    code = (
        "import resource, signal, sys, torch; from safetensors.torch import save_file; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
        "save_file({'a': torch.zeros(1 << 20)}, sys.argv[1] + '/a.safetensors')"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True)
    assert killed.returncode < 0
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".tmp")


def test_a_resumed_run_writes_only_the_layers_that_are_missing(tmp_path, shards):
    with ShardWriter(tmp_path, shards, TENSORS.__getitem__) as writer:
        writer.put(0, quantized(0))
    before = (tmp_path / shards.layers[0][0]).stat().st_mtime_ns
    with ShardWriter(tmp_path, shards, TENSORS.__getitem__) as writer:
        for layer in range(1, LAYERS):
            writer.put(layer, quantized(layer))
    assert (tmp_path / shards.layers[0][0]).stat().st_mtime_ns == before
    found = {}
    for file in set(shards.weight_map.values()):
        found.update(load_file(tmp_path / file))
    assert found.keys() == TENSORS.keys()


def test_layers_are_recorded_in_order_once_they_are_on_the_disk(tmp_path, shards, monkeypatch):
    from checkpoint import shards as module

    write = module.write_tensors

    def slow_first(path, tensors):
        if path.name == shards.layers[0][0]:
            time.sleep(0.2)
        write(path, tensors)

    monkeypatch.setattr(module, "write_tensors", slow_first)
    recorded = []

    def record(layer):
        file = tmp_path / shards.layers[layer][0]
        recorded.append((layer, file.exists()))

    with ShardWriter(tmp_path, shards, TENSORS.__getitem__) as writer:
        for layer in range(3):
            writer.put(layer, quantized(layer), then=lambda layer=layer: record(layer))
    assert recorded == [(0, True), (1, True), (2, True)]


def test_drain_waits_for_every_layer(tmp_path, shards):
    with ShardWriter(tmp_path, shards, TENSORS.__getitem__) as writer:
        for layer in range(LAYERS):
            writer.put(layer, quantized(layer))
        writer.drain()
        files = [tmp_path / file for file in {*shards.weight_map.values()}]
        assert all(file.exists() for file in files)


def fail_at(monkeypatch, file):
    """Let the disk be full when a file is written."""
    from checkpoint import shards as module

    write = module.write_tensors

    def full(path, tensors):
        if path.name == file:
            raise OSError(28, "No space left on device", str(path))
        write(path, tensors)

    monkeypatch.setattr(module, "write_tensors", full)


def test_nothing_is_recorded_after_a_write_that_failed(tmp_path, shards, monkeypatch):
    fail_at(monkeypatch, shards.layers[1][0])
    recorded = []

    def run():
        with ShardWriter(tmp_path, shards, TENSORS.__getitem__) as writer:
            for layer in range(LAYERS):
                writer.put(layer, quantized(layer), then=lambda layer=layer: recorded.append(layer))

    with pytest.raises(OSError, match="No space left"):
        run()
    assert recorded == [0]
    assert not (tmp_path / shards.layers[1][0]).exists()


def test_a_failure_outside_the_layers_is_raised_and_leaves_no_file(tmp_path, shards, monkeypatch):
    (outside,) = shards.outside
    fail_at(monkeypatch, outside)
    with pytest.raises(OSError, match="No space left"):
        write_all(tmp_path, shards)
    assert not (tmp_path / outside).exists()


def test_an_error_of_the_body_is_the_one_that_is_raised(tmp_path, shards, monkeypatch):
    fail_at(monkeypatch, shards.layers[0][0])

    def run():
        with ShardWriter(tmp_path, shards, TENSORS.__getitem__) as writer:
            writer.put(0, quantized(0))
            raise RuntimeError("in the body")

    with pytest.raises(RuntimeError, match="in the body"):
        run()


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (torch.zeros(4, dtype=torch.uint8), r"torch.uint8 \(4,\)"),
        (torch.zeros(3, 4), r"torch.float32 \(3, 4\)"),
    ],
    ids=["another shape", "another dtype"],
)
def test_a_tensor_of_another_shape_or_dtype_than_planned_is_a_defect(
    tmp_path, shards, tensor, found
):
    name = f"{PREFIX}0.packed"

    def run():
        with ShardWriter(tmp_path, shards, TENSORS.__getitem__) as writer:
            writer.put(0, quantized(0) | {name: tensor})

    with pytest.raises(AssertionError, match=rf"{name} is {found}, planned is U8 \(3, 4\)"):
        run()
    assert not (tmp_path / shards.layers[0][0]).exists()


def test_put_waits_rather_than_hold_many_layers(tmp_path, shards, monkeypatch):
    """At most three layers wait to be written: more would fill the memory before a slow disk."""
    from checkpoint import shards as module

    write = module.write_tensors
    may_write = threading.Event()

    def blocked(path, tensors):
        may_write.wait(30)
        write(path, tensors)

    monkeypatch.setattr(module, "write_tensors", blocked)
    put = []

    def run():
        with ShardWriter(tmp_path, shards, TENSORS.__getitem__) as writer:
            for layer in range(LAYERS):
                writer.put(layer, quantized(layer))
                put.append(layer)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        deadline = time.monotonic() + 10
        while len(put) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        assert put == [0, 1, 2]
    finally:
        may_write.set()
        thread.join()
    assert put == list(range(LAYERS))
