"""Measures what the plug-in's ways with clips and pictures cost in accuracy.

    python -m benchmarks.video_accuracy --items 300 --json FILE

The tiny checkpoint is served by stock vLLM, with the plug-in, and with the plug-in and its tower in
FP8. All answer the same items of the tasks with pictures and clips, whose answers are known.
Intervals are paired 95 % intervals of the difference from stock. What EVS keeps with a tower in FP8
is computed in this process, with ModelOpt's FP8: weights per tensor, activations per token.
"""

from __future__ import annotations

import argparse
import copy
import functools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from rich.console import Console

from accuracy.endpoint import ask_endpoint
from accuracy.paired import pair, paired_table
from benchmarks.answers import described, differing
from benchmarks.environment import device_name
from benchmarks.parts import Parts, write_json
from benchmarks.serving import vllm_version
from calibrate.forward import embed
from calibrate.prompts import Prompt, build_prompt
from calibrate.samples import Sample
from checkpoint.command import command_parser, parse_command
from checkpoint.faults import main
from checkpoint.libraries import installed_versions, prepare_libraries
from checkpoint.native import load_model
from checkpoint.opened import Checkpoint, open_checkpoint
from checkpoint.video import Video
from quantize.modelopt_output import printed_to_log
from serve.process import running_server
from serve.settings import ServeSettings
from tiny.checkpoint import tiny_checkpoint
from tiny.tasks import check_tasks, items

STOCK = "stock"

WAYS: Mapping[str, Mapping[str, str]] = {
    STOCK: {"HYBRIDQUANT_FAST_VIDEO": "0"},
    "plug-in": {"HYBRIDQUANT_FAST_VIDEO": "1"},
    "plug-in, FP8 tower": {"HYBRIDQUANT_FAST_VIDEO": "1", "HYBRIDQUANT_FP8_TOWER": "1"},
}
"""Environment variables of the server by way."""

TASKS = ("document", "chart", "images", "video_event", "video_static")

CLIPS = 24
"""Clips whose masks are compared."""


def answers_of(
    directory: Path, way: str, samples: Mapping[str, Sequence[Sample]], video: Video
) -> dict[str, Any]:
    """Let a server answer in one of the ways.

    Returns:
        `answers` by task.
    """
    settings = ServeSettings(port=0, video=video)
    # Stock vLLM needs the checkpoint's code.
    flags = ["--trust-remote-code"] if way == STOCK else []
    with running_server(directory, settings, flags, more_variables=WAYS[way]) as server:
        return {"answers": ask_endpoint(server.url, samples)}


def kept_in_common(
    directory: Path, samples: Sequence[Sample], video: Video
) -> dict[str, float | int]:
    """Compare what EVS keeps of clips with a tower in BF16 and in FP8.

    Returns:
        `share`: of the visual tokens that are kept with BF16, those that are kept with FP8 too;
        `lowest`: the same of the clip that differs most; `clips`: their number.
    """
    checkpoint = open_checkpoint(directory)
    prompts = [
        build_prompt(sample, checkpoint.config, checkpoint.tokenizer, video) for sample in samples
    ]
    model = load_model(checkpoint, layers=False)
    plain = [kept_visual_tokens(model, prompt, checkpoint) for prompt in prompts]
    quantize_tower(model.vision_model)
    quantized = [kept_visual_tokens(model, prompt, checkpoint) for prompt in prompts]
    common = [int((one & other).sum()) for one, other in zip(plain, quantized, strict=True)]
    kept = [int(mask.sum()) for mask in plain]
    shares = [both / all_kept for both, all_kept in zip(common, kept, strict=True)]
    return {"share": sum(common) / sum(kept), "lowest": min(shares), "clips": len(shares)}


def kept_visual_tokens(model: Any, prompt: Prompt, checkpoint: Checkpoint) -> torch.Tensor:
    """Return which visual tokens of a prompt with one clip remain, bool [tokens before EVS]."""
    embedded = embed(model, prompt, checkpoint.config)
    (media,) = prompt.media
    return torch.cat([embedded.kept[run.start : run.end] for run in media.visual])


def quantize_tower(tower: torch.nn.Module) -> None:
    """Round a tower's linears to FP8 as vLLM's online quantization does, by ModelOpt."""
    config = copy.deepcopy(mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG)
    for rule in config["quant_cfg"]:
        if rule["quantizer_name"] == "*weight_quantizer":
            rule["cfg"]["axis"] = None
    with printed_to_log():
        mtq.quantize(tower, config)


def measure(work: Path, tasks: Sequence[str], count: int, video: Video) -> dict[str, Any]:
    """Let each way answer, and compare the answers with stock's.

    Args:
        work: Folder of the checkpoint, and of what is measured so far.
        tasks: Names of tasks.
        count: Items of each.
        video: How clips are sampled and pruned.
    """
    model = tiny_checkpoint(work / "bf16").directory
    samples = {task: items(task, "test", count) for task in tasks}
    parts = Parts(work / "video_accuracy.json", {"items": count, "tasks": list(tasks)})
    answers = {}
    for way in WAYS:
        ask = functools.partial(answers_of, model, way, samples, video)
        answers[way] = parts.part(way, ask)["answers"]
    against_stock = {}
    for way in WAYS:
        if way != STOCK:
            rows = pair(samples, answers[STOCK], answers[way])
            Console().print(paired_table(rows, STOCK, way))
            against_stock[way] = [described(row) for row in rows]
    clips = [sample for task in tasks if task.startswith("video") for sample in samples[task]]
    return {
        "against_stock": against_stock,
        "answers_that_differ": {
            way: differing(answers[STOCK], answers[way]) for way in against_stock
        },
        "kept_with_fp8_tower": kept_in_common(model, clips[:CLIPS], video) if clips else None,
    }


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.video_accuracy", __doc__)
    parser.add_argument("--items", type=int, default=300, help="of each task (300)")
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"(default: {','.join(TASKS)})")
    parser.add_argument("--rate", type=float, default=0.5, help="EVS rate of clips (0.5)")
    parser.add_argument("--work", type=Path, default=Path("out/video-accuracy"), metavar="DIR")
    parser.add_argument("--json", type=Path, required=True, help="the result file")
    return parser


def _run() -> int:
    given = parse_command(_parser())
    tasks = [task for task in given.tasks.split(",") if task]
    check_tasks(tasks)
    prepare_libraries()
    given.work.mkdir(parents=True, exist_ok=True)
    video = Video(pruning_rate=given.rate)
    options = [f"--items={given.items}", f"--tasks={given.tasks}", f"--rate={given.rate:g}"]
    found = measure(given.work, tasks, given.items, video)
    about = {
        "command": shlex.join(["python", "-m", "benchmarks.video_accuracy", *options]),
        "device": device_name("cuda" if torch.cuda.is_available() else "cpu"),
        "vllm": vllm_version(),
        "versions": installed_versions(),
    }
    write_json(given.json, about | found)
    return 0


if __name__ == "__main__":
    main(_run)
