"""A hash of what is served from a checkpoint directory: two directories with it answer alike."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

MANIFEST = "hybridquant.json"
"""What is known of how an export was made."""

_ABOUT = (".md", ".html")
"""Ends of the names of files about the model: its card and the report, written after measuring."""


def content_hash(directory: Path) -> str:
    """Return a hash of all files that are served from a checkpoint directory, by name and content.

    The manifest is left out: the gate writes its outcome there, and what of it is served belongs to
    the settings. So are the report and the model card.
    """
    digest = hashlib.sha256()
    for file in _files(directory):
        digest.update(f"{file.relative_to(directory)}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def _files(directory: Path) -> Iterator[Path]:
    for file in sorted(directory.rglob("*")):
        is_hidden = any(part.startswith(".") for part in file.relative_to(directory).parts)
        is_served = file.name != MANIFEST and file.suffix not in _ABOUT
        if file.is_file() and is_served and not is_hidden:
            yield file
