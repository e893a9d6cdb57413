"""The exports of the tiny FP8 and NVFP4 recipes have the bytes they had before each format became
a file.

tests/data/tiny_exports.json was made from exports of commit b1929c5, on one CPU:

    python -m quantize.fp8 output=FP8 calibrate.samples=7 accuracy.samples=1 accuracy.tasks=null
    python -m quantize.nvfp4 output=NVFP4 calibrate.samples=2 accuracy.samples=1 accuracy.tasks=null
    python -m tests.export.test_kept_bytes fp8=FP8 nvfp4=NVFP4 > tests/data/tiny_exports.json

which are the samples of the fixtures `fp8` and `nvfp4`. Its weights are those of the full recipes:
they do not depend on the samples. Input scales do, and on the order in which a CPU adds.
"""

import hashlib
import json
import sys
from pathlib import Path

import pytest

from checkpoint.files import TensorFiles, bytes_of

DATA = Path(__file__).parents[1] / "data" / "tiny_exports.json"
TOLERANCE = 0.02
"""Relative, of input scales."""


def describe(directory) -> dict[str, float | str]:
    """By tensor: SHA-256 of its bytes, or the value of an input scale."""
    tensors = TensorFiles(directory)
    found: dict[str, float | str] = {}
    for name in sorted(tensors):
        tensor = tensors.read(name)
        if name.endswith(".input_scale"):
            found[name] = float(tensor)
        else:
            found[name] = hashlib.sha256(bytes_of(tensor)).hexdigest()
    return found


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_every_tensor_is_kept(name, request):
    before = json.loads(DATA.read_text())[name]
    now = describe(request.getfixturevalue(name))
    assert set(now) == set(before)
    for tensor, value in before.items():
        if isinstance(value, float):
            assert now[tensor] == pytest.approx(value, rel=TOLERANCE), tensor
        else:
            assert now[tensor] == value, tensor


if __name__ == "__main__":
    directories = dict(argument.split("=", 1) for argument in sys.argv[1:])
    content = {name: describe(directory) for name, directory in directories.items()}
    print(json.dumps(content, indent=1))
