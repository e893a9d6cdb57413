"""Fetches the media of requests as vLLM does, and says what is wrong with a request whose medium
cannot be had.

vLLM answers such a request with 500 or 501, as if the server were at fault: a local file that does
not exist, a directory, a `data:` URL that is not base64, `file://` where no directory is allowed,
a host that does not resolve, a picture of far too many pixels, pictures of a clip that differ in
size. Here it gets 400 and the reason. A redirect that is not followed is said to be one: vLLM takes
what stands in it for the medium. vLLM's own flags decide which hosts and directories are allowed.
"""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from vllm import envs
from vllm.connections import HTTPConnection
from vllm.exceptions import VLLMError, VLLMValidationError
from vllm.multimodal.media import (
    MEDIA_CONNECTOR_REGISTRY,
    MediaConnector,
    MediaIO,
    VideoMediaIO,
)

_LONGEST_REASON = 200

MOST_PICTURE_BYTES = 2**30
"""Most bytes of the pictures of a clip, decoded: 128 of 1080p have 0.8 GB."""

_LIMIT_VARIABLE = "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB"
_LIMIT_MB = 256
"""vLLM's variable for the size of what is fetched from hosts, and its default; 0 sets no limit."""

_PICTURES = "video/jpeg"
"""Type of a clip that is sent as pictures, in base64 and separated by commas."""

_KNOWN = (ValueError, TypeError, OverflowError, VLLMError, MemoryError)
"""Errors that vLLM answers with 4xx itself, and what is no request's fault. Whatever else is raised
is the medium's: the engine gets a request after its media."""


class CheckedConnection(HTTPConnection):
    """vLLM's connection to hosts of media, which tells a redirect from a medium."""

    def get_response(self, url: str, **options: Any) -> Any:
        """As vLLM's.

        Raises:
            VLLMValidationError: The host answers that the medium is elsewhere.
        """
        response = super().get_response(url, **options)
        _check_status(response.status_code)
        return response

    async def get_async_response(self, url: str, **options: Any) -> Any:
        """As vLLM's; the error comes where the answer is waited for."""
        return _checked(await super().get_async_response(url, **options))


@contextlib.asynccontextmanager
async def _checked(answer: Any) -> AsyncIterator[Any]:
    async with answer as response:
        _check_status(response.status)
        yield response


def _check_status(status: int) -> None:
    if 300 <= status < 400:
        what = f"the host of the URL answers {status}: the medium is elsewhere"
        raise VLLMValidationError(f"{what}, and redirects are not followed; send its own URL")


CONNECTION = CheckedConnection()


class ReasonedConnector(MediaConnector):
    """vLLM's connector; its errors are those of the request."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.connection = CONNECTION

    def load_from_url(self, url: str, media_io: MediaIO[Any], **options: Any) -> Any:
        """Fetch and decode a medium.

        Raises:
            VLLMValidationError: It cannot be had; vLLM answers 400.
            ValueError: It is not allowed, or cannot be decoded; the same.
        """
        try:
            return super().load_from_url(url, CheckedReader(media_io), **options)
        except _KNOWN:
            raise
        except Exception as error:
            raise VLLMValidationError(_reason(error)) from error

    async def load_from_url_async(self, url: str, media_io: MediaIO[Any], **options: Any) -> Any:
        """Do the same in the event loop."""
        try:
            return await super().load_from_url_async(url, CheckedReader(media_io), **options)
        except _KNOWN:
            raise
        except Exception as error:
            raise VLLMValidationError(_reason(error)) from error


class CheckedReader(MediaIO[Any]):
    """A reader that takes what vLLM can read in bounded time and memory.

    A local file must be a regular one: a pipe would block one of vLLM's few media threads until
    somebody writes to it. The pictures of a clip are held in full size all at once, so their sizes
    are read before any is decoded.
    """

    def __init__(self, reader: MediaIO[Any]) -> None:
        super().__init__()
        self._reader = reader

    def get_max_bytes(self) -> int | None:
        """As the reader does."""
        return self._reader.get_max_bytes()

    def load_bytes(self, data: bytes) -> Any:
        """As the reader does."""
        return self._reader.load_bytes(data)

    def load_base64(self, media_type: str, data: str) -> Any:
        """As the reader does.

        Raises:
            VLLMValidationError: They are pictures that cannot be the frames of a clip.
        """
        if isinstance(self._reader, VideoMediaIO) and media_type.lower() == _PICTURES:
            most = self._reader.num_frames
            check_pictures(data.split(",", most)[:most] if most > 0 else data.split(","))
        return self._reader.load_base64(media_type, data)

    def load_file(self, filepath: Path) -> Any:
        """As the reader does.

        Raises:
            ValueError: It is a directory, a pipe, a device or a socket, or larger than what is
                fetched from hosts.
        """
        if filepath.exists() and not filepath.is_file():
            raise ValueError(f"{filepath.name} is not a regular file")
        most = getattr(envs, _LIMIT_VARIABLE, _LIMIT_MB)
        if most > 0 and filepath.exists() and filepath.stat().st_size > most * 2**20:
            what = f"{filepath.name} has {filepath.stat().st_size / 2**20:,.0f} MB"
            raise ValueError(f"{what}, at most {_LIMIT_VARIABLE}={most} are read")
        return self._reader.load_file(filepath)


def check_pictures(parts: Sequence[str]) -> None:
    """Check the pictures of a clip by their heads.

    Args:
        parts: Pictures in base64.

    Raises:
        VLLMValidationError: They cannot be the frames of one clip.
    """
    sizes = set()
    for number, part in enumerate(parts):
        try:
            with Image.open(io.BytesIO(base64.b64decode(part, validate=True))) as picture:
                sizes.add(picture.size)
        except (OSError, ValueError) as error:
            what = f"frame {number} of the clip is no picture: {str(error)[:80]}"
            raise VLLMValidationError(what) from None
        except Image.DecompressionBombError:
            raise VLLMValidationError(f"frame {number} of the clip has too many pixels") from None
    if len(sizes) > 1:
        raise VLLMValidationError(f"frames of the clip have {len(sizes)} sizes, not one")
    for width, height in sizes:
        if 3 * width * height * len(parts) > MOST_PICTURE_BYTES:
            what = f"{len(parts)} frames of {width} × {height} are too large for one clip"
            raise VLLMValidationError(f"{what}; send fewer, or smaller ones")


def _reason(error: Exception) -> str:
    what = str(error) or type(error).__name__
    if isinstance(error, TimeoutError):
        return "media cannot be read: the host of the URL does not answer in time"
    if isinstance(error, OSError) and error.strerror:
        what = error.strerror  # without the path
    if isinstance(error, Image.DecompressionBombError):
        what += " (make it smaller)"
    return f"media cannot be read: {what[:_LONGEST_REASON]}"


def register() -> None:
    """Replace vLLM's own connector with this one."""
    MEDIA_CONNECTOR_REGISTRY.register("http")(ReasonedConnector)
