"""The recipe's section `distill`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from calibrate.settings import DEFAULT_SOURCES, Sources
from checkpoint.settings import Section
from checkpoint.video import PruningRate

_SHORT_SAMPLE = 64
"""Tokens of a short sample: packed rows that need more samples than this allows begin again."""

_MOST_STEPS = 10**7
_MOST_ROWS = 10**6
_MOST_TOKENS = 2**24
_MOST_HELD_OUT = 10**6
"""Far beyond any training; the samples of a pass, of which these are factors, fit 64 bits."""


class Distill(Section):
    """Distillation of the quantized model from BF16; the defaults are the published run of the 12B.

    Sources: arXiv 2511.03929 (batch, steps, optimizer, warm-up, loss over prompt tokens too) and
    arXiv 2601.20088, Table 7 (learning rate).
    """

    sources: Sources = DEFAULT_SOURCES
    """Where training samples come from. The last turn should be the assistant's: answers count."""
    loss: Literal["kl", "cross_entropy"] = "kl"
    """`kl`: BF16's next-token distributions. `cross_entropy`: the samples' own tokens (QAT)."""
    steps: Annotated[int, Field(ge=1, le=_MOST_STEPS)] = 240
    """Optimizer steps."""
    batch: Annotated[int, Field(ge=1, le=_MOST_ROWS)] = 128
    """Rows per step over all processes; they run one by one and are accumulated. A row is one
    sample unless `pack_length` is given."""
    pack_length: Annotated[int, Field(ge=16, le=_MOST_TOKENS)] | None = None
    """Tokens of a row that is filled with whole samples, which do not see each other. At least
    `max_length`."""
    prompt_weight: Annotated[float, Field(ge=0, le=1)] = 1.0
    """What a token of a prompt counts in the loss beside one of an answer; 1 as published."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-6
    """The peak rate: a tenth of fine-tuning's."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05
    """AdamW's, with betas 0.9 and 0.999."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps over which the rate rises; afterwards it falls as a cosine."""
    train: str = "all"
    """What trains: `all` of the language model, as published; `linears`, the quantized ones; or
    some of those, by a shell pattern on the full name or its last part."""
    video_pruning_rates: Annotated[tuple[PruningRate, ...], Field(min_length=1)] | None = None
    """EVS rates of the clips; each sample draws one. By default `video.pruning_rate`."""
    max_length: Annotated[int, Field(ge=16)] = 16384
    """Longest sample in tokens after EVS; longer ones are skipped and counted."""
    max_skipped: Annotated[int, Field(ge=0)] = 0
    """Bad samples to skip before the run stops; it is resumed with a larger number."""
    held_out: Annotated[int, Field(ge=1, le=_MOST_HELD_OUT)] = 32
    """Samples kept apart, with all that say the same; the best step is chosen by the loss of their
    answers."""
    save_every: Annotated[int, Field(ge=1)] = 20
    """Steps between two checkpoints, each with an evaluation."""
    patience: Annotated[int, Field(ge=1)] = 4
    """Evaluations in a row worse than PTQ after which the run stops."""
    gradient_checkpointing: bool = False
    """Whether to compute each layer twice rather than keep its activations."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 2_000_003
    """A third seed, so that synthetic samples are neither calibration's nor accuracy's. NumPy's
    generator, which transformers seeds, takes 32 bits."""

    @property
    def samples(self) -> int:
        """Samples that one pass needs at most."""
        rows = self.steps * self.batch
        if self.pack_length is not None:
            rows *= max(1, self.pack_length // _SHORT_SAMPLE)
        return self.held_out + rows
