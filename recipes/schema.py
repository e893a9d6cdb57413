"""What a recipe may say: the sections of the rooms, composed."""

from __future__ import annotations

from pathlib import Path

from pydantic import field_validator
from quantize.settings import Quantize

from accuracy.settings import Accuracy
from calibrate.settings import Calibrate
from checkpoint.settings import Section
from checkpoint.video import Video
from quantize.distill.settings import Distill
from serve.settings import Serve

TINY = "tiny"
"""What `model` says for the tiny checkpoint."""


class Recipe(Section):
    """One product: what to load, calibrate on, quantize, require and serve."""

    model: str
    """Directory of the BF16 checkpoint, or `tiny` for the checkpoint that ships with us."""
    output: Path
    """Directory to write; it must not exist, and appears whole at the end or not at all."""
    device: str | None = None
    """A torch device; by default the GPU if there is one."""
    video: Video = Video()
    """How clips are sampled and pruned: in calibration, in the accuracy gate and when serving."""
    calibrate: Calibrate = Calibrate()
    """What the activation ranges are taken from."""
    quantize: Quantize
    """Which layer gets which format, and how its ranges are found."""
    distill: Distill | None = None
    """Distillation from BF16; without this section a recipe is PTQ."""
    accuracy: Accuracy = Accuracy()
    """What is measured against BF16, and what is required."""
    serve: Serve = Serve()
    """How `python -m serve` starts vLLM on the result."""

    @field_validator("output")
    @classmethod
    def _expand_output(cls, output: Path) -> Path:
        return output.expanduser()

    @field_validator("model")
    @classmethod
    def _expand_model(cls, model: str) -> str:
        return str(Path(model).expanduser()) if model.startswith("~") else model
