"""What a recipe may say: the sections of the rooms, composed."""

from __future__ import annotations

from pathlib import Path

from pydantic import field_validator

from accuracy.settings import Accuracy
from calibrate.settings import Calibrate
from calibrate.sources.source import Source
from checkpoint.settings import Section
from checkpoint.video import Video
from quantize.distill.settings import Distill
from quantize.settings import Quantize
from serve.settings import Serve

TINY = "tiny"
"""What `model` says for the tiny checkpoint."""


class Recipe(Section):
    """One product: what to load, calibrate on, quantize, require and serve."""

    model: str
    """Directory of the BF16 checkpoint, or `tiny` for the checkpoint that ships with us. Weights in
    float32 or float16 are rounded to BF16 as they are read."""
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

    def sampled_sections(self) -> list[Calibrate | Accuracy | Distill]:
        """Return the sections that have sources: calibration, accuracy and distillation."""
        sections: list[Calibrate | Accuracy | Distill] = [self.calibrate, self.accuracy]
        if self.distill is not None:
            sections.append(self.distill)
        return sections

    def sources(self) -> list[Source]:
        """Return the sources of all samples."""
        return [source for section in self.sampled_sections() for source in section.sources]

    @field_validator("output")
    @classmethod
    def _check_output(cls, output: Path) -> Path:
        expanded = _expand_user(output)
        if expanded.name in ("", ".."):
            raise ValueError("give a directory that does not exist yet")
        return expanded

    @field_validator("model")
    @classmethod
    def _expand_model(cls, model: str) -> str:
        return str(_expand_user(Path(model))) if model.startswith("~") else model


def _expand_user(path: Path) -> Path:
    """Replace `~` and `~NAME` by the home directory."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"there is no home directory for {path.parts[0]}") from None
