"""The way of a run whose model is never whole in memory: calibrate and pack layer by layer.

The bytes are those of the whole model. Under torchrun each process takes a share of the samples;
the first one writes and measures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from accuracy.agreement import States
from calibrate.activations import Activations, Budget
from calibrate.forward import Counts, Embedded
from calibrate.layerwise import embed_into, runner
from calibrate.prompts import Prompt
from calibrate.samples import Skipped
from checkpoint.faults import BadInput, Fault, raise_if_any
from checkpoint.native import load_final_norm, load_model
from checkpoint.opened import open_checkpoint
from export.load import exported_reader, read_exported_layers
from pipeline.job import Job, Record
from pipeline.layer_state import LayerState, PromptDigest, Stores
from quantize.layerwise import FinishedLayer, quantize_layers


class LayerByLayer:
    """Quantizes one layer after the other; activations wait in host memory or in a file."""

    def __init__(self, job: Job, budget: int) -> None:
        """Describe the way; nothing is read yet.

        Args:
            job: The checked run.
            budget: Bytes of host memory for activations, of all processes.
        """
        self._job = job
        self._budget = budget
        self._state = LayerState(job.state, job.processes)

    def progress(self) -> str:
        """How far the run has come, for an out-of-memory message."""
        done = self._state.layers_written
        depth = self._job.checkpoint.config.depth
        return f"{self._job.device} ran out of memory after {done} of {depth} layers"

    def packed_layers(self, drain: Callable[[], None]) -> Iterator[FinishedLayer]:
        """Calibrate and pack; yield every layer that an earlier run has not written.

        Args:
            drain: Waits until every yielded layer is on the disk.

        Raises:
            BadInput: Too few samples for the processes, samples that have changed, or a quantizer
                without a range.
        """
        job = self._job
        depth = job.checkpoint.config.depth
        finished = self._state.layers_written
        saved = self._state.saved_layer
        job.processes.wait()  # every process has read the progress before the first one changes it
        if finished == depth and self._state.has_reference:
            return
        with contextlib.ExitStack() as stack:
            stores = self._open_stores(stack)
            first = self._fill(stores, saved)
            read = functools.partial(job.checkpoint.tensors.read, pin=job.device.startswith("cuda"))
            layers = quantize_layers(
                job.checkpoint,
                job.policy,
                read,
                job.device,
                stores["calibrate"],
                stores["held_out"],
                job.recipe.quantize.batch_tokens,
                first,
                finished,
            )
            for layer in layers:
                if layer.index >= finished:
                    yield layer
                if layer.index + 1 < depth:
                    self._save_if_due(stores, layer.index + 1, drain)
            self._keep_reference(stores["held_out"])
        job.processes.wait()

    def _open_stores(self, stack: contextlib.ExitStack) -> dict[str, Activations]:
        job = self._job
        budget = Budget(self._budget // job.processes.count)
        stores = {}
        for name in ("calibrate", "held_out"):
            spill = self._state.spill_file(name)
            store = Activations(job.checkpoint.config.hidden_size, job.device, budget, spill)
            stack.enter_context(contextlib.closing(store))
            stores[name] = store
        return stores

    def _fill(self, stores: Stores, saved: int | None) -> int:
        """Embed all prompts, or restore those of an earlier run.

        Returns:
            The layer whose input the activations are.
        """
        skipped = Skipped(self._job.recipe.calibrate.max_skipped)
        digest = PromptDigest()
        opened = {
            "calibrate": self._job.calibration_prompts(skipped),
            "held_out": self._job.held_out_prompts(),
        }
        if saved is not None and self._state.samples() is not None:
            # Nothing is embedded again, but the prompts must be those of the saved activations.
            for prompts in opened.values():
                for _ in digest.over(prompts):
                    pass
            raise_if_any(self._state.sample_faults(str(digest)))
            self._state.restore(saved, stores)
            return saved
        kept = self._embed(stores, opened, digest)
        gc.collect()  # the embedding modules refer to one another; the layers need the memory
        raise_if_any(self._state.sample_faults(str(digest)))
        kept["digest"] = str(digest)
        kept["skipped"] = skipped.samples
        self._state.keep_samples(kept)
        self._save_if_due(stores, 0, drain=None)
        return 0

    def _embed(
        self, stores: Stores, opened: Mapping[str, Iterator[Prompt]], digest: PromptDigest
    ) -> dict[str, Any]:
        """Embed the prompts of each store, and return what samples-R.json says about them."""
        job = self._job
        model = load_model(job.checkpoint, job.device, layers=False)
        totals = {
            "calibrate": job.recipe.calibrate.samples,
            "held_out": job.recipe.accuracy.samples,
        }
        kept: dict[str, Any] = {}
        for name, prompts in opened.items():
            before = digest.count
            seen: list[dict[str, Any]] = []
            counts = embed_into(
                stores[name],
                model,
                digest.over(prompts),
                job.checkpoint.config,
                totals[name],
                functools.partial(_remember, seen),
                (job.processes.index, job.processes.count),
                f"embed {name.replace('_', ' ')}",
            )
            # Every process reads every prompt, so that all of them count and raise the same.
            section = "accuracy" if name == "held_out" else name
            job.warn_of_fewer(section, digest.count - before)
            if digest.count < job.processes.count:
                what = f"give {digest.count} samples for {job.processes.count} processes"
                raise BadInput(Fault("calibrate.sources", what, "start fewer processes"))
            kept[name] = {
                "lengths": stores[name].lengths,
                "counts": dataclasses.asdict(counts),
                "seen": seen if name == "held_out" else [],
                "digests": digest.each[before:] if name == "calibrate" else [],
            }
        return kept

    def _save_if_due(self, stores: Stores, layer: int, drain: Callable[[], None] | None) -> None:
        """Save the activations if enough time has passed; all layers before must be on the disk."""
        size = sum(store.nbytes for store in stores.values())
        if not self._job.processes.from_first(self._state.save_is_due(size)):
            return
        if drain is not None:
            drain()
        self._state.save(layer, stores)

    def _keep_reference(self, held_out: Activations) -> None:
        norm = load_final_norm(self._job.checkpoint, self._job.device)
        states = {}
        with torch.no_grad():
            for number, hidden in enumerate(held_out.each()):
                states[f"{number:06d}"] = norm(hidden)[0].cpu().clone()
        self._state.keep_reference(states)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor of the source: only quantized tensors change."""
        return self._job.checkpoint.tensors.read(name)

    def on_written(self, layer: int) -> None:
        """Record that a layer need not be calibrated again."""
        self._state.record_layers(layer + 1)

    def record(self) -> Record:
        """What is known about the run after `packed_layers`, over all processes."""
        total = Counts()
        skipped = 0
        digests: list[str] = []
        for index in range(self._job.processes.count):
            samples = self._state.samples(index)
            assert samples is not None
            counts = Counts(**samples["calibrate"]["counts"])
            total = total.plus_counts(counts)
            if index == 0:  # every process reads every sample
                skipped = samples["skipped"]
                digests = samples["calibrate"]["digests"]
        found = dataclasses.asdict(total) | {"skipped": skipped, "digests": digests}
        return Record(found, {})

    def reference(self) -> list[States]:
        """BF16's states of the held-out prompts, of all processes, in the order of the prompts."""
        by_process = []
        for index in range(self._job.processes.count):
            samples = self._state.samples(index)
            assert samples is not None
            finals = self._state.reference(index)
            states = []
            for number, seen in enumerate(samples["held_out"]["seen"]):
                states.append(_states(seen, finals[f"{number:06d}"]))
            by_process.append(states)
        ordered = []
        for number in range(sum(len(states) for states in by_process)):
            process = number % len(by_process)
            ordered.append(by_process[process][number // len(by_process)])
        return ordered

    def read_back(self) -> tuple[list[States], nn.Module]:
        """The written directory's states of the held-out prompts, layer by layer, and its head."""
        job = self._job
        exported = open_checkpoint(job.recipe.output)
        seen: list[dict[str, Any]] = []
        spill = self._state.spill_file("answers")
        hidden_size = exported.config.hidden_size
        store = Activations(hidden_size, job.device, Budget(self._budget), spill)
        with contextlib.closing(store), torch.no_grad():
            read = exported_reader(exported)
            model = load_model(exported, job.device, read=read, layers=False)
            embed_into(
                store,
                model,
                job.held_out_prompts(),
                exported.config,
                job.recipe.accuracy.samples,
                functools.partial(_remember, seen),
                describe="quantized answers",
            )
            norm = model.language_model.model.norm_f
            head = model.language_model.lm_head
            del model
            for _, layer in read_exported_layers(exported, job.device):
                # One by one, as the reference's bits were made.
                store.replace(runner(layer), store.batches(0))
            finals = [norm(hidden)[0].cpu() for hidden in store.each()]
        states = [_states(one, final) for one, final in zip(seen, finals, strict=True)]
        return states, head


def _remember(seen: list[dict[str, Any]], prompt: Prompt, embedded: Embedded) -> None:
    seen.append({"group": prompt.group, "token_ids": embedded.token_ids.tolist()})


def _states(seen: dict[str, Any], final: torch.Tensor) -> States:
    return States(seen["group"], torch.tensor(seen["token_ids"]), final)
