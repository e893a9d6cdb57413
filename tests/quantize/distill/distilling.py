"""A distillation of the tiny checkpoint small enough for a test: its samples, its plan, its
quantized model.
"""

import dataclasses
import itertools

import pytest
import torch

from calibrate.samples import Sample
from calibrate.sources.synthetic.kinds import draw
from checkpoint.layout import language_model_linears
from checkpoint.native import load_model, load_tokenizer
from quantize.distill import distillation as distilling
from quantize.distill.batches import batch_of
from quantize.distill.distillation import Settings, plan_distillation
from quantize.distill.student import frozen_copy
from quantize.policy import Rule, make_policy
from quantize.ptq import quantize_model

SETTINGS = Settings(
    steps=2,
    batch=2,
    learning_rate=1e-4,
    weight_decay=0.05,
    warmup=0.1,
    train="*",
    video_pruning_rates=(0.9,),
    max_length=4096,
    max_skipped=0,
    held_out=2,
    save_every=1,
    patience=4,
    gradient_checkpointing=False,
    seed=7,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sequences this short gain nothing from a second thread, and wait for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def said(number: int) -> Sample:
    text = f"Sentence {number} of many. " * (1 + number % 3)
    return Sample(
        f"text-{number}", [{"role": "user", "content": text}], "test", answer=f"Answer {number}."
    )


def texts():
    return map(said, itertools.count())


def mixture():
    """Held out: a text and a picture; then trained on: a clip, a text, and more texts."""
    return iter([said(0), draw("chart", 5, 0), draw("video_static", 5, 2), *map(said, range(1, 6))])


class Small:
    """One distillation before it is run: `plan`, `model` (quantized), `teacher`."""

    def __init__(self, config, directory, samples=texts, format="fp8", **settings):
        policy = make_policy([Rule(format)], language_model_linears(config))
        self.config, self.tokenizer = config, load_tokenizer(config)
        self.settings = dataclasses.replace(SETTINGS, **settings)
        self.plan = plan_distillation(
            self.settings,
            samples,
            config,
            self.tokenizer,
            policy,
            directory / "out",
            {"recipe": str(settings)},
            "cpu",
        )
        self.model = load_model(config)
        self.teacher = frozen_copy(self.model.language_model) if self.plan.taught else None
        batches = [self.batch(sample) for sample in itertools.islice(samples(), 4)]
        forward = self.model.language_model
        quantize_model(
            forward, policy, lambda: [forward(inputs_embeds=b["inputs_embeds"]) for b in batches]
        )

    def batch(self, sample):
        rate = self.settings.video_pruning_rates[0]
        return batch_of(
            self.model, sample, self.config, self.tokenizer, rate, self.settings.max_length
        )

    def run(self):
        return distilling.distill(self.plan, self.model, self.teacher)
