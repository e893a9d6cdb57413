"""The plug-in's sources in the serve environment: values of the reference kernels, registration."""

import json
from pathlib import Path

import pytest
from commands import ROOMS
from vllm_process import without_python

KERNEL_VALUES = Path(__file__).with_name("kernel_values.py")


@pytest.fixture(scope="module")
def values(vllm_process):
    # The sources here, not the plug-in that is installed there.
    environment = without_python() | {"PYTHONPATH": str(ROOMS / "plugin")}
    done = vllm_process.run(KERNEL_VALUES, environment=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_fp8_is_w8a8_to_bf16_rounding(values):
    assert values["fp8_error"] < 2**-8
    # Unquantized activations, as in vLLM's own AMX kernel, would be further off than that.
    assert values["fp8_error_if_w8a16"] > 2 * 2**-8


def test_nvfp4_is_w4a4_to_bf16_rounding(values):
    # Both sides are rounded to BF16 before the product, as in vLLM's emulation.
    assert values["nvfp4_error"] < 2 * 2**-8
    assert values["nvfp4_error_if_w4a16"] > 0.1


def test_weight_only_nvfp4_is_w4a16_to_bf16_rounding(values):
    assert values["weight_only_kernel"] == "ReferenceNvFp4WeightOnlyKernel"
    assert values["weight_only_error"] < 2**-8


def test_upstream_trap_vllm_takes_marlin_for_weight_only_nvfp4_on_any_cpu(values):
    """If this ever fails, `register_linear_kernel` may be enough for the plug-in."""
    refused = values["weight_only_switched_off"]
    assert "Forced NVFP4 kernel MarlinNvFp4LinearKernel is not supported" in refused


def test_fused_weights_get_one_scale(values):
    # CPU builds declare `static_scaled_fp8_quant() -> ()`; without the replacement, loading FP8
    # q/k/v fails on it.
    assert values["merged_error"] == 0


def test_our_fp8_kernel_is_the_first_candidate_and_both_are_added_once(values):
    # vLLM takes the first candidate that supports the device: behind its own W8A16 kernel for AMX
    # ours would not be chosen.
    assert values["candidates"][0] == "ReferenceFp8Kernel"
    assert values["candidates"].count("ReferenceFp8Kernel") == 1
    assert values["candidates"].count("ReferenceNvFp4Kernel") == 1
    assert values["candidates_after_a_second_call"] == values["candidates"]


def test_the_switch_leaves_vllms_own_choice(values):
    assert not any(name.startswith("Reference") for name in values["switched_off"])


def test_a_vllm_without_the_private_lists_starts_with_a_warning(values):
    (message,) = values["other_vllm"]
    assert "_POSSIBLE_FP8_KERNELS" in message
    assert "FP8 and NVFP4 may not run here" in message
