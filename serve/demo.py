"""Serves a checkpoint with EVS on, asks four questions, and counts what EVS saves.

    python -m serve.demo DIR                       # draws its own pictures and clip
    python -m serve.demo DIR --image page.png --image a.png --image b.png --video clip.mp4

The questions are about a list, a page, two images and a clip. The prompt tokens with EVS off come
from a second server, started with rate 0: they are counted, not computed. Runs on two CPU cores
with the tiny checkpoint in about a minute; needs Pillow and PyAV to draw.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoint.command import command_parser, parse_command
from checkpoint.faults import BadInput, Fault, main
from checkpoint.log import get_logger
from serve.ask import Answer, RequestRefused, ask, content_parts
from serve.environment import find_environment
from serve.options import VIDEO_SETTINGS, add_setting_options, given_settings
from serve.preflight import checked_settings
from serve.process import ServerDied, running_server
from serve.settings import ServeSettings, override

logger = get_logger("serve.demo")

CLIP_SECONDS = 8
CLIP_FPS = 8
SIDE = 256
"""Side of a picture and of the clip in pixels: one tile of the tiny checkpoint."""

COLOURS = {"red": (215, 35, 40), "blue": (40, 75, 210)}
PAPER = (250, 248, 240)
INK = (20, 20, 40)
LIST = "List:\nab 417\nkx 208\nqe 935\nzo 661\n"

Parts = list[dict[str, Any]]


def draw_page(path: Path, code: str = "K7XP2") -> None:
    """Draw a PNG of one tile of the tiny checkpoint: a code, its characters spaced."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIDE, SIDE), PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((30, 40), "order paper for the winter", fill=INK, font_size=18)
    pen.text((30, 110), "Code", fill=INK, font_size=20)
    for position, character in enumerate(code):
        pen.text((44 + 34 * position, 160), character, fill=INK, font_size=31, anchor="ms")
    image.save(path)


def draw_square(path: Path, colour: str) -> None:
    """Draw a PNG of one tile: a square."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIDE, SIDE), PAPER)
    ImageDraw.Draw(image).rectangle((80, 70, 170, 160), fill=COLOURS[colour])
    image.save(path)


def draw_video(path: Path, seconds: float = CLIP_SECONDS, fps: int = CLIP_FPS) -> None:
    """Draw an H.264 clip: a disc moves, and from half of the clip on there is a blue box with a 7
    for a second and a half.

    Raises:
        BadInput: PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        what = "is not installed here, so no clip can be drawn"
        remedy = "pip install av, or give --video FILE"
        raise BadInput(Fault("av", what, remedy)) from None
    from PIL import Image, ImageDraw

    frames = int(seconds * fps)
    with av.open(str(path), "w") as container:
        track = container.add_stream("libx264", rate=fps)
        track.width = SIDE
        track.height = SIDE
        track.pix_fmt = "yuv420p"
        for number in range(frames):
            image = Image.new("RGB", (SIDE, SIDE), (120, 130, 120))
            pen = ImageDraw.Draw(image)
            left = 20 + 180 * number / frames
            pen.ellipse((left, 200, left + 36, 236), fill=(90, 160, 150))
            if seconds / 2 <= number / fps < seconds / 2 + 1.5:
                pen.rectangle((90, 80, 138, 128), fill=COLOURS["blue"])
                pen.text((114, 116), "7", fill=(250, 250, 250), font_size=35, anchor="ms")
            container.mux(track.encode(av.VideoFrame.from_image(image)))
        container.mux(track.encode())


def questions(images: Sequence[Path], video: Path) -> dict[str, Parts]:
    """Return the prompts by title, worded as the tiny checkpoint was trained.

    Args:
        images: A page, then two or more others.
        video: A clip.
    """
    page, *others = images
    numbered: Parts = []
    for number, image in enumerate(others, start=1):
        numbered += content_parts([f"Image {number}: "])
        numbered += content_parts(images=[image])
    numbered += content_parts(["\nWhich image shows a blue square?"])
    return {
        "list": content_parts([LIST + "What is the value of kx?"]),
        "page": content_parts(["\nWhat is the code on the page?"], [page]),
        "two images": numbered,
        "video": content_parts(["\nWhich digit appears?"], videos=[video]),
    }


def demonstrate(
    directory: Path, settings: ServeSettings, images: Sequence[Path], video: Path, max_tokens: int
) -> int:
    """Serve, ask, print; then count the video's prompt tokens with EVS off.

    Returns:
        0 when every question got an answer and EVS shortened the video's prompt, else 1.

    Raises:
        BadInput: The directory or a file cannot be used.
        ServerDied: vLLM does not start.
        RequestRefused: It fails to answer.
    """
    rate = settings.video.pruning_rate
    prompts = questions(images, video)
    answers: dict[str, Answer] = {}
    with running_server(directory, settings) as server:
        print(f"{server.model} at {server.url}, EVS at q = {rate:g}")
        client = server.client()
        for title, parts in prompts.items():
            answers[title] = ask(client, server.model, parts, max_tokens)
            question = str(parts[-1]["text"]).splitlines()[-1]
            print(f"\n{title}: {question}\n{answers[title]}")
    unpruned = override(settings, {"video.pruning_rate": 0.0})
    with running_server(directory, unpruned) as server:
        counted = ask(server.client(), server.model, prompts["video"], max_tokens=1)
    without = counted.prompt_tokens
    with_evs = answers["video"].prompt_tokens
    fewer = 1 - with_evs / without
    tokens = f"{without} with EVS off, {with_evs} at q = {rate:g} ({fewer:.0%} fewer)"
    print(f"\nvideo, prompt tokens: {tokens}")
    all_answered = all(answer.completion_tokens > 0 for answer in answers.values())
    if all_answered and with_evs < without:
        return 0
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("serve.demo", __doc__)
    parser.add_argument("directory", metavar="DIR", type=Path, help="checkpoint directory")
    image_help = "a page, then others; drawn when not given"
    parser.add_argument("--image", action="append", type=Path, metavar="FILE", help=image_help)
    parser.add_argument("--video", type=Path, metavar="FILE", help="drawn when not given")
    tokens_help = "most tokens of an answer (default: 48)"
    parser.add_argument("--max-tokens", type=int, default=48, metavar="N", help=tokens_help)
    add_setting_options(parser, VIDEO_SETTINGS)
    return parser


def _draw_images(folder: Path) -> list[Path]:
    page = folder / "page.png"
    draw_page(page)
    images = [page]
    for colour in COLOURS:
        image = folder / f"{colour}.png"
        draw_square(image, colour)
        images.append(image)
    return images


def _run() -> int:
    options = parse_command(_parser())
    overrides = given_settings(options) | {"port": 0}
    settings = checked_settings(options.directory, overrides, (), find_environment())
    if settings.video.pruning_rate == 0:
        what = "is 0, so there is no EVS to show"
        raise BadInput(Fault("--video-pruning-rate", what, "give a rate above 0"))
    if options.image and len(options.image) < 3:
        remedy = "give a page and two pictures, or none to have them drawn"
        raise BadInput(Fault("--image", f"was given {len(options.image)} times", remedy))
    with tempfile.TemporaryDirectory() as scratch:
        images = options.image or _draw_images(Path(scratch))
        video = options.video
        if video is None:
            video = Path(scratch) / "clip.mp4"
            draw_video(video)
        try:
            return demonstrate(options.directory, settings, images, video, options.max_tokens)
        except (ServerDied, RequestRefused) as failed:
            logger.error("%s", failed)
            return 1


if __name__ == "__main__":
    main(_run)
