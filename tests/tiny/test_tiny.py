"""The weights of the tiny checkpoint are those that the training record names."""

import hashlib
from pathlib import Path

import tiny.training
from tiny.checkpoint import WEIGHTS

RECORD = Path(tiny.training.__file__).parent / "record"


def test_the_weights_have_the_recorded_digest():
    digest, name = (RECORD / "SHA256SUMS").read_text().split()
    weights = (WEIGHTS / name).read_bytes()
    assert hashlib.sha256(weights).hexdigest() == digest
