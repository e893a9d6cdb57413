"""Says whether a server will prepare clips with the plug-in or as vLLM does by itself."""

from __future__ import annotations

from dataclasses import dataclass

from serve.environment import ServeEnvironment, parse_version

SWITCH = "HYBRIDQUANT_FAST_VIDEO"
"""Environment variable that turns fast video off where it is 0 (hybridquant_vllm/fast_video.py)."""

FIRST_PLUGIN = (0, 2, 0)
"""First version of the plug-in with fast video."""


@dataclass(frozen=True)
class FastVideo:
    """Whether a server prepares clips with the plug-in.

    Attributes:
        is_on: Whether it does.
        reason: Why.
    """

    is_on: bool
    reason: str

    def __str__(self) -> str:
        return "on" if self.is_on else f"off, {self.reason}"


def fast_video_of(environment: ServeEnvironment) -> FastVideo:
    """Return whether a server prepares clips with the plug-in, and why.

    Args:
        environment: Where vLLM is.
    """
    remedy = "hybridquant setup-serve PYTHON"
    if environment.plugin is None:
        return FastVideo(False, f"the plug-in is not installed ({remedy})")
    if parse_version(environment.plugin) < FIRST_PLUGIN:
        return FastVideo(False, f"the plug-in {environment.plugin} is too old ({remedy})")
    from hybridquant_vllm.fast_video import TESTED
    from hybridquant_vllm.switches import is_on

    if not is_on(SWITCH, default=True):
        return FastVideo(False, f"{SWITCH} is 0")
    if environment.vllm[:2] not in TESTED:
        return FastVideo(False, f"the plug-in is not tested with vLLM {environment.version}")
    return FastVideo(True, "the plug-in is tested with this vLLM")
