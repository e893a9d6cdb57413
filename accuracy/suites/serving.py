"""Serves a directory while a suite is asked, and starts the server once more when it dies."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from accuracy.suites.asking import TIMEOUT_SECONDS, Endpoint, ServerLost
from accuracy.suites.load import read_queue
from checkpoint.endpoint import connect, first_model
from checkpoint.faults import BadInput, Fault, raise_if_any
from checkpoint.log import get_logger
from checkpoint.video import Video
from serve.environment import find_environment
from serve.own_server import own_server
from serve.preflight import checked_settings, directory_faults
from serve.process import ServerDied, running_server
from serve.vllm_log import death_message

if TYPE_CHECKING:
    from openai import OpenAI

logger = get_logger(__name__)

_ANSWER_SECONDS = 10.0
"""Seconds in which a server lists its models, however many requests it has."""


@dataclass(frozen=True)
class Model:
    """A checkpoint that is asked.

    Attributes:
        directory: The checkpoint.
        url: A running server that answers in its place; None to serve it.
        api_key: That server's key.
    """

    directory: Path
    url: str | None = None
    api_key: str | None = None


def check_models(models: Sequence[Model]) -> None:
    """Check directories and endpoints before the first of them is asked for hours.

    Raises:
        BadInput: With every fault of the directories that will be served, and every endpoint that
            does not answer.
    """
    faults: list[Fault] = []
    for model in models:
        if model.url is None:
            faults += directory_faults(model.directory, find_environment())
            continue
        try:
            first_model(connect(model.url, model.api_key, _ANSWER_SECONDS))
        except BadInput as bad:
            faults += bad.faults
    raise_if_any(dict.fromkeys(faults))


@contextlib.contextmanager
def asked_endpoint(
    model: Model, video: Video, media_root: Path | None, log: Path
) -> Iterator[Endpoint]:
    """Yield a server of a checkpoint for the length of a `with` block.

    Args:
        model: The checkpoint.
        video: How clips are seen.
        media_root: Folder of the clips, which a server of ours reads itself.
        log: File for vLLM's output.

    Raises:
        BadInput: The directory cannot be served, or nothing answers at the URL.
        ServerDied: vLLM ended before it answered.
        ServerLost: It ended while it was asked, or nothing answers at the URL any more.
    """
    if model.url is not None:
        client = connect(model.url, model.api_key, TIMEOUT_SECONDS)
        name = first_model(client)
        yield Endpoint(client, name, lambda: _answers(client), lambda: read_queue(client))
        return
    environment = find_environment()
    # The server samples the clips: its flag names fps and frames, and vLLM refuses requests that
    # name them ("Per-request media_io_kwargs are disabled by default").
    overrides = {
        "port": 0,
        "video.pruning_rate": video.pruning_rate,
        "video.fps": video.fps,
        "video.max_frames": video.max_frames,
        "allowed_local_media_path": None if media_root is None else str(media_root),
    }
    settings = checked_settings(model.directory, overrides, (), environment)
    with running_server(model.directory, settings, (), log, environment) as server:
        reached = own_server(server.settings)
        client = server.client(TIMEOUT_SECONDS)
        try:
            yield Endpoint(
                client, server.model, reached.is_healthy, lambda: read_queue(client), media_root
            )
        except ServerLost:
            what = "vLLM ended while it was asked"
            raise ServerLost(death_message(log, what)) from None


def _answers(client: OpenAI) -> bool:
    """Whether a server that we did not start still lists its models."""
    try:
        first_model(client.with_options(timeout=_ANSWER_SECONDS))
    except BadInput:
        return False
    return True


def with_one_restart(
    model: Model,
    video: Video,
    media_root: Path | None,
    log: Path,
    ask: Callable[[Endpoint], None],
) -> None:
    """Call `ask` with a server of a checkpoint; when the server dies, once more with a new one.

    A server that we did not start cannot be started again: when it is gone, that is the end.

    Args:
        model: The checkpoint.
        video: How clips are seen.
        media_root: As in `asked_endpoint`.
        log: As in `asked_endpoint`.
        ask: Asks what has no answer yet.

    Raises:
        BadInput: As in `asked_endpoint`.
        ServerDied: The server died twice, or did not start, or is gone from its URL.
    """
    try:
        with asked_endpoint(model, video, media_root, log) as endpoint:
            ask(endpoint)
        return
    except ServerLost as first:
        if model.url is not None:
            raise ServerDied(f"{model.url}: the server no longer answers") from None
        logger.warning("%s: %s", model.directory, first)
        logger.warning("%s: is served once more", model.directory)
    try:
        with asked_endpoint(model, video, media_root, _second(log)) as endpoint:
            ask(endpoint)
    except (ServerLost, ServerDied) as second:
        raise ServerDied(f"{model.directory}: the server died twice: {second}") from None


def _second(log: Path) -> Path:
    return log.with_name(f"{log.stem}-2{log.suffix}")


def common_root(roots: list[Path]) -> Path | None:
    """Return the folder below which all clips are; None when that would be the whole disk."""
    if not roots:
        return None
    common = Path(os.path.commonpath(roots))
    return None if common == Path(common.anchor) else common
