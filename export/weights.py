"""Checks the values of an exported directory: finite, with sound scales, and near their source.

Every weight file is read once, in parts, and its SHA-256 comes out of the same pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from tqdm import tqdm

from checkpoint.faults import Fault
from checkpoint.files import TensorFiles, all_finite, in_threads
from checkpoint.hashing import Part, Parts, visit_file
from checkpoint.opened import Checkpoint
from export.closeness import Closeness, Treatment, elements_beyond
from export.scales import is_sound, scale_faults
from quantize.algorithms import Change
from quantize.formats.registry import FORMATS, UNQUANTIZED, Tensors

_REWRITE = "export again"
_WRONG_SOURCE = "is this the right --source?"
_NOT_FINITE = "contains NaN or infinite values"
_STEP = {"cpu": 1 << 18, "cuda": 1 << 23}
"""Weights compared at once: what fits into a CPU's cache, and what keeps a GPU busy."""


@dataclass(frozen=True)
class Values:
    """What one pass over the weight files found.

    Attributes:
        faults: In the order of the model.
        digests: SHA-256 of every weight file.
    """

    faults: list[Fault]
    digests: dict[str, str]


@dataclass(frozen=True)
class ValueCheck:
    """The check of all values of one directory, whose layout is already known to be right.

    Attributes:
        exported: The quantized checkpoint.
        formats: Format of every quantized linear.
        source: The tensors of the BF16 checkpoint; None to leave out the comparison.
        trained: Tensors that a distillation has moved away from the source.
        change: What the calibration algorithm may have done to weights.
    """

    exported: Checkpoint
    formats: Mapping[str, str]
    source: TensorFiles | None
    trained: frozenset[str]
    change: Change

    def run(self) -> Values:
        """Read every file once, several at a time in threads."""
        files = self.exported.tensors.files
        found: dict[str, list[Fault]] = {}
        digests = {}
        shown = tqdm(files, desc="verifying", unit="file", leave=False, disable=None)
        for file, (faults, digest) in zip(files, in_threads(self._check_file, shown), strict=True):
            found.update(faults)
            digests[file] = digest
        ordered: list[Fault] = []
        for name in self.exported.tensors:
            ordered += found.get(name, [])
        return Values(ordered, digests)

    def _check_file(self, file: str) -> tuple[dict[str, list[Fault]], str]:
        found: dict[str, list[Fault]] = {}

        def check(name: str, parts: Parts) -> None:
            faults = list(self._faults(name, parts))
            if faults:
                found[name] = faults

        digest = visit_file(self.exported.tensors, file, check)
        return found, digest

    def _faults(self, name: str, parts: Parts) -> Iterator[Fault]:
        linear, _, suffix = name.rpartition(".")
        format = self.formats.get(linear)
        if self._is_kv_scale(name):
            yield from scale_faults(self._where(name), self.exported.tensors.read(name))
        elif format is None or suffix not in FORMATS[format].suffixes:
            yield from self._unquantized_faults(name, parts)
        elif suffix == "weight":
            yield from self._weight_faults(linear, parts)
        else:
            yield from scale_faults(self._where(name), self.exported.tensors.read(name))

    def _where(self, name: str) -> str:
        return self.exported.tensors.where(name)

    def _unquantized_faults(self, name: str, parts: Parts) -> Iterator[Fault]:
        where = self._where(name)
        spec = self.exported.tensors.specs[name]
        source = self.source
        if source is not None and source.specs.get(name) != spec:
            yield Fault(where, "is not in the source, or has another shape there", _WRONG_SOURCE)
            source = None
        is_finite = True
        is_same = True
        closeness = Closeness("trained", has_lines=len(spec.shape) == 2)
        for part in parts:
            if part.rows.is_floating_point():
                is_finite = is_finite and all_finite(part.rows)
            if source is None:
                continue
            exact = source.read(name, rows=_row_numbers(part))
            if name in self.trained:
                closeness.add(_matrix(exact), _matrix(part.rows))
            elif is_same:
                is_same = torch.equal(_bits(part.rows), _bits(exact))
        if not is_finite:
            yield Fault(where, _NOT_FINITE, _REWRITE)
        elif not is_same:
            yield Fault(where, "differs from the source, though it is not quantized", _REWRITE)
        elif source is not None and name in self.trained:
            yield from closeness.faults(where, UNQUANTIZED)

    def _is_kv_scale(self, name: str) -> bool:
        suffixes = self.exported.config.family.kv_linears.values()
        return name.rpartition(".")[2] in suffixes

    def _weight_faults(self, linear: str, parts: Parts) -> Iterator[Fault]:
        """Compare a packed weight with its source, in parts: never the whole in float32."""
        name = f"{linear}.weight"
        where = self._where(name)
        format = self.formats[linear]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        scales = {}
        for suffix in FORMATS[format].suffixes:
            if suffix != "weight":
                scales[suffix] = self.exported.tensors.read(f"{linear}.{suffix}").to(device)
                if not is_sound(scales[suffix]):
                    return  # reported where the scale itself is checked
        columns = _columns(self.exported.tensors, name, format, scales)
        source = self.source
        rows = self.exported.tensors.specs[name].shape[0]
        if source is not None:
            spec = source.specs.get(name)
            if spec is None or spec.shape != (rows, columns):
                what = "is not in the source, or has another shape there"
                yield Fault(where, what, _WRONG_SOURCE)
                return
        comparison = _Comparison(format, self._treatment(linear))
        step = max(1, _STEP[device] // columns)
        for part in parts:
            packed = part.rows.to(device)
            exact = None
            if source is not None:
                exact = source.read(name, rows=_row_numbers(part)).to(device)
            for start in range(0, len(packed), step):
                end = min(start + step, len(packed))
                rows_of = _rows(scales, part.start + start, part.start + end)
                weight = None if exact is None else exact[start:end].float()
                comparison.add({"weight": packed[start:end], **rows_of}, weight)
        yield from comparison.faults(where, rows * columns)

    def _treatment(self, linear: str) -> Treatment:
        return "trained" if f"{linear}.weight" in self.trained else self.change


class _Comparison:
    """The comparison of one packed weight with its source, part by part."""

    def __init__(self, format: str, treatment: Treatment) -> None:
        self._format = format
        self._treatment = treatment
        self._is_finite = True
        self._beyond = 0
        self._closeness: Closeness | None = None

    def add(self, packed: Tensors, weight: torch.Tensor | None) -> None:
        """Add some rows of the packed weight, and the source's in float32 if there is one."""
        if weight is None:
            # Scales are known to be finite; unpacking would take twice the time.
            self._is_finite = self._is_finite and _has_finite_codes(packed["weight"])
            return
        unpacked = FORMATS[self._format].unpack(packed)
        self._is_finite = self._is_finite and all_finite(unpacked)
        self._beyond += elements_beyond(weight, unpacked, packed, self._format, self._treatment)
        if self._treatment != "rounded":
            if self._closeness is None:
                self._closeness = Closeness(self._treatment)
            self._closeness.add(weight, unpacked)

    def faults(self, where: str, total: int) -> Iterator[Fault]:
        """Yield at most one fault; `total` is the number of weights."""
        if not self._is_finite:
            yield Fault(where, _NOT_FINITE, _REWRITE)
        elif self._beyond:
            share = f"{self._beyond / total:.2%} of the weights"
            what = f"{share} are further from the source than {self._format} rounding allows"
            yield Fault(where, what, f"{_WRONG_SOURCE} else {_REWRITE}")
        elif self._closeness is not None:
            yield from self._closeness.faults(where, self._format)


def _has_finite_codes(weight: torch.Tensor) -> bool:
    """Whether no code of a packed weight stands for NaN or infinity; integers have none."""
    if not weight.is_floating_point():
        return True
    if weight.dtype == torch.float8_e4m3fn:
        # E4M3 has NaN at all ones, without the sign; a conversion would take 25 times as long.
        codes = weight.view(torch.uint8)
        return int((codes & 0x7F).max()) != 0x7F
    return all_finite(weight.float())


def _columns(tensors: TensorFiles, name: str, format: str, scales: Tensors) -> int:
    """in_features of a packed weight."""
    first = {"weight": tensors.read(name, rows=(0, 1)), **_rows(scales, 0, 1)}
    first = {suffix: tensor.cpu() for suffix, tensor in first.items()}
    return FORMATS[format].unpack(first).shape[1]


def _row_numbers(part: Part) -> tuple[int, int] | None:
    if part.rows.dim() == 0:
        return None
    return part.start, part.start + len(part.rows)


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in float32 as [rows, others]."""
    return tensor.float().reshape(len(tensor), -1)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """A view that compares equal where the bits are equal: NaN would not."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _rows(packed: Tensors, start: int, end: int) -> dict[str, torch.Tensor]:
    """Some rows of a packed linear; scalar scales apply to all of them."""
    part = {}
    for suffix, tensor in packed.items():
        part[suffix] = tensor[start:end] if tensor.dim() > 0 else tensor
    return part
