import dataclasses
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from editing import edit_json, truncate

from checkpoint.faults import BadInput
from serve.environment import CPU, Device, ServeEnvironment
from serve.preflight import preflight
from serve.settings import ServeSettings, served

ANY_PORT = ServeSettings(port=0)
ON_CPU = ServeEnvironment(Path("python"), (0, 32, 0), CPU, plugin="0.1.0")


def on(name, capability, version=(0, 33, 0), count=1):
    return ServeEnvironment(
        Path("python"), version, Device("cuda", name, capability, count), plugin=None
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
    text = faults(tiny_copy, dataclasses.replace(ANY_PORT, video_pruning_rate=1.0, fps=0))
    for part in (
        "tokenizer.json",
        "configuration.py",
        "neither model.safetensors",
        "chat_template.jinja",
    ):
        assert part in text
    for part in ("ps_version", "video_pruning_rate: is 1.0", "fps: is 0"):
        assert part in text


def test_no_such_directory(tmp_path):
    assert "no such directory" in faults(tmp_path / "nothing")


def test_a_truncated_file_is_named(tiny_copy):
    truncate(tiny_copy / "model.safetensors", 0.9)
    assert "model.safetensors: is truncated" in faults(tiny_copy)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs", b"\x02\0\0\0\0\0\0\0[]"])
def test_a_file_that_is_no_safetensors_is_named(tiny_copy, content):
    (tiny_copy / "model.safetensors").write_bytes(content)
    assert "model.safetensors: is" in faults(tiny_copy)


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
        ("FP8", dataclasses.replace(ON_CPU, plugin=None), "serve.mend"),
        ("NVFP4", dataclasses.replace(ON_CPU, plugin=None), "serve.mend"),
        ("FP8", on("A100", (8, 0), version=(0, 26, 0)), "needs capability 8.9; A100 has 8.0"),
        ("FP8", T4, "needs capability 8.0"),
        ("NVFP4", T4, "needs capability 8.0"),
        ("MIXED_PRECISION", on("H100", (9, 0), version=(0, 11, 0)), "vLLM 0.11.0 cannot load"),
        ("INT4_AWQ", H100, "quant_algo is INT4_AWQ"),
        ("", H100, "quant_algo is unnamed"),
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
    ],
)
def test_precisions_that_can_run(tiny_copy, algo, environment):
    quantize(tiny_copy, algo)
    preflight(tiny_copy, ANY_PORT, environment)


def test_devices_that_are_not_there(tiny):
    nothing = dataclasses.replace(H100, device=Device("none", "no GPU"))
    assert "there is no GPU" in faults(tiny, environment=nothing)
    assert "there are 1 GPUs" in faults(
        tiny, dataclasses.replace(ANY_PORT, tensor_parallel_size=2), H100
    )


def test_the_manifest_sets_the_rate_and_the_flag_wins(tiny_copy):
    assert served(tiny_copy).settings.video_pruning_rate == 0.75
    manifest = {
        "serve": {"video_pruning_rate": 0.9, "max_model_len": None},
        "gate": {"passed": None},
    }
    (tiny_copy / "hybridquant.json").write_text(json.dumps(manifest))
    assert served(tiny_copy).settings.video_pruning_rate == 0.9
    assert served(tiny_copy, {"video_pruning_rate": None}).settings.video_pruning_rate == 0.9
    assert served(tiny_copy, {"video_pruning_rate": 0.0}).settings.video_pruning_rate == 0.0
    assert served(tiny_copy).gate_passed is None


@pytest.mark.parametrize(
    "section", [{"pruning_rate": 0.9}, {"video_pruning_rate": "0.9"}, {"port": 1}, []]
)
def test_a_manifest_that_says_something_else_is_refused(tiny_copy, section):
    (tiny_copy / "hybridquant.json").write_text(json.dumps({"serve": section or ["x"]}))
    with pytest.raises(BadInput, match=r"hybridquant\.json"):
        served(tiny_copy)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "serve", *map(str, arguments)], capture_output=True, text=True
    )


def test_dry_run_prints_a_line_a_shell_can_run(tiny):
    done = run(tiny, "--dry-run", "--video-pruning-rate", "0.5", "--", "--max-num-seqs", "4")
    assert done.returncode == 0, done.stderr
    assert "vllm.entrypoints.cli.main serve" in done.stdout
    assert "--video-pruning-rate 0.5" in done.stdout
    assert done.stdout.rstrip().endswith("--max-num-seqs 4")
    assert "VLLM_CPU_KVCACHE_SPACE=1 " in done.stdout


def test_a_failed_gate_is_said_and_does_not_stop(tiny_copy):
    (tiny_copy / "hybridquant.json").write_text(json.dumps({"gate": {"passed": False}}))
    done = run(tiny_copy, "--dry-run")
    assert done.returncode == 0
    assert "failed its accuracy gate" in done.stderr


def test_bad_input_ends_with_status_2_and_no_traceback(tiny_copy):
    (tiny_copy / "tokenizer.json").unlink()
    done = run(tiny_copy, "--port", "0", "--video-pruning-rate", "1.5")
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if not line.startswith("error: ")] == []
    assert len(done.stderr.splitlines()) == 2
