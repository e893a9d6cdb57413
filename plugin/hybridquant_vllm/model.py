"""The model class: takes uint8 frames and tiles, and normalizes them on its device.

Traps of vLLM 0.32 and 0.33 (tests/plugin/test_expected_classes.py):

- vLLM caches the flags it reads off a class under the bytes of this one file: none of them may
  depend on an environment variable.
- The decorator of the base class does not reach a subclass; it is repeated here.
- Some of vLLM's tables are keyed by the name of the class, so it is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.model_executor.models import nano_nemotron_vl
from vllm.model_executor.models.nano_nemotron_vl import NanoNemotronVLDummyInputsBuilder
from vllm.model_executor.models.radio import RadioModel
from vllm.multimodal import MULTIMODAL_REGISTRY

from hybridquant_vllm.processor import FastMultiModalProcessor, FastProcessingInfo
from hybridquant_vllm.step_times import timed
from hybridquant_vllm.tower import drop_layer_scales, fp8_tower, wants_fp8

_FRAMES_AT_ONCE = 16
"""Frames normalized at once: in float32 all frames of a clip would take four times the memory."""


def normalize(
    pixels: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Normalize uint8 pixels as vLLM's processor does, in float32, and cast.

    Args:
        pixels: uint8 [N, 3, H, W], in any memory layout.
        mean: float32 [1, 3, 1, 1], of values between 0 and 1.
        deviation: The same.
        dtype: Of the result.

    Returns:
        [N, 3, H, W], contiguous.
    """
    normalized = torch.empty(pixels.shape, dtype=dtype, device=pixels.device)
    for start in range(0, len(pixels), _FRAMES_AT_ONCE):
        part = slice(start, start + _FRAMES_AT_ONCE)
        values = pixels[part].to(torch.float32)
        values.div_(255.0).sub_(mean).div_(deviation)
        normalized[part].copy_(values)
    return normalized


def _planes_first(pixels: Any) -> Any:
    """Return uint8 [..., H, W, 3] as a view [..., 3, H, W], in lists too; others unchanged."""
    if isinstance(pixels, (list, tuple)):
        return [_planes_first(part) for part in pixels]
    if isinstance(pixels, torch.Tensor) and pixels.dtype == torch.uint8:
        return pixels.movedim(-1, -3)
    return pixels


@MULTIMODAL_REGISTRY.register_processor(
    FastMultiModalProcessor,
    info=FastProcessingInfo,
    dummy_inputs=NanoNemotronVLDummyInputsBuilder,
)
class NemotronH_Nano_VL_V2(nano_nemotron_vl.NemotronH_Nano_VL_V2):
    """vLLM's class of this model, for pixels in uint8, and with ReplaySSM."""

    supports_replayssm = True
    """Trap: vLLM refuses --use-replayssm because its own class does not say so. Shapes and types of
    the states come from its NemotronHForCausalLM, whose Mamba layers do it."""

    def extract_feature(
        self, pixel_values: torch.Tensor, num_frames: int | None = None
    ) -> torch.Tensor:
        """Return the tower's features of tiles or frames.

        Args:
            pixel_values: [N, 3, H, W], uint8 or normalized.
            num_frames: Frames of the clip, where the tower joins consecutive frames.

        Returns:
            [N, tokens, hidden].
        """
        if pixel_values.dtype != torch.uint8:
            return super().extract_feature(pixel_values, num_frames)
        if num_frames is None and len(pixel_values) > 1:
            return self._features_without_repeats(pixel_values)
        return self._features(self._normalized(pixel_values), num_frames)

    def _features(self, pixels: torch.Tensor, num_frames: int | None = None) -> torch.Tensor:
        with timed("tower", on_device=True):
            return super().extract_feature(pixels, num_frames)

    def _features_without_repeats(self, pixels: torch.Tensor) -> torch.Tensor:
        """Compute the features of a run of equal frames once, for its first frame.

        Slides, paused screens and static cameras have many of them.
        """
        is_new = torch.ones(len(pixels), dtype=torch.bool, device=pixels.device)
        is_new[1:] = (pixels[1:] != pixels[:-1]).any(dim=(1, 2, 3))
        if bool(is_new.all()):
            return self._features(self._normalized(pixels))
        features = self._features(self._normalized(pixels[is_new]))
        return features[is_new.cumsum(0) - 1]

    def _normalized(self, pixels: torch.Tensor) -> torch.Tensor:
        mean = torch.tensor(self.config.norm_mean, device=pixels.device).reshape(1, 3, 1, 1)
        deviation = torch.tensor(self.config.norm_std, device=pixels.device).reshape(1, 3, 1, 1)
        return normalize(pixels, mean, deviation, self.llm_dtype)

    def _parse_and_validate_image_input(self, **kwargs: object) -> Any:
        if "pixel_values_flat" in kwargs:
            kwargs["pixel_values_flat"] = _planes_first(kwargs["pixel_values_flat"])
        return super()._parse_and_validate_image_input(**kwargs)

    def _parse_and_validate_video_input(self, **kwargs: object) -> Any:
        if "pixel_values_flat_video" in kwargs:
            frames = kwargs["pixel_values_flat_video"]
            kwargs["pixel_values_flat_video"] = _planes_first(frames)
        return super()._parse_and_validate_video_input(**kwargs)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """Load the weights, then drop the tower's layer scales if all are ones."""
        loaded = super().load_weights(weights)
        drop_layer_scales(self.vision_model)
        return loaded

    def get_vit_model_from_radio_config(self, hf_config: Any) -> RadioModel:
        """Return the tower; with HYBRIDQUANT_FP8_TOWER=1, one whose linears are in FP8."""
        if not wants_fp8():
            return super().get_vit_model_from_radio_config(hf_config)
        # vLLM's own builds it without quantization; what it makes of the configuration is taken.
        with torch.device("meta"):
            unquantized = super().get_vit_model_from_radio_config(hf_config)
        return fp8_tower(unquantized.config)

    def embed_multimodal(self, **kwargs: object) -> Any:
        """Return the embeddings of each clip and picture."""
        with timed("vision", on_device=True):
            return super().embed_multimodal(**kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the language model's hidden states, [tokens, hidden]."""
        with timed("language model", on_device=True):
            return super().forward(*args, **kwargs)
