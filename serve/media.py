"""What a file or a URL given to `ask` holds, by its first bytes, and the URL that is sent.

A server answers a clip that was given as a picture, or the reverse, with an error of its decoder.
PyAV may be missing where vLLM is installed, so clips are told by the marks of their containers;
what none of them fits is left to the server.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from checkpoint.faults import BadInput, Fault, shortened
from checkpoint.reading import deep_pixels_fault, regular_file_fault

Content = Literal["a picture", "a clip", "audio", "text"]

_TYPES = {
    ".mkv": "video/x-matroska",
    ".webm": "video/webm",
    ".mp4": "video/mp4",
}
"""Media types of clips by suffix."""

_URL_SCHEMES = ("http://", "https://", "file://", "data:")

_FIRST: tuple[tuple[bytes, Content], ...] = (
    (b"\xff\xd8\xff", "a picture"),  # JPEG
    (b"II*\0", "a picture"),  # TIFF
    (b"MM\0*", "a picture"),
    (b"8BPS", "a picture"),
    (b"\0\0\0\x0cjP  ", "a picture"),  # JPEG 2000
    (b"\0\0\0\x0cJXL ", "a picture"),
    (b"FLV\x01", "a clip"),
    (b"\0\0\x01\xba", "a clip"),  # MPEG program stream
    (b"\0\0\x01\xb3", "a clip"),
    (b"ID3", "audio"),
    (b"fLaC", "audio"),
    (b"\xff\xfb", "audio"),  # MP3 without tags
    (b"\xff\xf3", "audio"),
    (b"\xff\xf2", "audio"),
    (b"\xff\xf1", "audio"),  # AAC
    (b"\xff\xf9", "audio"),
)
"""How files begin."""

_RIFF: dict[bytes, Content] = {b"WEBP": "a picture", b"AVI ": "a clip", b"WAVE": "audio"}
_PICTURE_BRANDS = (b"heic", b"heix", b"mif1", b"avif")
_HEAD = 4096


def media_url(source: str | Path, kind: str) -> str:
    """Return the URL of an image or a video.

    Args:
        source: A file or a URL.
        kind: `image` or `video`.

    Raises:
        BadInput: The file cannot be read, is of another kind, or is a picture that a server cannot
            show; the same for the content of a base64 `data:` URL.
    """
    if isinstance(source, str) and source.lower().startswith(_URL_SCHEMES):
        data = _data_of_url(source)
        if data is not None:
            _check_kind(data, kind, shortened(source, 60))
            if kind == "image":
                _image_type(data, shortened(source, 60))
        return source
    path = Path(source)
    fault = regular_file_fault(path)
    if fault is not None:
        reason = fault.what.replace("no such file", "No such file or directory")
        raise BadInput(Fault(shortened(path), reason, "check the path"))
    try:
        data = path.read_bytes()
    except OSError as error:
        what = error.strerror or "cannot be read"
        raise BadInput(Fault(str(path), what, "check the path")) from None
    _check_kind(data, kind, str(path))
    media_type = _image_type(data, str(path)) if kind == "image" else _clip_type(path)
    encoded = base64.b64encode(data).decode()
    return f"data:{media_type};base64,{encoded}"


def _data_of_url(url: str) -> bytes | None:
    """The content of a base64 `data:` URL; None if it is another URL, or for the server to judge.

    vLLM takes `video/jpeg` for frames, each a picture in base64, with commas between them.
    """
    head, _, encoded = url.partition(",")
    described = head.lower()
    if not described.startswith("data:") or not described.endswith(";base64"):
        return None
    if described.startswith("data:video/jpeg"):
        return None
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        return None


def decoding_faults(sources: Sequence[str], parts: Sequence[Mapping[str, Any]]) -> Iterator[Fault]:
    """Yield the faults of pictures and clips that no decoder reads.

    A running server says that itself; before one is started for a question, it saves its start.
    Clips are looked at where PyAV is installed.

    Args:
        sources: Files and URLs, which faults name.
        parts: An OpenAI content part of each.
    """
    for source, part in zip(sources, parts, strict=True):
        data = _data_of_url(part[part["type"]]["url"])
        if data is None:
            continue
        try:
            if part["type"] == "image_url":
                _decode_picture(data)
            else:
                _open_clip(data)
        except Exception as error:  # decoders raise nearly anything on damaged files
            reason = getattr(error, "strerror", None) or _reason(error)
            what = f"cannot be read: {shortened(reason)}"
            yield Fault(shortened(source), what, "copy the file again, or give another one")


def _decode_picture(data: bytes) -> None:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        image.load()


def _open_clip(data: bytes) -> None:
    try:
        import av
    except ImportError:
        return
    with av.open(io.BytesIO(data)) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")


def _reason(error: Exception) -> str:
    # Pillow's text for what it does not know is the address of the bytes in memory.
    return "it is in no known format" if "cannot identify" in str(error) else str(error)


def _check_kind(data: bytes, kind: str, where: str) -> None:
    if not data:
        raise BadInput(Fault(where, "is empty", "copy the file again"))
    wanted: Content = "a picture" if kind == "image" else "a clip"
    found = content_of(data)
    if found is None or found == wanted:
        return
    remedies = {
        "a picture": "give it to --image",
        "a clip": "give it to --video",
        "audio": "leave it out: the model sees pictures and clips only",
        "text": "check the path; a text is given with --text",
    }
    raise BadInput(Fault(where, f"is {found}, not {wanted}", remedies[found]))


def content_of(data: bytes) -> Content | None:
    """Return what a file holds; None where that is not certain, or it may pass for several kinds.

    A GIF, an animated PNG and a series of JPEGs are pictures and clips.
    """
    if data.startswith(b"\x89PNG\r\n"):
        return None if b"acTL" in data[:_HEAD] else "a picture"
    if data.startswith(b"\xff\xd8\xff") and b"\xff\xd9\xff\xd8\xff" in data:
        return None
    for beginning, content in _FIRST:
        if data.startswith(beginning):
            return content
    if data.startswith(b"BM") and data[6:10] == bytes(4):
        return "a picture"
    if data.startswith(b"RIFF"):
        return _RIFF.get(data[8:12])
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide"):
        return _content_of_mp4(data)
    if data.startswith(b"\x1a\x45\xdf\xa3"):  # Matroska and WebM
        return _by_tracks(data, rb"\x86[\x80-\xff]V_", rb"\x86[\x80-\xff]A_")
    if data.startswith(b"OggS"):
        return _by_tracks(data[:_HEAD], rb"\x80theora", rb"OpusHead|\x01vorbis|\x7fFLAC|Speex ")
    for start, size in ((0, 188), (4, 192)):  # MPEG transport streams
        if data[start : start + 2 * size + 1 : size] == b"GGG":
            return "a clip"
    return "text" if _is_text(data[:_HEAD]) else None


def _content_of_mp4(data: bytes) -> Content | None:
    if data[4:8] == b"ftyp" and data[8:12] in _PICTURE_BRANDS:
        return "a picture"
    return _by_tracks(data, rb"hdlr.{8}vide", rb"hdlr.{8}soun")


def _by_tracks(data: bytes, video: bytes, audio: bytes) -> Content | None:
    """What a container holds by patterns of its tracks; a cover picture is none."""
    if re.search(video, data, re.DOTALL):
        return "a clip"
    if re.search(audio, data, re.DOTALL):
        return "audio"
    return None


def _is_text(head: bytes) -> bool:
    """Whether these first bytes are UTF-8 without control characters."""
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if len(head) < _HEAD or error.start < _HEAD - 3:
            return False
        text = head[: error.start].decode("utf-8")  # the last character is cut
    return not re.search(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]", text)


def _image_type(data: bytes, where: str) -> str:
    """The media type of a picture by its content.

    Raises:
        BadInput: It has more than 8 bits a channel, which the server would clip to white.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            mode = image.mode
            media_type = Image.MIME.get(str(image.format), "image/png")
    except Exception:  # the server says what is wrong with it
        return "image/png"
    deep = deep_pixels_fault(mode, where)
    if deep is not None:
        raise BadInput(deep)
    return media_type


def _clip_type(path: Path) -> str:
    """The media type of a clip: vLLM looks at the content, whatever the type says."""
    return _TYPES.get(path.suffix.lower(), "video/mp4")
