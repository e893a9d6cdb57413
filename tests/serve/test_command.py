"""The `vllm serve` command line, and vLLM's own flags behind `--`."""

import json

import pytest
from editing import edit_json

from checkpoint.faults import BadInput
from checkpoint.video import Video
from serve.__main__ import split_extra
from serve.command import batched_tokens, build_command, build_environment
from serve.environment import CPU, Device
from serve.precision import PRECISIONS
from serve.settings import ServeSettings, override
from serve.vllm_flags import canonical, is_flag, setting_values

H100 = Device("cuda", "NVIDIA H100 80GB HBM3", (9, 0), 1)
VERSIONS = [(0, 11, 0), (0, 26, 0), (0, 32, 0), (0, 33, 0)]


def value(command, flag):
    assert command.count(flag) == 1, command
    return command[command.index(flag) + 1]


def with_rate(rate):
    return ServeSettings(video=Video(pruning_rate=rate))


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
    assert "--trust-remote-code" not in command
    assert "--no-enable-prefix-caching" in command


@pytest.mark.parametrize(
    ("version", "wanted"), [((0, 11, 0), True), ((0, 19, 1), True), ((0, 20, 0), False)]
)
def test_only_old_versions_are_told_the_state_dtype(tiny, version, wanted):
    command = build_command(tiny, ServeSettings(), version, H100)
    assert ("--mamba-ssm-cache-dtype" in command) == wanted


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("algo", [None, *PRECISIONS])
def test_vllm_is_left_to_read_the_precision_itself(tiny_copy, algo, version):
    """test_quantized.py holds a real vLLM to it."""
    if algo is not None:
        quantized(tiny_copy, algo)
    command = build_command(tiny_copy, ServeSettings(), version, H100)
    assert "--quantization" not in command


def test_settings_become_flags(tiny, tmp_path):
    settings = ServeSettings(
        video=Video(pruning_rate=0.0, max_frames=32, fps=0.5),
        max_model_len=8192,
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
    assert build_environment(tiny_config, ServeSettings(), CPU)["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert build_environment(full12b, ServeSettings(), CPU)["VLLM_CPU_KVCACHE_SPACE"] == "8"
    assert "VLLM_CPU_KVCACHE_SPACE" not in build_environment(tiny_config, ServeSettings(), H100)


def test_upstream_trap_vllm_makes_media_ready_on_one_thread_unless_told_otherwise(
    full12b, monkeypatch
):
    """Its renderer calls `set_default_torch_num_threads`: one, or OMP_NUM_THREADS."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("VLLM_MEDIA_LOADING_THREAD_COUNT", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    assert build_environment(full12b, ServeSettings(), H100)["OMP_NUM_THREADS"] == "12"
    # On a CPU, vLLM binds its threads to cores itself.
    assert "OMP_NUM_THREADS" not in build_environment(full12b, ServeSettings(), CPU)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in build_environment(full12b, ServeSettings(), H100)


@pytest.mark.parametrize(("rate", "tokens"), [(0.0, 32768), (0.75, 8192), (0.99, 327)])
def test_one_step_holds_a_clip_its_frame_texts_and_a_question(full12b, rate, tokens):
    found = batched_tokens(full12b, with_rate(rate))
    assert tokens + 128 * 17 + 500 <= found <= tokens + 128 * 24 + 2048
    assert found % 1024 == 0


def test_one_step_is_no_longer_than_the_longest_prompt(full12b):
    assert batched_tokens(full12b, override(with_rate(0.0), {"max_model_len": 8192})) == 8192


def test_one_step_holds_what_vllms_own_flags_make_of_a_clip(full12b):
    flags = ["--media-io-kwargs", '{"video": {"fps": 2, "num_frames": 256}}']
    settings = override(with_rate(0.0), setting_values(flags))
    assert batched_tokens(full12b, settings) >= 256 * 256


@pytest.mark.parametrize(
    ("extra", "ours"),
    [
        (["--max-num-batched-tokens", "4096"], "--max-num-batched-tokens"),
        (["--max_num_batched_tokens=4096"], "--max-num-batched-tokens"),
        (["--enable-prefix-caching"], "--no-enable-prefix-caching"),
        (["--no-enforce-eager"], "--enforce-eager"),
        (["--media-io-kwargs.video.fps=4"], "--media-io-kwargs"),
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
    settings = override(ServeSettings(max_model_len=4096), setting_values(extra))
    assert settings.port == 9000
    assert settings.video.pruning_rate == 0.5
    assert settings.max_model_len == 4096


@pytest.mark.parametrize(
    ("flags", "values"),
    [
        (["-tp", "2", "--dtype=float16"], {"tensor_parallel_size": 2, "dtype": "float16"}),
        (["--dtype", "half"], {"dtype": "float16"}),
        (["--dtype=auto"], {"dtype": "bfloat16"}),
        (["--max-model-len", "-1"], {}),
        (["--port"], {}),
        (["--seed", "-1"], {}),
        (["--media-io-kwargs", "no JSON"], {}),
        (["--media-io-kwargs", '["x"]'], {}),
        (["--media-io-kwargs", '{"video": 7}'], {}),
        # vLLM takes 32 frames where its flag gives no number, also where it is about images.
        (["--media-io-kwargs", '{"image": {}}'], {"video.max_frames": 32}),
        (["--media-io-kwargs", '{"video": null}'], {"video.max_frames": 32}),
        (["--media-io-kwargs.video.fps", "4"], {"video.fps": 4, "video.max_frames": 32}),
        (
            ["--media-io-kwargs.video.fps=4", "--media_io_kwargs.video.num_frames=8"],
            {"video.fps": 4, "video.max_frames": 8},
        ),
        # Without a rate vLLM takes so many frames of every clip.
        (["--media-io-kwargs.video.num_frames=8"], {"video.max_frames": 8}),
    ],
)
def test_vllms_flags_that_mean_a_setting(flags, values):
    assert setting_values(flags) == values


def test_numbers_are_no_flags():
    assert is_flag("--seed")
    assert is_flag("-tp")
    assert not is_flag("-1")
    assert not is_flag("-0.5")
    assert not is_flag("7")


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
