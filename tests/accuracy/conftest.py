"""Fixtures of the suites: a small ChartQA; pages with codes, and clips, for real servers."""

from pathlib import Path

import pytest
from suite_data import (
    CHART_ANSWERS,
    write_chartqa,
    write_clip,
    write_codes,
    write_longvideobench,
    write_videomme,
)

CODES = 24


@pytest.fixture
def folder(tmp_path) -> Path:
    write_chartqa(tmp_path, CHART_ANSWERS)
    return tmp_path


@pytest.fixture(scope="session")
def pages(tmp_path_factory) -> Path:
    """OCRBench of pages with a code, which the tiny checkpoint was trained to read; Video-MME and
    LongVideoBench of a clip.
    """
    folder = tmp_path_factory.mktemp("pages")
    write_codes(folder, CODES)
    clip = write_clip(folder / "clip.mp4")
    write_videomme(folder, ["A", "B", "C"], clip)
    write_longvideobench(folder, [0, 1, 2], clip)
    return folder
