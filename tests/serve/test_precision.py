"""The table of precisions, and where a checkpoint's precision is read from."""

import json

import pytest
from editing import edit_json

from checkpoint.config import read_config
from serve.precision import PRECISIONS, UNNAMED, Quantization, read_quantization


def with_section(directory, section):
    edit_json(directory / "config.json", lambda raw: raw.update(quantization_config=section))
    return read_config(directory)


def test_bf16_has_no_quantization(tiny):
    assert read_quantization(read_config(tiny)) is None


@pytest.mark.parametrize("algo", ["fp8", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION"])
def test_the_precision_is_read_from_config_json(tiny_copy, algo):
    config = with_section(tiny_copy, {"quant_method": "modelopt", "quant_algo": algo})
    assert read_quantization(config) == Quantization(algo.upper(), "config.json")
    assert algo.upper() in PRECISIONS


def test_the_precision_is_read_from_hf_quant_config_where_config_json_has_none(tiny_copy):
    old = tiny_copy / "hf_quant_config.json"
    old.write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    expected = Quantization("NVFP4", "hf_quant_config.json")
    assert read_quantization(read_config(tiny_copy)) == expected
    config = with_section(tiny_copy, {"quant_algo": "FP8"})
    assert read_quantization(config) == Quantization("FP8", "config.json")


@pytest.mark.parametrize("section", [{}, {"quant_algo": None}, {"quant_algo": ""}])
def test_a_section_without_a_name_is_not_taken_for_bf16(tiny_copy, section):
    config = with_section(tiny_copy, section)
    assert read_quantization(config) == Quantization(UNNAMED, "config.json")


@pytest.mark.parametrize(
    ("algo", "vllm", "least"),
    [
        ("FP8", (0, 31, 0), (8, 9)),
        ("FP8", (0, 32, 0), (8, 0)),
        ("NVFP4", (0, 11, 0), (8, 0)),
        ("W4A16_NVFP4", (0, 21, 0), (8, 0)),
        ("MIXED_PRECISION", (0, 18, 0), (8, 0)),
    ],
)
def test_the_least_capability_depends_on_vllms_version(algo, vllm, least):
    assert PRECISIONS[algo].least_capability(vllm) == least
