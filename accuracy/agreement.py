"""Token agreement of a variant with BF16: KL divergence, top-1 agreement, perplexity ratio.

Final hidden states are kept rather than logits (5,120 numbers per token instead of 132,096), and
both models' states go through the same `lm_head`, which is never quantized. So the two models need
not be in memory together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from calibrate.forward import embed
from calibrate.prompts import Prompt
from checkpoint.config import CheckpointConfig

if TYPE_CHECKING:
    from transformers.models.nemotron_h_omni import NemotronH_Omni_Reasoning_V3

_POSITIONS = 512
"""Positions whose logits are computed at once: 2 × 0.27 GB at the 12B's vocabulary."""

_LARGEST_LOG = 700.0
"""exp() of more overflows a float."""


@dataclass(frozen=True)
class States:
    """A model's final hidden states for one prompt.

    Attributes:
        group: The kind of sample, for the table.
        token_ids: int64 [length], after EVS.
        hidden: Final hidden states [length, hidden], normalized, on the CPU.
    """

    group: str
    token_ids: torch.Tensor
    hidden: torch.Tensor


@dataclass(frozen=True)
class Agreement:
    """How well a variant agrees with BF16.

    Attributes:
        prompts: Prompts compared.
        tokens: Positions compared: those whose next token is text, not a visual placeholder.
        kl: Mean KL(BF16 ‖ variant) of the next-token distributions, in nats.
        kl_max: The largest KL of a position.
        top1: Share of positions where both rank the same token first.
        perplexity: BF16's perplexity of the next tokens.
        perplexity_ratio: The variant's over BF16's.
    """

    prompts: int
    tokens: int
    kl: float
    kl_max: float
    top1: float
    perplexity: float
    perplexity_ratio: float


@torch.no_grad()
def final_states(
    model: NemotronH_Omni_Reasoning_V3,
    prompts: Iterable[Prompt],
    config: CheckpointConfig,
    describe: str,
) -> list[States]:
    """Run `prompts` through a model and keep the final hidden states.

    Args:
        model: BF16, or read back from an export.
        prompts: Held-out prompts.
        config: The checkpoint's.
        describe: Name on the progress bar.
    """
    states = []
    for prompt in tqdm(prompts, desc=describe, unit="prompt", leave=False, disable=None):
        embedded = embed(model, prompt, config)
        inputs = embedded.inputs_embeds[None]
        output = model.language_model.model(inputs_embeds=inputs, use_cache=False)
        hidden = output.last_hidden_state[0].cpu()
        states.append(States(prompt.group, embedded.token_ids.cpu(), hidden))
    return states


@torch.no_grad()
def compare(
    reference: Sequence[States],
    variant: Sequence[States],
    lm_head: torch.nn.Module,
    image_token_id: int,
) -> dict[str, Agreement]:
    """Compare two models' states of the same prompts.

    Args:
        reference: BF16's.
        variant: The quantized model's, of the same prompts.
        lm_head: The shared output layer, [vocabulary, hidden].
        image_token_id: Positions before this token are left out: placeholders are not predicted.

    Returns:
        Agreement over `all`, then over each group of prompts.
    """
    sums = {"all": _Sums()}
    for ours, theirs in zip(reference, variant, strict=True):
        if not torch.equal(ours.token_ids, theirs.token_ids):
            raise AssertionError("the two models were given different tokens")
        prompt = _Sums(prompts=1)
        positions = torch.nonzero(ours.token_ids[1:] != image_token_id).flatten()
        for part in positions.split(_POSITIONS):
            prompt = prompt.plus(_compare_positions(ours, theirs, part, lm_head))
        sums["all"] = sums["all"].plus(prompt)
        sums[ours.group] = sums.get(ours.group, _Sums()).plus(prompt)
    return {group: total.agreement() for group, total in sums.items()}


@dataclass(frozen=True)
class _Sums:
    """Sums over positions; `nll` is the negative log-likelihood of the next tokens."""

    prompts: int = 0
    tokens: int = 0
    kl: float = 0.0
    kl_max: float = 0.0
    same_first: int = 0
    nll_reference: float = 0.0
    nll_variant: float = 0.0

    def plus(self, other: _Sums) -> _Sums:
        return _Sums(
            self.prompts + other.prompts,
            self.tokens + other.tokens,
            self.kl + other.kl,
            max(self.kl_max, other.kl_max),
            self.same_first + other.same_first,
            self.nll_reference + other.nll_reference,
            self.nll_variant + other.nll_variant,
        )

    def agreement(self) -> Agreement:
        count = max(self.tokens, 1)
        log_perplexity = self.nll_reference / count
        log_ratio = (self.nll_variant - self.nll_reference) / count
        return Agreement(
            prompts=self.prompts,
            tokens=self.tokens,
            kl=self.kl / count,
            kl_max=self.kl_max,
            top1=self.same_first / count,
            perplexity=math.exp(min(log_perplexity, _LARGEST_LOG)),
            perplexity_ratio=math.exp(min(log_ratio, _LARGEST_LOG)),
        )


def _compare_positions(
    ours: States, theirs: States, part: torch.Tensor, lm_head: torch.nn.Module
) -> _Sums:
    p = _log_probabilities(ours, part, lm_head)
    q = _log_probabilities(theirs, part, lm_head)
    divergence = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    following = ours.token_ids[1:][part].to(p.device)[:, None]
    return _Sums(
        tokens=len(part),
        kl=float(divergence.sum()),
        kl_max=float(divergence.max()),
        same_first=int((p.argmax(-1) == q.argmax(-1)).sum()),
        nll_reference=-float(p.gather(1, following).sum()),
        nll_variant=-float(q.gather(1, following).sum()),
    )


def _log_probabilities(
    states: States, part: torch.Tensor, lm_head: torch.nn.Module
) -> torch.Tensor:
    """float32 [positions, vocabulary]."""
    weight = next(lm_head.parameters())
    hidden = states.hidden[part].to(weight.device, weight.dtype)
    return torch.log_softmax(lm_head(hidden).float(), dim=-1)


def agreement_rows(measured: Mapping[str, Agreement]) -> list[tuple[str, ...]]:
    """The figures as text, one row per group of samples."""
    rows: list[tuple[str, ...]] = []
    for name, figures in measured.items():
        rows.append(
            (
                name.removeprefix("synthetic "),
                str(figures.prompts),
                str(figures.tokens),
                f"{figures.kl:.5f}",
                f"{figures.top1:.2%}",
                f"{figures.perplexity:.4g}",
                f"{figures.perplexity_ratio:.4f}",
            )
        )
    return rows
