"""ModelOpt's calibration algorithms that end in files vLLM loads: its settings for each, and what
each does to weights.

AWQ's smoothing (`awq_lite`, `awq_full`) and SmoothQuant divide a linear's input by a
`pre_quant_scale`. ModelOpt 0.47's exporter folds it into the norm before a linear, but this model's
down_proj comes after a ReLU² and o_proj after an attention with fewer values than queries, which it
does not fold; it writes the rest beside the weights as `NVFP4_AWQ`. vLLM 0.32 refuses that name
(`QUANT_ALGOS` in its modelopt.py) and nowhere reads such a scale. So they are refused here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from checkpoint.faults import Fault
from quantize.policy import Policy

Change = Literal["rounded", "clipped", "moved"]
"""What an algorithm does to a weight: rounds it, clips it to a searched range and rounds it, or
moves it to make up for the rounding of others."""


@dataclass(frozen=True)
class Algorithm:
    """One calibration algorithm.

    Attributes:
        method: ModelOpt's name for it.
        formats: The formats it does something for; others in the same recipe keep their absolute
            maxima.
        change: What it does to the weights of those formats.
        repeats: Whether it runs over the calibration samples more than once.
        searches_blocks: Whether it sets each of NVFP4's block scales, which ModelOpt then holds in
            a static quantizer.
    """

    method: str
    formats: tuple[str, ...]
    change: Change
    repeats: bool = False
    searches_blocks: bool = False


ALGORITHMS: dict[str, Algorithm] = {
    "max": Algorithm("max", ("fp8", "nvfp4"), "rounded"),
    "mse": Algorithm("mse", ("fp8", "nvfp4"), "clipped", searches_blocks=True),
    "local_hessian": Algorithm(
        "local_hessian", ("nvfp4",), "clipped", repeats=True, searches_blocks=True
    ),
    "awq_clip": Algorithm("awq_clip", ("nvfp4",), "clipped"),
    "gptq": Algorithm("gptq", ("fp8", "nvfp4"), "moved", repeats=True, searches_blocks=True),
}
"""By the name that recipes write."""


def algorithm_faults(name: str, policy: Policy, distils: bool) -> Iterator[Fault]:
    """What is wrong with an algorithm for a policy: it would change nothing, or a distillation
    would undo it.
    """
    where, formats = "quantize.algorithm", set(policy.quantized.values())
    if not formats & set(ALGORITHMS[name].formats):
        fit = ", ".join(
            key for key, algorithm in ALGORITHMS.items() if formats & set(algorithm.formats)
        )
        what = f"{name} does nothing for {', '.join(sorted(formats))}"
        yield Fault(where, what, f"choose from {fit}")
    if distils and name != "max":
        # Searched block scales would stay where they are while the weights under them train, and
        # GPTQ's weights are no start for a distillation that begins from PTQ's.
        yield Fault(
            where,
            f"{name} finds scales for weights that distillation then changes",
            "set it to max",
        )


def modelopt_algorithm(name: str, policy: Policy, device: str, damping: float) -> dict[str, Any]:
    """ModelOpt's `algorithm` section, its own defaults but for what its NVFP4 recipes set
    (modelopt_recipes/).

    Args:
        name: A key of `ALGORITHMS`.
        policy: Format by linear.
        device: Where the model is.
        damping: GPTQ's, a share of the mean diagonal of the Hessian.
    """
    settings: dict[str, Any] = {"method": ALGORITHMS[name].method}
    if name == "mse":
        # The sweep over E4M3 is for NVFP4's block scales, and leaves FP8 linears beside them at
        # their absolute maximum, as in ModelOpt's recipe for Nemotron 3 Super. Without it, the step
        # search is for FP8.
        settings["fp8_scale_sweep"] = "nvfp4" in policy.quantized.values()
    if name == "gptq":
        # Layer by layer: each layer's Hessian sees the quantized layers before it, and only one
        # layer's are in memory (20,480² float32 numbers for a down_proj of the 12B). The fused
        # kernel is Triton's.
        settings |= {
            "layerwise": {"enable": True},
            "perc_damp": damping,
            "fused": device.startswith("cuda"),
        }
    return settings
