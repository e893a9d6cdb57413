"""The weights of the tiny checkpoint are those that the training record names, and a run that needs
it finds it.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tiny.training
from tiny.checkpoint import WEIGHTS, tiny_checkpoint

RECORD = Path(tiny.training.__file__).parent / "record"


def test_the_weights_have_the_recorded_digest():
    digest, name = (RECORD / "SHA256SUMS").read_text().split()
    weights = (WEIGHTS / name).read_bytes()
    assert hashlib.sha256(weights).hexdigest() == digest


def test_the_processes_of_a_run_find_it_whichever_comes_first(tmp_path):
    wanted = tmp_path / "out" / "tiny-bf16"
    with ThreadPoolExecutor(4) as pool:
        configs = list(pool.map(tiny_checkpoint, [wanted] * 4))
    assert [config.directory for config in configs] == [wanted] * 4
    assert [path.name for path in wanted.parent.iterdir()] == ["tiny-bf16"]


def test_files_of_another_version_are_replaced(tmp_path):
    wanted = tmp_path / "tiny-bf16"
    tiny_checkpoint(wanted)
    changed = wanted / "tokenizer_config.json"
    before = changed.read_bytes()
    changed.write_bytes(before + b"\n")
    tiny_checkpoint(wanted)
    assert changed.read_bytes() == before
