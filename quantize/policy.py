"""Which linear layer gets which format: the rules of a recipe applied to a model, checked first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from checkpoint.family import NEMOTRON_NANO_VL_V2, Family
from checkpoint.faults import Fault, nearest, raise_if_any, shortened
from checkpoint.layout import Linear
from quantize.formats.registry import FORMATS, MIXED_PRECISION, UNQUANTIZED
from quantize.settings import Rule

__all__ = ["Policy", "Rule", "make_policy"]


@dataclass(frozen=True)
class Policy:
    """The format of every linear layer of the language model.

    Attributes:
        formats: Format by checkpoint name of the linear, `bf16` for those left unquantized; in the
            model's order.
        kv_cache: `fp8`, or None for an unquantized KV cache.
        family: The names of the model family.
    """

    formats: Mapping[str, str]
    kv_cache: str | None = None
    family: Family = NEMOTRON_NANO_VL_V2

    @property
    def quantized(self) -> dict[str, str]:
        """Only the linears that are quantized."""
        return {name: format for name, format in self.formats.items() if format != UNQUANTIZED}

    @property
    def algo(self) -> str:
        """vLLM's `quant_algo`: that of the only format, or `MIXED_PRECISION`."""
        used = set(self.quantized.values())
        if len(used) != 1:
            return MIXED_PRECISION
        return FORMATS[used.pop()].algo

    def counts(self) -> dict[str, int]:
        """Number of linears by format."""
        return dict(Counter(self.formats.values()))

    def fused_groups(self) -> list[list[str]]:
        """Names of the quantized linears that vLLM fuses into one module, such as q, k and v."""
        groups: dict[str, list[str]] = {}
        for name in self.quantized:
            if self.family.fused_parts(name.rpartition(".")[2]):
                groups.setdefault(self.family.fused_module(name), []).append(name)
        return list(groups.values())


def make_policy(
    rules: Sequence[Rule],
    linears: Sequence[Linear],
    kv_cache: str | None = None,
    family: Family = NEMOTRON_NANO_VL_V2,
) -> Policy:
    """Apply `rules` to the linears of a model.

    Args:
        rules: In order; the last that matches a linear wins.
        linears: All linears of the language model, in its order.
        kv_cache: `fp8`, or None.
        family: The names of the model family.

    Raises:
        BadInput: With every fault: an unknown format or kind, a rule that matches nothing, nothing
            quantized, fused linears of different formats, or a width that the format cannot have.
    """
    depth = 1 + linears[-1].layer
    formats = {linear.name: UNQUANTIZED for linear in linears}
    faults: list[Fault] = []
    for number, rule in enumerate(rules):
        where = f"quantize.layers[{number}]"
        unknown = list(_unknown_names(rule, family, where))
        if unknown:
            faults += unknown
            continue
        matched = [linear.name for linear in linears if rule.matches(linear, depth)]
        if not matched:
            known = ", ".join(sorted({linear.short for linear in linears}))
            remedy = f"the model has {depth} layers with {known}"
            faults.append(Fault(where, f"{rule} matches no layer", remedy))
        for name in matched:
            formats[name] = rule.format
    if not faults:
        faults = list(_format_faults(formats, linears, family))
    raise_if_any(faults)
    return Policy(formats, kv_cache, family)


def _unknown_names(rule: Rule, family: Family, where: str) -> Iterator[Fault]:
    known = [*FORMATS, UNQUANTIZED]
    if rule.format not in known:
        what = f"unknown format {shortened(rule.format, 80)!r}"
        yield Fault(where, what, nearest(rule.format, known))
    elif rule.kind is not None and rule.kind not in family.mixers.values():
        what = f"unknown kind {shortened(rule.kind, 80)!r}"
        yield Fault(where, what, nearest(rule.kind, family.mixers.values()))


def _format_faults(
    formats: Mapping[str, str], linears: Sequence[Linear], family: Family
) -> Iterator[Fault]:
    if set(formats.values()) <= {UNQUANTIZED}:
        # ModelOpt's exporter writes a BF16 directory without an error in this case.
        remedy = f"give at least one rule with {' or '.join(FORMATS)}"
        yield Fault("quantize.layers", "no layer is quantized", remedy)
    for linear in linears:
        format = FORMATS.get(formats[linear.name])
        width = linear.shape[1]
        if format is not None and width % format.multiple:
            needed = f"{format.multiple}, which {format.name} needs"
            what = f"in_features {width} is not a multiple of {needed}"
            yield Fault(linear.name, what, "leave it in bf16")
    yield from _fusion_faults(formats, linears, family)


def _fusion_faults(
    formats: Mapping[str, str], linears: Sequence[Linear], family: Family
) -> Iterator[Fault]:
    fused: dict[str, list[Linear]] = {}
    for linear in linears:
        if family.fused_parts(linear.short):
            fused.setdefault(family.fused_module(linear.name), []).append(linear)
    for parts in fused.values():
        used = {linear.short: formats[linear.name] for linear in parts}
        if len(set(used.values())) > 1:
            what = f"{', '.join(used)} have the formats {', '.join(used.values())}"
            remedy = "vLLM fuses them: give them one format"
            yield Fault(f"layer {parts[0].layer}", what, remedy)
