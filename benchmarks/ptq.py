"""Post-training quantization: ours with the whole model and a layer at a time, beside stock
ModelOpt, in one run.

    python -m benchmarks.ptq MODEL --work DIR --json benchmarks/results/ptq_fp8.json [--format fp8]
    [--samples 64]
    python -m checkpoint.synthetic /data/full --size full && python -m benchmarks.ptq /data/full
    --work /data --json …

One process, one device, one set of prompts: random token ids of one length, so that the forward
rate means something. Each stage is timed once after a warm-up of the kernels, the raw forward three
times; ratios are between stages of the same run. A run that was cut off goes on with the same
command: of the three ways, those it finished are kept in DIR. `--whole` leaves the way a layer at a
time out; `--device cpu` tries the program on the tiny checkpoint, FP8 alone: stock ModelOpt has no
NVFP4 there.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from rich.console import Console
from rich.table import Table

from benchmarks.parts import Parts, write_json
from calibrate.activations import Activations, Budget
from checkpoint.faults import BadInput, Fault, main
from checkpoint.files import TensorFiles
from checkpoint.libraries import find_mamba_kernels, prepare_libraries
from checkpoint.native import load_model
from checkpoint.opened import Checkpoint, check_finite, open_bf16
from export.manifest import Manifest
from export.verify import verify
from export.write import open_writer, write_companions
from pipeline.inputs import versions
from quantize.layerwise import FinishedLayer, layer_policy, quantize_layers
from quantize.policy import Policy, Rule, make_policy
from quantize.ptq import packed_linears, quantize_model

_FORWARD, _REPEATS = 64, 3
"""Samples of the raw forward, and how often it is timed; its rate is the median's."""
_STOCK = {"fp8": mtq.FP8_DEFAULT_CFG, "nvfp4": mtq.NVFP4_DEFAULT_CFG}


class Clock:
    """Seconds and peak memory, GPU's and host's, of named stages; GB are 1e9 bytes. They are kept
    with `parts`.
    """

    def __init__(self, device: str, parts: Parts) -> None:
        self.cuda = device == "cuda"
        self.seconds, self.gpu, self.host = (
            parts.noted.setdefault(name, {}) for name in ("seconds", "gpu", "host")
        )

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        """Run `work` under a name and return what it returns."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(
            OSError
        ):  # where it is not allowed, peaks are those since the process began
            Path("/proc/self/clear_refs").write_text("5")
        start = time.perf_counter()
        result = work()
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds[name] = seconds = time.perf_counter() - start
        self.gpu[name] = gpu = torch.cuda.max_memory_allocated() / 1e9 if self.cuda else 0.0
        self.host[name] = host = _peak_resident() / 1e9
        print(f"{name}: {seconds:.1f} s, GPU {gpu:.1f} GB, host {host:.1f} GB", flush=True)
        return result


def _peak_resident() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def sequential_write_rate(folder: Path, gigabytes: float) -> float:
    """GB/s of writing and syncing one file."""
    block = os.urandom(1 << 26)
    path = folder / "rate.bin"
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(int(gigabytes * 1e9) >> 26):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    size = path.stat().st_size
    path.unlink()
    return size / 1e9 / seconds


def measure(
    model_directory: Path,
    work: Path,
    format: str,
    samples: int,
    tokens: int,
    device: str = "cuda",
    streams: bool = True,
) -> dict[str, Any]:
    """Run every stage, without `streams` of two ways only; seconds, GB (1e9 bytes) and ratios."""
    checkpoint = open_bf16(model_directory)
    work.mkdir(parents=True, exist_ok=True)
    ours, streamed, stock = work / "ours", work / "streamed", work / "stock"
    plan = {
        "model": str(model_directory),
        "format": format,
        "samples": samples,
        "tokens": tokens,
        "device": device,
    }
    parts = Parts(work / "measured.json", plan)
    clock = Clock(device, parts)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, 900, (samples, 1, tokens), generator=generator).to(device)

    def forward(language_model: Any, count: int = samples) -> None:
        with torch.no_grad():
            for sample in ids[:count]:
                language_model(sample, use_cache=False, logits_to_keep=1)

    warm = False

    def way(name: str, out: Path, work: Callable[[], None]) -> dict[str, Any]:
        def run() -> dict[str, Any]:
            nonlocal warm
            shutil.rmtree(out, ignore_errors=True)
            if not warm:
                _warm_up(checkpoint, clock, forward, device)
            warm = True
            work()
            _let_go()
            faults = (
                []
                if out == stock
                else clock.time(f"{name}: verify", lambda: verify(out, model_directory))
            )
            return {"faults": [str(fault) for fault in faults]}

        return parts.part(name, run)

    whole = way(
        "ours", ours, lambda: _measure_ours(checkpoint, clock, format, forward, ours, device)
    )
    faults, same = list(whole["faults"]), None
    if streams:
        layers = way(
            "streamed",
            streamed,
            lambda: _measure_layers(checkpoint, clock, format, ids, streamed, device),
        )
        faults += layers["faults"]
        same = all(
            (ours / file).read_bytes() == (streamed / file).read_bytes()
            for file in TensorFiles(ours).files
        )
    written = TensorFiles(ours).total_bytes / 1e9
    disk = parts.part(
        "disk", lambda: {"rate": sequential_write_rate(work, max(0.1, min(4.0, written)))}
    )
    way("stock", stock, lambda: _measure_stock(checkpoint, clock, format, forward, stock, device))
    parts.done()
    seconds, total = clock.seconds, samples * tokens
    raw = statistics.median(seconds[f"raw forward {repeat}"] for repeat in range(1, _REPEATS + 1))
    rate = min(samples, _FORWARD) * tokens / raw
    stages: dict[str, tuple[str, ...]] = {
        "ours": ("load", "ours: calibrate", "ours: export", "ours: verify")
    }
    if streams:
        stages["streamed"] = ("streamed: calibrate and export", "streamed: verify")
    stages["stock"] = ("stock: load", "stock: calibrate", "stock: export")
    end_to_end = {side: sum(seconds[stage] for stage in named) for side, named in stages.items()}
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "versions": versions(),
        "mamba_kernels": find_mamba_kernels() or "mamba_ssm",
        "format": format,
        "samples": samples,
        "tokens_per_sample": tokens,
        "seconds": seconds,
        "peak_gpu_gb": clock.gpu,
        "peak_host_gb": clock.host,
        "streamed_bytes_equal": same,
        "faults": faults,
        "forward_tokens_per_s": rate,
        "calibration_tokens_per_s": {
            s: total / seconds[f"{s}: calibrate"] for s in ("ours", "stock")
        },
        "calibration_share_of_forward": {
            s: total / seconds[f"{s}: calibrate"] / rate for s in ("ours", "stock")
        },
        "written_gb": written,
        "export_gb_per_s": written / seconds["ours: export"],
        "disk_gb_per_s": disk["rate"],
        "stock_written_gb": TensorFiles(stock).total_bytes / 1e9,
        "load_to_verified_directory_s": end_to_end,
        "times_faster_than_stock": {
            s: end_to_end["stock"] / end_to_end[s] for s in end_to_end if s != "stock"
        },
    }


def _let_go() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _warm_up(
    checkpoint: Checkpoint, clock: Clock, forward: Callable[..., None], device: str
) -> None:
    def run() -> None:
        forward(load_model(checkpoint, device).language_model, 2)

    clock.time("warm up kernels", run)
    _let_go()


def _policy(checkpoint: Checkpoint, format: str) -> Policy:
    return make_policy([Rule(format=format)], checkpoint.linears)


def _measure_ours(
    checkpoint: Checkpoint,
    clock: Clock,
    format: str,
    forward: Callable[..., None],
    out: Path,
    device: str,
) -> None:
    """Time the whole model in memory, from the check of the weights to the written directory."""
    policy = _policy(checkpoint, format)
    clock.time("check BF16 weights", lambda: check_finite(checkpoint))
    language_model = clock.time("load", lambda: load_model(checkpoint, device)).language_model
    for repeat in range(1, _REPEATS + 1):
        clock.time(f"raw forward {repeat}", lambda: forward(language_model, _FORWARD))

    def calibrate() -> None:
        quantize_model(language_model, policy, lambda: forward(language_model))

    def packed_layers() -> Iterator[FinishedLayer]:
        for layer in range(checkpoint.config.depth):
            part = layer_policy(policy, checkpoint.config, layer)
            yield FinishedLayer(layer, tuple(packed_linears(language_model, part)))

    clock.time("ours: calibrate", calibrate)
    clock.time("ours: export", lambda: _write(checkpoint, policy, packed_layers(), out))


def _measure_layers(
    checkpoint: Checkpoint, clock: Clock, format: str, ids: torch.Tensor, out: Path, device: str
) -> None:
    """Time the way layer by layer, as pipeline.layer_by_layer takes it, without its saves."""
    policy = _policy(checkpoint, format)
    hidden = checkpoint.config.hidden_size
    read = functools.partial(checkpoint.tensors.read, pin=device == "cuda")

    def run() -> None:
        budget = Budget(22_000_000_000)
        calibration = Activations(hidden, device, budget, out.with_name("calibration"))
        held_out = Activations(hidden, device, budget, out.with_name("held_out"))
        with contextlib.closing(calibration), contextlib.closing(held_out):
            name = f"{checkpoint.config.family.embeddings}.weight"
            embeddings = checkpoint.tensors.read(name).to(device)
            for sample in ids:
                calibration.add(embeddings[sample[0]])
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
    manifest = Manifest({}, versions(), policy.counts(), {})
    write_companions(checkpoint, policy, out, manifest)


def _measure_stock(
    checkpoint: Checkpoint,
    clock: Clock,
    format: str,
    forward: Callable[..., None],
    out: Path,
    device: str,
) -> None:
    model = clock.time("stock: load", lambda: load_model(checkpoint, device)).language_model
    clock.time("stock: calibrate", lambda: mtq.quantize(model, _STOCK[format], forward))

    def export() -> None:
        export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=out)

    clock.time("stock: export", export)


def _run() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ptq", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument(
        "--work",
        type=Path,
        required=True,
        help="folder for the exports, on the disk to be measured",
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--format", choices=sorted(_STOCK), default="fp8")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--whole", action="store_true", help="leave the way a layer at a time out")
    given = parser.parse_args()
    prepare_libraries()
    if given.device == "cuda" and not torch.cuda.is_available():
        raise BadInput(
            Fault(
                "--device", "there is no CUDA device", "try --device cpu with the tiny checkpoint"
            )
        )
    if given.device == "cpu" and given.format != "fp8":
        raise BadInput(
            Fault(
                "--format", f"stock ModelOpt cannot quantize to {given.format} on a CPU", "use fp8"
            )
        )
    streams = not given.whole
    result = measure(
        given.model, given.work, given.format, given.samples, given.tokens, given.device, streams
    )
    shape = (
        f"--format {given.format} --samples {given.samples} --tokens {given.tokens}"
        + " --whole" * given.whole
    )
    result["command"] = f"python -m benchmarks.ptq MODEL --work DIR {shape}"
    table = Table(title=f"{given.format} on {result['device']}", title_justify="left")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    table.add_column("peak GPU, GB", justify="right")
    table.add_column("peak host, GB", justify="right")
    for stage, seconds in result["seconds"].items():
        gpu, host = result["peak_gpu_gb"][stage], result["peak_host_gb"][stage]
        table.add_row(stage, f"{seconds:.1f}", f"{gpu:.1f}", f"{host:.1f}")
    Console().print(table)
    write_json(given.json, result)
    print(
        {
            key: value
            for key, value in result.items()
            if key not in ("seconds", "peak_gpu_gb", "peak_host_gb", "versions")
        }
    )
    return 0


if __name__ == "__main__":
    main(_run)
