"""Muon, the optimizer for the matrices inside the network: it orthogonalises each update.

Jordan et al., 2024 (kellerjordan.github.io/posts/muon), with the scale and the weight decay of
arXiv 2502.16982, which make its steps as large as AdamW's. Matrices of one shape are orthogonalised
in one batch, because for some fifty small matrices most of the time would be kernel launches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# Coefficients of the quintic iteration, from the same page.
_A = 3.4445
_B = -4.7750
_C = 2.0315


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised and scaled by 0.2 sqrt(max(rows, columns)).

    Args:
        parameters: Matrices.
        lr: Learning rate; a tensor may be changed between replays of a CUDA graph.
        momentum: Decay of the mean of the gradients.
        weight_decay: Share of a weight that is removed per step, times `lr`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float | torch.Tensor,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(list(parameters), defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            self._update(group)

    def _update(self, group: dict[str, Any]) -> None:
        # torch._foreach_* has no public name. torch.optim's own optimizers use it too; a loop over
        # single matrices launches fifty times as many kernels.
        parameters = [each for each in group["params"] if each.grad is not None]
        gradients = [each.grad for each in parameters]
        momenta = [self._momentum(each) for each in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
        places_by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for place, parameter in enumerate(parameters):
            places_by_shape[parameter.shape].append(place)
        for shape, places in places_by_shape.items():
            matrices = [parameters[place] for place in places]
            directions = torch.stack([ahead[place] for place in places])
            scale = -0.2 * max(shape) ** 0.5 * group["lr"]
            updates = orthogonal(directions) * scale
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, list(updates))

    def _momentum(self, parameter: nn.Parameter) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]


def orthogonal(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Return approximately the nearest (semi-)orthogonal matrices.

    Args:
        matrices: [matrices, rows, columns].
        steps: Newton-Schulz iterations. After five, singular values are between 0.7 and 1.2.
    """
    x = matrices.bfloat16()
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    if is_tall:
        x = x.mT
    return x.to(matrices.dtype)
