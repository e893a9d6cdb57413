"""Prepares the language model for training: what trains and in which precision, Mamba's path, the
teacher beside it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from checkpoint.libraries import language_model_classes
from quantize.distill.weights import Linears, weight_of

if TYPE_CHECKING:
    from transformers.models.nemotron_h_omni import NemotronH_Omni_Reasoning_V3


@contextlib.contextmanager
def trainable(student: nn.Module, linears: Linears) -> Iterator[None]:
    """Freeze everything but the weights of `linears`, hold those in float32, and keep Mamba's path
    unfused.
    """
    student.requires_grad_(False)
    hooks = []
    for linear in linears.values():
        weight = weight_of(linear)
        dtype = weight.dtype
        # A step of 2e-6 is lost in BF16, whose numbers near 0.02 are 1e-4 apart.
        weight.data = weight.data.float()
        weight.requires_grad_(True)
        # With the quantized weight in BF16 the matmul is PTQ's own, and the first loss is that of
        # PTQ. Autocast would change every other layer as well.
        quantizer: Any = linear.weight_quantizer
        hooks.append(quantizer.register_forward_hook(partial(_cast_output, dtype=dtype)))
    mixers = unfuse_mamba(student)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for mixer in mixers:
            del mixer.train
        student.requires_grad_(False).eval()


def _cast_output(
    module: nn.Module, inputs: Any, output: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return output.to(dtype)


def unfuse_mamba(language_model: nn.Module) -> list[Any]:
    """Keep every Mamba mixer in `eval()` whatever mode the model is put in, until its `train` is
    deleted.

    Trap: in `train()` with mamba_ssm installed, transformers calls a kernel that takes
    `out_proj.weight` as it is. ModelOpt's quantizers of `out_proj` are then never called, and the
    model learns as if that layer were in BF16. Nothing else in the mixer depends on the mode.

    Returns:
        The mixers.
    """
    mamba = language_model_classes().NemotronHMamba2Mixer
    mixers: list[Any] = []
    for module in language_model.modules():
        if isinstance(module, mamba):
            mixer: Any = module.eval()
            mixer.train = partial(_stay, mixer)
            mixers.append(mixer)
    return mixers


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


@contextlib.contextmanager
def embedding_only(model: NemotronH_Omni_Reasoning_V3) -> Iterator[None]:
    """Leave the model only what `calibrate.forward.embed` needs.

    Samples are embedded while the language model trains, and FSDP shards the language model's own
    embeddings.
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


def frozen_copy(language_model: nn.Module) -> nn.Module:
    """Return the teacher: a copy that shares no storage with the student.

    Call it before the language model is quantized.
    """
    return copy.deepcopy(language_model).requires_grad_(False).eval()
