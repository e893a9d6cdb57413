"""Which linear layer gets which format: rules from the recipe, in order, the last match wins; all
checked first.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from checkpoint.config import MIXER_KINDS
from checkpoint.faults import Fault, nearest, raise_if_any
from checkpoint.layout import Linear
from quantize.formats.registry import FORMATS, UNQUANTIZED


@dataclass(frozen=True)
class Rule:
    """One line of a layer policy. What is not given matches everything.

    Attributes:
        format: `fp8`, `nvfp4` or `bf16`.
        kind: `mamba`, `mlp` or `attention`.
        layers: Layer indices; negative ones count from the last layer.
        name: A shell pattern on the linear's full name or its last part: `o_proj`,
            `*.mixer.in_proj`.
    """

    format: str
    kind: str | None = None
    layers: tuple[int, ...] | None = None
    name: str | None = None

    def matches(self, linear: Linear, depth: int) -> bool:
        """Whether this rule speaks of `linear` in a model of `depth` layers."""
        return (
            (self.kind is None or self.kind == linear.kind)
            and (
                self.layers is None
                or linear.layer in {i % depth for i in self.layers if -depth <= i < depth}
            )
            and (
                self.name is None
                or any(fnmatch.fnmatchcase(n, self.name) for n in (linear.name, linear.short))
            )
        )

    def __str__(self) -> str:
        parts = [
            f"{key}={value}"
            for key in ("kind", "layers", "name")
            if (value := getattr(self, key)) is not None
        ]
        return f"{self.format} for {', '.join(parts) or 'every linear layer'}"


@dataclass(frozen=True)
class Policy:
    """The format of every linear layer of the language model.

    Attributes:
        formats: Format by checkpoint name of the linear, `bf16` for those left alone; in the
            model's order.
        kv_cache: `fp8`, or None for an unquantized KV cache.
    """

    formats: Mapping[str, str]
    kv_cache: str | None = None

    @property
    def quantized(self) -> dict[str, str]:
        """Only the linears that are quantized."""
        return {name: format for name, format in self.formats.items() if format != UNQUANTIZED}

    @property
    def algo(self) -> str:
        """vLLM's `quant_algo`: the one format's, or `MIXED_PRECISION`."""
        used = set(self.quantized.values())
        return FORMATS[used.pop()].algo if len(used) == 1 else "MIXED_PRECISION"

    def counts(self) -> dict[str, int]:
        """Number of linears by format."""
        return dict(Counter(self.formats.values()))


def make_policy(
    rules: Sequence[Rule], linears: Sequence[Linear], kv_cache: str | None = None
) -> Policy:
    """Apply `rules` to the model's linears.

    Raises:
        BadInput: With every fault: an unknown format or kind, a rule that matches nothing or that
            later rules undo altogether, nothing quantized, q, k and v of different formats, or a
            width that the format cannot have.
    """
    faults = []
    depth = 1 + max((linear.layer for linear in linears), default=0)
    formats = {linear.name: UNQUANTIZED for linear in linears}
    for number, rule in enumerate(rules):
        where = f"quantize.layers[{number}]"
        if rule.format not in (*FORMATS, UNQUANTIZED):
            faults.append(
                Fault(
                    where,
                    f"unknown format {rule.format!r}",
                    nearest(rule.format, [*FORMATS, UNQUANTIZED]),
                )
            )
            continue
        if rule.kind is not None and rule.kind not in MIXER_KINDS.values():
            faults.append(
                Fault(
                    where, f"unknown kind {rule.kind!r}", nearest(rule.kind, MIXER_KINDS.values())
                )
            )
            continue
        matched = [linear for linear in linears if rule.matches(linear, depth)]
        if not matched:
            known = ", ".join(sorted({linear.short for linear in linears}))
            faults.append(
                Fault(
                    where, f"{rule} matches no layer", f"the model has {depth} layers with {known}"
                )
            )
        formats.update({linear.name: rule.format for linear in matched})
    if not faults:
        faults += _unfit(formats, linears)
    raise_if_any(faults)
    return Policy(formats, kv_cache)


def _unfit(formats: Mapping[str, str], linears: Sequence[Linear]) -> list[Fault]:
    faults = []
    if all(format == UNQUANTIZED for format in formats.values()):
        # ModelOpt's exporter writes a BF16 directory without a word in this case.
        faults.append(
            Fault(
                "quantize.layers",
                "no layer is quantized",
                "give at least one rule with fp8 or nvfp4",
            )
        )
    fused: dict[int, set[str]] = {}
    for linear in linears:
        format = FORMATS.get(formats[linear.name])
        if format and linear.shape[1] % format.columns:
            what = f"in_features {linear.shape[1]} is no multiple of {format.columns}, which {format.name} needs"
            faults.append(Fault(linear.name, what, "leave it in bf16"))
        if linear.short in ("q_proj", "k_proj", "v_proj"):
            fused.setdefault(linear.layer, set()).add(formats[linear.name])
    for layer, used in fused.items():
        if len(used) > 1:
            what = f"q_proj, k_proj and v_proj have the formats {', '.join(sorted(used))}"
            faults.append(
                Fault(f"layer {layer}", what, "vLLM fuses the three: give them one format")
            )
    return faults
