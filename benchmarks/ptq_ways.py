"""Three ways of post-training quantization, timed stage by stage, and figures that compare them.

The ways are this project's with the whole model in memory ("ours" in the results), this project's
layer by layer ("streamed" in the results), and stock ModelOpt ("stock").
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint

from benchmarks.environment import device_name, mamba_kernels
from benchmarks.parts import Parts
from benchmarks.processes import same_files
from calibrate.activations import Activations, Budget
from checkpoint.files import TensorFiles
from checkpoint.libraries import installed_versions
from checkpoint.log import get_logger
from checkpoint.native import load_model
from checkpoint.opened import Checkpoint, check_finite, open_bf16
from export.manifest import Manifest
from export.verify import verification
from export.write import open_writer, write_companions
from quantize.layerwise import FinishedLayer, layer_policy, quantize_layers
from quantize.policy import Policy, Rule, make_policy
from quantize.ptq import packed_linears, quantize_model

logger = get_logger(__name__)

_FORWARD = 64
"""Samples of the raw forward pass."""
_REPEATS = 3
"""How often the raw forward pass is timed; its rate is that of the median."""
_STOCK = {"fp8": mtq.FP8_DEFAULT_CFG, "nvfp4": mtq.NVFP4_DEFAULT_CFG}
_ACTIVATION_BYTES = 22_000_000_000
"""Host memory for activations in the way layer by layer."""
_STAGES = {
    "ours": ("load", "ours: calibrate", "ours: export", "ours: verify"),
    "streamed": ("streamed: calibrate and export", "streamed: verify"),
    "stock": ("stock: load", "stock: calibrate", "stock: export"),
}
"""The stages of each way from the BF16 checkpoint to the verified directory."""


class Clock:
    """Seconds and peak memory of named stages.

    Attributes:
        seconds: By stage.
        gpu: Peak of allocated GPU memory, by stage, in GB (1e9 bytes).
        host: Peak of resident host memory, by stage, in GB (1e9 bytes).
    """

    def __init__(self, device: str, parts: Parts) -> None:
        """Use the figures that are kept with `parts`, and keep new ones there."""
        self.cuda = device == "cuda"
        self.seconds = parts.noted.setdefault("seconds", {})
        self.gpu = parts.noted.setdefault("gpu", {})
        self.host = parts.noted.setdefault("host", {})

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        """Run `work` as the stage `name` and return what it returns."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        # Where this is not allowed, peaks are those since the process began.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        start = time.perf_counter()
        result = work()
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        gpu = torch.cuda.max_memory_allocated() / 1e9 if self.cuda else 0.0
        host = _peak_resident() / 1e9
        self.seconds[name] = seconds
        self.gpu[name] = gpu
        self.host[name] = host
        logger.info("%s: %.1f s, GPU %.1f GB, host %.1f GB", name, seconds, gpu, host)
        return result


def _peak_resident() -> int:
    """Return the peak of resident memory since it was reset, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return 1024 * int(value.split()[0])
    raise RuntimeError("/proc/self/status has no VmHWM")


def sequential_write_rate(folder: Path, gigabytes: float) -> float:
    """Return the GB/s (1e9 bytes) of writing and syncing one file of random bytes."""
    block = os.urandom(1 << 26)
    blocks = int(gigabytes * 1e9) // len(block)
    path = folder / "rate.bin"
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(blocks):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    size = path.stat().st_size
    path.unlink()
    return size / 1e9 / seconds


@dataclass(frozen=True)
class Subject:
    """What every way quantizes, and with what.

    Attributes:
        checkpoint: The BF16 checkpoint.
        format: `fp8` or `nvfp4`.
        prompts: int64 [samples, 1, tokens], on the device.
        device: `cuda` or `cpu`.
    """

    checkpoint: Checkpoint
    format: str
    prompts: torch.Tensor
    device: str

    def load(self) -> Any:
        """Load the whole model and return its language model."""
        return load_model(self.checkpoint, self.device).language_model

    def policy(self) -> Policy:
        """Return the policy that gives every linear the format."""
        return make_policy([Rule(format=self.format)], self.checkpoint.linears)

    @torch.no_grad()
    def forward(self, language_model: Any, samples: int | None = None) -> None:
        """Run the first samples, by default all, through a language model."""
        for prompt in self.prompts[:samples]:
            language_model(prompt, use_cache=False, logits_to_keep=1)


def measure_whole(subject: Subject, clock: Clock, out: Path) -> None:
    """Time this project's way with the whole model, from the check of the weights on."""
    checkpoint = subject.checkpoint
    policy = subject.policy()
    clock.time("check BF16 weights", lambda: check_finite(checkpoint))
    language_model = clock.time("load", subject.load)
    for repeat in range(1, _REPEATS + 1):
        clock.time(f"raw forward {repeat}", lambda: subject.forward(language_model, _FORWARD))

    def calibrate() -> None:
        quantize_model(language_model, policy, lambda: subject.forward(language_model))

    def packed_layers() -> Iterator[FinishedLayer]:
        for layer in range(checkpoint.config.depth):
            part = layer_policy(policy, checkpoint.config, layer)
            yield FinishedLayer(layer, tuple(packed_linears(language_model, part)))

    clock.time("ours: calibrate", calibrate)
    clock.time("ours: export", lambda: _write(checkpoint, policy, packed_layers(), out))


def measure_layers(subject: Subject, clock: Clock, out: Path) -> None:
    """Time this project's way layer by layer, without the state that it saves to be resumed."""
    checkpoint = subject.checkpoint
    device = subject.device
    policy = subject.policy()
    hidden = checkpoint.config.hidden_size
    read = functools.partial(checkpoint.tensors.read, pin=device == "cuda")

    def run() -> None:
        budget = Budget(_ACTIVATION_BYTES)
        calibration = Activations(hidden, device, budget, out.with_name("calibration"))
        held_out = Activations(hidden, device, budget, out.with_name("held_out"))
        with contextlib.closing(calibration), contextlib.closing(held_out):
            name = f"{checkpoint.config.family.embeddings}.weight"
            embeddings = checkpoint.tensors.read(name).to(device)
            for prompt in subject.prompts:
                calibration.add(embeddings[prompt[0]])
            del embeddings
            layers = quantize_layers(
                checkpoint, policy, read, device, calibration, held_out, batch_tokens=8192
            )
            _write(checkpoint, policy, layers, out)

    clock.time("streamed: calibrate and export", run)


def _write(
    checkpoint: Checkpoint, policy: Policy, layers: Iterable[FinishedLayer], out: Path
) -> None:
    with open_writer(checkpoint, policy, out) as writer:
        for layer in layers:
            writer.put(layer.index, layer.tensors())
    manifest = Manifest({}, installed_versions(), policy.counts(), {})
    write_companions(checkpoint, policy, out, manifest)


def measure_stock(subject: Subject, clock: Clock, out: Path) -> None:
    """Time stock ModelOpt, which quantizes and exports the language model only."""
    model = clock.time("stock: load", subject.load)
    config = _STOCK[subject.format]

    def export() -> None:
        export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=out)

    clock.time("stock: calibrate", lambda: mtq.quantize(model, config, subject.forward))
    clock.time("stock: export", export)


Way = Callable[[Subject, Clock, Path], None]


class Runner:
    """Runs the ways that an earlier run has not finished, after a warm-up of the kernels."""

    def __init__(self, subject: Subject, clock: Clock, parts: Parts) -> None:
        self.subject = subject
        self.clock = clock
        self.parts = parts
        self.is_warm = False

    def run(self, name: str, way: Way, out: Path, verified: bool = True) -> list[str]:
        """Run one way.

        Args:
            name: Name of the way.
            way: What to run.
            out: Directory that it writes.
            verified: Whether the directory is verified.

        Returns:
            The faults that verification finds.
        """
        return self.parts.part(name, lambda: self._run(name, way, out, verified))["faults"]

    def _run(self, name: str, way: Way, out: Path, verified: bool) -> dict[str, Any]:
        shutil.rmtree(out, ignore_errors=True)
        if not self.is_warm:
            self.clock.time("warm up kernels", self._warm_up)
            _release_memory()
            self.is_warm = True
        way(self.subject, self.clock, out)
        _release_memory()
        faults = []
        if verified:
            source = self.subject.checkpoint.directory
            # Without prompts, as a run itself verifies.
            check = functools.partial(verification, out, source, run_prompts=False)
            faults = self.clock.time(f"{name}: verify", check).faults
        return {"faults": [str(fault) for fault in faults]}

    def _warm_up(self) -> None:
        self.subject.forward(self.subject.load(), 2)


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(
    model_directory: Path,
    work: Path,
    format: str,
    samples: int,
    tokens: int,
    device: str = "cuda",
    layers: bool = True,
) -> dict[str, Any]:
    """Measure every stage of every way.

    Args:
        model_directory: The BF16 checkpoint.
        work: Folder of the exports and of what is finished, on the disk to be measured.
        format: `fp8` or `nvfp4`.
        samples: Number of prompts.
        tokens: Tokens per prompt.
        device: `cuda` or `cpu`.
        layers: Whether the way layer by layer is measured.

    Returns:
        Seconds, GB (1e9 bytes), rates and ratios.
    """
    checkpoint = open_bf16(model_directory)
    work.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": str(model_directory),
        "format": format,
        "samples": samples,
        "tokens": tokens,
        "device": device,
    }
    parts = Parts(work / "measured.json", settings)
    clock = Clock(device, parts)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(20, 900, (samples, 1, tokens), generator=generator).to(device)
    subject = Subject(checkpoint, format, prompts, device)
    runner = Runner(subject, clock, parts)
    faults = list(runner.run("ours", measure_whole, work / "ours"))
    same = None
    if layers:
        faults += runner.run("streamed", measure_layers, work / "streamed")
        same = same_files(work / "ours", work / "streamed")
    written = TensorFiles(work / "ours").total_bytes / 1e9
    size = max(0.1, min(4.0, written))
    disk = parts.part("disk", lambda: {"rate": sequential_write_rate(work, size)})
    runner.run("stock", measure_stock, work / "stock", verified=False)
    parts.done()
    figures = _figures(clock.seconds, samples, tokens)
    return {
        "device": device_name(device),
        "versions": installed_versions(),
        "mamba_kernels": mamba_kernels(),
        "format": format,
        "samples": samples,
        "tokens_per_sample": tokens,
        "seconds": clock.seconds,
        "peak_gpu_gb": clock.gpu,
        "peak_host_gb": clock.host,
        "streamed_bytes_equal": same,
        "faults": faults,
        **figures,
        "written_gb": written,
        "export_gb_per_s": written / clock.seconds["ours: export"],
        "disk_gb_per_s": disk["rate"],
        "stock_written_gb": TensorFiles(work / "stock").total_bytes / 1e9,
        **_comparison(clock.seconds, layers),
    }


def _figures(seconds: dict[str, float], samples: int, tokens: int) -> dict[str, Any]:
    """Return the rates of the raw forward pass and of calibration, in tokens/s."""
    forwards = [seconds[f"raw forward {repeat}"] for repeat in range(1, _REPEATS + 1)]
    forward_rate = min(samples, _FORWARD) * tokens / statistics.median(forwards)
    rates = {}
    shares = {}
    for way in ("ours", "stock"):
        rates[way] = samples * tokens / seconds[f"{way}: calibrate"]
        shares[way] = rates[way] / forward_rate
    return {
        "forward_tokens_per_s": forward_rate,
        "calibration_tokens_per_s": rates,
        "calibration_share_of_forward": shares,
    }


def _comparison(seconds: dict[str, float], layers: bool) -> dict[str, Any]:
    """Return the seconds of each way from end to end, and how many times faster than stock."""
    ways = ["ours", "streamed", "stock"] if layers else ["ours", "stock"]
    totals = {way: sum(seconds[stage] for stage in _STAGES[way]) for way in ways}
    faster = {way: totals["stock"] / totals[way] for way in ways if way != "stock"}
    return {"load_to_verified_directory_s": totals, "times_faster_than_stock": faster}
