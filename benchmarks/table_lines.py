"""What `benchmarks.serving_table` asks: clips, pages, text and one long prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.decode import SHORT_PROMPT, decode_rate, prefill_seconds
from benchmarks.gpu_shares import Load
from benchmarks.paired_servers import Asker
from benchmarks.video_serving import Workload, requests_per_second
from checkpoint.config import CheckpointConfig
from serve.command import batched_tokens
from serve.settings import ServeSettings

PAGE_TILES = 13
"""Tiles of a page of A4 at most, the small picture of the whole among them."""

TEXT_TOKENS = 512
"""Tokens beside the media of a request at most, its answer among them."""


@dataclass(frozen=True)
class Sizes:
    """How much is asked.

    Attributes:
        clip_seconds: Length of the clip of `clip`.
        clips_seconds: Length of each clip of `clips`.
        clips: Number of these.
        pages: Pages of `images`.
        pages_at_once: How many of them are asked about at a time.
        at_once: Requests of `decode64`.
        decode_tokens: Tokens of an answer when decoding is measured.
        long_tokens: Tokens of the prompt of `long`.
        repeats: Rounds of a line that is not a load of its own.
    """

    clip_seconds: float = 64.0
    clips_seconds: float = 32.0
    clips: int = 12
    pages: int = 64
    pages_at_once: int = 16
    at_once: int = 64
    decode_tokens: int = 256
    long_tokens: int = 120_000
    repeats: int = 3


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        key: As the command line names it.
        title: As the file names it.
        more_is_better: Whether a larger figure is better.
        depends_on_rate: Whether it is measured at each EVS rate.
        repeats: Rounds; 0 for as many as `Sizes` says.
        warms_up: Whether a run of each server before the rounds is not counted.
    """

    key: str
    title: str
    more_is_better: bool
    depends_on_rate: bool
    repeats: int = 0
    warms_up: bool = True


LINES = {
    line.key: line
    for line in (
        Line("clip", "first token of a clip, s", False, True),
        # The line before it has warmed the servers up.
        Line("clips", "clips at once, requests/s", True, True, repeats=1, warms_up=False),
        Line("decode64", "decode of many, tokens/s", True, False),
        Line("decode1", "decode of one, tokens/s", True, False),
        Line("long", "first token of a long prompt, s", False, False, repeats=2),
        Line("images", "pages, requests/s", True, False, repeats=1, warms_up=False),
    )
}


def load_of(line: Line, sizes: Sizes, config: CheckpointConfig, rate: float) -> Load:
    """Return what a line asks of a server at once.

    Args:
        line: One of `LINES`.
        sizes: How much is asked.
        config: The checkpoint's.
        rate: Of EVS.
    """
    settings = ServeSettings.model_validate({"video": {"pruning_rate": rate}})
    whole_clip = batched_tokens(config, settings)
    loads = {
        "clip": Load(1, whole_clip),
        # At two frames a second they have half of the frames.
        "clips": Load(sizes.clips, whole_clip // 2 + TEXT_TOKENS),
        "images": Load(sizes.pages_at_once, PAGE_TILES * config.tokens_per_tile + TEXT_TOKENS),
        "decode64": Load(sizes.at_once, SHORT_PROMPT + sizes.decode_tokens),
        "decode1": Load(1, SHORT_PROMPT + sizes.decode_tokens),
        "long": Load(1, sizes.long_tokens + 1),
    }
    return loads[line.key]


class Workbench:
    """Asks the questions of the lines.

    Attributes:
        sizes: How much is asked.
        prompt_tokens: Tokens of the last clip's prompt by the server's address.

    Args:
        sizes: How much is asked.
        media: Folder that the servers may read, where media are written.
        film: 720p.
    """

    def __init__(self, sizes: Sizes, media: Path, film: Path) -> None:
        self.sizes = sizes
        self.prompt_tokens: dict[str, int] = {}
        self._work = Workload(media, {720: film})
        self._pages: list[Path] = []

    def draw_ahead(self, count: int) -> None:
        """Draw `count` pages, which takes a while, before they are needed."""
        self._pages += self._work.pages(count)

    def runner(self, line: Line) -> Callable[[Asker, int], float]:
        """Return what measures a line once; it gets a server and a number that no other run has."""
        ways = {
            "clip": self._clip,
            "clips": self._clips,
            "images": self._images,
            "decode64": self._decode64,
            "decode1": self._decode1,
            "long": self._long,
        }
        return ways[line.key]

    def _clip(self, asker: Asker, seed: int) -> float:
        clip = self._work.clip(720, self.sizes.clip_seconds)
        answer = asker.ask("video", [clip], 1)
        clip.unlink()
        self.prompt_tokens[asker.url] = answer["prompt_tokens"]
        return float(answer["first"])

    def _clips(self, asker: Asker, seed: int) -> float:
        sizes = self.sizes
        clips = [[self._work.clip(720, sizes.clips_seconds)] for _ in range(sizes.clips)]
        return requests_per_second(asker, "video", clips, sizes.clips, 128)

    def _images(self, asker: Asker, seed: int) -> float:
        sizes = self.sizes
        if len(self._pages) < sizes.pages:
            self.draw_ahead(sizes.pages - len(self._pages))
        pages = [[self._pages.pop()] for _ in range(sizes.pages)]
        return requests_per_second(asker, "image", pages, sizes.pages_at_once, 16)

    def _decode64(self, asker: Asker, seed: int) -> float:
        return decode_rate(asker, self.sizes.at_once, self.sizes.decode_tokens, seed)

    def _decode1(self, asker: Asker, seed: int) -> float:
        return decode_rate(asker, 1, self.sizes.decode_tokens, seed)

    def _long(self, asker: Asker, seed: int) -> float:
        return prefill_seconds(asker, self.sizes.long_tokens, seed)
