"""The tiny checkpoint's weights: those of the training that lies beside them."""

import hashlib
from pathlib import Path

import tiny.training
from tiny.checkpoint import WEIGHTS

RECORD = Path(tiny.training.__file__).parent / "record"


def test_the_weights_are_those_that_training_recorded():
    digest, name = (RECORD / "SHA256SUMS").read_text().split()
    assert hashlib.sha256((WEIGHTS / name).read_bytes()).hexdigest() == digest
