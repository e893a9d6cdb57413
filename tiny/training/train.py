"""Trains the tiny checkpoint to do the six tasks, from a seed, on one GPU.

    python -m tiny.training.train ONE --minutes 12 [--seed 0] [--pause-after 9]
    python -m tiny.training.train TWO --minutes 7 --from ONE/checkpoint                   # second
    stage: comparing
    python -m tiny.training.train OUT --steps 4 --tokens 1500 --workers 0 --device cpu    # a try
    without a GPU

OUT gets `log.jsonl` (loss, and accuracy of items when they are seen for the first time), `state.pt`
and, at the end, `checkpoint/`, the released layout in BF16, with `evaluation.json`. A run ends
after `--steps` updates or `--minutes` of training, whichever comes first, and the learning rate
follows; the same command goes on where the last one stopped. It needs 40 GB of GPU memory and, for
speed, mamba_ssm's Triton kernels (`pip install --no-deps`).
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from checkpoint.config import CheckpointConfig, read_config
from checkpoint.faults import BadInput, Fault, main
from checkpoint.native import load_model, load_tokenizer
from tiny.checkpoint import write_tiny
from tiny.training.data import (
    CHARACTERS,
    LABEL_SIZES,
    NAMES,
    SECOND_SHARES,
    SHARES,
    Batch,
    Batches,
    PromptBuilder,
)
from tiny.training.evaluation import PRUNING_RATES, drawn_items, evaluated
from tiny.training.graphed import GraphedSteps, Pool
from tiny.training.log import Seen
from tiny.training.model import (
    dense_losses,
    fuse_elementwise,
    initialise,
    save_released,
    text_loss,
    tile_embeddings,
    without_layer_scale,
    without_pruned,
)
from tiny.training.muon import Muon

# Half of the clips whole: what is pruned away cannot be learned from.
_RATE_SHARES = (0.6, 0.15, 0.15, 0.1)
# Shares of the run: clips are not pruned yet; the learning rate stays level.
_WHOLE_CLIPS, _LEVEL = 0.35, 0.5
_WARM_UP = 300
# Of the loss over all text, most of which is chance: enough for a perplexity that says something,
# once recall stands.
_TEXT_WEIGHT, _TEXT_FROM = 0.1, 0.35
# Matrices that Muon moves.
_INSIDE = ("layers.", "encoder.layer.", "projector", "patch_projection")
_RATES = {"muon": 2e-3, "adam": 2e-3}


@dataclass(frozen=True)
class Settings:
    """A run, as its command line gives it."""

    out: Path
    seed: int
    steps: int
    minutes: float
    pause_after: float
    tokens: int
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
        # eval() keeps the mixers off the fused training path, which wants causal_conv1d; nothing
        # here has dropout.
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
            if parameter.ndim == 2 and any(part in name for part in _INSIDE):
                matrices.append(parameter)
            else:
                others.append(parameter)
        # What changes from step to step stands on the device, where a CUDA graph reads it.
        on_gpu = settings.device == "cuda"
        self.dense_weight = torch.ones((), device=settings.device)
        self.text_weight = torch.zeros((), device=settings.device)
        self.rates = {name: torch.zeros((), device=settings.device) for name in _RATES}
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "muon": Muon(matrices, self.rates["muon"]),
            "adam": torch.optim.AdamW(others, self.rates["adam"], betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0,
                                      fused=on_gpu, capturable=on_gpu),
        }  # fmt: skip
        self.others = others
        spelled = [name if name in CHARACTERS else f" {name}" for name in NAMES]
        tokens = [self.tokenizer.encode(name, add_special_tokens=False) for name in spelled]
        if any(len(token) > 1 for token in tokens):
            raise ValueError(f"not one token each: {spelled}")
        self.names = torch.tensor(tokens, device=settings.device)[:, 0]
        self.steps = GraphedSteps(self.update, settings.device)
        self.step = 0
        self.seconds = 0.0

    @property
    def done(self) -> float:
        """How much of the run is over, 0 to 1."""
        return min(
            1.0, max(self.step / self.settings.steps, self.seconds / (60 * self.settings.minutes))
        )

    def schedule(self) -> float:
        """Share of the full learning rate: up, level, then down to 0."""
        return min(1.0, (self.step + 1) / _WARM_UP, (1 - self.done) / (1 - _LEVEL))

    def losses(self, batch: Batch, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [5]: answer loss and text loss (cross-entropy a token), `dense_losses`; bool
        [questions]: all right?

        With every answer token the most likely one after the right ones before it, greedy decoding
        says the same. Nothing here waits for the GPU.
        """
        moved = [part.to(self.settings.device, non_blocking=True) for part in batch.tensors]
        tokens, rows, columns, question, places, tiles, labels = moved
        (items, length), targets = tokens.shape, tokens[rows, columns]
        with torch.autocast(self.settings.device, dtype=torch.bfloat16):
            embeds = self.model.get_input_embeddings()(tokens).float()
            dense = embeds.new_zeros(3)
            if len(tiles):
                visual = tile_embeddings(self.model, self.config, tiles)
                alike = visual @ self.model.language_model.model.embeddings.weight[self.names].T
                dense = dense_losses(self.dense(visual), alike * visual.shape[-1] ** -0.5, labels)
                embeds = (
                    embeds.flatten(0, 1)
                    .index_copy(0, places, visual.float().flatten(0, 1))
                    .view(embeds.shape)
                )
                if rate > 0 and batch.moving:
                    kept, new = without_pruned(visual.detach(), places, length, items, rate)
                    embeds = embeds.gather(1, kept[..., None].expand(-1, -1, embeds.shape[-1]))
                    tokens, columns = tokens.gather(1, kept), new[rows, columns]
            hidden = self.model.language_model.model(
                inputs_embeds=embeds, use_cache=False
            ).last_hidden_state
            # The position before a token predicts it.
            logits = self.model.language_model.lm_head(hidden[:, :-1]).float()
        text = text_loss(logits, tokens[:, 1:], self.config.image_token_id)
        asked, logits = (question < batch.questions).float(), logits[rows, columns - 1]
        each = nn.functional.cross_entropy(logits, targets, reduction="none") * asked
        wrong = torch.zeros(batch.questions + 1, device=asked.device)
        wrong.index_add_(0, question, (logits.argmax(-1) != targets).float())
        return torch.stack([each.sum() / asked.sum(), text, *dense]), wrong[:-1] == 0

    def update(self, batch: Batch, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of both optimizers; returns what `losses` does."""
        figures, right = self.losses(batch, rate)
        # By the root of the items: a batch of few long clips counts less than one of many pages,
        # but not by as much as it is smaller.
        answers = (figures[0] + self.text_weight * figures[1]) * (batch.items / 64) ** 0.5
        (answers + self.dense_weight * figures[2]).backward()
        nn.utils.clip_grad_norm_(self.others, 1.0)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return figures, right

    def train_step(self, batch: Batch, new: bool, seen: Seen) -> None:
        """Draw the pruning rate, set what depends on the time, update."""
        done, began = self.done, time.monotonic()
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.step)
        rate = PRUNING_RATES[
            int(torch.multinomial(torch.tensor(_RATE_SHARES), 1, generator=generator))
        ]
        rate = rate if done > _WHOLE_CLIPS and batch.moving else 0.0
        with self.steps.stream():
            self.dense_weight.fill_(1.0 - 0.8 * done)
            self.text_weight.fill_(_TEXT_WEIGHT if done > _TEXT_FROM else 0.0)
            for name, full in _RATES.items():
                self.rates[name].fill_(full * self.schedule())
        figures, right = self.steps(batch, rate)
        seen.add(batch, rate, figures, right, new)
        if self.step:
            self.seconds += time.monotonic() - began  # not the first, which compiles
        self.step += 1

    def save(self) -> None:
        """Write `state.pt`, whole or not at all."""
        self.steps.wait()
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
            raise BadInput(
                Fault(str(path), f"was trained with {found}, not {wanted}", "give another output")
            )
        self.model.load_state_dict(state["model"])
        self.dense.load_state_dict(state["dense"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
            for group in optimizer.param_groups:
                group["lr"] = self.rates[name]
        self.step, self.seconds = state["step"], state["seconds"]

    @property
    def plan(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        names = ("seed", "steps", "minutes", "tokens")
        return {name: getattr(self.settings, name) for name in names} | {
            "start": str(self.settings.start)
        }


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
    done = multiprocessing.Value("d", trainer.done)
    shares = SECOND_SHARES if settings.start else SHARES
    source = Batches(builder, settings.seed, trainer.step, settings.tokens, done, shares)
    loader = DataLoader(source, batch_size=None, num_workers=settings.workers, pin_memory=settings.device == "cuda",
                        prefetch_factor=3 if settings.workers else None, worker_init_fn=_of_its_own)  # fmt: skip
    pool, seen, saved = Pool(iter(loader), settings.device), Seen(), time.monotonic()
    batches = iter(pool)
    stopped = threading.Event()
    if threading.current_thread() is threading.main_thread():
        for wanted in (signal.SIGTERM, signal.SIGINT):
            signal.signal(wanted, lambda *_: stopped.set())
    with (settings.out / "log.jsonl").open("a", encoding="utf-8") as log:
        while (
            trainer.done < 1
            and time.monotonic() - began < settings.pause_after * 60
            and not stopped.is_set()
        ):
            trainer.train_step(*next(batches), seen)
            done.value = trainer.done
            if trainer.step % 500 == 0 or trainer.done >= 1:
                line = {
                    "step": trainer.step,
                    "seconds": round(trainer.seconds, 1),
                    "done": round(trainer.done, 3),
                }
                trainer.steps.wait()
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
    pool.close()
    if threading.current_thread() is threading.main_thread():
        for wanted in (signal.SIGTERM, signal.SIGINT):
            signal.signal(wanted, signal.SIG_DFL)  # the evaluation has nothing to save
    if trainer.done < 1:
        save_released(trainer.model, trainer.config, settings.out / "so-far")
        print(f"paused at step {trainer.step}; the same command goes on")
        return None
    save_released(trainer.model, trainer.config, released)
    items = drawn_items(trainer.directory, settings.workers)
    accuracy = evaluated(trainer.losses, items, trainer.config.image_token_id)
    evaluation = {"step": trainer.step, "seconds": round(trainer.seconds), "accuracy": accuracy}
    (settings.out / "evaluation.json").write_text(
        json.dumps(evaluation, indent=1) + "\n", encoding="utf-8"
    )
    print(json.dumps(evaluation), flush=True)
    return evaluation


def _of_its_own(_: int) -> None:
    """Put a worker where a signal to the trainer's group does not reach it: the trainer saves
    first.
    """
    os.setpgrp()


def _run() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tiny.training.train", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="directory of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100000, help="updates at most")
    parser.add_argument(
        "--minutes",
        type=float,
        default=15.0,
        help="minutes of training at most, pauses not counted",
    )
    parser.add_argument(
        "--pause-after",
        type=float,
        default=1e9,
        help="save and stop so many minutes after the start",
    )
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of a batch")
    parser.add_argument("--workers", type=int, default=13, help="processes that draw items")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--from",
        dest="start",
        metavar="DIR",
        type=Path,
        help="second stage, from the first one's checkpoint",
    )
    parser.add_argument(
        "--no-compile",
        dest="compiled",
        action="store_false",
        help="leave element-wise steps unfused",
    )
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        raise BadInput(Fault("--device", "there is no CUDA device", "try --device cpu"))
    train(Settings(**vars(given)))
    return 0


if __name__ == "__main__":
    main(_run)
