"""Random-weight checkpoints of real size: the released layout, sharded, finite; the same bytes for
the same seed.
"""

import contextlib
import re
import threading
from pathlib import Path

import pytest
import torch

from checkpoint.config import CheckpointConfig
from checkpoint.layout import expected_tensors, spec_bytes
from checkpoint.native import load_model
from checkpoint.opened import check_finite, open_bf16
from checkpoint.synthetic import synthetic_config, write_synthetic


def anonymous_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


@contextlib.contextmanager
def peak_anonymous_memory():
    """Yield a list whose one item is, afterwards, by how many bytes anonymous memory had grown at
    its highest.
    """
    before = anonymous_memory()
    grown = [0]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            grown[0] = max(grown[0], anonymous_memory() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield grown
    finally:
        ended.set()
        thread.join()


def test_full_is_the_released_model_of_26_36_gb(full12b):
    config = CheckpointConfig(full12b.directory, synthetic_config("full"))
    assert config.raw == full12b.raw
    assert spec_bytes(expected_tensors(config)) / 1e9 == pytest.approx(26.36, abs=0.01)


def test_medium_is_whole_loads_and_stays_finite(medium):
    checkpoint = open_bf16(medium)
    check_finite(checkpoint)
    total = checkpoint.tensors.total_bytes
    assert 1e9 < total < 2e9
    assert checkpoint.tokenizer.convert_tokens_to_ids("<image>") == 131072
    with peak_anonymous_memory() as grown:
        model = load_model(checkpoint)
    assert grown[0] < 1.1 * total, "a second copy of the weights was in memory"
    with torch.no_grad():
        logits = model.language_model(torch.arange(100, 164)[None], use_cache=False).logits
    assert torch.isfinite(logits).all()
    assert 0.1 < float(logits.std()) < 10


def test_the_same_seed_gives_the_same_bytes_and_another_other_ones(
    tmp_path, monkeypatch, tiny_config
):
    """At the size of the tiny checkpoint, in shards so small that there are several."""
    monkeypatch.setattr("checkpoint.synthetic.synthetic_config", lambda size: tiny_config.raw)
    monkeypatch.setattr("checkpoint.synthetic.SHARD_BYTES", 500_000)
    for name, seed in (("a", 1), ("again", 1), ("b", 2)):
        write_synthetic(tmp_path / name, "medium", seed, device="cpu")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    first = open_bf16(tmp_path / "a").tensors
    again = open_bf16(tmp_path / "again").tensors
    other = open_bf16(tmp_path / "b").tensors
    for name in first:
        assert torch.equal(first.read(name), again.read(name)), name
        if first.specs[name].dtype == "BF16":
            assert not torch.equal(first.read(name), other.read(name)), name
