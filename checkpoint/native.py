"""Loads the checkpoint into transformers' own classes, without remote code, weights streamed from the files."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerFast
from transformers.models.nemotron_h_omni import NemotronH_Omni_Reasoning_V3, NemotronH_Omni_Reasoning_V3_Config

from checkpoint.config import CheckpointConfig
from checkpoint.faults import BadInput, Fault

# transformers builds a video patch projection for the successor's temporal patches. V2 has none and never calls it.
_UNUSED = "vision_model.embeddings.video_patch_projection.weight"


def native_config(config: CheckpointConfig) -> NemotronH_Omni_Reasoning_V3_Config:
    """Map a V2 config to `NemotronH_Omni_Reasoning_V3_Config`, the successor's class, which loads V2's tensor names."""
    tower = config.vision
    text = {
        key: value
        for key, value in config.text.items()
        if key not in ("architectures", "model_type", "num_hidden_layers", "torch_dtype", "auto_map")
    }
    # time_step_min clamps dt in transformers; the release and vLLM do not clamp. The symptom is log-probabilities off
    # by up to 0.01 with no error anywhere.
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


def load_model(
    config: CheckpointConfig, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> NemotronH_Omni_Reasoning_V3:
    """Load the checkpoint in `eval()` mode.

    Tensors are read from the mapped files one at a time and placed on `device`, so host memory never holds a second
    copy. Embed tiles and frames with `calibrate.forward`, not with `forward(pixel_values_videos=…)`, which is broken
    in transformers 5.19.

    Raises:
        BadInput: When tensors that the model needs are missing, or some are left over.
    """
    model, report = NemotronH_Omni_Reasoning_V3.from_pretrained(
        config.directory,
        config=native_config(config),
        dtype=dtype,
        device_map={"": device},
        output_loading_info=True,
        local_files_only=True,
    )
    # transformers initialises what is missing at random and goes on.
    missing = sorted(name for name in report["missing_keys"] if name != _UNUSED and "layer_scale" not in name)
    left_over = sorted(name for name in report["unexpected_keys"] if "input_conditioner" not in name)
    if missing or left_over or report["mismatched_keys"]:
        raise BadInput(
            Fault(
                str(config.directory),
                f"tensors missing {missing}, left over {left_over}",
                "check it with export.verify",
            )
        )
    model.vision_model.embeddings.video_patch_projection = None
    return model.eval()


def load_tokenizer(config: CheckpointConfig) -> PreTrainedTokenizerFast:
    """Load tokenizer.json and the chat template of the directory.

    Raises:
        BadInput: When there is no tokenizer, or it lacks the special tokens that the prompts are made of.
    """
    if not (config.directory / "tokenizer.json").exists():
        raise BadInput(Fault(str(config.directory / "tokenizer.json"), "no such file", "copy the tokenizer files"))
    # AutoTokenizer would read the config class from the directory's Python files.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(config.directory, local_files_only=True)
    for key, token in (("img_context_token_id", config.raw["img_context_token"]),):
        found = tokenizer.convert_tokens_to_ids(token)
        if found != config.raw[key]:
            raise BadInput(
                Fault(
                    str(config.directory / "tokenizer.json"),
                    f"{token} has id {found}, config.json says {config.raw[key]}",
                    "copy tokenizer and config.json from one release",
                )
            )
    return tokenizer
