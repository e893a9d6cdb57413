"""A distillation of the tiny checkpoint small enough for a test: its samples, its plan, its
quantized model.
"""

import contextlib
import copy
import dataclasses
import itertools
import time

import pytest
import torch

from calibrate.samples import Sample, Skipped
from calibrate.sources.synthetic.kinds import draw
from checkpoint.native import load_model
from checkpoint.opened import open_bf16
from checkpoint.processes import ALONE
from checkpoint.products import float32_products
from checkpoint.video import Video
from quantize.distill.plan import plan_distillation
from quantize.distill.rows import prepare, row_of_sample
from quantize.distill.settings import Distill
from quantize.distill.student import frozen_copy
from quantize.distill.training import distill, find_trained
from quantize.distill.weights import Weight
from quantize.policy import Rule, make_policy
from quantize.ptq import quantize_model

SETTINGS = {
    "steps": 2,
    "batch": 2,
    "learning_rate": 1e-4,
    "weight_decay": 0.05,
    "warmup": 0.1,
    "max_length": 4096,
    "max_skipped": 0,
    "held_out": 2,
    "save_every": 1,
    "patience": 4,
    "seed": 7,
}
VIDEO = Video(pruning_rate=0.9)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sequences this short gain nothing from a second thread, and wait for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sample_row(model, checkpoint, sample, max_length=4096, prompt_weight=1.0, video=VIDEO):
    prepared = prepare(sample, checkpoint, video, max_length)
    return row_of_sample(model, prepared, checkpoint.config, prompt_weight)


@contextlib.contextmanager
def computed_as_in_training():
    """Round where a distillation on a CPU does."""
    with float32_products():
        yield


def text_sample(number: int, text: str = "Sentence") -> Sample:
    content = f"{text} {number} of many. " * (1 + number % 3)
    messages = [{"role": "user", "content": content}]
    return Sample(f"text-{number}", messages, "test", answer=f"Answer {number}.")


def texts():
    return map(text_sample, itertools.count())


def mixture():
    """Held out: a text and a picture. Trained on: a clip, a text, and nearly what is held out."""
    held_out = [text_sample(0), draw("chart", 5, 0)]
    near = map(with_a_blank, held_out)
    return iter([*held_out, draw("video_static", 5, 2), text_sample(1), *near])


def with_a_blank(sample):
    """The same sample, of which a blank before the question makes another one."""
    messages = copy.deepcopy(sample.messages)
    content = messages[-1]["content"]
    if isinstance(content, str):
        messages[-1]["content"] = f" {content}"
    else:
        text = next(part for part in content if part["type"] == "text")
        text["text"] = f" {text['text']}"
    return dataclasses.replace(sample, messages=messages)


def wait_until(condition):
    """Wait until `condition()` holds, for ten seconds at most."""
    limit = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


def ignore(step: int) -> None:
    """Record nothing."""


def small_plan(
    tiny,
    directory,
    samples=texts,
    format="fp8",
    processes=ALONE,
    record=ignore,
    device="cpu",
    **settings,
):
    """The checked plan of a distillation that keeps its checkpoints in `directory/distill`."""
    checkpoint = open_bf16(tiny)
    return plan_distillation(
        Distill(**(SETTINGS | settings)),
        lambda skipped: samples(),
        Skipped(settings.get("max_skipped", 0)),
        checkpoint,
        make_policy([Rule(format=format)], checkpoint.linears),
        VIDEO,
        directory / "distill",
        processes,
        device,
        record,
    )


class Small:
    """One distillation before it is run.

    Attributes:
        plan: Its checked plan.
        model: Its language model is quantized.
        teacher: BF16; None for QAT.
    """

    def __init__(self, tiny, directory, samples=texts, noise=0.0, **options):
        self.plan = small_plan(tiny, directory, samples, **options)
        self.checkpoint = self.plan.checkpoint
        self.model = load_model(self.checkpoint)
        self._family = self.checkpoint.config.family
        self.teacher = frozen_copy(self.student) if self.plan.is_taught else None
        self.add_noise(noise)
        calibration = list(itertools.islice(samples(), 4))
        quantize_model(self.student, self.plan.policy, lambda: self.run_student(calibration))

    @property
    def student(self):
        """The language model that is trained."""
        return self.model.language_model

    @property
    def trained(self):
        """What trains."""
        return find_trained(self.plan, self.student)

    @property
    def linears(self):
        """The quantized linears that train, by checkpoint name."""
        return self.trained.linears

    @property
    def trained_parameters(self):
        """Names in the language model of what trains."""
        return {self._family.native_module(name) for name in self.plan.trained}

    def undo_trainable(self):
        """Undo what a backward inside `trainable` leaves: gradients, and linears in float32."""
        for weight in self.trained.weights.values():
            weight.parameter.grad = None
        for linear in self.linears.values():
            weight = Weight(linear, "weight")
            weight.parameter.data = weight.parameter.data.bfloat16()

    def values(self):
        """Values of the language model's parameters in float32, by name."""
        found = {}
        for name, parameter in self.student.named_parameters():
            plain = name.replace(".parametrizations", "").removesuffix(".original")
            found[plain] = parameter.detach().float().clone()
        return found

    def add_noise(self, size):
        """Move the student away from BF16, by `size` times the spread of each linear's weights.

        Rounding to FP8 moves it so little that the way back is lost in the rounding of a step,
        which differs between CPUs. From farther away, a step leads back.
        """
        generator = torch.Generator().manual_seed(0)
        for name in self.plan.policy.quantized:
            weight = self.student.get_submodule(self._family.native_module(name)).weight.data
            noise = torch.randn(weight.shape, generator=generator)
            weight += (size * weight.float().std() * noise).to(weight.dtype)

    def plan_with(self, samples):
        """The same plan over other samples."""
        return dataclasses.replace(self.plan, samples=samples)

    def row(self, sample):
        video = VIDEO.with_rate(self.plan.rates[0])
        length = self.plan.settings.max_length
        return sample_row(self.model, self.checkpoint, sample, length, video=video)

    def run_student(self, samples):
        for sample in samples:
            self.student(inputs_embeds=self.row(sample)["inputs_embeds"], use_cache=False)

    def run(self):
        return distill(self.plan, self.model, self.teacher)
