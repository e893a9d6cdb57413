"""Serves a checkpoint with EVS on, asks about a list, a page, two images and a clip, and counts
what EVS saved.

    python -m serve.demo DIR                       # draws its own pictures and clip
    python -m serve.demo DIR --image page.png --image a.png --image b.png --video clip.mp4

The prompt tokens with EVS off come from a second server, started with rate 0: they are counted, not
computed. Runs on two CPU cores with the tiny checkpoint in about a minute; needs Pillow and PyAV to
draw.
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

CLIP_SECONDS = 8
CLIP_FPS = 8
SIDE = 256
COLOURS = {"red": (215, 35, 40), "blue": (40, 75, 210)}
LIST = "List:\nab 417\nkx 208\nqe 935\nzo 661\n"


def draw_page(path: Path, code: str = "K7XP2") -> None:
    """A PNG of one tile of the tiny checkpoint: a code, its characters spaced."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIDE, SIDE), (250, 248, 240))
    pen = ImageDraw.Draw(image)
    pen.text((30, 40), "order paper for the winter", fill=(20, 20, 40), font_size=18)
    pen.text((30, 110), "Code", fill=(20, 20, 40), font_size=20)
    for place, character in enumerate(code):
        pen.text((44 + 34 * place, 160), character, fill=(20, 20, 40), font_size=31, anchor="ms")
    image.save(path)


def draw_square(path: Path, colour: str) -> None:
    """A PNG of one tile: a square."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIDE, SIDE), (250, 248, 240))
    ImageDraw.Draw(image).rectangle((80, 70, 170, 160), fill=COLOURS[colour])
    image.save(path)


def draw_video(path: Path, seconds: float = CLIP_SECONDS, fps: int = CLIP_FPS) -> None:
    """An H.264 clip: a disc wanders, and from half of the clip on a blue box with a 7 stands for a
    second and a half.

    Raises:
        BadInput: When PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        remedy = "pip install av, or give --video FILE"
        raise BadInput(
            Fault("av", "is not installed here, so no clip can be drawn", remedy)
        ) from None
    from PIL import Image, ImageDraw

    frames = int(seconds * fps)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            image = Image.new("RGB", (SIDE, SIDE), (120, 130, 120))
            pen = ImageDraw.Draw(image)
            left = 20 + 180 * number / frames
            pen.ellipse((left, 200, left + 36, 236), fill=(90, 160, 150))
            if seconds / 2 <= number / fps < seconds / 2 + 1.5:
                pen.rectangle((90, 80, 138, 128), fill=COLOURS["blue"])
                pen.text((114, 116), "7", fill=(250, 250, 250), font_size=35, anchor="ms")
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())


def questions(images: Sequence[Path], video: Path) -> dict[str, list[dict[str, object]]]:
    """The prompts by title, worded as the tiny checkpoint was taught; the first image is a page."""
    page, *squares = images
    numbered = [part for number, square in enumerate(squares, 1)
                for part in reversed(content_parts([f"Image {number}: "], [square]))]  # fmt: skip
    return {
        "list": content_parts([LIST + "What is the value of kx?"]),
        "page": content_parts(["\nWhat is the code on the page?"], [page]),
        "two images": [*numbered, *content_parts(["\nWhich image shows a blue square?"])],
        "video": content_parts(["\nWhich digit appears?"], videos=[video]),
    }


def demonstrate(
    directory: Path, settings: ServeSettings, images: Sequence[Path], video: Path, max_tokens: int
) -> int:
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
            question = str(parts[-1]["text"]).splitlines()[-1]
            print(f"\n{title}: {question}\n{answers[title]}")
    with_evs = answers["video"].prompt_tokens
    with running_server(directory, dataclasses.replace(settings, video_pruning_rate=0.0)) as server:
        without = ask(connect(server.url), server.model, prompts["video"], 1).prompt_tokens
    print(
        f"\nvideo, prompt tokens: {without} with EVS off, {with_evs} at q = {settings.video_pruning_rate:g}",
        end="",
    )
    print(f" ({1 - with_evs / without:.0%} fewer)")
    return (
        0
        if with_evs < without and all(answer.completion_tokens for answer in answers.values())
        else 1
    )


def _run(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m serve.demo", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="checkpoint directory")
    parser.add_argument(
        "--image",
        action="append",
        type=Path,
        metavar="FILE",
        help="a page, then others; drawn when not given",
    )
    parser.add_argument("--video", type=Path, metavar="FILE", help="drawn when not given")
    parser.add_argument("--video-pruning-rate", metavar="Q", type=float, help="EVS rate in (0, 1)")
    parser.add_argument("--max-tokens", type=int, default=48, help="most tokens of an answer (48)")
    options = parser.parse_args(arguments)
    settings = served(
        options.directory, {"video_pruning_rate": options.video_pruning_rate, "port": 0}
    ).settings
    if not settings.video_pruning_rate:
        raise BadInput(
            Fault("--video-pruning-rate", "is 0, so there is no EVS to show", "give a rate above 0")
        )
    if options.image and len(options.image) < 3:
        remedy = "give a page and two pictures, or none to have them drawn"
        raise BadInput(Fault("--image", f"was given {len(options.image)} times", remedy))
    with tempfile.TemporaryDirectory() as scratch:
        images, video = options.image, options.video
        if not images:
            images = [Path(scratch) / f"{name}.png" for name in ("page", *COLOURS)]
            draw_page(images[0])
            for path in images[1:]:
                draw_square(path, path.stem)
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
