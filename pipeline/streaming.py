"""A PTQ run a layer at a time, and its way back after a kill: embed, calibrate, write, read back,
measure.

The state is `.NAME.stream` beside the output (`quantize.stream_state`); under torchrun each process
takes a share of the samples, the first one writes and measures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from accuracy.agreement import States
from calibrate.activations import Activations, Budget
from calibrate.forward import Counts, Embedded
from calibrate.layerwise import embed_into, runner
from calibrate.prompts import Prompt
from calibrate.samples import Skipped
from checkpoint.atomic import publish
from checkpoint.config import CheckpointConfig, read_config
from checkpoint.faults import BadInput, Fault, raise_if_any
from checkpoint.files import TensorFiles
from checkpoint.memory import memory_advice
from checkpoint.native import load_model
from checkpoint.processes import RANK, RANKS, firsts, together, wait
from export.load import exported_reader, read_exported_layers
from export.manifest import Manifest
from export.write import by_name, open_writer, write_companions
from pipeline.inputs import versions
from pipeline.verdict import conclude, say
from quantize.distill.state import identity_of, stamp
from quantize.layerwise import FinishedLayer, quantize_layers
from quantize.policy import Policy
from quantize.stream_state import Digest, StreamState
from recipes.schema import Recipe

Prompts = Callable[..., Iterator[Prompt]]
_GOES_ON = "the same command goes on from there"
STORES = ("calibrate", "held_out")


@dataclass(frozen=True)
class Job:
    """A checked run.

    Attributes:
        samples: Opens the calibration prompts; takes `skipped`.
        held_out: Opens the prompts that BF16 and the result are compared on; takes `skipped`.
        budget: Bytes of host memory for activations, of all processes.
    """

    recipe: Recipe
    config: CheckpointConfig
    policy: Policy
    source: TensorFiles
    device: str
    samples: Prompts
    held_out: Prompts
    budget: int


def stream_state(recipe: Recipe, config: CheckpointConfig, device: str) -> StreamState:
    """The state that belongs to a recipe's output, there or not."""
    files = sorted(config.directory.glob("*.safetensors"))
    source = {file.name: stamp(file) for file in files}
    decides = recipe.model_dump(
        mode="json", include={"model", "calibrate", "quantize", "accuracy", "serve"}
    )
    del (
        decides["quantize"]["memory"],
        decides["quantize"]["host_memory_gb"],
        decides["quantize"]["batch_tokens"],
    )
    decides["accuracy"] = {key: decides["accuracy"][key] for key in ("sources", "samples", "seed")}
    parts = {
        "source": source,
        "config": config.raw,
        "processes": RANKS,
        "device": device.partition(":")[0],
    }
    identity = identity_of(parts | {"versions": versions()} | decides)
    directory = recipe.output.absolute().with_name(f".{recipe.output.name}.stream")
    return StreamState(directory, identity, recipe.output.absolute(), RANK)


def run_streamed(job: Job) -> int:
    """Quantize, write, verify and measure; returns 0 when the gate passed, 1 for a fault or a
    missed gate.

    Raises:
        BadInput: As `stream`.
    """
    manifest = stream(job)
    if manifest is None:  # one of several processes: the first goes on
        return 0
    state = stream_state(job.recipe, job.config, job.device)
    counts = manifest.calibration
    say(
        f"calibrated on {counts['samples']} samples, {counts['tokens']} tokens, skipped {counts['skipped']}"
    )
    reference = functools.partial(reference_states, state)
    status = conclude(
        job.recipe, job.config, manifest, reference, lambda: exported_states(job, state), job.device
    )
    state.remove()
    return status


def stream(job: Job) -> Manifest | None:
    """Quantize and write the checkpoint, from where an earlier run was killed if there was one.

    Returns:
        The record of the run; None on every process but the first, which goes on alone.

    Raises:
        BadInput: Too few samples for the processes, samples that have changed, a quantizer without
            a range, or memory that did not suffice; what is finished stays for the same command to
            go on from.
    """
    state = stream_state(job.recipe, job.config, job.device)
    raise_if_any(state.faults())

    def reached() -> str:
        return f"{job.device} ran out of memory after {state.progress()[0]} of {len(job.config.pattern)} layers"

    with together(job.device):
        if RANK == 0:
            state.begin()
        wait()
        if not state.written():
            try:
                with memory_advice(
                    reached, "end what else uses it or lower quantize.batch_tokens; " + _GOES_ON
                ):
                    _quantize_and_write(job, state)
            except BadInput:
                if state.progress() == (0, None):  # nothing to go on from
                    state.remove()
                raise
        wait()
    return _manifest(job, state) if RANK == 0 else None


def _quantize_and_write(job: Job, state: StreamState) -> None:
    finished, saved = state.progress()
    wait()  # every process has read it before the first one writes it again
    hidden, budget = job.config.text["hidden_size"], Budget(job.budget // RANKS)
    with contextlib.ExitStack() as stack:
        stores = {
            name: Activations(hidden, job.device, budget, state.spill(name)) for name in STORES
        }
        for store in stores.values():
            stack.enter_context(contextlib.closing(store))
        first = _fill(job, state, stores, saved)
        if (
            finished < len(job.config.pattern)
            or not (state.directory / f"reference-{RANK}").exists()
        ):
            _pass_layers(job, state, stores, first, finished)
    wait()
    if RANK == 0:
        write_companions(
            job.config, job.policy, job.source, state.checkpoint, _manifest(job, state)
        )
        publish(state.checkpoint, state.output)


def _fill(job: Job, state: StreamState, stores: dict[str, Activations], first: int | None) -> int:
    """Embed all prompts, or take up those of an earlier run; returns the layer they stand in front
    of.
    """
    digest = Digest()
    skipped = Skipped(job.recipe.calibrate.max_skipped)
    opened = {
        "calibrate": job.samples(skipped=skipped),
        "held_out": job.held_out(skipped=Skipped()),
    }
    if first is not None and state.samples() is not None:
        for prompts in opened.values():
            for _ in digest.over(prompts):
                pass
        raise_if_any(state.sample_fault(str(digest)))
        state.restore(first, stores)
        return first
    model = load_model(job.config, job.device, layers=False)
    kept: dict[str, Any] = {}
    recipe = job.recipe
    totals = {"calibrate": recipe.calibrate.samples, "held_out": recipe.accuracy.samples}
    rates = {
        "calibrate": recipe.calibrate.video_pruning_rate,
        "held_out": recipe.serve.video_pruning_rate,
    }
    for name, prompts in opened.items():
        seen: list[dict[str, Any]] = []

        def remember(prompt: Prompt, embedded: Embedded, held: bool = name == "held_out") -> None:
            if held:
                seen.append({"group": prompt.group, "token_ids": embedded.token_ids.tolist()})  # noqa: B023

        counts = embed_into(
            stores[name],
            model,
            digest.over(prompts),
            job.config,
            rates[name],
            totals[name],
            remember,
            lambda number: number % RANKS == RANK,
            f"embed {name.replace('_', ' ')}",
        )
        if counts.samples == 0 and name == "calibrate":
            raise BadInput(
                Fault("calibrate.samples", f"are fewer than the {RANKS} processes", "start fewer")
            )
        kept[name] = {
            "lengths": stores[name].lengths,
            "counts": dataclasses.asdict(counts),
            "seen": seen,
        }
    raise_if_any(state.sample_fault(str(digest)))
    state.keep_samples(kept | {"digest": str(digest), "skipped": skipped.samples})
    _save_if_due(state, stores, 0)
    return 0


def _pass_layers(
    job: Job, state: StreamState, stores: dict[str, Activations], first: int, finished: int
) -> None:
    read = functools.partial(job.source.read, pin=job.device.startswith("cuda"))
    layers = quantize_layers(
        job.config, job.policy, read, job.device, stores["calibrate"], stores["held_out"],
        job.recipe.quantize.batch_tokens, first, finished,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        writer = None
        if RANK == 0:
            writer = stack.enter_context(
                open_writer(job.config, job.source, job.policy, state.checkpoint)
            )
        for layer in layers:
            done = layer.index + 1
            if writer and layer.index >= finished:
                writer.put(named_tensors(layer), then=functools.partial(state.finish_layer, done))
            if done < len(job.config.pattern):
                _save_if_due(state, stores, done, writer.drain if writer else None)
        _keep_reference(job, state, stores["held_out"])


def named_tensors(layer: FinishedLayer) -> dict[str, torch.Tensor]:
    """A layer's packed tensors by the names they get on disk."""
    return {name: tensor for linear in layer.linears for name, tensor in by_name(linear).items()}


def _save_if_due(
    state: StreamState,
    stores: dict[str, Activations],
    layer: int,
    drain: Callable[[], None] | None = None,
) -> None:
    """Save the activations when enough time has passed; never of a layer whose tensors are not on
    the disk.
    """
    if not firsts(state.due(sum(store.nbytes for store in stores.values()))):
        return
    if drain:
        drain()
    state.save(layer, stores)
    wait()
    if RANK == 0:
        state.name_saved(layer)
    wait()
    state.drop_saved(layer)


def _keep_reference(job: Job, state: StreamState, held_out: Activations) -> None:
    norm = load_norm(job.config, job.source.read, job.device)
    with torch.no_grad():
        finals = {
            f"{n:06d}": norm(hidden)[0].cpu().clone() for n, hidden in enumerate(held_out.each())
        }
    path = state.directory / f"reference-{RANK}"
    save_file(finals, path.with_name(path.name + ".partial"))
    path.with_name(path.name + ".partial").rename(path)


def _manifest(job: Job, state: StreamState) -> Manifest:
    found = [state.samples(rank) for rank in range(RANKS)]
    counts = [one["calibrate"]["counts"] for one in found if one]
    total = Counts(**{key: sum(count[key] for count in counts) for key in counts[0]})
    recorded = job.recipe.model_dump(mode="json")
    calibration = dataclasses.asdict(total) | {"skipped": found[0]["skipped"] if found[0] else 0}
    return Manifest(recorded, versions(), job.policy.counts(), calibration, recorded["serve"])


def reference_states(state: StreamState) -> list[States]:
    """BF16's final states of the held-out prompts, of all processes, in the order of the prompts.
    """
    by_rank = []
    for rank in range(RANKS):
        found = state.samples(rank)
        assert found is not None
        finals = load_file(state.directory / f"reference-{rank}")
        seen = found["held_out"]["seen"]
        by_rank.append([_states(one, finals[f"{n:06d}"]) for n, one in enumerate(seen)])
    return [by_rank[n % RANKS][n // RANKS] for n in range(sum(map(len, by_rank)))]


def exported_states(job: Job, state: StreamState) -> tuple[list[States], nn.Module]:
    """What the written directory, read back a layer at a time, makes of the held-out prompts; and
    its head.
    """
    config = read_config(state.output)
    files = TensorFiles(state.output)
    read = exported_reader(config, files)
    seen: list[dict[str, Any]] = []

    def remember(prompt: Prompt, embedded: Embedded) -> None:
        seen.append({"group": prompt.group, "token_ids": embedded.token_ids.tolist()})

    store = Activations(
        config.text["hidden_size"], job.device, Budget(job.budget), state.spill("answers")
    )
    with contextlib.closing(store), torch.no_grad():
        model = load_model(config, job.device, read=read, layers=False)
        rate, total = job.recipe.serve.video_pruning_rate, job.recipe.accuracy.samples
        embed_into(
            store,
            model,
            job.held_out(skipped=Skipped()),
            config,
            rate,
            total,
            remember,
            describe="quantized answers",
        )
        norm, head = model.language_model.model.norm_f, model.language_model.lm_head
        del model
        for _, layer in read_exported_layers(config, job.device):
            store.replace(
                runner(layer), store.batches(0)
            )  # one by one, as the reference's bits were made
        finals = [norm(hidden)[0].cpu() for hidden in store.each()]
    return [_states(one, final) for one, final in zip(seen, finals, strict=True)], head


def _states(seen: dict[str, Any], final: torch.Tensor) -> States:
    return States(seen["group"], torch.tensor(seen["token_ids"]), final)


def load_norm(
    config: CheckpointConfig, read: Callable[[str], torch.Tensor], device: str
) -> nn.Module:
    """The language model's final norm."""
    from checkpoint.classes import NemotronHRMSNorm

    norm = NemotronHRMSNorm(config.text["hidden_size"], eps=config.text["layer_norm_epsilon"])
    norm.weight = nn.Parameter(
        read("language_model.backbone.norm_f.weight").to(device), requires_grad=False
    )
    return norm
