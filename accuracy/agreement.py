"""Token agreement of a variant with BF16: KL divergence, top-1 agreement, perplexity ratio on
held-out prompts.

Final hidden states are kept rather than logits (5,120 numbers a token instead of 132,096), and both
sides go through the same `lm_head`, which is never quantized. So the two models need not be in
memory together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from calibrate.forward import embed
from calibrate.prompts import Prompt
from checkpoint.classes import NemotronH_Omni_Reasoning_V3
from checkpoint.config import CheckpointConfig

_POSITIONS = 512
"""Positions whose logits are computed at once: 2 × 0.27 GB at the 12B's vocabulary."""


@dataclass(frozen=True)
class States:
    """What a model made of one prompt.

    Attributes:
        group: What kind of sample it is, for the table.
        token_ids: int64 [length], after EVS.
        hidden: Final hidden states [length, hidden], normalised, on the CPU.
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
        kl_max: The largest of them.
        top1: Share of positions where both put the same token first.
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
    pruning_rate: float,
    describe: str,
) -> list[States]:
    """Run `prompts` through a model and keep the final hidden states.

    Args:
        model: BF16, or read back from an export.
        prompts: Held-out prompts.
        config: The checkpoint's.
        pruning_rate: EVS rate of videos; give both models the same, and compare what both kept.
        describe: Name on the progress bar.
    """
    states = []
    for prompt in tqdm(prompts, desc=describe, unit="prompt", leave=False, disable=None):
        embedded = embed(model, prompt, config, pruning_rate)
        output = model.language_model.model(
            inputs_embeds=embedded.inputs_embeds[None], use_cache=False
        )
        states.append(
            States(prompt.group, embedded.token_ids.cpu(), output.last_hidden_state[0].cpu())
        )
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
        variant: The quantized model's, of the same prompts at the same pruning rate.
        lm_head: The shared output layer, [vocabulary, hidden].
        image_token_id: Positions before this token are left out: nobody predicts a placeholder.

    Returns:
        `all`, then each group of prompts.
    """
    sums: dict[str, _Sums] = {"all": _Sums()}
    for ours, theirs in zip(reference, variant, strict=True):
        if not torch.equal(ours.token_ids, theirs.token_ids):
            raise AssertionError("the two models were given different tokens")
        prompt = _Sums(prompts=1)
        positions = torch.nonzero(ours.token_ids[1:] != image_token_id).flatten()
        for part in positions.split(_POSITIONS):
            prompt += _compare_positions(ours, theirs, part, lm_head)
        sums["all"] += prompt
        sums[ours.group] = sums.get(ours.group, _Sums()) + prompt
    return {group: total.agreement() for group, total in sums.items()}


@dataclass(frozen=True)
class _Sums:
    prompts: int = 0
    tokens: int = 0
    kl: float = 0.0
    kl_max: float = 0.0
    same: int = 0
    nll_reference: float = 0.0
    nll_variant: float = 0.0

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.prompts + other.prompts,
            self.tokens + other.tokens,
            self.kl + other.kl,
            max(self.kl_max, other.kl_max),
            self.same + other.same,
            self.nll_reference + other.nll_reference,
            self.nll_variant + other.nll_variant,
        )

    def agreement(self) -> Agreement:
        count = max(self.tokens, 1)
        mean_nll, ratio = (
            self.nll_reference / count,
            (self.nll_variant - self.nll_reference) / count,
        )
        return Agreement(
            self.prompts,
            self.tokens,
            self.kl / count,
            self.kl_max,
            self.same / count,
            math.exp(min(mean_nll, 700.0)),
            math.exp(min(ratio, 700.0)),
        )


def _compare_positions(
    ours: States, theirs: States, part: torch.Tensor, lm_head: torch.nn.Module
) -> _Sums:
    weight = next(lm_head.parameters())
    p, q = (
        torch.log_softmax(
            lm_head(states.hidden[part].to(weight.device, weight.dtype)).float(), dim=-1
        )
        for states in (ours, theirs)
    )
    divergence = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    target = ours.token_ids[1:][part].to(weight.device)[:, None]
    return _Sums(
        tokens=len(part),
        kl=float(divergence.sum()),
        kl_max=float(divergence.max()),
        same=int((p.argmax(-1) == q.argmax(-1)).sum()),
        nll_reference=-float(p.gather(1, target).sum()),
        nll_variant=-float(q.gather(1, target).sum()),
    )
