"""What a streaming run leaves on disk while it goes, so that the same command goes on where it was
killed.

.NAME.stream/run.json             what the run must agree with to be taken up again
.NAME.stream/samples-R.json       what process R embedded: lengths, counts, held-out tokens, a
digest of all prompts .NAME.stream/progress.json        layers written, and the layer that the kept
activations belong to .NAME.stream/calibrate-K-R        process R's samples in front of layer K;
held_out-K-R likewise .NAME.stream/reference-R          BF16's final states of the held-out samples
.NAME.stream/checkpoint/          the output, its weight files filled layer by layer

Activations change at every layer, and those of a full run are larger than the model: they are saved
whenever the time since the last save is ten times what a save takes, so a save costs at most a
tenth, and a restart passes the samples through the few layers since then (in BF16: nothing is
quantized or written twice). Each save is a new file; the one before it goes when `progress.json`
names the new one.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from calibrate.activations import Activations
from calibrate.prompts import Prompt
from checkpoint.config import read_json
from checkpoint.faults import Fault
from quantize.distill.state import begin, end, state_faults, write_text

_SAVE_SHARE = 10
_ASSUMED_RATE = 1e9
"""Bytes a second of a save before the first has been measured."""


class Digest:
    """Tells whether two runs were given the same prompts, without keeping them."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def over(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
        """Pass prompts on and take each in."""
        for prompt in prompts:
            self._hash.update(f"{prompt.sample_id}\0{prompt.token_ids}\0".encode())
            # Sums of pixel rows, taken of the bits: hashing every pixel would cost more than
            # decoding it.
            rows = prompt.tiles.view(torch.int32).sum(-1, dtype=torch.int64)
            self._hash.update(rows.numpy().tobytes())
            yield prompt

    def __str__(self) -> str:
        return self._hash.hexdigest()


@dataclass
class StreamState:
    """The state of one run; every process has its own object, the first one records progress.

    Attributes:
        directory: `.NAME.stream` beside the output.
        identity: What must be the same for a run to be taken up again.
        output: Where the checkpoint goes at the end.
        rank: Number of this process.
    """

    directory: Path
    identity: Mapping[str, Any]
    output: Path
    rank: int = 0
    _saved_at: float = field(default_factory=time.monotonic)
    _rate: float = _ASSUMED_RATE

    @property
    def checkpoint(self) -> Path:
        """The output in the making."""
        return self.directory / "checkpoint"

    def spill(self, name: str) -> Path:
        """File for the activations of a store that host memory has no room for."""
        return self.directory / f"{name}.spill{self.rank}"

    def faults(self) -> list[Fault]:
        """Every difference from the run that has left a state here; none where there is no state.
        """
        return list(state_faults(self.directory, self.identity))

    def begin(self) -> None:
        """Make the directory and write down what it belongs to; leave what is there."""
        begin(self.directory, self.identity)

    def written(self) -> bool:
        """Whether the output is whole and in its place, so that only verification and the gate are
        left.
        """
        return (
            self.output.exists()
            and (self.directory / "progress.json").exists()
            and not self.checkpoint.exists()
        )

    def progress(self) -> tuple[int, int | None]:
        """Layers written, and the layer that the saved activations stand in front of; None without
        any.
        """
        if not (self.directory / "progress.json").exists():
            return 0, None
        found = read_json(self.directory / "progress.json")
        return found["layers"], found["saved"]

    def finish_layer(self, layers: int) -> None:
        """Record that so many layers are on the disk."""
        self._record(layers, self.progress()[1])

    def _record(self, layers: int, saved: int | None) -> None:
        write_text(
            self.directory / "progress.json", json.dumps({"layers": layers, "saved": saved}) + "\n"
        )

    def keep_samples(self, samples: Mapping[str, Any]) -> None:
        """Write down what this process embedded."""
        write_text(self.directory / f"samples-{self.rank}.json", json.dumps(dict(samples)))

    def samples(self, rank: int | None = None) -> dict[str, Any] | None:
        """What a process embedded, this one by default; None when it had not finished."""
        path = self.directory / f"samples-{self.rank if rank is None else rank}.json"
        return read_json(path) if path.exists() else None

    def sample_fault(self, digest: str) -> list[Fault]:
        """The fault of a run that is taken up with other samples."""
        before = self.samples()
        if before is None or before["digest"] == digest:
            return []
        remedy = (
            f"go back to them to take the run up again, or remove {self.directory} to start anew"
        )
        what = f"the samples have changed since {self.directory} was begun"
        return [Fault("calibrate.sources, accuracy.sources", what, remedy)]

    def due(self, size: int) -> bool:
        """Whether saving `size` bytes now costs at most a tenth of the time since the last save."""
        return time.monotonic() - self._saved_at >= _SAVE_SHARE * size / self._rate

    def save(self, layer: int, stores: Mapping[str, Activations]) -> None:
        """Save this process's samples in front of a layer; `name_saved` makes them count."""
        start = time.monotonic()
        for name, activations in stores.items():
            activations.save(self._file(name, layer))
        size = sum(activations.nbytes for activations in stores.values())
        self._saved_at = time.monotonic()
        self._rate = max(size / max(self._saved_at - start, 1e-6), 1.0)

    def name_saved(self, layer: int) -> None:
        """Record the activations that every process has saved."""
        self._record(self.progress()[0], layer)

    def drop_saved(self, keep: int) -> None:
        """Remove this process's older activations."""
        for path in self.directory.glob("*-*-*"):
            _, layer, rank = path.name.removesuffix(".partial").split("-")
            if int(rank) == self.rank and int(layer) != keep:
                path.unlink()

    def restore(self, layer: int, stores: Mapping[str, Activations]) -> None:
        """Fill empty stores from the activations saved in front of a layer."""
        found = self.samples()
        assert found is not None
        for name, activations in stores.items():
            activations.restore(self._file(name, layer), found[name]["lengths"])

    def _file(self, name: str, layer: int) -> Path:
        return self.directory / f"{name}-{layer}-{self.rank}"

    def remove(self) -> None:
        """Remove the state; call it when the result is on disk and measured."""
        end(self.directory)
