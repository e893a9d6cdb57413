"""Decodes a clip and samples its frames as the server does.

With 2 fps and at most 128 frames, a clip of up to 64 seconds gives two frames per second, a longer
one 128 frames, uniformly.

The decoder is the plug-in's, `hybridquant_vllm.frames`, so calibration and a server with the
plug-in see the same pixels. The indices equal those of vLLM without it for
`--media-io-kwargs '{"video": {"fps": 2, "num_frames": 128}}'`. Both keys are needed: with
`num_frames` left out the loader takes 32 frames, with `fps` left out it takes 128 of any clip.
"""

from __future__ import annotations

from checkpoint.faults import BadInput, Fault
from checkpoint.video import Video
from hybridquant_vllm import frames as decoder


def decode(data: bytes, where: str, video: Video, size: int | None = None) -> decoder.Clip:
    """Decode a video file and sample it.

    Frames that cannot be decoded are left out; the others keep their indices.

    Args:
        data: The file: anything that FFmpeg reads, MP4, WebM and GIF among them.
        where: Names the sample in faults.
        video: How it is sampled.
        size: Side of the squares that frames are resized to; None keeps the size of the file.

    Raises:
        BadInput: It is not a video, its frame rate is unknown, it is too long, its frames are too
            large, or none of them can be decoded.
    """
    square = None if size is None else (size, size)
    try:
        return decoder.read_clip(data, fps=video.fps, max_frames=video.max_frames, size=square)
    except decoder.ClipError as error:
        raise BadInput(Fault(where, error.what, error.remedy)) from None
