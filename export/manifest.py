"""hybridquant.json beside the weights: what made them, from what, how the gate went, and how to
serve them.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint.config import read_json

MANIFEST = "hybridquant.json"


@dataclass(frozen=True)
class Manifest:
    """A record of one run.

    Attributes:
        recipe: The resolved recipe.
        versions: Package versions.
        formats: Number of linear layers by format.
        calibration: Samples, tokens, skipped samples.
        serve: Settings for `python -m serve`, such as `video_pruning_rate`.
        gate: `passed` (None until measured), the measured figures and the thresholds they missed.
        distillation: `trained`, the linears whose weights are no longer the source's, and how it
            went; empty for PTQ.
    """

    recipe: dict[str, Any]
    versions: dict[str, str]
    formats: dict[str, int]
    calibration: dict[str, Any]
    serve: dict[str, Any]
    gate: dict[str, Any] = field(default_factory=lambda: {"passed": None})
    distillation: dict[str, Any] = field(default_factory=dict)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest into `directory`, replacing it whole."""
    partial = directory / f".{MANIFEST}.partial"
    partial.write_text(json.dumps(dataclasses.asdict(manifest), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, directory / MANIFEST)


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of `directory`, or None where there is none.

    Raises:
        BadInput: When it is not JSON.
    """
    if not (directory / MANIFEST).exists():
        return None
    raw = read_json(directory / MANIFEST)
    return Manifest(**{f.name: raw.get(f.name, {}) for f in dataclasses.fields(Manifest)})
