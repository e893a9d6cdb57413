"""Refuses an MP4 or MOV file whose index is out of proportion, before FFmpeg reads it.

Most tables of such an index are written out in the file. Four are not, and there a few bytes claim
any number of entries: samples of one size (`stsz`), fragments with default sizes (`trun`), sound of
equal samples in large chunks (`stsc`), and edits that show the same frames again (`elst`). FFmpeg
writes all entries out while it opens the file: 50 million take it seconds and gigabytes, and PyAV
has no limit for it. So the counts are read here; the file is taken as FFmpeg takes it, which finds
a table wherever it stands outside of `mdat` (libavformat/mov.c).
"""

from __future__ import annotations

import numpy as np

from hybridquant_vllm.clip import ClipError

MAX_ENTRIES = 4_000_000
"""Most entries of an index: four hours of video at 69 frames per second, and five tracks of sound.
FFmpeg needs half a second for them."""

MAX_BOXES = 1_000_000
"""Most boxes of a kind: a fragment for each frame of the longest clip."""

MAX_TRACKS = 1000
"""Most tracks, as in FFmpeg."""

_TOP_BOXES = set(
    b"ftyp moov mdat moof free skip wide pnot udta uuid styp sidx junk pict prfl hoov trak".split()
)
"""Boxes by which FFmpeg knows such a file."""

_SAMPLES_OF_AN_ENTRY = 1024
"""Of sound whose samples are equal; FFmpeg makes one entry for so many."""

_REMEDY = "write the file again"


def check_index(data: bytes) -> None:
    """Raise an error if FFmpeg would be long about opening a file; others than MP4 pass.

    Raises:
        ClipError: Its index claims more frames than the file has bytes for, or too many.
    """
    parts = _parts_outside_mdat(data)
    entries = 0
    for start, end in parts:
        for fields in _boxes(data, b"trun", start, end):
            entries += _number(data, fields + 4)
        tracks = _boxes(data, b"trak", start, end)
        if len(tracks) > MAX_TRACKS:
            raise ClipError(f"video has more than {MAX_TRACKS} tracks", _REMEDY)
        for fields in _boxes(data, b"cmov", start, end):
            if data[fields + 4 : fields + 8] == b"dcom":  # the box inside, after its size
                raise ClipError("video's index is compressed", _REMEDY)
        for track, next_track in zip(tracks, [*tracks[1:], end]):
            entries += _entries_of_track(data, track, next_track)
    if entries > MAX_ENTRIES:
        what = f"video's index has {entries} entries, at most {MAX_ENTRIES} are served"
        raise ClipError(what, f"cut it, or {_REMEDY}")


def _parts_outside_mdat(data: bytes) -> list[tuple[int, int]]:
    """Return (start, end) of all boxes but `mdat`, in whose frames the name of a box may occur by
    chance; none if the file is no MP4.
    """
    parts: list[tuple[int, int]] = []
    is_mp4 = False
    start = 0
    while start + 8 <= len(data):
        kind = data[start + 4 : start + 8]
        is_mp4 = is_mp4 or kind in _TOP_BOXES
        size = _number(data, start)
        if size == 1:
            size = int.from_bytes(data[start + 8 : start + 16], "big")
        if size < 8:  # 0 says that it goes to the end; FFmpeg reads no further after others
            size = len(data) - start
        end = min(start + size, len(data))
        if kind != b"mdat":
            parts.append((start, end))
        if len(parts) > MAX_BOXES:
            raise _too_many_boxes()
        start = end
    return parts if is_mp4 else []


def _entries_of_track(data: bytes, start: int, end: int) -> int:
    """Return how many entries FFmpeg makes of a track.

    Raises:
        ClipError: It claims more frames than the file has bytes for.
    """
    handlers = {data[fields + 8 : fields + 12] for fields in _boxes(data, b"hdlr", start, end)}
    is_sound = b"soun" in handlers and b"vide" not in handlers
    frames = 0
    for fields in _boxes(data, b"stsz", start, end):
        size = _number(data, fields + 4)
        count = _number(data, fields + 8)
        frames = max(frames, count)
        # The sound of a film that is cut off may be longer than the file.
        if count * size > len(data) and not is_sound:
            what = f"video's index claims {count} frames of {size} bytes, the file has {len(data)}"
            raise ClipError(what, _REMEDY)
    for fields in _boxes(data, b"stz2", start, end):
        frames = max(frames, _number(data, fields + 8))
    if is_sound and _has_equal_samples(data, start, end):
        frames = _entries_of_chunks(data, start, end)
    edits = [_table_length(data, fields, 12) for fields in _boxes(data, b"elst", start, end)]
    return frames * max([1, *edits])


def _has_equal_samples(data: bytes, start: int, end: int) -> bool:
    """Return whether each sample of a track lasts one unit of its time, as PCM's do."""
    tables = _boxes(data, b"stts", start, end)
    if len(tables) != 1:
        return False
    rows = _number(data, tables[0] + 4)
    duration = _number(data, tables[0] + 12)  # of the samples of the first row
    return rows == 1 and duration == 1


def _entries_of_chunks(data: bytes, start: int, end: int) -> int:
    """Return how many entries FFmpeg makes of a track with equal samples."""
    offsets = [*_boxes(data, b"stco", start, end), *_boxes(data, b"co64", start, end)]
    chunks = max((_table_length(data, fields, 4) for fields in offsets), default=0)
    most = 0
    for fields in _boxes(data, b"stsc", start, end):
        length = _table_length(data, fields, 12)
        rows = np.frombuffer(data, ">u4", 3 * length, fields + 8).reshape(-1, 3).astype(np.int64)
        # Chunks from number rows[i, 0] up to that of the next row hold rows[i, 1] samples each.
        first = np.append(rows[:, 0], chunks + 1)
        entries = -(-rows[:, 1] // _SAMPLES_OF_AN_ENTRY)  # rounded up
        most = max(most, int((np.diff(first).clip(0, chunks) * entries).sum()))
    return most


def _table_length(data: bytes, fields: int, row_bytes: int) -> int:
    """Return the rows of a table, no more than the file has bytes for.

    Args:
        data: The file.
        fields: Where the box's fields begin: version and flags, number of rows, rows.
        row_bytes: Bytes of a row.
    """
    return min(_number(data, fields + 4), max(0, len(data) - fields - 8) // row_bytes)


def _boxes(data: bytes, kind: bytes, start: int, end: int) -> list[int]:
    """Return where the fields of each box of a kind begin. Of most boxes, the first four bytes are
    its version and flags.

    A box is its size (4 bytes), its name (4), where the size is 1 its real size (8), and its
    fields.

    Raises:
        ClipError: There are too many.
    """
    if data.count(kind, start, end) > MAX_BOXES:
        raise _too_many_boxes()
    boxes = []
    name = data.find(kind, start, end)
    while name >= 0:
        has_long_size = _number(data, max(0, name - 4)) == 1
        boxes.append(name + 12 if has_long_size else name + 4)
        name = data.find(kind, name + 4, end)
    return boxes


def _number(data: bytes, place: int) -> int:
    """The unsigned number of four bytes at a place of the file."""
    return int.from_bytes(data[place : place + 4], "big")


def _too_many_boxes() -> ClipError:
    return ClipError(f"video has more than {MAX_BOXES} boxes of a kind", _REMEDY)
