"""Muon, the optimizer for the matrices inside the network: it orthogonalises each update.

Jordan et al., 2024 (kellerjordan.github.io/posts/muon), with the scale and the weight decay of
arXiv 2502.16982, which make its steps as large as AdamW's. Matrices of one shape are orthogonalised
in one batch, because some fifty small ones would spend their time in kernel launches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn

# Coefficients of the quintic iteration, from the same page.
_A, _B, _C = 3.4445, -4.7750, 2.0315


class Muon(torch.optim.Optimizer):
    """Momentum with Nesterov's look-ahead; the update scaled by 0.2 sqrt(max(rows, columns))."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float | torch.Tensor,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(
            list(parameters), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            gradients = [parameter.grad for parameter in moved]
            for parameter in moved:
                if "momentum" not in self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
            momenta = [self.state[parameter]["momentum"] for parameter in moved]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
            by_shape: dict[torch.Size, list[int]] = defaultdict(list)
            for place, parameter in enumerate(moved):
                by_shape[parameter.shape].append(place)
            for shape, places in by_shape.items():
                scale = -0.2 * max(shape) ** 0.5 * group["lr"]
                updates = orthogonal(torch.stack([ahead[place] for place in places])) * scale
                # The rate may be a tensor, which a CUDA graph reads anew each time.
                torch._foreach_mul_(
                    [moved[place] for place in places], 1 - group["lr"] * group["weight_decay"]
                )
                torch._foreach_add_([moved[place] for place in places], list(updates))


def orthogonal(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrices, about: singular values end between 0.7 and 1.2. [N,
    rows, cols].
    """
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)
