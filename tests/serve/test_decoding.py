"""ReplaySSM and NVFP4 as FP8: off unless asked for, refused with a reason where they cannot be.

Both need a GPU, so that nothing here computes with them: the tests hold the command, the plan and
the refusals. What they gain is in benchmarks/results/decode_….json.
"""

import pytest
import torch
from editing import edit_json
from safetensors.torch import save_file

from checkpoint.config import read_config
from checkpoint.faults import BadInput
from hybridquant_vllm import DISPLACED_KERNELS
from serve.command import build_command, build_environment
from serve.decoding import KERNELS_VARIABLE, RUNNER_VARIABLE, decoding_faults
from serve.environment import CPU, Gpu, ServeEnvironment, cuda_device
from serve.memory import GROWTH_AS_FP8, cache_of, packed_bytes, plan_memory
from serve.plan import serving_plan
from serve.preflight import preflight
from serve.settings import ServeSettings, settings_for
from serve.state_update import STATE_FLAG

H100 = cuda_device([Gpu((9, 0), "H100", 85e9, 84e9)])
B200 = cuda_device([Gpu((10, 0), "B200", 192e9, 191e9)])
A100 = cuda_device([Gpu((8, 0), "A100", 85e9, 84e9)])
REPLAY = ServeSettings(replayssm=True, port=0)
AS_FP8 = ServeSettings(nvfp4_as_fp8=True, port=0)


def on(device, vllm=(0, 33, 0), plugin="0.2.1"):
    return ServeEnvironment("python", vllm, device, plugin)


@pytest.fixture
def nvfp4_copy(tiny_copy):
    """The configuration of the tiny checkpoint as NVFP4."""
    section = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    edit_json(tiny_copy / "config.json", lambda raw: raw.update(quantization_config=section))
    return read_config(tiny_copy)


def faults(config, settings, environment, extra=()):
    return [str(fault) for fault in decoding_faults(config, settings, environment, extra)]


def lines(config, settings, extra=()):
    choices = serving_plan(config, settings, on(H100), extra)
    return {choice.name: str(choice) for choice in choices}


def test_both_are_off_unless_asked_for(nvfp4_copy):
    variables = build_environment(nvfp4_copy, ServeSettings(), H100)
    assert not {RUNNER_VARIABLE, KERNELS_VARIABLE} & set(variables)
    command = build_command(nvfp4_copy.directory, ServeSettings(), (0, 33, 0), H100)
    assert "--use-replayssm" not in command
    assert faults(nvfp4_copy, ServeSettings(), on(CPU, (0, 12, 0), None)) == []


def test_replayssm_is_a_flag_and_the_v1_runner(full12b, tiny):
    command = build_command(tiny, REPLAY, (0, 33, 0), H100)
    assert "--use-replayssm" in command
    assert command[command.index(STATE_FLAG) + 1] == "float16"
    assert build_environment(full12b, REPLAY, H100)[RUNNER_VARIABLE] == "0"
    assert "ReplaySSM, states in float16 (given" in lines(full12b, REPLAY)["state update"]
    assert faults(full12b, REPLAY, on(H100)) == []


def test_vllms_own_flag_means_the_setting(tiny):
    assert settings_for(tiny, {}, ["--use-replayssm"]).replayssm
    assert not settings_for(tiny, {}, ["--no-use-replayssm"]).replayssm
    given = settings_for(tiny, {}, ["--use-replayssm"])
    command = build_command(tiny, given, (0, 33, 0), H100, ["--use-replayssm"])
    assert command.count("--use-replayssm") == 1


def test_a_type_of_the_state_that_is_given_wins(full12b, tiny):
    extra = [STATE_FLAG, "float32"]
    command = build_command(tiny, REPLAY, (0, 33, 0), H100, extra)
    assert command.count(STATE_FLAG) == 1
    assert command[-2:] == extra
    assert "ReplaySSM, states in float32" in lines(full12b, REPLAY, extra)["state update"]
    assert (
        "states in float16"
        in lines(full12b, ServeSettings(), [STATE_FLAG, "float16"])["state update"]
    )


def test_replayssm_keeps_tokens_beside_each_state(full12b):
    plain, ringed = cache_of(full12b), cache_of(full12b, ring_tokens=16)
    # x in BF16, B in BF16 and the step in float32, of 16 tokens in 28 layers.
    ring = 16 * ((128 * 80 + 8 * 128) * 2 + 128 * 4)
    assert full12b.pattern.count("M") == 28
    assert ringed.sequence_bytes - plain.sequence_bytes == 28 * ring


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        (on(CPU), "needs a GPU"),
        (on(H100, (0, 34, 0)), "has not been tried with vLLM 0.34.0 (leave it out, or install"),
        (on(H100, plugin=None), "fast video is off, the plug-in is not installed"),
    ],
)
def test_replayssm_is_refused_where_it_cannot_be(full12b, environment, part):
    assert any(part in fault for fault in faults(full12b, REPLAY, environment))


def test_replayssm_is_refused_beside_the_v2_runner(full12b, monkeypatch):
    monkeypatch.setenv(RUNNER_VARIABLE, "1")
    assert f"unset {RUNNER_VARIABLE}" in faults(full12b, REPLAY, on(H100))[0]


def test_vllms_own_kernels_are_turned_off_beside_those_that_the_user_names(nvfp4_copy, monkeypatch):
    monkeypatch.setenv(KERNELS_VARIABLE, "OtherKernel")
    names = build_environment(nvfp4_copy, AS_FP8, H100)[KERNELS_VARIABLE].split(",")
    assert names == ["OtherKernel", *DISPLACED_KERNELS]
    assert "NVFP4, as FP8 from loading on (H100" in lines(nvfp4_copy, AS_FP8)["precision"]
    assert faults(nvfp4_copy, AS_FP8, on(H100)) == []


@pytest.mark.parametrize(
    ("device", "part"),
    [
        (CPU, "needs a GPU with FP8"),
        (A100, "A100 has no FP8 arithmetic"),
        (B200, "B200 multiplies NVFP4 itself"),
    ],
)
def test_conversion_is_refused_on_other_devices(nvfp4_copy, device, part):
    assert any(part in fault for fault in faults(nvfp4_copy, AS_FP8, on(device)))


def test_conversion_is_refused_for_other_checkpoints_and_beside_a_backend(full12b, nvfp4_copy):
    assert "the checkpoint is BF16, not NVFP4" in faults(full12b, AS_FP8, on(H100))[0]
    found = faults(nvfp4_copy, AS_FP8, on(H100), ["--linear-backend", "marlin"])
    assert "--linear-backend marlin chooses the kernel" in found[0]


def test_the_preflight_refuses(tiny):
    with pytest.raises(BadInput, match="nvfp4_as_fp8: the checkpoint is BF16"):
        preflight(tiny, AS_FP8, on(H100))


def test_the_plan_counts_converted_weights_as_fp8(nvfp4_copy):
    for path in nvfp4_copy.directory.glob("*.safetensors*"):
        path.unlink()
    packed = torch.zeros(64, 128, dtype=torch.uint8)
    tensors = {"a": packed, "b": torch.zeros(64, 16, dtype=torch.float8_e4m3fn)}
    save_file(tensors, nvfp4_copy.directory / "model.safetensors")
    assert packed_bytes(nvfp4_copy.directory) == 64 * 128
    plain = plan_memory(nvfp4_copy, H100, 2048, 8)
    converted = plan_memory(nvfp4_copy, H100, 2048, 8, is_fp4_converted=True)
    # 64 x 256 weights in FP8 take the place of packed codes and block scales.
    assert converted.weights - plain.weights == 64 * 256 - 64 * 128 - 64 * 16
    assert converted.weights - plain.weights == GROWTH_AS_FP8 * 64 * 128
