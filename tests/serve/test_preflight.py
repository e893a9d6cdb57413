"""What is checked before vLLM starts, and what `python -m serve` says of it."""

import dataclasses
import json
import shutil
import socket
from pathlib import Path

import pytest
from commands import run_module
from editing import cast_weights, edit_json, truncate

from checkpoint.config import read_config
from checkpoint.faults import BadInput
from serve.environment import CPU, Device, ServeEnvironment
from serve.memory import weight_bytes
from serve.preflight import (
    LONGER_VARIABLE,
    checked_settings,
    limit_faults,
    log_faults,
    preflight,
)
from serve.settings import ServeSettings
from serve.step_faults import step_faults

ANY_PORT = ServeSettings(port=0)
ON_CPU = ServeEnvironment(Path("python"), (0, 32, 0), CPU, plugin="0.2.1")


def on(name, capability, version=(0, 33, 0), count=1):
    return ServeEnvironment(
        Path("python"), version, Device("cuda", name, capability, count), plugin="0.2.1"
    )


H100, A100, T4 = on("H100", (9, 0)), on("A100", (8, 0)), on("T4", (7, 5))


def faults(directory, settings=ANY_PORT, environment=ON_CPU):
    with pytest.raises(BadInput) as caught:
        preflight(directory, settings, environment)
    return "\n".join(map(str, caught.value.faults))


def quantize(directory, algo):
    section = {"quant_method": "modelopt", "quant_algo": algo}
    edit_json(directory / "config.json", lambda raw: raw.update(quantization_config=section))


def test_a_whole_checkpoint_passes(tiny):
    assert preflight(tiny, ANY_PORT, ON_CPU).directory == tiny
    assert preflight(tiny, ANY_PORT, H100).directory == tiny


def test_all_faults_come_at_once(tiny_copy):
    for name in ("tokenizer.json", "configuration.py", "model.safetensors", "chat_template.jinja"):
        (tiny_copy / name).unlink()
    edit_json(tiny_copy / "tokenizer_config.json", lambda raw: raw.pop("chat_template"))
    edit_json(tiny_copy / "config.json", lambda raw: raw.pop("ps_version"))
    overrides = {"video.pruning_rate": 1.0, "video.fps": 0, "port": 0}
    with pytest.raises(BadInput) as caught:
        checked_settings(tiny_copy, overrides, ["--max-model-len", "8"], ON_CPU)
    text = str(caught.value)
    for part in (
        "tokenizer.json",
        "configuration.py",
        "neither model.safetensors",
        "chat_template.jinja",
    ):
        assert part in text
    for part in ("ps_version", "video.pruning_rate: is 1.0", "video.fps: is 0"):
        assert part in text
    assert "max_model_len: is 8 " in text
    assert len(caught.value.faults) == 8


def test_faults_of_precision_and_device_come_with_those_of_the_settings(tiny_copy):
    quantize(tiny_copy, "FP8")
    nothing = dataclasses.replace(T4, device=Device("none", "no GPU"))
    for environment, message in ((T4, "needs capability"), (nothing, "there is no GPU")):
        with pytest.raises(BadInput, match=message) as caught:
            checked_settings(tiny_copy, {"port": -1}, (), environment)
        assert "port: is -1" in str(caught.value)


def test_settings_that_are_right_leave_the_directory_to_the_preflight(tmp_path):
    settings = checked_settings(tmp_path, {"port": 0}, ["--video-pruning-rate=0"], ON_CPU)
    assert settings.video.pruning_rate == 0


def test_dtypes_that_vllm_gives_a_part_of_the_model_only(tiny, tiny_copy):
    """vLLM 0.32 dies: "expected m1 and m2 to have the same dtype, but got: BFloat16 != float"."""
    cast_weights(tiny_copy, "float32")
    rounded = weight_bytes(preflight(tiny_copy, ANY_PORT, H100))
    assert rounded == pytest.approx(weight_bytes(read_config(tiny)), rel=0.01)

    def declare(raw):
        raw.update(torch_dtype="float32")
        raw["llm_config"].update(torch_dtype="float32")

    edit_json(tiny_copy / "config.json", declare)
    what = "torch_dtype is float32, llm_config.torch_dtype is float32: vLLM would die"
    assert what in faults(tiny_copy)


def test_no_such_directory(tmp_path):
    assert "no such directory" in faults(tmp_path / "nothing")


def test_a_truncated_file_is_named(tiny_copy):
    truncate(tiny_copy / "model.safetensors", 0.9)
    assert "model.safetensors: is truncated" in faults(tiny_copy)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs", b"\x02\0\0\0\0\0\0\0[]"])
def test_a_file_that_is_no_safetensors_is_named(tiny_copy, content):
    (tiny_copy / "model.safetensors").write_bytes(content)
    assert "model.safetensors: is" in faults(tiny_copy)


def test_weights_that_the_user_may_not_read_are_named(tiny_copy, monkeypatch):
    # Tests may run as root, who may read everything.
    monkeypatch.setattr("checkpoint.reading.os.access", lambda *_: False)
    assert "model.safetensors: cannot be read: Permission denied" in faults(tiny_copy)


def test_a_missing_shard_is_named(tiny_copy):
    index = {
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        }
    }
    shutil.copy(tiny_copy / "model.safetensors", tiny_copy / "model-00001-of-00002.safetensors")
    (tiny_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    text = faults(tiny_copy)
    assert "model-00002-of-00002.safetensors: no such file" in text
    assert "model-00001" not in text


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
def test_a_pointer_of_git_lfs_is_named(tiny_copy, name):
    (tiny_copy / name).unlink()
    (tiny_copy / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "Git LFS pointer" in faults(tiny_copy)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_cut_is_named(tiny_copy, name):
    content = (tiny_copy / name).read_bytes()
    (tiny_copy / name).unlink()
    (tiny_copy / name).write_bytes(content[:100])
    assert f"{name}: cannot be read as JSON" in faults(tiny_copy)


def test_the_template_may_stand_in_the_tokenizer_config(tiny_copy):
    (tiny_copy / "chat_template.jinja").unlink()
    preflight(tiny_copy, ANY_PORT, ON_CPU)


def test_a_taken_port_is_named(tiny):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in faults(tiny, ServeSettings(port=port))
    preflight(tiny, ServeSettings(port=port), ON_CPU)


@pytest.mark.parametrize(
    ("algo", "environment", "message"),
    [
        ("FP8", dataclasses.replace(ON_CPU, plugin=None), "run hybridquant setup-serve python"),
        ("NVFP4", dataclasses.replace(ON_CPU, plugin=None), "run hybridquant setup-serve python"),
        ("FP8", on("A100", (8, 0), version=(0, 26, 0)), "needs capability 8.9; A100 has 8.0"),
        ("FP8", T4, "needs capability 8.0"),
        ("NVFP4", T4, "needs capability 8.0"),
        ("MIXED_PRECISION", on("H100", (9, 0), version=(0, 11, 0)), "vLLM 0.11.0 cannot load"),
        ("INT4_AWQ", H100, "quant_algo is INT4_AWQ"),
        ("", H100, "quant_algo is unnamed"),
        ("W4A16_NVFP4", T4, "needs capability 8.0; T4 has 7.5"),
        ("W4A16_NVFP4", on("H100", (9, 0), version=(0, 20, 2)), "vLLM 0.20.2 cannot load"),
    ],
)
def test_precisions_that_cannot_run(tiny_copy, algo, environment, message):
    quantize(tiny_copy, algo)
    assert message in faults(tiny_copy, environment=environment)


@pytest.mark.parametrize(
    ("algo", "environment"),
    [
        ("FP8", H100),
        ("FP8", on("L4", (8, 9))),
        ("FP8", A100),
        ("NVFP4", A100),
        ("MIXED_PRECISION", H100),
        ("W4A16_NVFP4", H100),
        ("W4A16_NVFP4", A100),
        ("W4A16_NVFP4", ON_CPU),
    ],
)
def test_precisions_that_can_run(tiny_copy, algo, environment):
    quantize(tiny_copy, algo)
    preflight(tiny_copy, ANY_PORT, environment)


@pytest.mark.parametrize(
    ("algo", "read"),
    [("FP8", True), ("NVFP4", True), ("MIXED_PRECISION", False), ("W4A16_NVFP4", False)],
)
def test_some_precisions_are_not_read_from_hf_quant_config_alone(tiny_copy, algo, read):
    """test_quantized.py holds vLLM to both."""
    old = tiny_copy / "hf_quant_config.json"
    old.write_text(json.dumps({"quantization": {"quant_algo": algo}}))
    if read:
        preflight(tiny_copy, ANY_PORT, H100)
    else:
        assert f"hf_quant_config.json: vLLM does not read {algo}" in faults(tiny_copy)


def test_devices_that_are_not_there(tiny):
    nothing = dataclasses.replace(H100, device=Device("none", "no GPU"))
    assert "there is no GPU" in faults(tiny, environment=nothing)
    two = ServeSettings(port=0, tensor_parallel_size=2)
    assert "there are 1 GPUs" in faults(tiny, two, H100)


def test_dry_run_prints_a_line_a_shell_can_run(tiny, probed):
    probed({"read": [["--max-num-seqs", 4]]})
    options = ["--dry-run", "--video-pruning-rate", "0.5"]
    done = run_module("serve", tiny, *options, "--", "--max-num-seqs", "4")
    assert done.returncode == 0, done.stderr
    assert "vllm.entrypoints.cli.main serve" in done.stdout
    assert "--video-pruning-rate 0.5" in done.stdout
    assert done.stdout.rstrip().endswith("--max-num-seqs 4")
    assert "VLLM_CPU_KVCACHE_SPACE=1 " in done.stdout


def test_a_failed_gate_is_said_and_does_not_stop(tiny_copy):
    (tiny_copy / "hybridquant.json").write_text(json.dumps({"gate": {"passed": False}}))
    done = run_module("serve", tiny_copy, "--dry-run")
    assert done.returncode == 0
    assert f"warning: {tiny_copy} failed its accuracy gate" in done.stderr


def test_another_video_than_the_manifests_is_one_warning_line(tiny_copy, probed):
    manifest = {"video": {"pruning_rate": 0.9}, "gate": {"passed": True}}
    (tiny_copy / "hybridquant.json").write_text(json.dumps(manifest))
    done = run_module("serve", tiny_copy, "--dry-run")
    assert "warning: " not in done.stderr
    assert "fast video: o" in done.stderr
    probed({"read": [["--video-pruning-rate", 0.5]]})
    done = run_module("serve", tiny_copy, "--dry-run", "--", "--video-pruning-rate", "0.5")
    assert done.returncode == 0
    assert done.stdout.count("--video-pruning-rate") == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert "EVS rate 0.9" in line
    assert "EVS rate 0.5" in line


def test_quiet_and_verbose(tiny_copy, probed):
    (tiny_copy / "hybridquant.json").write_text(json.dumps({"gate": {"passed": False}}))
    assert run_module("serve", tiny_copy, "--dry-run", "-qq").stderr == ""
    probed({"read": [["--max-model-len", -1]]})
    done = run_module("serve", tiny_copy, "--dry-run", "-v", "--", "--max-model-len", "auto")
    assert "--max-model-len -1 is left to vLLM" in done.stderr


def test_a_log_that_can_be_written_is_left_as_it_is(tiny, tmp_path):
    log = tmp_path / "log"
    preflight(tiny, ANY_PORT, ON_CPU, log=log)
    assert not log.exists()
    log.write_text("of an earlier server")
    preflight(tiny, ANY_PORT, ON_CPU, log=log)
    assert log.read_text() == "of an earlier server"
    preflight(tiny, ANY_PORT, ON_CPU, log=Path("/dev/null"))


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("nowhere/log", "cannot be written: No such file or directory"),
        ("file/log", "cannot be written: Not a directory"),
        ("", "is a directory"),
        ("/proc/log", "cannot be written"),
    ],
)
def test_a_log_that_cannot_be_written_ends_a_dry_run(tiny, tmp_path, log, message):
    (tmp_path / "file").touch()
    done = run_module("serve", tiny, "--dry-run", "--log", tmp_path / log)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: --log {tmp_path / log}: {message}")


def test_a_log_never_replaces_a_file_of_the_checkpoint(tiny_copy, tmp_path):
    (tiny_copy / "older.log").touch()
    (tmp_path / "config.json").touch()
    for allowed in (tiny_copy / "older.log", tiny_copy / "new.txt", tmp_path / "config.json"):
        assert list(log_faults(allowed, tiny_copy)) == []
    (tmp_path / "link").symlink_to(tiny_copy)
    for log in (tiny_copy / "config.json", tmp_path / "link" / "config.json"):
        (fault,) = log_faults(log, tiny_copy)
        assert "is a file of the checkpoint" in str(fault)


def test_sampling_defaults_of_a_flag_that_no_request_survives_are_refused(tiny):
    flags = ["--override-generation-config", '{"temperature": "zzz", "unknown": 1}']
    with pytest.raises(BadInput, match="--override-generation-config: temperature is 'zzz'"):
        preflight(tiny, ANY_PORT, ON_CPU, flags)
    for good in ('{"temperature": 0.5}', "not JSON"):
        preflight(tiny, ANY_PORT, ON_CPU, [flags[0], good])


def test_an_empty_path_is_refused_by_every_command():
    done = run_module("serve", "", "--dry-run")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("argument DIR: is empty (give a path)")


def test_help_names_every_setting_once():
    done = run_module("serve", "--help")
    assert done.returncode == 0
    for option in ("--video-pruning-rate", "--fps", "--port", "--dtype", "--verbose"):
        assert done.stdout.count(f"  {option} ") + done.stdout.count(f", {option} ") == 1


def test_bad_input_ends_with_status_2_and_no_traceback(tiny_copy):
    (tiny_copy / "tokenizer.json").unlink()
    done = run_module("serve", tiny_copy, "--port", "0", "--video-pruning-rate", "1.5")
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if not line.startswith("error: ")] == []
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_model_len": 10**9}, "max_model_len: is 1000000000, and the model has at most"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size: is 3, which does not divide"),
    ],
)
def test_what_vllm_refuses_for_this_model_is_refused_first(settings, reason, tiny_config):
    found = [str(fault) for fault in limit_faults(tiny_config, ServeSettings(**settings))]
    assert found
    assert reason in found[0]


def test_a_longer_context_is_left_to_who_allows_it(tiny_config, monkeypatch):
    monkeypatch.setenv(LONGER_VARIABLE, "1")
    assert list(limit_faults(tiny_config, ServeSettings(max_model_len=10**9))) == []


STEP_FLAGS = {
    "--max-num-seqs 8000": "--max-num-seqs: is 8000, and a step has 6,144 tokens",
    "--max-num-seqs 200 --max-num-batched-tokens 100": "is 200, and a step has 100 tokens",
    "--max-num-active-seqs 9 --max-num-seqs 5": "--max-num-active-seqs: is 9, and --max-num-seqs",
    "--long-prefill-token-threshold 65537": "is 65537, and the longest sequence has 65,536 tokens",
    "--no-enable-chunked-prefill": "65,536 tokens, and one has 6,144",
    "--max-num-seqs 6144": None,
    "--max-num-seqs 8000 --max-num-batched-tokens 8000": None,
    "--max-num-active-seqs 5 --max-num-seqs 5": None,
    "--long-prefill-token-threshold 65536": None,
    "--no-enable-chunked-prefill --max-num-batched-tokens 65536": None,
    "--enable-chunked-prefill": None,
}
"""Flags that vLLM's scheduler compares, and what the fault says."""


@pytest.mark.parametrize("text", STEP_FLAGS)
def test_numbers_that_do_not_go_together_are_refused_first(text, tiny_config):
    found = [str(fault) for fault in step_faults(tiny_config, ServeSettings(), text.split())]
    if STEP_FLAGS[text] is None:
        assert found == []
    else:
        (fault,) = found
        assert STEP_FLAGS[text] in fault


def test_a_server_with_a_key_needs_the_plug_in_that_guards_it(tiny, monkeypatch):
    old = dataclasses.replace(ON_CPU, plugin="0.2.0")
    assert preflight(tiny, ANY_PORT, old).directory == tiny
    keyed = ServeSettings(port=0, api_key="secret")
    with pytest.raises(BadInput, match=r"is version 0\.2\.0 \(run hybridquant setup-serve"):
        preflight(tiny, keyed, old)
    assert preflight(tiny, keyed, ON_CPU).directory == tiny
