"""Our max calibrators give ModelOpt's ranges without its waiting and without reading a weight at
every forward.
"""

from __future__ import annotations

from collections.abc import Callable

import modelopt.torch.quantization as mtq
import modelopt.torch.quantization.calib.max as modelopt_max
import pytest
import torch
from modelopt.torch.quantization.calib import MaxCalibrator
from modelopt.torch.quantization.utils import reduce_amax
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import quantize.ranges
from quantize.policy import Policy
from quantize.ptq import modelopt_config

NAME = "language_model.backbone.layers.0.mixer.up_proj"
PASSES = 5


def calibrated(calibrators: bool) -> nn.Linear:
    """A linear in FP8 after a few forwards, with our calibrators or ModelOpt's."""
    torch.manual_seed(0)
    linear = nn.Linear(32, 16, bias=False)
    model = nn.Module()
    parent = model
    policy = Policy({NAME: "fp8"}, None)
    *above, last = policy.family.native_module(NAME).split(".")
    for part in above:
        parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    parent.add_module(last, linear)
    config = modelopt_config(policy)
    if not calibrators:
        for entry in config["quant_cfg"]:
            entry.get("cfg", {}).pop("calibrator", None)
    inputs = torch.randn(PASSES, 4, 32)
    mtq.quantize(model, config, lambda _: [linear(x) for x in inputs])
    return linear


def test_the_ranges_are_modelopts():
    ours, stock = calibrated(True), calibrated(False)
    for quantizer in ("weight_quantizer", "input_quantizer"):
        assert getattr(ours, quantizer).amax.equal(getattr(stock, quantizer).amax)


def read_shapes(monkeypatch: pytest.MonkeyPatch, calibrators: bool) -> list[tuple[int, ...]]:
    """Shapes of the tensors whose range was taken."""
    shapes = []
    for module, name in (
        (quantize.ranges, "absolute_max"),
        (modelopt_max.quant_utils, "reduce_amax"),
    ):
        reduce = getattr(module, name)

        def noted(
            x: torch.Tensor, axis: object = None, reduce: Callable[..., torch.Tensor] = reduce
        ) -> torch.Tensor:
            shapes.append(tuple(x.shape))
            return reduce(x, axis)

        monkeypatch.setattr(module, name, noted)
    calibrated(calibrators)
    return shapes


def test_a_weight_is_read_once_however_many_samples_pass(monkeypatch: pytest.MonkeyPatch):
    shapes = read_shapes(monkeypatch, calibrators=True)
    assert (shapes.count((16, 32)), shapes.count((4, 32))) == (1, PASSES)


def test_upstream_trap_modelopt_reads_every_weight_at_every_forward(
    monkeypatch: pytest.MonkeyPatch,
):
    assert read_shapes(monkeypatch, calibrators=False).count((16, 32)) == 1 + PASSES


class Reads(TorchDispatchMode):
    """Counts the operations that read a tensor of 1,000 elements."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.count += any(
            isinstance(given, torch.Tensor) and given.numel() == 1000 for given in arguments
        )
        return function(*arguments, **(named or {}))


def reads(calibrator: MaxCalibrator) -> int:
    x = torch.randn(10, 100)
    with Reads() as counted:
        calibrator.collect(x)
    return counted.count


def test_an_activation_is_read_once():
    assert reads(quantize.ranges.DeviceMax(num_bits=(4, 3), axis=None)) == 1


def test_upstream_trap_modelopt_reads_an_activation_twice():
    assert reads(MaxCalibrator(num_bits=(4, 3), axis=None)) >= 2


@pytest.mark.parametrize("worst", [-7.5, 7.5, float("-inf"), float("nan")])
def test_a_range_taken_in_one_read_is_modelopts(worst: float):
    x = torch.randn(3, 5, 16, dtype=torch.bfloat16)
    x[1, 2, 3] = worst
    ours, stock = quantize.ranges.absolute_max(x, None), reduce_amax(x, axis=None)
    assert (ours.dtype, ours.shape) == (stock.dtype, stock.shape)
    assert torch.equal(ours, stock) or bool(ours.isnan() & stock.isnan())
