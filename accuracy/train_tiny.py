"""Trains the embedded checkpoint to do the six tasks, from a seed, on one GPU.

    python -m accuracy.train_tiny OUT [--seed 0] [--minutes 20] [--pause-after 9] [--from DIR]
    python -m accuracy.train_tiny OUT --steps 4 --tokens 3000 --workers 0 --device cpu    # a try without a GPU

OUT gets `log.jsonl` (loss and accuracy of the items as they are trained on, each seen once), `state.pt` and, at the
end, `checkpoint/`, the released layout in BF16, with `evaluation.json`. A run ends after `--steps` updates or
`--minutes` of training, whichever comes first, and the learning rate follows; the same command goes on where the last
one stopped. It needs 20 GB of GPU memory and, for speed, mamba_ssm's Triton kernels (`pip install --no-deps`).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from accuracy.muon import Muon
from accuracy.tasks import TASKS, TEST_ITEMS, scene, series
from accuracy.training_data import (
    CHARACTERS,
    LABEL_SIZES,
    Batch,
    Batches,
    Item,
    PromptBuilder,
    Seen,
    collate,
    make_item,
)
from accuracy.training_model import (
    dense_losses,
    fuse_elementwise,
    initialise,
    save_released,
    tile_embeddings,
    without_layer_scale,
    without_pruned,
)
from checkpoint.config import CheckpointConfig, read_config
from checkpoint.faults import BadInput, Fault, main
from checkpoint.native import load_model, load_tokenizer
from checkpoint.tiny import write_tiny

PRUNING_RATES = (0.0, 0.5, 0.75, 0.9)
# Half of the clips whole: what is pruned away cannot be learned from.
_RATE_SHARES = (0.6, 0.15, 0.15, 0.1)
# Shares of the run: the tower alone learns to read glyphs; clips are not pruned yet; the learning rate stays level.
_TOWER_ALONE, _WHOLE_CLIPS, _LEVEL = 0.1, 0.35, 0.5


@dataclass(frozen=True)
class Settings:
    """A run, as its command line gives it."""

    out: Path
    seed: int
    steps: int
    minutes: float
    pause_after: float
    tokens: int
    accumulate: int
    workers: int
    device: str
    compiled: bool
    start: Path | None = None


class Trainer:
    """The model, its dense heads, the optimizers and how far they are."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        torch.manual_seed(settings.seed)
        self.directory = Path(tempfile.mkdtemp(prefix="tiny-")) / "untrained"
        self.config: CheckpointConfig = write_tiny(self.directory, trained=False)
        self.tokenizer: PreTrainedTokenizerFast = load_tokenizer(self.config)
        # eval() keeps the mixers off the fused training path, which wants causal_conv1d; nothing here has dropout.
        source = read_config(settings.start) if settings.start else self.config
        self.model = load_model(source, device=settings.device, dtype=torch.float32)
        without_layer_scale(self.model)
        if not settings.start:
            initialise(self.model, settings.seed)
        hidden = self.config.text["hidden_size"]
        self.dense = nn.Linear(hidden, 4 * sum(LABEL_SIZES)).to(settings.device)
        if settings.compiled:
            fuse_elementwise()
        matrices, others = [], [*self.dense.parameters()]
        for name, parameter in self.model.named_parameters():
            if parameter.ndim == 2 and ("layers." in name or "encoder.layer." in name or "projector" in name):
                matrices.append(parameter)
            else:
                others.append(parameter)
        self.rates = {"muon": 2e-3, "adam": 2e-3}
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "muon": Muon(matrices, self.rates["muon"]),
            "adam": torch.optim.AdamW(others, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True),
        }
        self.others = others
        self.characters = torch.tensor(
            [self.tokenizer.encode(c, add_special_tokens=False)[0] for c in CHARACTERS], device=settings.device
        )
        self.step = 0
        self.seconds = 0.0

    @property
    def done(self) -> float:
        """How much of the run is over, 0 to 1."""
        return min(1.0, max(self.step / self.settings.steps, self.seconds / (60 * self.settings.minutes)))

    def schedule(self) -> float:
        """Share of the full learning rate: 100 steps up, level, then down to 0."""
        return min(1.0, (self.step + 1) / 100, (1 - self.done) / (1 - _LEVEL))

    def losses(
        self, batch: Batch, rate: float, tower_alone: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Answer loss (cross-entropy a token), dense loss, and bool [questions]: would it be answered exactly?

        With every answer token the most likely one after the right ones before it, greedy decoding says the same.
        Nothing here waits for the GPU.
        """
        device = self.settings.device
        moved = [part.to(device, non_blocking=True) for part in batch[2:8]]
        tokens, rows, columns, question, tiles, labels = moved
        targets = tokens[rows, columns]
        with torch.autocast(device, dtype=torch.bfloat16):
            embeds = self.model.get_input_embeddings()(tokens).float()
            dense_loss = embeds.new_zeros(())
            if len(tiles):
                visual = tile_embeddings(self.model, self.config, tiles)
                alike = visual @ self.model.language_model.model.embeddings.weight[self.characters].T
                dense_loss = dense_losses(self.dense(visual), alike * visual.shape[-1] ** -0.5, labels)
                if tower_alone:
                    return embeds.new_zeros(()), dense_loss, torch.empty(0)
                places = tokens == self.config.image_token_id
                embeds = embeds.masked_scatter(places[..., None], visual.float())
                if rate > 0 and batch.moving:
                    kept, new = without_pruned(visual.detach(), places, rate, self.config.tokens_per_tile)
                    embeds = embeds.gather(1, kept[..., None].expand(-1, -1, embeds.shape[-1]))
                    columns = new[rows, columns]
            hidden = self.model.language_model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
            # The position before a token predicts it.
            logits = self.model.language_model.lm_head(hidden[rows, columns - 1]).float()
        each = nn.functional.cross_entropy(logits, targets, reduction="none")
        wrong = torch.zeros(len(batch.kinds), device=device)
        wrong.index_add_(0, question, (logits.argmax(-1) != targets).float())
        return each.mean(), dense_loss, wrong == 0

    def train_step(self, batches: Iterator[Batch], seen: Seen) -> None:
        """One update from `accumulate` batches."""
        done, began = self.done, time.monotonic()
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.step)
        for _ in range(self.settings.accumulate):
            asked = time.monotonic()
            batch = next(batches)
            seen.waited += time.monotonic() - asked
            rate = PRUNING_RATES[int(torch.multinomial(torch.tensor(_RATE_SHARES), 1, generator=generator))]
            rate = rate if done > _WHOLE_CLIPS and batch.moving else 0.0
            answer_loss, dense_loss, right = self.losses(batch, rate, tower_alone=done < _TOWER_ALONE)
            # By the root of the items: a batch of few long clips counts less than one of many pages, but not by as much
            # as it is smaller.
            loss = answer_loss * (batch.items / 64) ** 0.5 + (1.0 - 0.8 * done) * dense_loss
            (loss / self.settings.accumulate).backward()
            seen.add(batch, rate, answer_loss, dense_loss, right)
        nn.utils.clip_grad_norm_(self.others, 1.0)
        factor = self.schedule()
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.rates[name] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.step:
            self.seconds += time.monotonic() - began  # not the first, which compiles
        self.step += 1

    def save(self) -> None:
        """Write `state.pt`, whole or not at all."""
        state = {"model": self.model.state_dict(), "dense": self.dense.state_dict(), "step": self.step,
                 "seconds": self.seconds, "optimizers": {k: o.state_dict() for k, o in self.optimizers.items()},
                 "plan": self.plan}  # fmt: skip
        partial = self.settings.out / ".state.pt.partial"
        torch.save(state, partial)
        os.replace(partial, self.settings.out / "state.pt")

    def resume(self) -> None:
        """Take up `state.pt` when there is one.

        Raises:
            BadInput: When it belongs to a run with other settings.
        """
        path = self.settings.out / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.settings.device, weights_only=True)
        if state["plan"] != self.plan:
            found, wanted = state["plan"], self.plan
            raise BadInput(Fault(str(path), f"was trained with {found}, not {wanted}", "give another output"))
        self.model.load_state_dict(state["model"])
        self.dense.load_state_dict(state["dense"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.step, self.seconds = state["step"], state["seconds"]

    @property
    def plan(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        names = ("seed", "steps", "minutes", "tokens", "accumulate")
        return {name: getattr(self.settings, name) for name in names} | {"start": str(self.settings.start)}

    @torch.no_grad()
    def evaluate(self, count: int = TEST_ITEMS) -> dict[str, Any]:
        """Accuracy on test items, clips at every pruning rate. Weights as they are: call it after `save_released`."""
        results: dict[str, Any] = {}
        by_task = self._test_items(count)
        for task in TASKS:
            for rate in PRUNING_RATES if task.startswith("video") else (0.0,):
                right: list[bool] = []
                groups: dict[tuple[int, int], list[Item]] = defaultdict(list)
                for item in by_task[task]:
                    groups[len(item.tiles), len(item.token_ids)].append(item)
                for group in groups.values():
                    size = max(1, self.settings.tokens // len(group[0].token_ids))
                    for start in range(0, len(group), size):
                        right += self.losses(collate(group[start : start + size]), rate)[2].tolist()
                results[task if rate == 0 else f"{task}@{rate}"] = round(sum(right) / len(right), 4)
        return results

    def _test_items(self, count: int) -> dict[str, list[Item]]:
        jobs = [(task, index, str(self.directory)) for task in TASKS for index in range(count)]
        if self.settings.workers:
            with multiprocessing.get_context("fork").Pool(self.settings.workers) as pool:
                items = pool.map(_test_item, jobs, chunksize=8)
        else:
            items = [_test_item(job) for job in jobs]
        return {task: [item for item in items if item.kind == task] for task in TASKS}


_builders: dict[str, PromptBuilder] = {}


def _test_item(job: tuple[str, int, str]) -> Item:
    task, index, directory = job
    if directory not in _builders:
        torch.set_num_threads(1)
        config = read_config(directory)
        _builders[directory] = PromptBuilder(config, load_tokenizer(config))
    return make_item(scene(task, series("test", 0), index), task, _builders[directory], compressed=True)


def train(settings: Settings) -> dict[str, Any] | None:
    """Train until the run is over or pauses; at its end write the checkpoint and evaluate it.

    Returns:
        The evaluation, None after a pause.

    Raises:
        BadInput: The output belongs to another run, or its checkpoint is there already.
    """
    released = settings.out / "checkpoint"
    if released.exists():
        raise BadInput(Fault(str(released), "exists already", "remove it or give another output"))
    settings.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    trainer = Trainer(settings)
    trainer.resume()
    builder = PromptBuilder(trainer.config, trainer.tokenizer)
    done, total = trainer.step * settings.accumulate, settings.steps * settings.accumulate
    # Time ends a run before its steps do; the easy part is then about a fifth of it.
    source = Batches(builder, settings.seed, done, settings.tokens, easy_batches=total // 8)
    loader = DataLoader(source, batch_size=None, num_workers=settings.workers, pin_memory=settings.device == "cuda",
                        prefetch_factor=3 if settings.workers else None)  # fmt: skip
    batches, seen, saved = iter(loader), Seen(), time.monotonic()
    stopped = threading.Event()
    if threading.current_thread() is threading.main_thread():
        for wanted in (signal.SIGTERM, signal.SIGINT):
            signal.signal(wanted, lambda *_: stopped.set())
    with (settings.out / "log.jsonl").open("a", encoding="utf-8") as log:
        while trainer.done < 1 and time.monotonic() - began < settings.pause_after * 60 and not stopped.is_set():
            trainer.train_step(batches, seen)
            if trainer.step % 50 == 0 or trainer.done >= 1:
                line = {"step": trainer.step, "seconds": round(trainer.seconds, 1), "done": round(trainer.done, 3)}
                line |= seen.line()
                log.write(json.dumps(line) + "\n")
                log.flush()
                print(json.dumps(line), flush=True)
                if not math.isfinite(line.get("loss", 0.0)):
                    raise FloatingPointError(f"loss is not finite at step {trainer.step}")
                seen = Seen()
            if time.monotonic() - saved > 120:
                trainer.save()
                saved = time.monotonic()
    trainer.save()
    del batches, loader
    if trainer.done < 1:
        save_released(trainer.model, trainer.config, settings.out / "so-far")
        print(f"paused at step {trainer.step}; the same command goes on")
        return None
    save_released(trainer.model, trainer.config, released)
    evaluation = {"step": trainer.step, "seconds": round(trainer.seconds), "accuracy": trainer.evaluate()}
    (settings.out / "evaluation.json").write_text(json.dumps(evaluation, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(evaluation), flush=True)
    return evaluation


def _run() -> int:
    parser = argparse.ArgumentParser(prog="python -m accuracy.train_tiny", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", metavar="OUT", type=Path, help="directory of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12000, help="updates at most")
    parser.add_argument("--minutes", type=float, default=20.0, help="minutes of training at most, pauses not counted")
    parser.add_argument("--pause-after", type=float, default=1e9, help="save and stop so many minutes after the start")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens of a batch")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of an update")
    parser.add_argument("--workers", type=int, default=13, help="processes that draw items")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--from", dest="start", metavar="DIR", type=Path, help="start from a checkpoint's weights")
    parser.add_argument("--no-compile", dest="compiled", action="store_false", help="leave element-wise steps unfused")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        raise BadInput(Fault("--device", "there is no CUDA device", "try --device cpu"))
    train(Settings(**vars(given)))
    return 0


if __name__ == "__main__":
    main(_run)
