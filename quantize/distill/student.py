"""Prepares the language model for training: what trains and in which precision, Mamba's path, the
teacher beside it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn

from checkpoint.classes import NemotronH_Omni_Reasoning_V3, NemotronHMamba2Mixer
from quantize.distill.state import weight_of


@contextlib.contextmanager
def trainable(student: nn.Module, linears: Mapping[str, nn.Module]) -> Iterator[None]:
    """Freeze everything but the weights of `linears`, hold those in float32, and keep Mamba's path
    unfused.
    """
    student.requires_grad_(False)
    hooks = []
    for linear in linears.values():
        weight: Any = weight_of(linear)
        dtype = weight.dtype
        # A step of 2e-6 is lost in BF16, whose numbers near 0.02 lie 1e-4 apart.
        weight.data = weight.data.float()
        weight.requires_grad_(True)
        # So the matmul is PTQ's own, and the first loss is PTQ's KL; autocast would change every
        # other layer as well.
        quantizer: Any = linear.weight_quantizer
        hooks.append(quantizer.register_forward_hook(lambda _, __, out, dtype=dtype: out.to(dtype)))
    mixers = unfuse_mamba(student)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for mixer in mixers:
            del mixer.train
        student.requires_grad_(False).eval()


def unfuse_mamba(language_model: nn.Module) -> list[Any]:
    """Keep every Mamba mixer in `eval()` whatever mode the model is put in, until its `train` is
    deleted.

    In `train()` with mamba_ssm installed, transformers calls a kernel that takes `out_proj.weight`
    as it is: ModelOpt's quantizers of `out_proj` are never called, and the model learns as if that
    layer were in BF16. Nothing else in the mixer asks for the mode.
    """
    mixers: list[Any] = [
        module for module in language_model.modules() if isinstance(module, NemotronHMamba2Mixer)
    ]
    for mixer in mixers:
        mixer.train(False)
        mixer.train = partial(_stay, mixer)
    return mixers


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


@contextlib.contextmanager
def embedding_only(model: NemotronH_Omni_Reasoning_V3) -> Iterator[None]:
    """Leave the model only what `calibrate.forward.embed` needs, so that FSDP can shard the rest
    under other hands.
    """
    student = model.language_model
    embeddings = nn.Embedding.from_pretrained(student.get_input_embeddings().weight.detach())
    model.language_model = _Embeddings(embeddings)
    try:
        yield
    finally:
        model.language_model = student


class _Embeddings(nn.Module):
    def __init__(self, embeddings: nn.Embedding) -> None:
        super().__init__()
        self.embeddings = embeddings

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings


def training_bytes(model: int, weights: int, taught: bool, shards: int) -> int:
    """Bytes of device memory that one process needs for training at the least; activations come on
    top.

    Args:
        model: Bytes of the language model in BF16.
        weights: Number of weights that train: float32 in BF16's place, a gradient and AdamW's two
            moments as well.
        taught: Whether the teacher lies beside it.
        shards: Processes that FSDP divides both models among; each holds them whole before.
    """
    loaded = model * (2 if taught else 1) + 2 * weights
    return max(loaded, (loaded + 12 * weights) // shards)


def frozen_copy(language_model: nn.Module) -> nn.Module:
    """The teacher: a copy that shares no storage with the student; take it before quantization."""
    return copy.deepcopy(language_model).requires_grad_(False).eval()
