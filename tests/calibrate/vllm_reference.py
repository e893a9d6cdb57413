"""Runs in the serve environment: what vLLM itself makes of the same chat messages, clips and
embeddings.

    python tests/calibrate/vllm_reference.py CHECKPOINT CASES.json EVS.npz OUT.npz

Chats go through the server's own renderer: media loading, chat template, processor. See
test_against_vllm.py.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.media.image import ImageMediaIO
from vllm.multimodal.media.video import VideoMediaIO
from vllm.multimodal.video_prune.evs import compute_retained_tokens_count, compute_retention_mask
from vllm.renderers import ChatParams, renderer_from_config
from vllm.transformers_utils.processors.internvl import (
    calculate_internvl_targets,
    get_internvl_target_ratios,
)
from vllm.transformers_utils.processors.nano_nemotron_vl import video_to_pixel_values

TILED = 4
"""Frames of a clip whose tiles are compared."""

EVERY = 37
"""One value in 37 of each tile is compared: the whole would be 400 MB for the longest clip."""


def main() -> None:
    checkpoint, cases, evs, out = sys.argv[1:]
    given = json.loads(Path(cases).read_text())
    result: dict[str, np.ndarray] = {}
    chats(checkpoint, given, result)
    clips(checkpoint, given, result)
    grids(given, result)
    masks(np.load(evs), result)
    np.savez(out, **result)


def chats(checkpoint: str, given: dict, result: dict) -> None:
    media = {"video": given["media_io_kwargs"]}
    arguments = EngineArgs(checkpoint, max_model_len=65536, media_io_kwargs=media)
    renderer = renderer_from_config(arguments.create_engine_config())
    for name, chat in given["chats"].items():
        kwargs = {"add_generation_prompt": chat["open_turn"], "tokenize": False}
        params = ChatParams(chat_template_kwargs=kwargs, media_io_kwargs=media)
        _, (prompt,) = renderer.render_chat([chat["messages"]], params)
        result[f"ids/{name}"] = np.array(prompt["prompt_token_ids"])
        for modality, items in prompt.get("mm_kwargs", {}).items():
            key = "pixel_values_flat" if modality == "image" else "pixel_values_flat_video"
            for number, item in enumerate(items):
                tiles = item[key].data.float()
                result[f"tiles/{name}/{modality}/{number}"] = tiles.flatten(1)[:, ::EVERY].numpy()
                if modality == "video":
                    result[f"duration/{name}/{number}"] = item["frame_duration_ms"].data.numpy()


def clips(checkpoint: str, given: dict, result: dict) -> None:
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    mean = torch.tensor(config["norm_mean"]).reshape(1, 3, 1, 1)
    deviation = torch.tensor(config["norm_std"]).reshape(1, 3, 1, 1)
    loader = VideoMediaIO(ImageMediaIO(), **given["media_io_kwargs"])
    few = VideoMediaIO(ImageMediaIO(), **given["few_frames"])
    for name, path in given["clips"].items():
        frames, metadata = loader.load_file(Path(path)).media
        result[f"frames/{name}"] = frames
        result[f"indices/{name}"] = np.array(metadata["frames_indices"])
        result[f"fps/{name}"] = np.array(metadata["fps"])
        tiles = video_to_pixel_values(
            frames[:TILED],
            input_size=config["force_image_size"],
            norm_mean=mean,
            norm_std=deviation,
        )
        result[f"frame_tiles/{name}"] = tiles.flatten(1)[:, ::EVERY].numpy()
        _, metadata = few.load_file(Path(path)).media
        result[f"few_indices/{name}"] = np.array(metadata["frames_indices"])


def grids(given: dict, result: dict) -> None:
    ratios = get_internvl_target_ratios(1, 12)
    for size in given["grid_tiles"]:
        found = []
        for width, height in given["grid_images"]:
            targets = calculate_internvl_targets(
                orig_width=width,
                orig_height=height,
                target_ratios=ratios,
                image_size=size,
                use_thumbnail=False,
            )
            found.append(targets[1:])
        result[f"grids/{size}"] = np.array(found) // size


def masks(embeddings: np.lib.npyio.NpzFile, result: dict) -> None:
    for name in embeddings.files:
        # name: dtype/kind/frames/rows/cols/rate
        dtype, _, frames, rows, cols, rate = name.split("/")
        values = torch.from_numpy(embeddings[name]).to(getattr(torch, dtype))
        size = (int(frames), int(rows), int(cols))
        result[f"mask/{name}"] = compute_retention_mask(values, size, 1, float(rate)).numpy()
        count = compute_retained_tokens_count(size[1] * size[2], size[0], float(rate))
        result[f"retained/{name}"] = np.array(count)


if __name__ == "__main__":
    main()
