"""Our exports of every format on a real vLLM on a CPU, through the plug-in."""

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import run_module

from serve.ask import ask, content_parts
from serve.environment import find_python
from serve.precision import PRECISIONS
from serve.process import running_server

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
def read_by_vllm(tiny, tmp_path_factory):
    """What vLLM reads of each precision, in config.json and in hf_quant_config.json alone."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [find_python(), PRECISION_BY_VLLM, tiny, *PRECISIONS],
        env=environment,
        cwd=tmp_path_factory.mktemp("x"),
        capture_output=True,
        text=True,
    )
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


def generate(directory, variables=None):
    with running_server(directory, more_variables=variables) as server:
        parts = content_parts(["What is it?"])
        answer = ask(server.client(), server.model, parts, max_tokens=8)
        return answer, server.log.read_text()


def ask_directory(directory):
    return run_module("serve.ask", directory, "--text", "What is it?", "--max-tokens", "8")


@pytest.fixture(scope="module")
def served(nvfp4, nvfp4_weight_only, nvfp4_export):
    """Two servers at once: starting one imports vLLM three times, and uses one core.

    That of the FP8 export is in tests/export/test_loaded.py.
    """
    mixed = nvfp4_export(MIXED)
    with ThreadPoolExecutor(max_workers=2) as pool:
        started = {
            "mixed": pool.submit(generate, mixed),
            "nvfp4": pool.submit(ask_directory, nvfp4),
            "weight_only": pool.submit(generate, nvfp4_weight_only, FP8_TOWER),
        }
    return started


@pytest.mark.server
def test_our_mixed_export_generates(served):
    answer, log = served["mixed"].result()
    assert answer.completion_tokens >= 1
    assert "quantization=modelopt_mixed," in log
    assert "Using ReferenceNvFp4Kernel" in log
    assert "Using ReferenceNvFp4WeightOnlyKernel" in log
    assert "Selected ReferenceFp8Kernel" in log


@pytest.mark.server
def test_our_weight_only_export_generates(served):
    answer, log = served["weight_only"].result()
    assert answer.completion_tokens >= 1
    assert "quantization=modelopt_fp4," in log
    assert "Using ReferenceNvFp4WeightOnlyKernel" in log
    assert log.count("weight-only NVFP4 (W4A16) layers run on a REFERENCE kernel") == 1


@pytest.mark.server
def test_the_towers_linears_are_quantized_on_request(served):
    """vLLM runs the tower before it answers, and no other linear of a weight-only export is FP8."""
    _, log = served["weight_only"].result()
    assert "Selected ReferenceFp8Kernel for Fp8PerTensorOnlineLinearMethod" in log
    _, other = served["mixed"].result()
    assert "Fp8PerTensorOnlineLinearMethod" not in other


@pytest.mark.server
def test_our_nvfp4_export_is_served_for_one_question(served):
    """The whole of `python -m serve.ask DIR`: start, ask, stop; clips as its manifest says."""
    done = served["nvfp4"].result()
    assert done.returncode == 0, done.stderr
    assert "prompt tokens, " in done.stdout.splitlines()[-1]
    assert "warning: " not in done.stderr
