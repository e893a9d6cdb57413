"""The loss of a distillation, computed from hidden states a few positions at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from modelopt.torch.distill.losses import LogitsDistillationLoss
from torch import nn
from torch.utils.checkpoint import checkpoint

from quantize.distill.packing import Packed
from quantize.distill.rows import IGNORE

POSITIONS = 512
"""Positions whose logits exist at once: 2 × 0.27 GB at the 12B's vocabulary. ModelOpt's own loss
would hold several tensors of 8.7 GB at 16,384 tokens.
"""


@contextlib.contextmanager
def replaced_head(model: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator:
    """Let `forward` take the place of the output layer's own; it is given the hidden states.

    What it computes runs inside the model's forward. There the output layer's weight is whole
    where FSDP has sharded the model, and it is whole again when the backward reaches it.
    """
    head: Any = model.lm_head
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def hidden_states(
    model: nn.Module, inputs_embeds: torch.Tensor, packed: Packed | None = None
) -> torch.Tensor:
    """Return what the model's output layer would be given, [1, length, hidden] in float32.

    Args:
        model: The language model.
        inputs_embeds: [1, length, hidden].
        packed: The samples in the row; None if it is one.
    """
    with replaced_head(model, _identity):
        return model(inputs_embeds=inputs_embeds, use_cache=False, packed=packed).logits


def _identity(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def loss_sum(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor,
    head: torch.Tensor,
    teacher_head: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum the loss over the positions whose next token counts, in nats.

    With a teacher it is ModelOpt's forward KL divergence of the next token's distribution, without
    one the cross-entropy of the next token itself. The logits are computed again in the backward.

    Args:
        student: The student's hidden states [1, length, hidden].
        teacher: The teacher's, or None.
        labels: int64 [1, length]; tokens labelled `IGNORE` do not count.
        head: Weight [vocabulary, hidden] of the student's output layer.
        teacher_head: The teacher's; the student's when None.
        weights: float32 [1, length], what each token counts; 1 when None.
    """
    next_tokens = labels[:, 1:]
    counted = next_tokens != IGNORE
    ours = student[:, :-1][counted].to(head.dtype)
    piece: Callable[..., torch.Tensor]
    if teacher is None:
        piece = _cross_entropy
        targets = next_tokens[counted]
    else:
        piece = _divergence
        targets = teacher[:, :-1][counted].to(head.dtype)
    if weights is None:
        weights = torch.ones(labels.shape, device=labels.device)
    shares = weights[:, 1:][counted].split(POSITIONS)
    sums = []
    heads = [head] if teacher is None else [head, head if teacher_head is None else teacher_head]
    pieces = zip(ours.split(POSITIONS), targets.split(POSITIONS), shares, strict=True)
    for some, their_targets, their_weights in pieces:
        losses = checkpoint(piece, some, their_targets, *heads, use_reentrant=False)
        sums.append((losses * their_weights).sum())
    return torch.stack(sums).sum()


def _divergence(
    student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor, teacher_head: torch.Tensor
) -> torch.Tensor:
    criterion = LogitsDistillationLoss(temperature=1.0, reduction="none")
    ours = F.linear(student, head).float()
    theirs = F.linear(teacher, teacher_head).float()
    return criterion(ours, theirs)


def _cross_entropy(student: torch.Tensor, tokens: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    logits = F.linear(student, head).float()
    return F.cross_entropy(logits, tokens, reduction="none")
