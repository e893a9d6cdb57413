"""Serves a checkpoint with EVS on, asks about a text, an image, two images and a video, and counts what EVS saved.

    python -m serve.demo DIR                       # draws its own pictures and clip
    python -m serve.demo DIR --image a.png --image b.png --video clip.mp4

The prompt tokens with EVS off come from a second server, started with rate 0: they are counted, not computed. Runs on
two CPU cores with the embedded checkpoint in about a minute; needs Pillow and PyAV to draw.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from checkpoint.faults import BadInput, Fault, main
from serve.ask import Answer, RequestRefused, ask, connect, content_parts
from serve.process import ServerDied, running_server
from serve.settings import ServeSettings, served

COLOURS = ("red", "blue", "green", "orange")
CLIP_SECONDS = 8
CLIP_FPS = 8
SIDE = 256


def draw_image(path: Path, colour: str, label: str) -> None:
    """A PNG of 512 × 512 pixels, one tile: a coloured box with a label."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (512, 512), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((96, 160, 416, 352), fill=colour)
    draw.text((240, 240), label, fill="white", font_size=48)
    image.save(path)


def draw_video(path: Path, seconds: float = CLIP_SECONDS, fps: int = CLIP_FPS) -> None:
    """An H.264 clip: a box stands still for the first half and wanders, changing colour, through the second.

    Raises:
        BadInput: When PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        remedy = "pip install av, or give --video FILE"
        raise BadInput(Fault("av", "is not installed here, so no clip can be drawn", remedy)) from None
    from PIL import Image, ImageDraw

    frames = int(seconds * fps)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            image = Image.new("RGB", (SIDE, SIDE), "white")
            moved = max(0, number - frames // 2)
            left = 16 + moved * (SIDE - 96) // max(1, frames // 2)
            colour = COLOURS[moved * len(COLOURS) // frames * 2 % len(COLOURS)]
            ImageDraw.Draw(image).rectangle((left, 96, left + 64, 160), fill=colour)
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())


def questions(images: Sequence[Path], video: Path) -> dict[str, list[dict[str, object]]]:
    """The four prompts, by title."""
    return {
        "text": content_parts(["What is the largest of 3, 17 and 8?"]),
        "image": content_parts(["What colour is the box?"], images[:1]),
        "two images": content_parts(["What is different in the second image?"], images[:2]),
        "video": content_parts(["What happens in the video?"], videos=[video]),
    }


def demonstrate(directory: Path, settings: ServeSettings, images: Sequence[Path], video: Path, max_tokens: int) -> int:
    """Serve, ask, print; then count the video's prompt tokens with EVS off.

    Returns:
        0 when every question got an answer and EVS shortened the video's prompt, else 1.

    Raises:
        BadInput: When the directory or a file cannot be used.
        ServerDied: When vLLM does not start.
        RequestRefused: When it fails to answer.
    """
    prompts = questions(images, video)
    answers: dict[str, Answer] = {}
    with running_server(directory, settings) as server:
        print(f"{server.model} at {server.url}, EVS at q = {settings.video_pruning_rate:g}")
        client = connect(server.url)
        for title, parts in prompts.items():
            answers[title] = ask(client, server.model, parts, max_tokens)
            print(f"\n{title}\n{answers[title]}")
    with_evs = answers["video"].prompt_tokens
    with running_server(directory, dataclasses.replace(settings, video_pruning_rate=0.0)) as server:
        without = ask(connect(server.url), server.model, prompts["video"], 1).prompt_tokens
    print(f"\nvideo, prompt tokens: {without} with EVS off, {with_evs} at q = {settings.video_pruning_rate:g}", end="")
    print(f" ({1 - with_evs / without:.0%} fewer)")
    return 0 if with_evs < without and all(answer.completion_tokens for answer in answers.values()) else 1


def _run(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serve.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", metavar="DIR", type=Path, help="checkpoint directory")
    parser.add_argument("--image", action="append", type=Path, metavar="FILE", help="twice; drawn when not given")
    parser.add_argument("--video", type=Path, metavar="FILE", help="drawn when not given")
    parser.add_argument("--video-pruning-rate", metavar="Q", type=float, help="EVS rate in (0, 1)")
    parser.add_argument("--max-tokens", type=int, default=48, help="most tokens of an answer (48)")
    options = parser.parse_args(arguments)
    settings = served(options.directory, {"video_pruning_rate": options.video_pruning_rate, "port": 0}).settings
    if not settings.video_pruning_rate:
        raise BadInput(Fault("--video-pruning-rate", "is 0, so there is no EVS to show", "give a rate above 0"))
    if options.image and len(options.image) < 2:
        raise BadInput(Fault("--image", "was given once", "give two images, or none to have them drawn"))
    with tempfile.TemporaryDirectory() as scratch:
        images, video = options.image, options.video
        if not images:
            images = [Path(scratch) / "red.png", Path(scratch) / "blue.png"]
            for path, label in zip(images, "AB", strict=True):
                draw_image(path, path.stem, label)
        if video is None:
            video = Path(scratch) / "clip.mp4"
            draw_video(video)
        try:
            return demonstrate(options.directory, settings, images, video, options.max_tokens)
        except (ServerDied, RequestRefused) as failed:
            print(f"error: {failed}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    main(_run)
