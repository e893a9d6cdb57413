"""Asks a server about a clip before its users do: on a GPU the first one compiles kernels."""

from __future__ import annotations

import base64
import io
from fractions import Fraction

from checkpoint.faults import BadInput
from checkpoint.log import get_logger
from checkpoint.video import Video
from serve.ask import RequestRefused, ask, content_parts
from serve.own_server import OwnServer

logger = get_logger(__name__)

_SECONDS = 300.0
"""Longest wait: kernels of two passes are compiled within a minute."""

_SIDE = 64


def warm_up(server: OwnServer, video: Video) -> None:
    """Ask about the longest clip that is sampled; a failure is a warning, and nothing else.

    Args:
        server: One that answers.
        video: How it samples clips.
    """
    data = base64.b64encode(moving_clip(video)).decode()
    parts = content_parts(["What happens?"], videos=[f"data:video/mp4;base64,{data}"])
    try:
        answer = ask(server.client(_SECONDS), server.served_name(), parts, max_tokens=2)
    except (BadInput, RequestRefused, OSError) as error:
        logger.warning("the server did not answer about a clip: %.200s", error)
        return
    logger.info("answered about a clip for warming up, %.0f s", answer.seconds)


def moving_clip(video: Video) -> bytes:
    """Return a small MP4 file of which a server samples the most frames.

    Args:
        video: How clips are sampled.
    """
    import av
    import numpy as np

    ramp = np.linspace(0, 255, _SIDE).astype(np.uint8)
    picture = np.stack([np.tile(ramp, (_SIDE, 1))] * 3, -1)
    rate = Fraction(video.fps).limit_denominator(1000)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as target:
        stream = target.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = _SIDE, _SIDE, "yuv420p"
        for number in range(video.max_frames):
            moved = np.ascontiguousarray(np.roll(picture, number, axis=1))
            target.mux(stream.encode(av.VideoFrame.from_ndarray(moved)))
        target.mux(stream.encode())
    return buffer.getvalue()
