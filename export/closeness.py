"""How near a packed weight must be to its BF16 source, by what the calibration algorithm may do to
weights.

Rounding by absolute maxima has a bound for every element, so one flipped weight shows. A searched
range may clip: the bound then holds against the clipped source. GPTQ moves every weight: what is
left to hold it to is the error of the whole tensor, and that each row and column still points where
the source's does; that shows exchanged, zeroed, shuffled or wrongly scaled weights, and no longer a
single one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from checkpoint.faults import Fault
from quantize.algorithms import Change
from quantize.formats.registry import FORMATS

_ERROR = {"clipped": 2.0, "moved": 6.0}
"""Allowed error of a tensor, in errors of rounding by absolute maxima. On the tiny checkpoint
`local_hessian` reaches 1.1 and GPTQ 1.7; on inputs whose channels spread over two orders of
magnitude, GPTQ reaches 2.8."""
_SLOPE = (0.9, 1.1)
"""Allowed ⟨unpacked, source⟩ / ⟨source, source⟩ of a tensor; 0.987 to 1.000 in all these."""
_LINE_SLOPE = (0.5, 1.5)
"""The same of one row or column; 0.84 to 1.05 there."""
_REMEDY = "is this the right --source? else export again"


def elements_beyond(
    weight: torch.Tensor,
    unpacked: torch.Tensor,
    packed: Mapping[str, torch.Tensor],
    format: str,
    change: Change,
) -> int:
    """How many weights are further from the source than rounding allows; none where they may be
    moved.

    Args:
        weight: The source's, or some rows of it, float32 [out, in].
        unpacked: What the packed tensors stand for, float32 [out, in].
        packed: The packed tensors, by suffix.
        format: A key of `FORMATS`.
        change: What the algorithm may do to weights.
    """
    if change == "moved":
        return 0
    if change == "clipped":
        largest = FORMATS[format].largest(packed)
        weight = torch.minimum(torch.maximum(weight, -largest), largest)
    excess = (unpacked - weight).abs_().sub_(FORMATS[format].error_bound(weight, packed))
    return int((excess > 0).sum()) if bool(excess.max() > 0) else 0


def tensor_faults(
    name: str, weight: torch.Tensor, unpacked: torch.Tensor, format: str, change: Change
) -> Iterator[Fault]:
    """Yield what shows that a whole tensor does not stand for its source; at most one fault, none
    after rounding.

    Args:
        name: The weight's, for the fault.
        weight: The source's, float32 [out, in].
        unpacked: What the packed tensors stand for, float32 [out, in].
        format: A key of `FORMATS`.
        change: What the algorithm may do to weights.
    """
    if change == "rounded":
        return
    allowed = FORMATS[format].relative_error * _ERROR[change]
    error = float((unpacked - weight).norm() / weight.norm())
    slope = float(_slopes(weight.flatten(), unpacked.flatten(), 0))
    if not error <= allowed:  # so that NaN, of a source of zeros, is none that passes
        yield Fault(
            name,
            f"differs from the source by {error:.1%} of its norm, allowed is {allowed:.1%}",
            _REMEDY,
        )
    elif not _SLOPE[0] <= slope <= _SLOPE[1]:
        yield Fault(name, f"is {slope:.3f} times the source on average", _REMEDY)
    else:
        for line, along in (("rows", 1), ("columns", 0)):
            slopes, norms = _slopes(weight, unpacked, along), weight.norm(dim=along)
            # Of a row of nearly nothing rounding leaves no direction.
            told = norms > 0.1 * norms.square().mean().sqrt()
            astray = told & ~((slopes >= _LINE_SLOPE[0]) & (slopes <= _LINE_SLOPE[1]))
            if bool(astray.any()):
                what = f"{int(astray.sum())} of {len(slopes)} {line} do not point where the source's do"
                yield Fault(name, what, _REMEDY)
                return


def _slopes(weight: torch.Tensor, unpacked: torch.Tensor, along: int) -> torch.Tensor:
    return (unpacked * weight).sum(along) / weight.square().sum(along)
