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
from torch.nn.utils import parametrize

from checkpoint.libraries import language_model_classes
from quantize.distill.rows import IGNORE
from quantize.distill.weights import Trained

if TYPE_CHECKING:
    from transformers.models.nemotron_h_omni import NemotronH_Omni_Reasoning_V3


@contextlib.contextmanager
def trainable(student: nn.Module, trained: Trained) -> Iterator[None]:
    """Freeze everything but what trains, hold that in float32, and keep Mamba's path unfused.

    A step of 2e-6 is lost in BF16, whose numbers near 0.02 are 1e-4 apart. The model computes with
    the weights rounded to BF16, so that the first loss is PTQ's; autocast would change every other
    operation as well. Afterwards what was trained stays in float32.
    """
    student.requires_grad_(False)
    linears = set(trained.linears.values())
    hooks = []
    for weight in trained.weights.values():
        parameter = weight.parameter
        dtype = parameter.dtype
        parameter.data = parameter.data.float()
        if weight.module in linears:
            quantizer: Any = weight.module.weight_quantizer
            hooks.append(quantizer.register_forward_hook(partial(_cast_output, dtype=dtype)))
        elif not weight.is_rounded:
            # `unsafe` allows another dtype than the parameter's.
            parametrize.register_parametrization(
                weight.module, weight.key, _Rounded(dtype), unsafe=True
            )
        weight.parameter.requires_grad_(True)
    mixers = unfuse_mamba(student)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for mixer in mixers:
            del mixer.train
        student.requires_grad_(False).eval()


class _Rounded(nn.Module):
    """Rounds a float32 weight to the dtype that its module computes in."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self._dtype)


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


@contextlib.contextmanager
def own_embeddings(student: nn.Module, text_ids: torch.Tensor) -> Iterator[None]:
    """Let the student embed text by its own embeddings, so that they are given gradients.

    Samples are embedded before, by BF16's, which the teacher is given. The student embeds inside
    its forward, where its embeddings are whole under FSDP.

    Args:
        student: A `NemotronHForCausalLM`.
        text_ids: int64 [1, length]; `IGNORE` at visual tokens, whose embeddings are the projector's
            and stay.
    """
    model: Any = student
    backbone = model.get_decoder()
    hook = backbone.register_forward_pre_hook(partial(_embed_text, text_ids), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _embed_text(
    text_ids: torch.Tensor, backbone: Any, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = named["inputs_embeds"]
    is_text = text_ids != IGNORE
    own = backbone.get_input_embeddings()(text_ids.clamp(min=0)).to(given.dtype)
    return inputs, named | {"inputs_embeds": torch.where(is_text[..., None], own, given)}


def frozen_copy(language_model: nn.Module) -> nn.Module:
    """Return the teacher: a copy that shares no storage with the student.

    Call it before the language model is quantized.
    """
    return copy.deepcopy(language_model).requires_grad_(False).eval()
