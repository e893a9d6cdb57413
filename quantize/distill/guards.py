"""Stops a distillation that does not train what it should: quantizers that are not called,
gradients that are missing or in excess, ranges that change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from quantize.distill.weights import Linears, Trained, enabled_quantizers, ranges_of, whole


@contextlib.contextmanager
def watched_quantizers(model: nn.Module) -> Iterator[None]:
    """Check that the body calls every enabled quantizer of the model.

    Raises:
        RuntimeError: It did not, with their names. Seen with mamba_ssm, whose fused kernel takes
            `out_proj.weight` as it is: see `quantize.distill.student.unfuse_mamba`.
    """
    missed = set[str]()
    hooks = []
    for name, quantizer in enabled_quantizers(model):
        missed.add(name)
        hooks.append(quantizer.register_forward_hook(partial(_called, missed, name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if missed:
        what = f"a training step did not call {len(missed)} enabled quantizers"
        raise RuntimeError(f"{what}: {', '.join(sorted(missed))}")


def _called(missed: set[str], name: str, *_: Any) -> None:
    missed.discard(name)


class GradientCheck(TrainerCallback):
    """Checks at the first optimizer step that gradients reach every weight that trains, and no
    other.
    """

    def __init__(self, trained: Trained) -> None:
        self._trained = trained
        self._is_done = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check once.

        Raises:
            RuntimeError: With the weights that lack a gradient and those that have one too many.
        """
        if self._is_done:
            return
        self._is_done = True
        missing = []
        expected = set()
        for name, weight in self._trained.weights.items():
            expected.add(id(weight.parameter))
            if not _has_gradient(weight.parameter):
                missing.append(name)
        unexpected = []
        for name, parameter in kwargs["model"].named_parameters():
            if id(parameter) not in expected and _has_gradient(parameter):
                unexpected.append(name)
        if missing or unexpected:
            raise RuntimeError(f"no gradient at {missing}, and one too many at {unexpected}")


def _has_gradient(parameter: nn.Parameter) -> bool:
    """Return whether there is one, and for matrices that it is not zero: what a vector of a few
    values is given may round to zero.
    """
    if parameter.grad is None:
        return False
    return parameter.dim() < 2 or bool(whole(parameter.grad.norm()))


def copied_ranges(linears: Linears) -> dict[str, torch.Tensor]:
    """Return copies of the linears' ranges, for `check_ranges`."""
    return {name: amax.clone() for name, amax in ranges_of(linears).items()}


def check_ranges(linears: Linears, before: Mapping[str, torch.Tensor]) -> None:
    """Check that the linears have the ranges they had `before`.

    Raises:
        RuntimeError: With the names of those that changed.
    """
    changed = []
    for name, amax in ranges_of(linears).items():
        if not torch.equal(amax.cpu(), before[name].cpu()):
            changed.append(name)
    if changed:
        names = ", ".join(changed)
        raise RuntimeError(f"distillation changed the ranges {names}, which were to stay")
