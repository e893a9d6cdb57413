"""Max calibrators for ModelOpt that keep ranges on the device and read no tensor twice.

Upstream traps of ModelOpt 0.47: `MaxCalibrator.collect` asserts three times per call that the range
is a valid number, and each assertion waits for the GPU; NaN and infinity are not lost without them,
because a maximum keeps them and `quantize.ptq.calibration_faults` reports them. Every forward pass
shows each weight to its calibrator again, which for the 12B reads 24 GB twice per sample. And a
range is computed in two reads of the tensor, its maximum and its minimum.
"""

from __future__ import annotations

import torch
from modelopt.torch.quantization.calib import MaxCalibrator
from modelopt.torch.quantization.utils import convert_quantization_axis_to_reduce_axis, reduce_amax


def absolute_max(x: torch.Tensor, axis: int | tuple[int, ...] | None) -> torch.Tensor:
    """Return ModelOpt's range of a tensor.

    Args:
        x: Any shape.
        axis: The axes to reduce, which are kept with length 1; None reduces all, in one read of
            the tensor, to shape [].
    """
    if axis is None:
        return torch.linalg.vector_norm(x, torch.inf)
    return reduce_amax(x, axis=axis)


class DeviceMax(MaxCalibrator):
    """Tracks the absolute maximum of all tensors that it is given."""

    _calib_amax: torch.Tensor | None

    @torch.no_grad()
    def collect(self, x: torch.Tensor) -> None:
        """Extend the range by a tensor of any shape."""
        axis = convert_quantization_axis_to_reduce_axis(x, self._axis)
        amax = absolute_max(x, axis).detach()
        if self._calib_amax is None:
            self._calib_amax = amax
        else:
            self._calib_amax = torch.maximum(self._calib_amax, amax)


class WeightMax(DeviceMax):
    """The absolute maximum of a weight, which calibration does not change: it is read once."""

    def collect(self, x: torch.Tensor) -> None:
        """Set the range to that of the weight, the first time."""
        if self._calib_amax is None:
            super().collect(x)
