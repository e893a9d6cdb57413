"""Our exports of every format in a real vLLM on a CPU, through the plug-in.

The FP8 export is served in tests/export/test_loaded.py.
"""

import json
from pathlib import Path

import pytest
from commands import run_module

from serve.ask import content_parts
from serve.precision import PRECISIONS

PRECISION_BY_VLLM = Path(__file__).with_name("precision_by_vllm.py")
METHODS = {
    "FP8": "modelopt",
    "NVFP4": "modelopt_fp4",
    "W4A16_NVFP4": "modelopt_fp4",
    "MIXED_PRECISION": "modelopt_mixed",
}
MIXED = (
    "quantize.layers=[{format: nvfp4}, {format: fp8, kind: mamba}, {format: bf16, kind: attention},"
    " {format: nvfp4_weight_only, name: down_proj}]"
)


FP8_TOWER = {"HYBRIDQUANT_FP8_TOWER": "1"}


@pytest.fixture(scope="module")
def read_by_vllm(tiny, vllm_process):
    """What vLLM reads of each precision, in config.json and in hf_quant_config.json alone."""
    done = vllm_process.run(PRECISION_BY_VLLM, tiny, *PRECISIONS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("algo", PRECISIONS)
def test_vllm_reads_the_precision_without_being_told(read_by_vllm, algo):
    assert read_by_vllm[f"{algo} in config.json"] == METHODS[algo]
    old = read_by_vllm[f"{algo} in hf_quant_config.json"]
    if PRECISIONS[algo].in_old_config:
        assert old == METHODS[algo]
    else:
        assert old.startswith("error: ")
        assert algo in old


@pytest.fixture(scope="module")
def generate(vllm_process):
    """A function that asks the engine of `hybridquant serve`; the tokens of its answer, its log."""

    def ask_engine(directory, variables=None):
        messages = [{"role": "user", "content": content_parts(["What is it?"])}]
        answer, log = vllm_process.answer(
            directory, {"messages": messages}, more_variables=variables
        )
        return answer["tokens"], log

    return ask_engine


@pytest.fixture(scope="module")
def mixed(generate, nvfp4_export):
    return generate(nvfp4_export(MIXED))


@pytest.fixture(scope="module")
def weight_only(generate, nvfp4_weight_only):
    return generate(nvfp4_weight_only, FP8_TOWER)


def test_our_mixed_export_generates(mixed):
    tokens, log = mixed
    assert tokens >= 1
    assert "quantization=modelopt_mixed," in log
    assert "Using ReferenceNvFp4Kernel" in log
    assert "Using ReferenceNvFp4WeightOnlyKernel" in log
    assert "Selected ReferenceFp8Kernel" in log


def test_our_weight_only_export_generates(weight_only):
    tokens, log = weight_only
    assert tokens >= 1
    assert "quantization=modelopt_fp4," in log
    assert "Using ReferenceNvFp4WeightOnlyKernel" in log
    assert log.count("weight-only NVFP4 (W4A16) layers run on a REFERENCE kernel") == 1


def test_the_towers_linears_are_quantized_on_request(weight_only, mixed):
    """vLLM runs the tower before it answers, and no other linear of a weight-only export is FP8."""
    _, log = weight_only
    assert "Selected ReferenceFp8Kernel for Fp8PerTensorOnlineLinearMethod" in log
    _, other = mixed
    assert "Fp8PerTensorOnlineLinearMethod" not in other


@pytest.mark.server
def test_our_nvfp4_export_is_served_for_one_question(nvfp4):
    """The whole of `python -m serve.ask DIR`: start, ask, stop; clips as its manifest says."""
    done = run_module("serve.ask", nvfp4, "--text", "What is it?", "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert "prompt tokens, " in done.stdout.splitlines()[-1]
    assert "warning: " not in done.stderr
