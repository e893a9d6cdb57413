"""Runs in the serve environment, with the plug-in's sources: what vLLM makes of media through it.

    python tests/plugin/plugin_report.py CHECKPOINT CASES.json OUT.npz

Prints one JSON object about the classes that the plug-in subclasses. See
test_in_vllm.py.
"""

import inspect
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from decode_report import decode_report
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.model_executor.models import ModelRegistry, nano_nemotron_vl, radio
from vllm.model_executor.models.interfaces import supports_multimodal
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.media.connector import MODALITY_IO_MAP
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY
from vllm.renderers import ChatParams, renderer_from_config
from vllm.transformers_utils.processors import nano_nemotron_vl as processors

MEDIA_OPTIONS = {"video": {"fps": 2, "num_frames": 128}}


def main() -> None:
    checkpoint, cases, out = sys.argv[1:]
    arguments = EngineArgs(
        checkpoint,
        max_model_len=65536,
        media_io_kwargs={key: dict(value) for key, value in MEDIA_OPTIONS.items()},
    )
    config = arguments.create_engine_config()
    renderer = renderer_from_config(config)
    options = config.model_config.multimodal_config.media_io_kwargs
    pixels: dict[str, np.ndarray] = {}
    found = {
        "options": options,
        "loader": VIDEO_LOADER_REGISTRY.load(options["video"]["video_backend"]).frame_size,
        "processor": type(renderer.mm_processor).__name__,
        "media": media(renderer, options, json.loads(Path(cases).read_text()), pixels),
        "model": model_report(),
    }
    found["decode"] = decode_report(checkpoint)
    np.savez(out, **pixels)
    print(json.dumps(found))


def media(renderer, options: dict, given: dict, pixels: dict[str, np.ndarray]) -> dict:
    """Token ids, hashes, seconds and errors of each case; its pixels go to `pixels`."""
    found = {}
    for name, case in given.items():
        requested = {"video": case["video"]} if "video" in case else None
        template = {"add_generation_prompt": True, "tokenize": False}
        params = ChatParams(chat_template_kwargs=template, media_io_kwargs=requested)
        started = time.process_time()
        try:
            params = params.with_defaults(default_media_io_kwargs=options)
            _, (prompt,) = renderer.render_chat([case["messages"]], params)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            found[name]["status"] = create_error_response(error).error.code
            found[name]["seconds"] = time.process_time() - started
            continue
        found[name] = {"ids": prompt["prompt_token_ids"], "hashes": dict(prompt["mm_hashes"])}
        found[name]["seconds"] = time.process_time() - started
        for modality, items in prompt["mm_kwargs"].items():
            key = "pixel_values_flat" if modality == "image" else "pixel_values_flat_video"
            for number, item in enumerate(items):
                if item is not None:
                    pixels[f"{name}/{modality}/{number}"] = item[key].data.numpy()
    return found


def model_report() -> dict:
    """What the plug-in's model and what it subclasses look like in this vLLM."""
    from hybridquant_vllm import model

    stock = nano_nemotron_vl.NemotronH_Nano_VL_V2
    ours = model.NemotronH_Nano_VL_V2
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (20, 3, 8, 6), dtype=torch.uint8)
    frames = frames.contiguous(memory_format=torch.channels_last)
    mean = torch.tensor([0.48, 0.46, 0.41]).reshape(1, 3, 1, 1)
    deviation = torch.tensor([0.27, 0.26, 0.28]).reshape(1, 3, 1, 1)
    resize = processors._bicubic_resize_and_normalize
    by_stock = inspect.unwrap(resize)
    expected = by_stock(frames.permute(0, 2, 3, 1), None, mean, deviation, torch.bfloat16)
    normalized = model.normalize(frames, mean, deviation, torch.bfloat16)
    return {
        "registered": ModelRegistry.models["NemotronH_Nano_VL_V2"].module_name,
        "name": ours.__name__,
        "has_own_processor": "_processor_factory" in vars(ours),
        "stock_has_own_processor": "_processor_factory" in vars(stock),
        "registry": type(MULTIMODAL_REGISTRY).__name__,
        "is_multimodal": supports_multimodal(ours),
        "sequential": hasattr(ours, "requires_sequential_video_encoding"),
        "device_normalize": getattr(stock, "supports_mm_device_do_normalize", False),
        "normalized_equal": bool(torch.equal(normalized, expected)),
        "normalized_is_contiguous": normalized.is_contiguous(),
        "video_io": MODALITY_IO_MAP["video"].__name__,
        "reused": reused_frames(ours),
        "layer_scales": "self.ls1" in inspect.getsource(radio.RadioVisionEncoderLayer.forward),
        "scales_are_loaded": '{"ls1", "ls2"}' not in inspect.getsource(radio.RadioModel),
        "signatures": {
            name: list(inspect.signature(function).parameters)
            for name, function in {
                "extract_feature": stock.extract_feature,
                "images": processors.NanoNemotronVLProcessor._images_to_pixel_values_lst,
                "video": processors.NanoNemotronVLProcessor._preprocess_video,
                "layer": radio.RadioVisionEncoderLayer.forward,
            }.items()
        },
    }


def reused_frames(ours: type) -> dict:
    """How many frames the tower is asked about where some equal the one before."""
    asked = []

    def tower(self, pixel_values, num_frames=None):
        asked.append(len(pixel_values))
        return pixel_values.float().sum((1, 2, 3))[:, None, None]

    frames = torch.arange(5, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 4, 4)
    repeated = frames[torch.tensor([0, 0, 1, 1, 1, 2, 0, 4])]
    unnormalized = type("Unnormalized", (ours,), {"_normalized": lambda self, pixels: pixels})
    model = unnormalized.__new__(unnormalized)
    torch.nn.Module.__init__(model)
    stock = ours.__mro__[1]
    kept = stock.extract_feature
    stock.extract_feature = tower
    try:
        features = model.extract_feature(repeated)
    finally:
        stock.extract_feature = kept
    expected = repeated.float().sum((1, 2, 3))[:, None, None]
    return {"asked": asked, "equal": bool(torch.equal(features, expected))}


if __name__ == "__main__":
    main()
