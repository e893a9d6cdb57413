"""Clips and pictures to uint8 [N, height, width, 3]; the model normalizes them on its device.

vLLM resizes in float32 on one thread and sends BF16 to the engine. Here frames come in the model's
size (`loader`) and pass through; pictures, and frames of other loaders, are resized in uint8 on
`pixels.PIXEL_POOL`.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from PIL import Image
from vllm.model_executor.models.nano_nemotron_vl import (
    NanoNemotronVLMultiModalProcessor,
    NanoNemotronVLProcessingInfo,
)
from vllm.multimodal.processing.context import InputProcessingContext
from vllm.transformers_utils.processors.internvl import (
    calculate_internvl_targets,
    get_internvl_target_ratios,
)
from vllm.transformers_utils.processors.nano_nemotron_vl import (
    NanoNemotronVLProcessor,
    get_video_target_size_and_feature_size,
)

from hybridquant_vllm import fast_video, loader, media_options
from hybridquant_vllm.pixels import PIXEL_POOL, cut_tiles, resize_all


class FastProcessor(NanoNemotronVLProcessor):
    """vLLM's processor of this model, with pixels in uint8."""

    def _preprocess_video(
        self, text: list[str], videos: list[tuple[Any, dict[str, Any]]]
    ) -> tuple[list[str], dict[str, Any]]:
        """Return the text unchanged and the fields of the clips.

        vLLM writes all of a clip's tokens into the text here and tokenizes it again. The text is a
        dummy whose tokens nobody reads: those of the prompt are made in `_get_prompt_updates`.
        """
        if not videos:
            return text, {}
        frames = [self._resized_frames(pixels) for pixels, _ in videos]
        metadata = [about for _, about in videos]
        durations = [int(1000.0 / about["fps"]) for about in metadata]
        return text, {
            "pixel_values_flat_video": frames[0] if len(frames) == 1 else torch.cat(frames),
            "video_num_patches": torch.tensor([len(clip) for clip in frames]),
            "frames_indices": [about["frames_indices"] for about in metadata],
            "frame_duration_ms": torch.tensor(durations),
        }

    def _resized_frames(self, frames: Any) -> torch.Tensor:
        """Return frames of one clip, uint8 [frames, H, W, 3], in the size of the model's."""
        pixels = np.ascontiguousarray(frames, dtype=np.uint8)
        height = width = self.image_size
        if self.video_target_num_patches is not None:
            width, height, _ = get_video_target_size_and_feature_size(
                orig_w=pixels.shape[2],
                orig_h=pixels.shape[1],
                target_patches=self.video_target_num_patches,
                maintain_aspect_ratio=self.video_maintain_aspect_ratio,
                patch_size=self.config.patch_size,
                downsample_ratio=self.config.downsample_ratio,
            )
        return torch.from_numpy(resize_all(pixels, height, width))

    def _images_to_pixel_values_lst(
        self, images: list[Image.Image], max_num_tiles: int
    ) -> list[torch.Tensor]:
        """Return the tiles of each picture, uint8 [tiles, size, size, 3], thumbnail last.

        A checkpoint with pictures of dynamic resolution does not come here: they stay vLLM's.
        """
        cut = functools.partial(self._tiles, max_num_tiles=max_num_tiles)
        return PIXEL_POOL.map(cut, images)

    def _tiles(self, image: Image.Image, max_num_tiles: int) -> torch.Tensor:
        size = self.image_size
        _, width, height = calculate_internvl_targets(
            orig_width=image.width,
            orig_height=image.height,
            target_ratios=get_internvl_target_ratios(1, max_num_tiles),
            image_size=size,
            use_thumbnail=False,
        )
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        pixels = np.array(rgb, dtype=np.uint8)
        tiles = cut_tiles(pixels, width // size, height // size, size, self.use_thumbnail)
        return torch.from_numpy(tiles)


class FastProcessingInfo(NanoNemotronVLProcessingInfo):
    """Gives the processor above, and makes clips come through the loader."""

    def __init__(self, ctx: InputProcessingContext) -> None:
        super().__init__(ctx)
        fast_video.announce()
        processor = self.get_hf_processor()
        # Frames whose size depends on the clip's are resized by the processor: vLLM reads that
        # size once more, to count their tokens.
        is_fixed = processor.video_target_num_patches is None
        size = processor.image_size if is_fixed else None
        options = ctx.get_mm_config().media_io_kwargs
        loader.use_for(options, size)
        context = ctx.model_config.max_model_len
        media_options.bound(options, self.get_num_frames_with_most_features(context, {"video": 1}))

    def get_hf_processor(self, **kwargs: object) -> FastProcessor:
        """Return the processor; `kwargs` are those of `mm_processor_kwargs`."""
        kwargs.pop("truncation", None)  # as in the base class: its __init__ does not take it
        return self.ctx.init_processor(
            FastProcessor,
            config=self.get_hf_config(),
            tokenizer=self.get_tokenizer(),
            video_token=self.get_video_token(),
            video_pruning_rate=self.get_video_pruning_rate(),
            max_model_len=self.ctx.model_config.max_model_len,
            **kwargs,
        )


class FastMultiModalProcessor(NanoNemotronVLMultiModalProcessor):
    """vLLM's, under a name that logs can show."""
