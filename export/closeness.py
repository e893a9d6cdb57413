"""How near a packed weight must be to its BF16 source, by what the calibration algorithm may do to
weights.

Rounding with absolute maxima has a bound for every element, so a single flipped weight is found. A
searched range may clip: the bound then applies to the clipped source. GPTQ moves every weight, so
the error of the whole tensor is checked, and that each row and column still points in the direction
of the source's. That finds exchanged, zeroed, shuffled or wrongly scaled weights, but not a single
one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from checkpoint.faults import Fault
from quantize.algorithms import Change
from quantize.formats.registry import FORMATS, Tensors

_ERROR = {"clipped": 2.0, "moved": 6.0}
"""Allowed error of a tensor, as a multiple of the error of rounding with absolute maxima. On the
tiny checkpoint `local_hessian` reaches 1.1 and GPTQ 1.7; on inputs whose channels spread over two
orders of magnitude, GPTQ reaches 2.8."""
_SLOPE = (0.9, 1.1)
"""Allowed ⟨unpacked, source⟩ / ⟨source, source⟩ of a tensor; 0.987 to 1.000 in all these."""
_LINE_SLOPE = (0.5, 1.5)
"""The same for one row or column; 0.84 to 1.05 there."""
_REMEDY = "is this the right --source? else export again"


def elements_beyond(
    weight: torch.Tensor, unpacked: torch.Tensor, packed: Tensors, format: str, change: Change
) -> int:
    """Count the weights that are further from the source than rounding allows.

    Args:
        weight: The source's, or some of its rows, float32 [out, in].
        unpacked: What the packed tensors represent, float32 [out, in].
        packed: The packed tensors, by suffix.
        format: A key of `FORMATS`.
        change: What the algorithm may do to weights.

    Returns:
        Their number; 0 where the algorithm may move weights.
    """
    if change == "moved":
        return 0
    if change == "clipped":
        largest = FORMATS[format].largest(packed)
        weight = torch.minimum(torch.maximum(weight, -largest), largest)
    excess = (unpacked - weight).abs_().sub_(FORMATS[format].error_bound(weight, packed))
    if not bool(excess.max() > 0):  # counting is a second pass, which a sound weight need not pay
        return 0
    return int((excess > 0).sum())


def tensor_faults(
    name: str, weight: torch.Tensor, unpacked: torch.Tensor, format: str, change: Change
) -> Iterator[Fault]:
    """Yield what shows that a whole tensor does not represent its source; at most one fault.

    Args:
        name: The weight's, for the fault.
        weight: The source's, float32 [out, in].
        unpacked: What the packed tensors represent, float32 [out, in].
        format: A key of `FORMATS`.
        change: What the algorithm may do to weights; nothing is checked after rounding alone.
    """
    if change == "rounded":
        return
    allowed = FORMATS[format].relative_error * _ERROR[change]
    error = float((unpacked - weight).norm() / weight.norm())
    if not error <= allowed:  # also when it is NaN, for a source of zeros
        what = f"differs from the source by {error:.1%} of its norm, allowed is {allowed:.1%}"
        yield Fault(name, what, _REMEDY)
        return
    slope = float(_slopes(weight.flatten(), unpacked.flatten(), 0))
    if not _SLOPE[0] <= slope <= _SLOPE[1]:
        yield Fault(name, f"is {slope:.3f} times the source on average", _REMEDY)
        return
    for lines, along in (("rows", 1), ("columns", 0)):
        count = _lines_astray(weight, unpacked, along)
        if count:
            total = weight.shape[1 - along]
            what = f"{count} of {total} {lines} do not point in the direction of the source's"
            yield Fault(name, what, _REMEDY)
            return


def _lines_astray(weight: torch.Tensor, unpacked: torch.Tensor, along: int) -> int:
    """Number of rows (`along` 1) or columns (`along` 0) whose slope is outside the allowed one."""
    slopes = _slopes(weight, unpacked, along)
    norms = weight.norm(dim=along)
    # Rounding leaves no direction to a line of nearly nothing.
    is_significant = norms > 0.1 * norms.square().mean().sqrt()
    is_allowed = (slopes >= _LINE_SLOPE[0]) & (slopes <= _LINE_SLOPE[1])
    return int((is_significant & ~is_allowed).sum())


def _slopes(weight: torch.Tensor, unpacked: torch.Tensor, along: int) -> torch.Tensor:
    return (unpacked * weight).sum(along) / weight.square().sum(along)
