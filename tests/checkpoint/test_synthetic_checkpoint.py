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
from checkpoint.files import check_weights
from checkpoint.layout import expected_tensors, spec_bytes
from checkpoint.native import load_model, load_tokenizer
from checkpoint.synthetic import synthetic_config, write_synthetic


@contextlib.contextmanager
def peak_anonymous_memory():
    """Yields a list whose one item is, afterwards, by how many bytes anonymous memory had grown at
    its highest.
    """

    def now() -> int:
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    grown, ended, before = [0], threading.Event(), now()

    def watch() -> None:
        while not ended.wait(0.005):
            grown[0] = max(grown[0], now() - before)

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


def test_medium_is_whole_loads_and_stays_finite(tmp_path):
    config = write_synthetic(tmp_path / "medium", "medium")
    tensors = check_weights(config)
    assert 1e9 < tensors.total_bytes < 2e9
    assert load_tokenizer(config).convert_tokens_to_ids("<image>") == 131072
    with peak_anonymous_memory() as grown:
        model = load_model(config)
    assert grown[0] < 1.1 * tensors.total_bytes, "a second copy of the weights was in memory"
    with torch.no_grad():
        logits = model.language_model(torch.arange(100, 164)[None], use_cache=False).logits
    assert torch.isfinite(logits).all()
    assert 0.1 < float(logits.std()) < 10
