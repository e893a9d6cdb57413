"""The recipe's section `quantize`."""

from __future__ import annotations

import fnmatch
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from checkpoint.faults import nearest, shortened
from checkpoint.layout import Linear
from checkpoint.settings import Section


class Rule(Section):
    """One rule of the layer policy: which linears get which format.

    What is not given matches everything. Rules apply in order, and the last that matches wins.
    """

    format: str
    """`bf16`, or the name of a format: `fp8`, `nvfp4`, `nvfp4_weight_only`."""
    kind: str | None = None
    """Kind of mixer: `mamba`, `mlp` or `attention`."""
    layers: tuple[int, ...] | None = None
    """Layer indices; negative ones count from the last layer."""
    name: str | None = None
    """Shell pattern on the linear's full name or its last part: `o_proj`, `*.mixer.in_proj`."""

    def matches(self, linear: Linear, depth: int) -> bool:
        """Return whether this rule applies to `linear` in a model of `depth` layers."""
        if self.kind is not None and self.kind != linear.kind:
            return False
        if self.layers is not None:
            indices = {linear.layer, linear.layer - depth}
            if indices.isdisjoint(self.layers):
                return False
        if self.name is not None:
            names = (linear.name, linear.short)
            return any(fnmatch.fnmatchcase(name, self.name) for name in names)
        return True

    def __str__(self) -> str:
        conditions = []
        for key in ("kind", "layers", "name"):
            value = getattr(self, key)
            if value is not None:
                conditions.append(f"{key}={value}")
        return f"{self.format} for {', '.join(conditions) or 'every linear layer'}"


class Auto(Section):
    """Which of several formats each linear gets, by ModelOpt's `auto_quantize`.

    The linears that `quantize.layers` quantizes are searched; those that it leaves in bf16 stay
    so.
    """

    bits: Annotated[float, Field(ge=4, lt=16, allow_inf_nan=False)] = 6.0
    """Mean bits per weight of the searched linears, at most: NVFP4 has 4.5 with its block scales,
    FP8 has 8.
    """
    formats: Annotated[tuple[str, ...], Field(min_length=1)] = ("nvfp4", "fp8")
    """What a linear may become, besides bf16."""
    samples: Annotated[int, Field(ge=1)] = 8
    """Calibration samples to score on; each runs once per group of linears and format."""

    @field_validator("formats")
    @classmethod
    def _check_formats(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        # Imported here because ModelOpt takes ten seconds to import, which a typing error in a
        # recipe without this field need not wait for.
        from quantize.formats.registry import FORMATS

        by_bits: dict[float, str] = {}
        for name in names:
            if name not in FORMATS:
                raise ValueError(
                    f"unknown format {shortened(name, 80)!r}: {nearest(name, FORMATS)}"
                )
            bits = FORMATS[name].bits
            if bits in by_bits:
                raise ValueError(
                    f"{by_bits[bits]} and {name} both have {bits:g} bits per weight, and the search"
                    " chooses by size: give one of them"
                )
            by_bits[bits] = name
        return names


class Quantize(Section):
    """Which layer gets which format, and how its ranges are found."""

    layers: Annotated[tuple[Rule, ...], Field(min_length=1)]
    """Rules in order; the last that matches a linear wins."""
    kv_cache: Literal["fp8"] | None = None
    """Format of the KV cache; null leaves it unquantized, as published."""
    algorithm: Literal["max", "mse", "local_hessian", "awq_clip", "gptq"] = "max"
    """ModelOpt's calibration algorithm; `quantize/algorithms.py` describes what each does, and for
    which formats.
    """
    gptq_damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Added to GPTQ's Hessian, as a share of its mean diagonal: more of it moves weights less."""
    auto: Auto | None = None
    """Without it, every linear has the format that `layers` gives it."""

    memory: Literal["auto", "whole", "layers"] = "auto"
    """`whole` holds the model in the device's memory, `layers` one layer at a time; `auto` decides
    by the device's memory.
    """
    batch_tokens: Annotated[int, Field(ge=1)] = 8192
    """Samples of one length run together up to this many tokens, where that changes no bit."""
    host_memory_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Activations that `layers` keeps in host memory, in 1e9 bytes; the rest goes to a file beside
    the output.
    """

    @field_validator("algorithm", mode="before")
    @classmethod
    def _check_algorithm(cls, name: Any) -> Any:
        if name in ("awq", "awq_lite", "awq_full", "smoothquant", "svdquant"):
            raise ValueError(
                "vLLM cannot load its pre_quant_scale; awq_clip is the part of AWQ that it can"
            )
        return name
