"""The plan that `hybridquant serve` prints: each choice with its reason, and known faults."""

import pytest
from commands import run_module
from editing import edit_json

from checkpoint.config import read_config
from serve.environment import CPU, Gpu, ServeEnvironment, cuda_device
from serve.known_faults import KNOWN_FAULTS, Situation, faults_of
from serve.plan import serving_plan
from serve.settings import ServeSettings

GB = 1e9
GPUS = {
    "B200": Gpu((10, 0), "B200", 192 * GB, 191 * GB),
    "H100": Gpu((9, 0), "H100", 85 * GB, 84 * GB),
    "L40S": Gpu((8, 9), "L40S", 48 * GB, 47 * GB),
    "A100": Gpu((8, 0), "A100", 85 * GB, 84 * GB),
}
ON_CPU = ServeEnvironment("python", (0, 32, 0), CPU, "0.2.1")


def on(name):
    return ServeEnvironment("python", (0, 33, 0), cuda_device([GPUS[name]]), "0.2.1")


def plan(directory, environment, extra=()):
    config = read_config(directory)
    choices = serving_plan(config, ServeSettings(), environment, extra)
    return {choice.name: str(choice) for choice in choices}


@pytest.mark.parametrize(
    ("algo", "gpu", "part"),
    [
        (None, "A100", "BF16 (the checkpoint is not quantized)"),
        ("FP8", "H100", "FP8 (H100 has kernels for it)"),
        ("FP8", "L40S", "FP8 (L40S has kernels for it)"),
        ("FP8", "A100", "FP8, weights only: activations stay in BF16 (A100 has capability 8.0"),
        ("NVFP4", "B200", "NVFP4 (B200 has kernels for it)"),
        ("NVFP4", "H100", "activations need 10.0; an FP8 export is faster there"),
        ("MIXED_PRECISION", "H100", "activations need 10.0; an FP8 export is faster there"),
        ("W4A16_NVFP4", "H100", "W4A16_NVFP4 (H100 has kernels for it)"),
    ],
)
def test_the_precision_is_named_with_what_the_gpu_does(tiny_copy, algo, gpu, part):
    if algo is not None:
        section = {"quant_method": "modelopt", "quant_algo": algo}
        edit_json(tiny_copy / "config.json", lambda raw: raw.update(quantization_config=section))
    assert part in plan(tiny_copy, on(gpu))["precision"]


def test_a_cpu_is_said_to_be_slow_for_quantized_checkpoints(fp8):
    assert "reference kernels" in plan(fp8, ON_CPU)["precision"]


def test_memory_and_step_name_their_numbers(tiny):
    lines = plan(tiny, on("H100"))
    assert "for sequences (of 78.2 GB, weights take" in lines["memory"]
    assert "B a token of KV cache" in lines["sequences"]
    assert "a clip of 128 frames at EVS rate 0.75" in lines["step"]
    given = plan(tiny, on("H100"), ["--max-num-batched-tokens", "9000"])
    assert given["step"] == "step: 9,000 tokens (given)"


def situation(version=(0, 33, 0), flags=(), **changed):
    values = {"device": CPU, "ranks": 1, "is_quantized": True, "has_fast_video": True}
    values |= {"is_tuned": False} | changed
    return Situation(vllm=version, flags=frozenset(flags), **values)


def sources(*arguments, **changed):
    return [fault.source for fault in faults_of(situation(*arguments, **changed))]


def test_no_fault_is_named_where_none_can_occur():
    assert sources() == []


def test_each_fault_is_named_where_it_can_occur():
    assert "vLLM issues 45699 and 53912" in sources(flags=["--enable-prefix-caching"])
    assert "vLLM pull request 39032" in sources((0, 19, 9))
    assert "vLLM pull request 39032" not in sources((0, 20, 0))
    assert "vLLM issue 34476" in sources(ranks=2)
    assert "vLLM issue 34476" not in sources(ranks=2, is_quantized=False)
    assert len(sources((0, 32, 0), has_fast_video=False)) == 2
    assert len(sources((0, 33, 0), has_fast_video=False)) == 3
    assert "vLLM issue 44251" in sources(device=on("H100").device)


def test_every_fault_has_a_source_and_a_remedy():
    for fault in KNOWN_FAULTS:
        assert fault.symptom
        assert fault.remedy
        assert "vLLM" in fault.source or "docs/" in fault.source


def test_switching_prefix_caching_off_is_no_fault(tiny):
    lines = plan(tiny, ON_CPU, ["--no-enable-prefix-caching"])
    assert not any(name.startswith("vLLM") for name in lines)
    lines = plan(tiny, ON_CPU, ["--enable-prefix-caching"])
    assert "45699" in lines["vLLM 0.32.0"]


def test_a_dry_run_prints_the_plan(tiny):
    done = run_module("serve", tiny, "--dry-run")
    assert done.returncode == 0
    for name in ("precision", "memory", "sequences", "step", "requests", "fast video"):
        assert f"{name}: " in done.stderr
