"""The embedded checkpoint's weights: those of the training that lies beside them."""

import hashlib

from checkpoint.tiny import EMBEDDED


def test_the_weights_are_those_that_training_recorded():
    digest, name = (EMBEDDED / "training" / "SHA256SUMS").read_text().split()
    assert hashlib.sha256((EMBEDDED / name).read_bytes()).hexdigest() == digest
