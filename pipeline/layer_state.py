"""What a run layer by layer keeps in its state directory, besides the output.

samples-R.json      what process R embedded: lengths, counts, held-out tokens, prompts' digest
calibrate-K-R       process R's calibration samples, as the input of layer K
held_out-K-R        its held-out samples, as the input of layer K
reference-R         BF16's final states of its held-out samples
NAME.spillR         activations that host memory has no room for

Activations change at every layer, and those of a full run are larger than the model. They are saved
whenever the time since the last save is ten times what a save takes. So a save costs at most a
tenth, and a resumed run passes the samples through the few layers since then, in BF16: nothing is
quantized or written twice.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import load_file

from calibrate.activations import Activations
from calibrate.prompts import Prompt
from checkpoint.atomic import write_json, write_tensors
from checkpoint.config import read_json
from checkpoint.faults import Fault
from checkpoint.processes import Processes
from checkpoint.run_state import RunState

_SAVE_SHARE = 10
"""A save may take this part of the time since the last one."""

_ASSUMED_RATE = 1e9
"""Bytes per second of a save before the first has been measured."""

LAYER_PROGRESS = {"layers", "saved"}
"""What only a run layer by layer records in its progress."""

Stores = Mapping[str, Activations]
"""Activations by name: `calibrate` and `held_out`."""


class PromptDigest:
    """Tells whether two runs were given the same prompts, without keeping them.

    Attributes:
        count: Prompts so far.
        each: The hash of each of them.
    """

    def __init__(self) -> None:
        self.count = 0
        self.each: list[str] = []
        self._hash = hashlib.blake2b(digest_size=16)

    def over(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
        """Yield prompts unchanged and include each in the digest."""
        for prompt in prompts:
            own = hashlib.blake2b(digest_size=16)
            own.update(f"{prompt.sample_id}\0{prompt.token_ids}\0".encode())
            # Sums of pixel rows, of their bits: hashing every pixel would cost more than decoding.
            rows = prompt.tiles.view(torch.int32).sum(-1, dtype=torch.int64)
            own.update(rows.numpy().tobytes())
            self._hash.update(own.digest())
            self.each.append(own.hexdigest())
            self.count += 1
            yield prompt

    def __str__(self) -> str:
        return self._hash.hexdigest()


class LayerState:
    """The part of a run's state that belongs to the way layer by layer."""

    def __init__(self, state: RunState, processes: Processes) -> None:
        self._state = state
        self._directory = state.directory
        self._processes = processes
        self._saved_at = time.monotonic()
        self._rate = _ASSUMED_RATE

    def spill_file(self, name: str) -> Any:
        """File for the activations of a store that host memory has no room for."""
        return self._directory / f"{name}.spill{self._processes.index}"

    @property
    def layers_written(self) -> int:
        """Number of layers that are on the disk."""
        return self._state.progress().get("layers", 0)

    def record_layers(self, count: int) -> None:
        """Record that `count` layers are on the disk."""
        self._state.record(layers=count)

    @property
    def saved_layer(self) -> int | None:
        """The layer whose input the saved activations are; None if none are saved."""
        return self._state.progress().get("saved")

    def keep_samples(self, samples: Mapping[str, Any]) -> None:
        """Write down what this process embedded."""
        write_json(self._directory / f"samples-{self._processes.index}.json", samples)

    def samples(self, index: int | None = None) -> dict[str, Any] | None:
        """What a process embedded, by default this one; None if it had not finished."""
        number = self._processes.index if index is None else index
        path = self._directory / f"samples-{number}.json"
        return read_json(path) if path.exists() else None

    def sample_faults(self, digest: str) -> Iterator[Fault]:
        """Yield a fault when a run is resumed with other samples."""
        before = self.samples()
        if before is None or before["digest"] == digest:
            return
        what = f"the samples have changed since {self._directory} was begun"
        remedy = f"restore them to resume the run, or remove {self._directory} to start again"
        yield Fault("calibrate.sources, accuracy.sources", what, remedy)

    def save_is_due(self, size: int) -> bool:
        """Whether saving `size` bytes now costs at most a tenth of the time since the last save."""
        return time.monotonic() - self._saved_at >= _SAVE_SHARE * size / self._rate

    def save(self, layer: int, stores: Stores) -> None:
        """Save the activations in front of a layer, on every process, and drop older ones."""
        start = time.monotonic()
        size = 0
        for name, activations in stores.items():
            activations.save(self._activation_file(name, layer))
            size += activations.nbytes
        self._saved_at = time.monotonic()
        self._rate = max(size / max(self._saved_at - start, 1e-6), 1.0)
        self._processes.wait()
        if self._processes.is_first:
            self._state.record(saved=layer)
        self._processes.wait()
        self._drop_saved(keep=layer)

    def _drop_saved(self, keep: int) -> None:
        """Remove this process's older activations."""
        for path in self._directory.glob("*-*-*"):
            _, layer, index = path.name.split("-")
            if int(index) == self._processes.index and int(layer) != keep:
                path.unlink()

    def restore(self, layer: int, stores: Stores) -> None:
        """Fill empty stores from the activations saved in front of a layer."""
        samples = self.samples()
        assert samples is not None
        for name, activations in stores.items():
            lengths = samples[name]["lengths"]
            activations.restore(self._activation_file(name, layer), lengths)

    def _activation_file(self, name: str, layer: int) -> Any:
        return self._directory / f"{name}-{layer}-{self._processes.index}"

    def keep_reference(self, states: Mapping[str, torch.Tensor]) -> None:
        """Write BF16's final states of this process's held-out samples, by number."""
        write_tensors(self._reference_file(self._processes.index), states)

    @property
    def has_reference(self) -> bool:
        """Whether this process has written its reference."""
        return self._reference_file(self._processes.index).exists()

    def reference(self, index: int) -> dict[str, torch.Tensor]:
        """What a process has written as its reference."""
        return load_file(self._reference_file(index))

    def _reference_file(self, index: int) -> Any:
        return self._directory / f"reference-{index}"
