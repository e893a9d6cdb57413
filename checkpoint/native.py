"""Loads the checkpoint into transformers' own classes, without remote code, weights streamed from
the files.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, logging

from checkpoint.classes import NemotronH_Omni_Reasoning_V3, NemotronH_Omni_Reasoning_V3_Config
from checkpoint.config import CheckpointConfig
from checkpoint.faults import BadInput, Fault
from checkpoint.files import TensorFiles
from checkpoint.layout import LANGUAGE_MODEL, LAYERS, expected_tensors

# transformers builds a video patch projection for the successor's temporal patches. V2 has none and
# never calls it.
_UNUSED = "vision_model.embeddings.video_patch_projection.weight"
# transformers would report that projection, and tensor parallelism we do not use, at every load;
# what is really missing is raised below.
logging.set_verbosity_error()
if not sys.stderr.isatty():
    logging.disable_progress_bar()


def native_config(config: CheckpointConfig) -> NemotronH_Omni_Reasoning_V3_Config:
    """Map a V2 config to `NemotronH_Omni_Reasoning_V3_Config`, the successor's class, which loads
    V2's tensor names.
    """
    tower = config.vision
    text = {
        key: value
        for key, value in config.text.items()
        if key
        not in ("architectures", "model_type", "num_hidden_layers", "torch_dtype", "auto_map")
    }
    # time_step_min clamps dt in transformers; the release and vLLM do not clamp. The symptom is
    # log-probabilities off by up to 0.01 with no error anywhere.
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
    return NemotronH_Omni_Reasoning_V3_Config(
        text_config=text,
        vision_config=vision,
        force_image_size=config.tile_size,
        downsample_ratio=config.raw["downsample_ratio"],
        projector_hidden_size=config.raw["projector_hidden_size"],
        vision_hidden_size=config.raw["vit_hidden_size"],
        image_token_id=config.image_token_id,
        video_temporal_patch_size=2,
    )


class _Deferred:
    """A tensor read when transformers' loader asks for it, in the shape of a safetensors slice."""

    def __init__(
        self, tensors: TensorFiles, name: str, read: Callable[[str], torch.Tensor]
    ) -> None:
        self._dtype, self._name, self._read = tensors.specs[name].dtype, name, read

    def get_dtype(self) -> str:
        return "BF16" if self._dtype.startswith(("F8", "U8")) else self._dtype

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self._read(self._name)


def load_model(
    config: CheckpointConfig,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    read: Callable[[str], torch.Tensor] | None = None,
    layers: bool = True,
) -> NemotronH_Omni_Reasoning_V3:
    """Load the checkpoint in `eval()` mode.

    Tensors are read from the mapped files one at a time and placed on `device`, so host memory
    never holds a second copy. Embed tiles and frames with `calibrate.forward`, not with
    `forward(pixel_values_videos=…)`, which is broken in transformers 5.19.

    Args:
        config: The checkpoint.
        device: A torch device.
        dtype: Parameters' dtype; float32 for comparisons.
        read: Gives the tensor of a checkpoint name where the files hold it in another form
            (quantized); the files' own tensor by default.
        layers: Without them, the language model is embeddings, final norm and head only:
            `checkpoint.layers` reads its layers one by one.

    Raises:
        BadInput: When tensors that the model needs are missing, or some are left over.
    """
    tensors = TensorFiles(config.directory)
    native: Any = native_config(config)
    names = expected_tensors(config)
    if not layers:
        native.text_config.layers_block_type = []
        names = {name: spec for name, spec in names.items() if not name.startswith(LAYERS)}
    loaded: Any = NemotronH_Omni_Reasoning_V3.from_pretrained(
        None,
        config=native,
        state_dict={name: _Deferred(tensors, name, read or tensors.read) for name in names},
        dtype=dtype,
        device_map={"": device},
        output_loading_info=True,
    )
    model, report = loaded
    # transformers initialises what is missing at random and goes on.
    missing = sorted(
        name for name in report["missing_keys"] if name != _UNUSED and "layer_scale" not in name
    )
    left_over = sorted(report["unexpected_keys"])
    if missing or left_over or report["mismatched_keys"]:
        what = f"tensors missing {missing}, left over {left_over}"
        raise BadInput(Fault(str(config.directory), what, "check it with export.verify"))
    model.vision_model.embeddings.video_patch_projection = None
    # from_config leaves this empty for a language model inside another, and ModelOpt's exporter
    # iterates over it.
    model.language_model.config.architectures = ["NemotronHForCausalLM"]
    return model.eval()


def module_name(tensor_or_linear: str) -> str:
    """The language model's module for a checkpoint name: `language_model.backbone.layers.0…` →
    `model.layers.0…`.
    """
    return tensor_or_linear.removeprefix(LANGUAGE_MODEL).replace("backbone.", "model.", 1)


def load_tokenizer(config: CheckpointConfig) -> PreTrainedTokenizerFast:
    """Load tokenizer.json and the chat template of the directory.

    Raises:
        BadInput: When there is no tokenizer, or it lacks the special tokens that the prompts are
            made of.
    """
    if not (config.directory / "tokenizer.json").exists():
        raise BadInput(
            Fault(
                str(config.directory / "tokenizer.json"), "no such file", "copy the tokenizer files"
            )
        )
    # AutoTokenizer would read the config class from the directory's Python files.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(config.directory, local_files_only=True)
    token, expected = config.raw["img_context_token"], config.image_token_id
    found = tokenizer.convert_tokens_to_ids(token)
    if found != expected:
        what = f"{token} has id {found}, config.json says {expected}"
        remedy = "copy tokenizer and config.json from one release"
        raise BadInput(Fault(str(config.directory / "tokenizer.json"), what, remedy))
    return tokenizer
