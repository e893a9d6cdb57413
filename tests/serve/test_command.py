import json

import pytest
from editing import edit_json

from checkpoint.faults import BadInput
from serve.__main__ import split_extra
from serve.command import adopt, batched_tokens, build_command, build_environment, canonical
from serve.environment import CPU, Device
from serve.settings import ServeSettings

H100 = Device("cuda", "NVIDIA H100 80GB HBM3", (9, 0), 1)
VERSIONS = [(0, 11, 0), (0, 26, 0), (0, 32, 0), (0, 33, 0)]


def value(command, flag):
    assert command.count(flag) == 1, command
    return command[command.index(flag) + 1]


def quantized(directory, algo):
    section = {"quant_method": "modelopt", "quant_algo": algo, "ignore": []}
    edit_json(directory / "config.json", lambda raw: raw.update(quantization_config=section))
    return directory


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_gets_evs_frames_and_a_name(tiny, version):
    command = build_command(tiny, ServeSettings(), version, H100)
    assert command[:3] == ["vllm", "serve", str(tiny)]
    assert value(command, "--video-pruning-rate") == "0.75"
    assert json.loads(value(command, "--media-io-kwargs")) == {
        "video": {"fps": 2, "num_frames": 128}
    }
    assert json.loads(value(command, "--limit-mm-per-prompt")) == {"image": 16, "video": 1}
    assert value(command, "--served-model-name") == "tiny"
    assert value(command, "--dtype") == "bfloat16"
    assert "--trust-remote-code" in command
    assert "--no-enable-prefix-caching" in command
    assert "--quantization" not in command


@pytest.mark.parametrize(
    ("version", "wanted"), [((0, 11, 0), True), ((0, 19, 1), True), ((0, 20, 0), False)]
)
def test_only_old_versions_are_told_the_state_dtype(tiny, version, wanted):
    command = build_command(tiny, ServeSettings(), version, H100)
    assert ("--mamba-ssm-cache-dtype" in command) == wanted


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("algo", "name"),
    [("FP8", "modelopt"), ("NVFP4", "modelopt_fp4"), ("MIXED_PRECISION", "modelopt_mixed")],
)
def test_precision_comes_from_config_json(tiny_copy, algo, name, version):
    assert (
        value(
            build_command(quantized(tiny_copy, algo), ServeSettings(), version, H100),
            "--quantization",
        )
        == name
    )


def test_precision_comes_from_hf_quant_config_when_config_json_is_silent(tiny_copy):
    (tiny_copy / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": "NVFP4"}})
    )
    command = build_command(tiny_copy, ServeSettings(), (0, 32, 0), H100)
    assert value(command, "--quantization") == "modelopt_fp4"


def test_settings_become_flags(tiny, tmp_path):
    settings = ServeSettings(
        video_pruning_rate=0.0,
        max_model_len=8192,
        max_frames=32,
        fps=0.5,
        host="0.0.0.0",
        port=8123,
        gpu_memory_utilization=0.85,
        tensor_parallel_size=2,
        allowed_local_media_path=tmp_path,
    )
    command = build_command(tiny, settings, (0, 33, 0), H100)
    expected = {
        "--video-pruning-rate": "0",
        "--max-model-len": "8192",
        "--media-io-kwargs": '{"video":{"fps":0.5,"num_frames":32}}',
        "--host": "0.0.0.0",
        "--port": "8123",
        "--gpu-memory-utilization": "0.85",
        "--tensor-parallel-size": "2",
        "--allowed-local-media-path": str(tmp_path),
    }
    assert {flag: value(command, flag) for flag in expected} == expected


def test_cpu_starts_eager_with_a_small_cache(tiny_config, tiny, full12b):
    command = build_command(
        tiny, ServeSettings(gpu_memory_utilization=0.9, tensor_parallel_size=2), (0, 32, 0), CPU
    )
    assert "--enforce-eager" in command
    assert not {"--gpu-memory-utilization", "--tensor-parallel-size"} & set(command)
    assert build_environment(tiny_config, CPU)["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert build_environment(full12b, CPU)["VLLM_CPU_KVCACHE_SPACE"] == "8"
    assert "VLLM_CPU_KVCACHE_SPACE" not in build_environment(tiny_config, H100)


@pytest.mark.parametrize(("rate", "tokens"), [(0.0, 32768), (0.75, 8192), (0.99, 327)])
def test_one_step_holds_a_clip_its_frame_texts_and_a_question(full12b, rate, tokens):
    found = batched_tokens(full12b, ServeSettings(video_pruning_rate=rate))
    assert tokens + 128 * 17 + 500 <= found <= tokens + 128 * 24 + 2048
    assert found % 1024 == 0


def test_one_step_is_no_longer_than_the_longest_prompt(full12b):
    assert (
        batched_tokens(full12b, ServeSettings(video_pruning_rate=0.0, max_model_len=8192)) == 8192
    )


@pytest.mark.parametrize(
    ("extra", "ours"),
    [
        (["--max-num-batched-tokens", "4096"], "--max-num-batched-tokens"),
        (["--max_num_batched_tokens=4096"], "--max-num-batched-tokens"),
        (["--enable-prefix-caching"], "--no-enable-prefix-caching"),
        (["--no-enforce-eager"], "--enforce-eager"),
        (["--media-io-kwargs.video.fps=4"], "--media-io-kwargs"),
        (["-q", "fp8"], "--quantization"),
        (["-tp", "2"], "--tensor-parallel-size"),
    ],
)
def test_what_follows_the_dashes_wins(tiny_copy, extra, ours):
    device = H100 if ours == "--tensor-parallel-size" else CPU
    command = build_command(
        quantized(tiny_copy, "FP8"),
        ServeSettings(tensor_parallel_size=4),
        (0, 32, 0),
        device,
        extra,
    )
    assert command[-len(extra) :] == extra
    assert ours not in command[: -len(extra)]


def test_values_that_look_like_flags_override_nothing(tiny):
    command = build_command(tiny, ServeSettings(), (0, 32, 0), CPU, ["--seed", "-1"])
    assert "--port" in command
    assert command[-2:] == ["--seed", "-1"]


def test_spellings_have_one_canonical_form():
    assert (
        canonical("--no-enable_prefix_caching")
        == canonical("--enable-prefix-caching")
        == "--enable-prefix-caching"
    )
    assert canonical("--media_io_kwargs.video.fps=4") == "--media-io-kwargs"


def test_settings_follow_what_vllm_is_told():
    extra = ["--port=9000", "--video_pruning_rate", "0.5", "--max-model-len", "128k", "--seed", "7"]
    adopted = adopt(ServeSettings(max_model_len=4096), extra)
    assert (adopted.port, adopted.video_pruning_rate, adopted.max_model_len) == (9000, 0.5, 4096)


def test_another_model_is_refused(tiny_copy):
    edit_json(tiny_copy / "config.json", lambda raw: raw.update(architectures=["LlamaForCausalLM"]))
    with pytest.raises(BadInput, match="LlamaForCausalLM"):
        build_command(tiny_copy, ServeSettings(), (0, 32, 0), CPU)


def test_arguments_split_at_the_first_dashes():
    assert split_extra(["DIR", "--port", "1", "--", "--a", "--"]) == (
        ["DIR", "--port", "1"],
        ["--a", "--"],
    )
    assert split_extra(["DIR"]) == (["DIR"], [])
