"""What fine-tuning has saved in float32 or float16 is read as the BF16 that it rounds to."""

import pytest
import torch

from checkpoint import files
from checkpoint.config import read_config, read_json
from checkpoint.faults import BadInput
from checkpoint.opened import check_finite, open_bf16, open_checkpoint, rounding_note
from tests.editing import cast_weights, edit_json, edit_tensors

UP = "language_model.backbone.layers.1.mixer.up_proj.weight"
NORM = "language_model.backbone.norm_f.weight"
VALUES = (1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 1.0 + 2**-8 + 2**-20, -1e-40, 3.38e38)
"""Of float32: exact, two ties, just above a tie, subnormal, nearly the largest of BF16."""


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_every_value_is_the_nearest_of_bf16_in_parts_of_any_size(tiny_copy, monkeypatch, dtype):
    monkeypatch.setattr(files, "_ROUNDED_AT_ONCE", 1000)
    cast_weights(tiny_copy, dtype)
    before = files.TensorFiles(tiny_copy)
    tensors = open_bf16(tiny_copy).tensors
    assert tensors.total_bytes == before.total_bytes
    for name in before:
        stored = before.read(name)
        wanted = stored.to(torch.bfloat16) if stored.is_floating_point() else stored
        assert torch.equal(tensors.read(name), wanted), name
    rows = tensors.read(UP, rows=(3, 7))
    assert torch.equal(rows, before.read(UP)[3:7].to(torch.bfloat16))


def test_ties_go_to_the_even_neighbour(tiny_copy):
    def change(tensors):
        tensors[NORM] = tensors[NORM].float()
        tensors[NORM][: len(VALUES)] = torch.tensor(VALUES)

    edit_tensors(tiny_copy, change)
    read = open_bf16(tiny_copy).tensors.read(NORM)
    assert read[:4].tolist() == [1.0, 1.0, 1.0 + 2**-6, 1.0 + 2**-7]
    assert 0 > read[4].item() > -2e-40
    assert read[5].item() == pytest.approx(3.38e38, rel=2**-8)


def test_what_is_bf16_already_and_integers_stay_as_they_are(tiny_copy, tiny):
    cast_weights(tiny_copy, "float32", "language_model")
    checkpoint = open_bf16(tiny_copy)
    original = open_bf16(tiny).tensors
    for name in checkpoint.tensors:
        is_language_model = name.startswith("language_model")
        assert (name in checkpoint.tensors.rounded) == is_language_model
        if not is_language_model:
            assert torch.equal(checkpoint.tensors.read(name), original.read(name))
    count = len(checkpoint.tensors.rounded)
    note = f"{count} of {len(original.specs)} tensors are not BF16 and are rounded to it"
    assert note in rounding_note(checkpoint)
    assert rounding_note(open_bf16(tiny)) is None


@pytest.mark.parametrize("dtype", ["float32", "torch.float16", "float64"])
@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_the_config_is_that_of_bf16(tiny_copy, tiny, dtype, key):
    def declare(raw):
        for section in (raw, raw["llm_config"], raw["vision_config"]):
            del section["torch_dtype"]
            section[key] = dtype
        raw["quantization_config"] = None

    edit_json(tiny_copy / "config.json", declare)
    expected = read_json(tiny / "config.json")
    for section in (expected, expected["llm_config"], expected["vision_config"]):
        section[key] = section.pop("torch_dtype")
    assert open_bf16(tiny_copy).config.raw == expected


@pytest.mark.parametrize("dtype", ["int8", "auto", "float8_e4m3fn"])
def test_a_dtype_that_no_weights_have_is_refused(tiny_copy, dtype):
    edit_json(tiny_copy / "config.json", lambda raw: raw["llm_config"].update(torch_dtype=dtype))
    with pytest.raises(BadInput, match=f"llm_config.torch_dtype is not bfloat16 but {dtype}"):
        read_config(tiny_copy)


def test_a_quantized_checkpoint_is_not_rounded(fp8_copy):
    cast_weights(fp8_copy, "float32", "mlp1")
    assert open_checkpoint(fp8_copy).tensors.specs["mlp1.0.weight"].dtype == "F32"
    edit_json(fp8_copy / "config.json", lambda raw: raw.update(torch_dtype="float32"))
    with pytest.raises(BadInput, match="torch_dtype is not bfloat16 but float32"):
        open_checkpoint(fp8_copy)


def test_values_that_are_infinite_in_bf16_are_refused_by_name(tiny_copy):
    cast_weights(tiny_copy, "float32")

    def change(tensors):
        tensors[UP].view(-1)[7:10] = torch.finfo(torch.float32).max
        tensors["mlp1.0.weight"][:2] = float("nan")

    edit_tensors(tiny_copy, change)
    with pytest.raises(BadInput) as caught:
        check_finite(open_bf16(tiny_copy))
    found = str(caught.value)
    assert f"{UP}: contains 3 values that are infinite in BF16" in found
    assert "mlp1.0.weight: contains 2 NaN or infinite values" in found


def test_float16_that_has_overflown_is_refused_by_name(tiny_copy):
    cast_weights(tiny_copy, "float16")
    edit_tensors(tiny_copy, lambda tensors: tensors[UP].view(-1)[:2].mul_(0).add_(1e5))
    with pytest.raises(BadInput, match=f"{UP}: contains 2 NaN or infinite values"):
        check_finite(open_bf16(tiny_copy))
