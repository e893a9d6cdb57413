"""Decodes on the GPU's video engines (NVDEC) where HYBRIDQUANT_VIDEO_DECODER=nvdec asks for it.

H.264, HEVC, VP9 and AV1 are decoded to the same pixels by every decoder, and the conversion to RGB
stays on the CPU. PyAV's wheels bring what is needed, but for the driver's libnvcuvid. A process
that decodes so keeps a CUDA context, 0.5 GB, beside the memory that vLLM has reserved.
"""

from __future__ import annotations

import logging
import os
from threading import BoundedSemaphore, Lock

from av.codec.hwaccel import HWAccel
from av.video.frame import VideoFrame

VARIABLE = "HYBRIDQUANT_VIDEO_DECODER"

SESSIONS = BoundedSemaphore(8)
"""Stretches that are decoded at once: a GPU has up to seven engines, and each decoder of 4K video
keeps 0.25 GB of frames."""

_PLANAR = {"nv12": "yuv420p", "p010le": "yuv420p10le"}
"""Formats of frames of NVDEC, and the same with separate planes."""

# Below "vllm", so that vLLM's own log handler prints it.
_logger = logging.getLogger("vllm.hybridquant")
_lock = Lock()
_refused: set[str] = set()


class NotOnHardware(Exception):
    """NVDEC gives frames of another format."""


def accelerator(kind: str) -> HWAccel | None:
    """Return what a decoder is to be created with; None where the CPU decodes.

    Args:
        kind: Codec and pixel format.
    """
    if os.environ.get(VARIABLE) != "nvdec" or kind in _refused:
        return None
    return HWAccel("cuda", allow_software_fallback=False, is_hw_owned=True)


def refuse(kind: str, error: Exception) -> None:
    """Leave clips of this kind to the CPU from now on, and say so once."""
    with _lock:
        if kind in _refused:
            return
        _refused.add(kind)
    _logger.warning("hybridquant: the CPU decodes %s, NVDEC cannot (%r).", kind, error)


def downloaded(frame: VideoFrame) -> VideoFrame:
    """Return a frame of NVDEC in the host's memory with separate planes; others as they are.

    From interleaved chroma FFmpeg converts to RGB by another, coarser way.

    Raises:
        NotOnHardware: Its format is neither NV12 nor P010.
    """
    software = frame.sw_format
    if software is None:
        return frame
    if software.name not in _PLANAR:
        raise NotOnHardware(software.name)
    return frame.reformat(format=_PLANAR[software.name], threads=1)
