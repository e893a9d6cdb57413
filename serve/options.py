"""Command-line options made from the declarations of the settings: name, description, default."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any

from pydantic.fields import FieldInfo

from checkpoint.video import Video
from serve.settings import ServeSettings

VIDEO_SETTINGS = tuple(f"video.{name}" for name in Video.model_fields)
"""Dotted names of the settings that say how clips are seen."""

_OPTIONS = {
    "video.pruning_rate": "--video-pruning-rate",
    "video.fps": "--fps",
    "video.max_frames": "--max-frames",
}
"""Options that are not named as their setting."""


def add_setting_options(
    parser: argparse.ArgumentParser, names: Collection[str] | None = None
) -> None:
    """Add one option per setting; an option that is not given leaves the setting alone.

    Args:
        parser: A command's parser.
        names: Dotted names of settings; all of them when None.
    """
    for name, field in _settings().items():
        if names is None or name in names:
            option = _OPTIONS.get(name, "--" + name.replace("_", "-"))
            parser.add_argument(option, dest=name, metavar="VALUE", help=_help(field))


def given_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the options that were given, by the setting's dotted name.

    They are text; `serve.settings.override` converts and checks them.
    """
    values = {}
    for name, value in vars(parsed).items():
        if name in _settings() and value is not None:
            values[name] = value
    return values


def _settings() -> dict[str, FieldInfo]:
    """All settings by dotted name."""
    fields: dict[str, FieldInfo] = {}
    for name, field in Video.model_fields.items():
        fields[f"video.{name}"] = field
    for name, field in ServeSettings.model_fields.items():
        if name != "video":
            fields[name] = field
    return fields


def _help(field: FieldInfo) -> str:
    description = " ".join((field.description or "").split())
    if field.default is not None:
        description += f" (default: {field.default})"
    return description.replace("%", "%%")
