"""How near a packed weight must be to its BF16 source, by what has been done to weights.

Rounding with absolute maxima has a bound for every element, so a single flipped weight is found. A
searched range may clip: the bound then applies to the clipped source. GPTQ and distillation move
every weight, so the error of the whole tensor is checked, and that each row and column still points
in the direction of the source's. That finds exchanged, zeroed, shuffled or wrongly scaled weights,
but not a single one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from checkpoint.faults import Fault
from quantize.algorithms import Change
from quantize.formats.registry import FORMATS, Tensors

Treatment = Change | Literal["trained"]
"""What has been done to a weight: what the algorithm does, or a distillation."""

_ERROR = {"clipped": 2.0, "moved": 6.0}
"""Allowed error of a tensor, as a multiple of the error of rounding with absolute maxima. On the
tiny checkpoint `local_hessian` reaches 1.1 and GPTQ 1.7; on inputs whose channels spread over two
orders of magnitude, GPTQ reaches 2.8."""
_TRAINED_ERROR = 0.5
"""Allowed error of a distilled tensor, as a share of the source's norm."""
_SLOPE = (0.9, 1.1)
"""Allowed ⟨unpacked, source⟩ / ⟨source, source⟩ of a tensor; 0.987 to 1.000 in all these."""
_LINE_SLOPE = (0.5, 1.5)
"""The same for one row or column; 0.84 to 1.05 there."""
_SIGNIFICANT = 0.5
"""Rows and columns with a smaller share of the root mean square norm are left out: rounding leaves
them no direction. On the tiny checkpoint, GPTQ turns columns of up to 0.3 around."""
_MOVED_COLUMNS = 0.01
"""Share of the columns that GPTQ and distillation may turn around: GPTQ makes up for the errors of
one input with the weights of others. Four per mille on the tiny checkpoint."""
_REMEDY = "is this the right --source? else export again"


def elements_beyond(
    weight: torch.Tensor, unpacked: torch.Tensor, packed: Tensors, format: str, treatment: Treatment
) -> int:
    """Count the weights that are further from the source than rounding allows.

    Args:
        weight: The source's, or some of its rows, float32 [out, in].
        unpacked: What the packed tensors represent, float32 [out, in].
        packed: The packed tensors, by suffix.
        format: A key of `FORMATS`.
        treatment: What has been done to the weight.

    Returns:
        Their number; 0 where weights may have moved.
    """
    if treatment in ("moved", "trained"):
        return 0
    if treatment == "clipped":
        largest = FORMATS[format].largest(packed)
        weight = torch.minimum(torch.maximum(weight, -largest), largest)
    excess = (unpacked - weight).abs_().sub_(FORMATS[format].error_bound(weight, packed))
    if not bool(excess.max() > 0):  # counting is a second pass, which a sound weight need not pay
        return 0
    return int((excess > 0).sum())


class Closeness:
    """Compares a whole packed weight with its source, from parts of a few rows.

    Attributes:
        treatment: What has been done to the weight.
        has_lines: Whether rows and columns are compared too, not for vectors.
    """

    def __init__(self, treatment: Treatment, has_lines: bool = True) -> None:
        self.treatment = treatment
        self.has_lines = has_lines
        self._error = 0.0
        self._row_squares: list[torch.Tensor] = []
        self._row_products: list[torch.Tensor] = []
        self._column_squares = torch.zeros(())
        self._column_products = torch.zeros(())

    def add(self, weight: torch.Tensor, unpacked: torch.Tensor) -> None:
        """Add some rows.

        Args:
            weight: The source's, float32 [rows, in].
            unpacked: What the packed tensors represent, float32 [rows, in].
        """
        squares = weight.square()
        products = unpacked * weight
        self._error += float((unpacked - weight).square_().sum(dtype=torch.float64))
        self._row_squares.append(squares.sum(1))
        self._row_products.append(products.sum(1))
        self._column_squares = self._column_squares.to(weight.device) + squares.sum(0)
        self._column_products = self._column_products.to(weight.device) + products.sum(0)

    def faults(self, name: str, format: str) -> Iterator[Fault]:
        """Yield what shows that the weight does not represent its source; at most one fault.

        Args:
            name: The weight's, for the fault.
            format: A key of `FORMATS`.
        """
        squares = torch.cat(self._row_squares)
        products = torch.cat(self._row_products)
        total = float(squares.sum(dtype=torch.float64))
        error = (self._error / total) ** 0.5 if total else float("nan")
        allowed = _allowed_error(format, self.treatment)
        if not error <= allowed:  # also when it is NaN, for a source of zeros
            what = f"differs from the source by {error:.1%} of its norm, allowed is {allowed:.1%}"
            yield Fault(name, what, _REMEDY)
            return
        slope = float(products.sum(dtype=torch.float64)) / total
        if not _SLOPE[0] <= slope <= _SLOPE[1]:
            yield Fault(name, f"is {slope:.3f} times the source on average", _REMEDY)
            return
        if not self.has_lines:
            return
        lines = {
            "rows": (squares, products),
            "columns": (self._column_squares, self._column_products),
        }
        for kind, (own_squares, own_products) in lines.items():
            count = _lines_astray(own_squares, own_products)
            allowed_count = 0.0
            if kind == "columns" and self.treatment in ("moved", "trained"):
                allowed_count = _MOVED_COLUMNS * len(own_squares)
            if count > allowed_count:
                what = f"{count} of {len(own_squares)} {kind} do not point in the direction of the"
                yield Fault(name, f"{what} source's", _REMEDY)
                return


def _allowed_error(format: str, treatment: Treatment) -> float:
    if treatment == "trained":
        return _TRAINED_ERROR
    return FORMATS[format].relative_error * _ERROR[treatment]


def _lines_astray(squares: torch.Tensor, products: torch.Tensor) -> int:
    """Number of rows or columns whose slope is outside the allowed one.

    Args:
        squares: ⟨source, source⟩ of each line.
        products: ⟨unpacked, source⟩ of each line.
    """
    slopes = products / squares
    is_significant = squares > _SIGNIFICANT**2 * squares.mean()
    is_allowed = (slopes >= _LINE_SLOPE[0]) & (slopes <= _LINE_SLOPE[1])
    return int((is_significant & ~is_allowed).sum())
