"""One training run of the tiny checkpoint: model, losses, optimizers, schedule and saved state."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from checkpoint.atomic import replaced_file
from checkpoint.config import CheckpointConfig
from checkpoint.faults import BadInput, Fault
from checkpoint.native import load_model
from checkpoint.opened import load_tokenizer, open_bf16
from tiny.checkpoint import write_tiny
from tiny.training.data import Batch
from tiny.training.evaluation import PRUNING_RATES
from tiny.training.graphed import GraphedSteps
from tiny.training.labels import CHARACTERS, LABEL_SIZES, NAMES
from tiny.training.log import Seen
from tiny.training.model import (
    dense_losses,
    fuse_elementwise,
    initialise,
    text_loss,
    tile_embeddings,
    without_layer_scale,
    without_pruned,
)
from tiny.training.muon import Muon
from tiny.training.settings import Settings

_RATE_SHARES = (0.6, 0.15, 0.15, 0.1)
"""Share of the clips that are trained at each of `PRUNING_RATES`. Most clips are whole, because
nothing can be learned from what is pruned."""
_WHOLE_CLIPS = 0.35
"""Share of the run before clips are pruned."""
_LEVEL = 0.5
"""Share of the run before the learning rate falls."""
_WARM_UP = 300
"""Steps until the learning rate is full."""
_TEXT_WEIGHT = 0.1
"""Weight of the loss over all text. Most of that text is random, so the weight is small: enough for
a perplexity that is meaningful."""
_TEXT_FROM = 0.35
"""Share of the run before the loss over all text counts: recall is learned first."""
_MUON_MODULES = ("layers.", "encoder.layer.", "projector", "patch_projection")
"""Matrices with one of these in their name are optimized by Muon, everything else by AdamW."""
_LEARNING_RATES = {"muon": 2e-3, "adam": 2e-3}


class Trainer:
    """The model, the heads of the dense loss, the optimizers and the progress of a run."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        device = settings.device
        torch.manual_seed(settings.seed)
        self.directory = Path(tempfile.mkdtemp(prefix="tiny-")) / "untrained"
        self.config: CheckpointConfig = write_tiny(self.directory, trained=False)
        self.tokenizer: PreTrainedTokenizerFast = load_tokenizer(self.config)
        # The model stays in eval mode, which it is loaded in: in training mode the mixers take a
        # fused path that needs causal_conv1d. The model has no dropout.
        source = open_bf16(settings.start or self.directory)
        self.model = load_model(source, device=device, dtype=torch.float32)
        without_layer_scale(self.model)
        if settings.start is None:
            initialise(self.model, settings.seed)
        hidden = self.config.text["hidden_size"]
        self.dense = nn.Linear(hidden, 4 * sum(LABEL_SIZES)).to(device)
        if settings.compiled:
            fuse_elementwise()
        # What changes from step to step is a tensor on the device, which a CUDA graph reads anew.
        self.dense_weight = torch.ones((), device=device)
        self.text_weight = torch.zeros((), device=device)
        self.rates = {name: torch.zeros((), device=device) for name in _LEARNING_RATES}
        matrices, self.others = self._parameters()
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "muon": Muon(matrices, self.rates["muon"]),
            "adam": torch.optim.AdamW(
                self.others,
                self.rates["adam"],
                betas=(0.9, 0.95),
                eps=1e-10,
                weight_decay=0.0,
                fused=device == "cuda",
                capturable=device == "cuda",
            ),
        }
        self.names = self._name_tokens().to(device)
        self.steps = GraphedSteps(self.update, device)
        self.step = 0
        self.seconds = 0.0

    def _parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the matrices for Muon, and all other parameters."""
        matrices = list[nn.Parameter]()
        others = list(self.dense.parameters())
        for name, parameter in self.model.named_parameters():
            is_inside = any(part in name for part in _MUON_MODULES)
            if is_inside and parameter.ndim == 2:
                matrices.append(parameter)
            else:
                others.append(parameter)
        return matrices, others

    def _name_tokens(self) -> torch.Tensor:
        """Return the token of each of `NAMES`: int64 [NAMES]."""
        tokens = []
        for name in NAMES:
            # In a text, words follow a space, which belongs to their token.
            spelled = name if name in CHARACTERS else f" {name}"
            token_ids = self.tokenizer.encode(spelled, add_special_tokens=False)
            if len(token_ids) != 1:
                raise ValueError(f"{spelled!r} is not one token")
            tokens.append(token_ids[0])
        return torch.tensor(tokens)

    @property
    def done(self) -> float:
        """The share of the run that is done, 0 to 1."""
        of_steps = self.step / self.settings.steps
        of_time = self.seconds / (60 * self.settings.minutes)
        return min(1.0, max(of_steps, of_time))

    def schedule(self) -> float:
        """Return the share of the full learning rate: it rises, stays level, then falls to 0."""
        rising = (self.step + 1) / _WARM_UP
        falling = (1 - self.done) / (1 - _LEVEL)
        return min(1.0, rising, falling)

    def losses(self, batch: Batch, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses of a batch, and which of its questions are answered exactly.

        A question is answered exactly if every token of its answer is the most likely one after the
        right tokens before it. Greedy decoding then gives the same answer. Nothing here waits for
        the GPU.

        Args:
            batch: The batch.
            rate: Pruning rate, used for clips.

        Returns:
            float32 [5]: cross-entropy per answer token, cross-entropy per text token and the three
            figures of `dense_losses`; bool [questions]: whether all tokens of the answer are right.
        """
        moved = [part.to(self.settings.device, non_blocking=True) for part in batch.tensors]
        tokens, rows, columns, question, places, tiles, labels = moved
        items, length = tokens.shape
        targets = tokens[rows, columns]
        language_model = self.model.language_model
        with torch.autocast(self.settings.device, dtype=torch.bfloat16):
            embeds = self.model.get_input_embeddings()(tokens).float()
            dense = embeds.new_zeros(3)
            if len(tiles):
                visual = tile_embeddings(self.model, self.config, tiles)
                dense = self._dense_losses(visual, labels)
                flat = embeds.flatten(0, 1)
                flat = flat.index_copy(0, places, visual.float().flatten(0, 1))
                embeds = flat.view(embeds.shape)
                if rate > 0 and batch.moving:
                    kept, new_columns = without_pruned(visual.detach(), places, length, items, rate)
                    embeds = embeds.gather(1, kept[..., None].expand(-1, -1, embeds.shape[-1]))
                    tokens = tokens.gather(1, kept)
                    columns = new_columns[rows, columns]
            output = language_model.model(inputs_embeds=embeds, use_cache=False)
            # The hidden state at each position predicts the next token.
            logits = language_model.lm_head(output.last_hidden_state[:, :-1]).float()
        text = text_loss(logits, tokens[:, 1:], self.config.image_token_id)
        of_answers = logits[rows, columns - 1]
        is_asked = (question < batch.questions).float()
        each = nn.functional.cross_entropy(of_answers, targets, reduction="none") * is_asked
        answer = each.sum() / is_asked.sum()
        is_wrong = (of_answers.argmax(-1) != targets).float()
        wrong = torch.zeros(batch.questions + 1, device=tokens.device)
        wrong.index_add_(0, question, is_wrong)
        # The last place counts padding.
        return torch.stack([answer, text, *dense]), wrong[:-1] == 0

    def _dense_losses(self, visual: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        embeddings = self.model.language_model.model.embeddings.weight
        alike = visual @ embeddings[self.names].T
        scaled = alike * visual.shape[-1] ** -0.5
        return dense_losses(self.dense(visual), scaled, labels)

    def update(self, batch: Batch, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Do one step of both optimizers, and return what `losses` returns."""
        figures, right = self.losses(batch, rate)
        answer, text, dense = figures[:3]
        # A batch of few long clips counts less than one of many pages, but not in proportion: by
        # the square root of the number of items.
        weight = (batch.items / 64) ** 0.5
        loss = (answer + self.text_weight * text) * weight + self.dense_weight * dense
        loss.backward()
        nn.utils.clip_grad_norm_(self.others, 1.0)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return figures, right

    def train_step(self, batch: Batch, new: bool, seen: Seen) -> None:
        """Do one step with the weights, learning rates and pruning rate of this time.

        Args:
            batch: The batch.
            new: Whether the model sees it for the first time.
            seen: Collects the results.
        """
        began = time.monotonic()
        done = self.done
        rate = self._pruning_rate()
        if done <= _WHOLE_CLIPS or not batch.moving:
            rate = 0.0
        with self.steps.stream():
            self.dense_weight.fill_(1.0 - 0.8 * done)
            self.text_weight.fill_(_TEXT_WEIGHT if done > _TEXT_FROM else 0.0)
            for name, full in _LEARNING_RATES.items():
                self.rates[name].fill_(full * self.schedule())
        figures, right = self.steps(batch, rate)
        seen.add(batch, rate, figures, right, new)
        if self.step > 0:  # the first step compiles
            self.seconds += time.monotonic() - began
        self.step += 1

    def _pruning_rate(self) -> float:
        """Draw the pruning rate of this step from its own seed."""
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.step)
        place = torch.multinomial(torch.tensor(_RATE_SHARES), 1, generator=generator)
        return PRUNING_RATES[int(place)]

    def save(self) -> None:
        """Write `state.pt`; it is replaced as a whole, also if the process is killed."""
        self.steps.wait()
        optimizers = {name: each.state_dict() for name, each in self.optimizers.items()}
        state = {
            "model": self.model.state_dict(),
            "dense": self.dense.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "optimizers": optimizers,
            "settings": self.fixed_settings,
        }
        with replaced_file(self.settings.out / "state.pt") as partial:
            torch.save(state, partial)

    def resume(self) -> None:
        """Load `state.pt` if there is one.

        Raises:
            BadInput: It belongs to a run with other settings.
        """
        path = self.settings.out / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.settings.device, weights_only=True)
        found = state.get("settings")
        if found != self.fixed_settings:
            what = f"was trained with {found}, not {self.fixed_settings}"
            raise BadInput(Fault(str(path), what, "give another output"))
        self.model.load_state_dict(state["model"])
        self.dense.load_state_dict(state["dense"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
            # Loading replaces the tensor that the learning rate is read from.
            for group in optimizer.param_groups:
                group["lr"] = self.rates[name]
        self.step = state["step"]
        self.seconds = state["seconds"]

    @property
    def fixed_settings(self) -> dict[str, Any]:
        """The settings that must be the same when a run is resumed."""
        settings = self.settings
        return {
            "seed": settings.seed,
            "steps": settings.steps,
            "minutes": settings.minutes,
            "tokens": settings.tokens,
            "start": str(settings.start),
        }
