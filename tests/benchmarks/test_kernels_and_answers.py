"""What vLLM makes of a checkpoint is read from its log and its answers."""

import contextlib
import sys

import pytest

from benchmarks import serving, tiny_accuracy
from checkpoint.faults import BadInput
from serve.demo import COLOURS, draw_page, draw_square, draw_video

# vLLM 0.26 on an H100.
FP8 = """
(EngineCore pid=2) INFO 11-26 09:43:35 [__init__.py:635] Selected CutlassFP8ScaledMMLinearKernel for ModelOptFp8LinearMethod
(EngineCore pid=2) INFO 11-26 09:43:36 [gpu_model_runner.py:5347] Model loading took 13.04 GiB memory and 0.208822 seconds
"""  # noqa: E501
NVFP4 = "(EngineCore pid=2) INFO 11-26 09:43:35 [__init__.py:978] Using MarlinNvFp4LinearKernel for NVFP4 GEMM\n"
# vLLM 0.32 on a CPU, a mixed export.
CPU = """
(Worker pid=3) INFO 11-26 12:59:40 [__init__.py:635] Selected ReferenceFp8Kernel for QKVParallelLinear
(Worker pid=3) INFO 11-26 12:59:40 [__init__.py:978] Using ReferenceNvFp4Kernel for NVFP4 GEMM
(Worker pid=3) INFO 11-26 12:59:41 [cpu.py:80] Using default backend AttentionBackendEnum.TORCH_SDPA for vit attention
"""


@pytest.mark.parametrize(
    ("log", "kernels", "weights"),
    [
        (FP8, ["CutlassFP8ScaledMMLinearKernel"], 13.04),
        (2 * NVFP4, ["MarlinNvFp4LinearKernel"], None),
        (CPU, ["ReferenceFp8Kernel", "ReferenceNvFp4Kernel"], None),
        ("", [], None),
    ],
)
def test_kernels_and_memory_are_what_the_log_says(log, kernels, weights):
    assert serving.said(log) == {"kernels": kernels, "weights_gib": weights}


def test_a_served_checkpoint_answers_every_kind_of_prompt(server, tiny, tmp_path, monkeypatch):
    seen = []

    def running(directory, settings, flags):
        seen.append((directory, flags))
        return contextlib.nullcontext(server)

    monkeypatch.setattr(serving, "running_server", running)
    images, video = [tmp_path / f"{name}.png" for name in ("page", *COLOURS)], tmp_path / "clip.mp4"
    draw_page(images[0])
    for path in images[1:]:
        draw_square(path, path.stem)
    draw_video(video)
    found = serving.measure(f"{tiny}:emulation", ["--enforce-eager"], images, video, 4)
    assert seen == [(tiny, ["--linear-backend", "emulation", "--enforce-eager"])]
    assert found["answers"].keys() == {"list", "page", "two images", "video"}
    assert all(answer["completion_tokens"] > 0 for answer in found["answers"].values())


def test_a_directory_that_is_no_checkpoint_is_refused_before_anything_is_served(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(
        sys, "argv", ["x", str(tmp_path / "nowhere"), "--json", str(tmp_path / "j")]
    )
    with pytest.raises(BadInput, match="nowhere"):
        serving._run()
    assert list(tmp_path.iterdir()) == []


def test_served_forms_are_compared_with_bf16_served_and_with_ptq_of_the_same_backend(
    tmp_path, monkeypatch
):
    right = {"bf16": 4, "nvfp4": 2, "nvfp4:emulation": 1, "nvfp4_qad:emulation": 3}

    def served(name, asked, **_):
        answers = {
            task: [sample.answer if n < right[name] else "x" for n, sample in enumerate(samples)]
            for task, samples in asked.items()
        }
        return {"answers": answers, "kernels": [name], "weights_gib": None}

    def answered(config, samples, rate):
        return {task: ["x"] * len(given) for task, given in samples.items()}

    monkeypatch.setattr(tiny_accuracy, "made", lambda form, work, model, settings: model)
    monkeypatch.setattr(tiny_accuracy, "_distillation", lambda directory: {})
    monkeypatch.setattr(tiny_accuracy, "answer_tasks", answered)
    monkeypatch.setattr(tiny_accuracy, "served_answers", served)
    found = tiny_accuracy.measure(tmp_path, ["nvfp4", "nvfp4_qad"], list(right), 4, ["text"])
    against = {
        name: (rows[0]["reference"], rows[0]["variant"])
        for name, rows in found["served_against_bf16"].items()
    }
    assert against == {
        "nvfp4": (1, 0.5),
        "nvfp4:emulation": (1, 0.25),
        "nvfp4_qad:emulation": (1, 0.75),
    }
    assert found["won_back_served"] == {"nvfp4_qad:emulation": round(2 / 3, 3)}
    assert found["kernels"]["nvfp4"] == ["nvfp4"]
