"""Kernels and memory are read from vLLM's log, and a served checkpoint answers every question."""

import contextlib
import sys

import pytest

from benchmarks import serving
from checkpoint.faults import BadInput
from serve.demo import COLOURS

# vLLM 0.26 on an H100.
FP8 = """
(EngineCore pid=2) INFO 11-26 09:43:35 [__init__.py:635] Selected CutlassFP8ScaledMMLinearKernel for ModelOptFp8LinearMethod
(EngineCore pid=2) INFO 11-26 09:43:36 [gpu_model_runner.py:5347] Model loading took 13.04 GiB memory and 0.208822 seconds
"""  # noqa: E501
NVFP4 = "(EngineCore pid=2) INFO 11-26 09:43:35 [__init__.py:978] Using MarlinNvFp4LinearKernel for NVFP4 GEMM\n"  # noqa: E501
# vLLM 0.32 on a CPU, a mixed export.
CPU = """
(Worker pid=3) INFO 11-26 12:59:40 [__init__.py:635] Selected ReferenceFp8Kernel for QKVParallelLinear
(Worker pid=3) INFO 11-26 12:59:40 [__init__.py:978] Using ReferenceNvFp4Kernel for NVFP4 GEMM
(Worker pid=3) INFO 11-26 12:59:41 [cpu.py:80] Using default backend AttentionBackendEnum.TORCH_SDPA for vit attention
"""  # noqa: E501


@pytest.mark.parametrize(
    ("log", "kernels", "weights"),
    [
        (FP8, ["CutlassFP8ScaledMMLinearKernel"], 13.04),
        (2 * NVFP4, ["MarlinNvFp4LinearKernel"], None),
        (CPU, ["ReferenceFp8Kernel", "ReferenceNvFp4Kernel"], None),
        ("", [], None),
    ],
)
def test_kernels_and_memory_are_read_from_the_log(log, kernels, weights):
    assert serving.read_log(log) == {"kernels": kernels, "weights_gib": weights}


@pytest.mark.server
def test_a_served_checkpoint_answers_every_kind_of_prompt(server, tiny, tmp_path, monkeypatch):
    started = []

    def running(directory, settings, flags):
        started.append((directory, flags))
        return contextlib.nullcontext(server)

    monkeypatch.setattr(serving, "running_server", running)
    images, video = serving._draw_media(tmp_path)
    assert len(images) == 1 + len(COLOURS)
    found = serving.measure(f"{tiny}:emulation", ["--enforce-eager"], images, video, 4)
    assert started == [(tiny, ["--linear-backend", "emulation", "--enforce-eager"])]
    assert found["answers"].keys() == {"list", "page", "two images", "video"}
    assert all(answer["completion_tokens"] > 0 for answer in found["answers"].values())


def test_a_directory_without_a_checkpoint_is_refused_before_anything_is_served(
    monkeypatch, tmp_path
):
    given = ["x", str(tmp_path / "nowhere"), "--json", str(tmp_path / "j")]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(BadInput, match="nowhere"):
        serving._run()
    assert list(tmp_path.iterdir()) == []
