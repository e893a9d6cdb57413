"""Our exports of every format on a real vLLM on a CPU, through the plug-in."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serve.ask import ask, connect, content_parts
from serve.environment import find_python
from serve.process import running_server

KERNEL_VALUES = Path(__file__).with_name("kernel_values.py")


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [find_python(), KERNEL_VALUES],
        env=environment,
        cwd=tmp_path_factory.mktemp("x"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_fp8_is_w8a8_to_bf16_rounding(values):
    assert values["fp8_kernel"] == "ReferenceFp8Kernel"
    assert values["fp8_error"] < 2**-8
    # Unquantized activations, as in vLLM's own AMX kernel, would be further off than that.
    assert values["fp8_error_if_w8a16"] > 2 * 2**-8


def test_nvfp4_is_w4a4_to_bf16_rounding(values):
    # Both sides are rounded to BF16 before the product, as in vLLM's emulation.
    assert values["nvfp4_kernel"] == "ReferenceNvFp4Kernel"
    assert values["nvfp4_error"] < 2 * 2**-8
    assert values["nvfp4_error_if_w4a16"] > 0.1


def test_fused_weights_get_one_scale(values):
    # CPU builds declare `static_scaled_fp8_quant() -> ()`; without the stand-in, loading FP8 q/k/v
    # dies on it.
    assert values["merged_error"] == 0


def generate(directory):
    with running_server(directory) as server:
        answer = ask(
            connect(server.url), server.model, content_parts(["What is it?"]), max_tokens=8
        )
        return answer, server.log.read_text()


def ask_directory(directory):
    command = [
        sys.executable,
        "-m",
        "serve.ask",
        str(directory),
        "--text",
        "What is it?",
        "--max-tokens",
        "8",
    ]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def served(fp8, nvfp4_export):
    """Three servers at once: starting one is importing vLLM three times, and uses one core."""
    layers = "quantize.layers=[{format: nvfp4}, {format: fp8, kind: mamba}, {format: bf16, kind: attention}]"
    mixed = nvfp4_export(layers)
    nvfp4 = nvfp4_export()
    with ThreadPoolExecutor() as pool:
        started = {
            "fp8": pool.submit(generate, fp8),
            "mixed": pool.submit(generate, mixed),
            "nvfp4": pool.submit(ask_directory, nvfp4),
        }
    return started


def test_our_fp8_export_generates(served):
    answer, log = served["fp8"].result()
    assert answer.completion_tokens >= 1
    assert "quantization=modelopt," in log
    assert log.count("FP8 (W8A8) layers run on a REFERENCE kernel") == 1


def test_our_mixed_export_generates(served):
    answer, log = served["mixed"].result()
    assert answer.completion_tokens >= 1
    assert "quantization=modelopt_mixed," in log
    assert "Using ReferenceNvFp4Kernel" in log
    assert "Selected ReferenceFp8Kernel" in log


def test_our_nvfp4_export_is_served_for_one_question(served):
    """The whole of `python -m serve.ask DIR`: start, ask, stop."""
    done = served["nvfp4"].result()
    assert done.returncode == 0, done.stderr
    assert "prompt tokens, " in done.stdout.splitlines()[-1]
