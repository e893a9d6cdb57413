"""Loads the checkpoint into transformers' own classes, without remote code, tensor by tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from checkpoint.command import command_name
from checkpoint.config import CheckpointConfig
from checkpoint.faults import BadInput, Fault, shortened
from checkpoint.files import Reader, TensorFiles
from checkpoint.libraries import language_model_classes, model_classes
from checkpoint.opened import Checkpoint

if TYPE_CHECKING:
    from transformers.models.nemotron_h_omni import (
        NemotronH_Omni_Reasoning_V3,
        NemotronH_Omni_Reasoning_V3_Config,
    )

_UNUSED = "vision_model.embeddings.video_patch_projection.weight"
"""A projection of the successor's class. Every frame is embedded as an image, so it is never used.
"""

_NOT_NATIVE = ("architectures", "model_type", "num_hidden_layers", "torch_dtype", "auto_map")
"""Keys of `llm_config` that the successor's config class does not take."""


def native_config(config: CheckpointConfig) -> NemotronH_Omni_Reasoning_V3_Config:
    """Map a V2 config to that of the successor's class, which loads V2's tensor names.

    Raises:
        BadInput: The class refuses a value.
    """
    tower = config.vision
    text = {key: value for key, value in config.text.items() if key not in _NOT_NATIVE}
    # transformers clamps dt to time_step_min; the release and vLLM do not. The symptom is
    # log-probabilities that differ by up to 0.01, without an error.
    text["time_step_min"] = 0.0
    vision: dict[str, Any] = {
        "hidden_size": tower.hidden_size,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "mlp_ratio": tower.mlp_size / tower.hidden_size,
        "patch_size": tower.patch_size,
        "max_img_size": tower.position_side * tower.patch_size,
        "num_cls_tokens": tower.class_tokens,
        "num_registers": tower.prefix_tokens - tower.class_tokens,
        "layer_norm_eps": 1e-6,
        "video_temporal_patch_size": 2,
        "summary_idxs": [0],
    }
    configuration = model_classes().NemotronH_Omni_Reasoning_V3_Config
    try:
        return configuration(
            text_config=text,
            vision_config=vision,
            force_image_size=config.tile_size,
            downsample_ratio=config.raw["downsample_ratio"],
            projector_hidden_size=config.raw["projector_hidden_size"],
            vision_hidden_size=config.raw["vit_hidden_size"],
            image_token_id=config.image_token_id,
            video_temporal_patch_size=2,
        )
    except Exception as error:  # its dataclasses check types, and raise what they like
        reason = str(error).strip().rpartition("\n")[2]
        what = f"is not what transformers' class of the model takes: {shortened(reason)}"
        path = str(config.directory / "config.json")
        remedy = "copy config.json from the released checkpoint"
        raise BadInput(Fault(path, what, remedy)) from None


class _Deferred:
    """A tensor that is read when transformers' loader requests it, like a safetensors slice."""

    def __init__(self, tensors: TensorFiles, name: str, read: Reader) -> None:
        self._dtype = tensors.specs[name].dtype
        self._name = name
        self._read = read

    def get_dtype(self) -> str:
        is_quantized = self._dtype.startswith(("F8", "U8"))
        return "BF16" if is_quantized else self._dtype

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self._read(self._name)


def load_model(
    checkpoint: Checkpoint,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    read: Reader | None = None,
    layers: bool = True,
) -> NemotronH_Omni_Reasoning_V3:
    """Load a checkpoint in `eval()` mode.

    Tensors are read from the files one at a time and placed on `device`, so host memory never
    holds a second copy. Embed tiles and frames with `calibrate.forward`, not with
    `forward(pixel_values_videos=…)`, which is broken in transformers 5.19.

    Args:
        checkpoint: BF16, or quantized with a `read` that dequantizes.
        device: A torch device.
        dtype: Of the parameters; float32 for comparisons.
        read: Returns the BF16 tensor of a checkpoint name; reads it from the files if None.
        layers: Whether to load the language model's layers. Without them it consists of
            embeddings, final norm and head: `checkpoint.layers` reads the layers one by one.

    Raises:
        BadInput: Tensors that the model needs are missing, or some are left over.
    """
    avoid_cudnn_attention()
    config = checkpoint.config
    family = config.family
    read = read or checkpoint.tensors.read
    native: Any = native_config(config)
    names = list(checkpoint.layout)
    if not layers:
        native.text_config.layers_block_type = []
        names = [name for name in names if family.layer_of(name) is None]
    absent = [name for name in names if name not in checkpoint.tensors]
    _refuse(checkpoint, absent, left_over=[])
    state = {
        family.released_name(name): _Deferred(checkpoint.tensors, name, read) for name in names
    }
    loaded: Any = model_classes().NemotronH_Omni_Reasoning_V3.from_pretrained(
        None,
        config=native,
        state_dict=state,
        dtype=dtype,
        device_map={"": device},
        output_loading_info=True,
    )
    model, report = loaded
    _check_report(report, checkpoint)
    model.vision_model.embeddings.video_patch_projection = None
    # from_config leaves this empty for a language model inside another one, and ModelOpt's exporter
    # iterates over it.
    model.language_model.config.architectures = ["NemotronHForCausalLM"]
    return model.eval()


def avoid_cudnn_attention() -> None:
    """Let torch take its other attention kernels on a GPU, in the whole process.

    Trap of torch 2.11 on Hopper: cuDNN comes first there, and plans every new length of a prompt
    anew, which takes the CPU 55 ms forward and 71 ms backward. Prompts differ in length, so the GPU
    waited during nearly half of a training (benchmarks/results/training_attention_h200.json).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def _check_report(report: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse what transformers only reports: it initializes missing tensors at random."""
    missing = []
    for name in sorted(report["missing_keys"]):
        if name != _UNUSED and "layer_scale" not in name:
            missing.append(name)
    missing += [str(name) for name in report["mismatched_keys"]]
    _refuse(checkpoint, missing, sorted(report["unexpected_keys"]))


def _refuse(checkpoint: Checkpoint, missing: list[str], left_over: list[str]) -> None:
    """Raise `BadInput` if tensors are missing or left over."""
    if missing or left_over:
        what = f"tensors missing: {missing[:5]}, left over: {left_over[:5]}"
        remedy = f"check it with {command_name('export.verify')}"
        raise BadInput(Fault(str(checkpoint.directory), what, remedy))


def load_final_norm(checkpoint: Checkpoint, device: str) -> nn.Module:
    """Load the norm after the language model's last layer."""
    text = checkpoint.config.text
    norm: nn.Module = language_model_classes().NemotronHRMSNorm(
        text["hidden_size"], eps=text["layer_norm_epsilon"]
    )
    weight = checkpoint.tensors.read(f"{checkpoint.config.family.final_norm}.weight")
    norm.weight = nn.Parameter(weight.to(device), requires_grad=False)
    return norm
