"""The calibration algorithms of ModelOpt whose results vLLM can load: their settings, and what each
does to weights.

AWQ's smoothing (`awq_lite`, `awq_full`) and SmoothQuant divide a linear's input by a
`pre_quant_scale`. ModelOpt 0.47's exporter folds it into the norm before a linear. In this model
down_proj follows a ReLU² and o_proj an attention with fewer values than queries, where it is not
folded; the exporter writes the rest beside the weights as `NVFP4_AWQ`. vLLM 0.32 refuses that name
(`QUANT_ALGOS` in its modelopt.py) and never reads such a scale, so these are not offered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from checkpoint.faults import Fault
from quantize.formats.registry import FORMATS, Format
from quantize.policy import Policy

Change = Literal["rounded", "clipped", "moved"]
"""What an algorithm does to a weight: it rounds it, clips it to a searched range and rounds it, or
moves it to compensate for the rounding of others."""


@dataclass(frozen=True)
class Algorithm:
    """One calibration algorithm.

    Attributes:
        method: ModelOpt's name for it.
        change: What it does to the weights of the formats that it applies to.
        needs_block_scales: Whether it applies only to formats with block scales. Linears of other
            formats in the same recipe keep their absolute maxima.
        repeats: Whether it runs over the calibration samples more than once.
        searches_blocks: Whether it sets each block scale, which ModelOpt then holds in a static
            quantizer.
    """

    method: str
    change: Change
    needs_block_scales: bool = False
    repeats: bool = False
    searches_blocks: bool = False

    def applies_to(self, format: Format) -> bool:
        """Return whether it does anything for linears of a format."""
        return format.has_block_scales or not self.needs_block_scales


ALGORITHMS: dict[str, Algorithm] = {
    "max": Algorithm("max", "rounded"),
    "mse": Algorithm("mse", "clipped", searches_blocks=True),
    "local_hessian": Algorithm(
        "local_hessian", "clipped", needs_block_scales=True, repeats=True, searches_blocks=True
    ),
    "awq_clip": Algorithm("awq_clip", "clipped", needs_block_scales=True),
    "gptq": Algorithm("gptq", "moved", repeats=True, searches_blocks=True),
}
"""By the name that recipes write."""


def algorithm_faults(name: str, policy: Policy, distils: bool) -> Iterator[Fault]:
    """Yield what is wrong with an algorithm for a policy.

    Args:
        name: A key of `ALGORITHMS`.
        policy: Format by linear.
        distils: Whether a distillation follows, which would undo some algorithms.
    """
    where = "quantize.algorithm"
    used = sorted(set(policy.quantized.values()))
    fitting = _fitting_algorithms(used)
    if name not in fitting:
        what = f"{name} does nothing for {', '.join(used)}"
        yield Fault(where, what, f"choose from {', '.join(fitting)}")
    if distils and name != "max":
        # Searched block scales would stay the same while the weights under them train, and
        # GPTQ's weights are not those of the PTQ model that a distillation starts from.
        what = f"{name} finds scales for weights that distillation then changes"
        yield Fault(where, what, "set it to max")


def _fitting_algorithms(formats: list[str]) -> list[str]:
    """Names of the algorithms that do something for at least one of the formats."""
    fitting = []
    for name, algorithm in ALGORITHMS.items():
        if any(algorithm.applies_to(FORMATS[format]) for format in formats):
            fitting.append(name)
    return fitting


def modelopt_algorithm(name: str, policy: Policy, device: str, damping: float) -> dict[str, Any]:
    """Return ModelOpt's `algorithm` section: its defaults, and what its NVFP4 recipes set
    (modelopt_recipes/).

    Args:
        name: A key of `ALGORITHMS`.
        policy: Format by linear.
        device: Where the model is.
        damping: GPTQ's, as a share of the mean diagonal of the Hessian.
    """
    settings: dict[str, Any] = {"method": ALGORITHMS[name].method}
    if name == "mse":
        # The sweep over E4M3 is for block scales, and leaves linears without them at their absolute
        # maxima, as in ModelOpt's recipe for Nemotron 3 Super. Formats without block scales are
        # searched only when no other is there.
        used = set(policy.quantized.values())
        settings["fp8_scale_sweep"] = any(FORMATS[format].has_block_scales for format in used)
    if name == "gptq":
        # Layer by layer: each layer's Hessian is computed after quantized layers, and only those
        # of one layer are in memory (20,480² float32 numbers for a down_proj of the 12B). The
        # fused kernel is Triton's.
        settings["layerwise"] = {"enable": True}
        settings["perc_damp"] = damping
        settings["fused"] = device.startswith("cuda")
    return settings
