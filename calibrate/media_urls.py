"""Reads the media of samples: local paths, `file://` URLs and base64 `data:` URLs."""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from checkpoint.faults import BadInput, Fault, shortened
from checkpoint.reading import regular_file_fault

_LONGEST_PATH = 4096


def media_bytes(url: str, where: str) -> bytes:
    """Return the bytes behind a local path, a `file://` URL or a base64 `data:` URL.

    Args:
        url: The path or URL.
        where: Names the sample in faults.

    Raises:
        BadInput: The file does not exist, the data is not base64, or the URL is not local.
    """
    url = local_url(url, Path.cwd(), where)
    path = local_file(url)
    if path is None:
        data = _decode_base64(url, where)
    else:
        fault = regular_file_fault(path)
        if fault is not None:
            reason = fault.what.removeprefix("cannot be read: ")
            reason = reason.replace("no such file", "No such file")
            what = f"{shortened(url)} cannot be read: {reason}"
            raise BadInput(Fault(where, what, "give an existing file"))
        try:
            data = path.read_bytes()
        except OSError as error:
            what = f"{shortened(url)} cannot be read: {error.strerror}"
            raise BadInput(Fault(where, what, "give an existing file")) from None
    if not data:
        raise BadInput(Fault(where, f"{shortened(url, 60)} is empty", "copy the file again"))
    return data


def local_file(url: str) -> Path | None:
    """Return the file that a `file://` URL names; None for a `data:` URL."""
    if url.startswith("data:"):
        return None
    return Path(url2pathname(urlsplit(url).path))


def _decode_base64(url: str, where: str) -> bytes:
    encoded = url.partition(",")[2]
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        what = f"data URL is not base64: {shortened(error)}"
        raise BadInput(Fault(where, what, "encode the file again")) from None


def local_url(url: object, base: Path, where: str) -> str:
    """Return a path or URL as a `file://` or `data:` URL.

    Args:
        url: As a row of a source gives it.
        base: Folder that a relative path starts from.
        where: Names the sample in faults.

    Raises:
        BadInput: It is neither a path nor such a URL.
    """
    if not isinstance(url, str) or not url or "\0" in url:
        what = f"media URL is {shortened(url)!r}"
        raise BadInput(Fault(where, what, "give a path or a data: URL"))
    if url[:5].lower() == "data:":
        if not url.partition(",")[0].endswith(";base64"):
            what = f"data URL {shortened(url, 40)} is not base64"
            raise BadInput(Fault(where, what, "write data:TYPE;base64,DATA"))
        return f"data:{url[5:]}"
    if url.startswith("file://"):
        return url
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", url):
        what = f"{shortened(url)} is not local, and nothing is downloaded"
        raise BadInput(Fault(where, what, "download it and give its path"))
    if _is_bare_base64(url):
        what = f"media URL {shortened(url, 40)} is base64 without a `data:` prefix"
        raise BadInput(Fault(where, what, "write data:TYPE;base64,DATA"))
    return (base / url).absolute().as_uri()


def _is_bare_base64(url: str) -> bool:
    """Whether a text is too long for a path, or looks like the base64 of a picture or a clip."""
    if len(url) > _LONGEST_PATH:
        return True
    return len(url) >= 200 and re.fullmatch(r"[A-Za-z0-9+/\s]+=*\s*", url) is not None
