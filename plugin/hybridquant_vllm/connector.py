"""Fetches the media of requests as vLLM does, and says what is wrong with a request whose medium
cannot be had.

vLLM answers such a request with 500 or 501, as if the server were at fault: a local file that does
not exist, a directory, a `data:` URL that is not base64, `file://` where no directory is allowed,
a host that does not resolve, a picture of far too many pixels. Here it gets 400 and the reason.
Which hosts and directories are allowed is decided by vLLM's own flags.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from vllm.exceptions import VLLMError, VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector, MediaIO

_LONGEST_REASON = 200

_KNOWN = (ValueError, TypeError, OverflowError, VLLMError, MemoryError)
"""Errors that vLLM answers with 4xx itself, and what is no request's fault. Whatever else is raised
is the medium's: the engine gets a request after its media."""


class ReasonedConnector(MediaConnector):
    """vLLM's connector; its errors are those of the request."""

    def load_from_url(self, url: str, media_io: MediaIO[Any], **options: Any) -> Any:
        """Fetch and decode a medium.

        Raises:
            VLLMValidationError: It cannot be had; vLLM answers 400.
            ValueError: It is not allowed, or cannot be decoded; the same.
        """
        try:
            return super().load_from_url(url, RegularFiles(media_io), **options)
        except _KNOWN:
            raise
        except Exception as error:
            raise VLLMValidationError(_reason(error)) from error

    async def load_from_url_async(self, url: str, media_io: MediaIO[Any], **options: Any) -> Any:
        """Do the same in the event loop."""
        try:
            return await super().load_from_url_async(url, RegularFiles(media_io), **options)
        except _KNOWN:
            raise
        except Exception as error:
            raise VLLMValidationError(_reason(error)) from error


class RegularFiles(MediaIO[Any]):
    """A reader that takes local files only where they are regular ones.

    A pipe would block one of vLLM's few media threads until somebody writes to it.
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
        """As the reader does."""
        return self._reader.load_base64(media_type, data)

    def load_file(self, filepath: Path) -> Any:
        """As the reader does.

        Raises:
            ValueError: It is a directory, a pipe, a device or a socket.
        """
        if filepath.exists() and not filepath.is_file():
            raise ValueError(f"{filepath.name} is not a regular file")
        return self._reader.load_file(filepath)


def _reason(error: Exception) -> str:
    what = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        what = error.strerror  # without the path
    if isinstance(error, Image.DecompressionBombError):
        what += " (make it smaller)"
    return f"media cannot be read: {what[:_LONGEST_REASON]}"


def register() -> None:
    """Replace vLLM's own connector with this one."""
    MEDIA_CONNECTOR_REGISTRY.register("http")(ReasonedConnector)
