"""ModelOpt's max calibrator without its questions and its repetitions; ranges stay on the device to
the last sample.

Upstream traps of ModelOpt 0.47: `MaxCalibrator.collect` asserts three times a call that the range
is a sound number, and each assertion waits for the GPU. A NaN or an infinity is not lost: it stays
in the maximum, and `quantize.ptq.calibration_faults` names it. Every forward shows each linear's
weight to its calibrator again, which for the 12B reads 24 GB twice a sample. And a range is taken
in two reads of the tensor, its maximum and its minimum.
"""

from __future__ import annotations

import torch
from modelopt.torch.quantization.calib import MaxCalibrator
from modelopt.torch.quantization.utils import convert_quantization_axis_to_reduce_axis, reduce_amax


def absolute_max(x: torch.Tensor, axis: int | tuple[int, ...] | None) -> torch.Tensor:
    """ModelOpt's range of a tensor, of all of it in one read: [] or, along `axis`, the axes kept
    with length 1.
    """
    return torch.linalg.vector_norm(x, torch.inf) if axis is None else reduce_amax(x, axis=axis)


class DeviceMax(MaxCalibrator):
    """Tracks the absolute maximum of all tensors it is shown."""

    _calib_amax: torch.Tensor | None

    @torch.no_grad()
    def collect(self, x: torch.Tensor) -> None:
        """Take a tensor of any shape into the range."""
        axis = convert_quantization_axis_to_reduce_axis(x, self._axis)
        amax = absolute_max(x, axis).detach()
        self._calib_amax = (
            amax if self._calib_amax is None else torch.maximum(self._calib_amax, amax)
        )


class WeightMax(DeviceMax):
    """The absolute maximum of a weight, which calibration does not change: taken the first time it
    is shown.
    """

    def collect(self, x: torch.Tensor) -> None:
        """Take the weight into the range, once."""
        if self._calib_amax is None:
            super().collect(x)
