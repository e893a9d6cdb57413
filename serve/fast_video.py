"""Says whether a server will prepare clips with the plug-in or as vLLM does by itself."""

from __future__ import annotations

from serve.environment import ServeEnvironment, parse_version

SWITCH = "HYBRIDQUANT_FAST_VIDEO"
"""Environment variable that turns fast video off where it is 0 (hybridquant_vllm/fast_video.py)."""

FIRST_PLUGIN = (0, 2, 0)
"""First version of the plug-in with fast video."""


def fast_video_state(environment: ServeEnvironment) -> str:
    """Return `on`, or `off` and why.

    Args:
        environment: Where vLLM is.
    """
    if environment.plugin is None:
        return "off, the plug-in is not installed (hybridquant setup-serve PYTHON)"
    if parse_version(environment.plugin) < FIRST_PLUGIN:
        return f"off, the plug-in {environment.plugin} is too old (hybridquant setup-serve PYTHON)"
    from hybridquant_vllm.fast_video import TESTED
    from hybridquant_vllm.switches import is_on

    if not is_on(SWITCH, default=True):
        return f"off by {SWITCH}=0"
    if environment.vllm[:2] not in TESTED:
        version = environment.version
        return f"off, the plug-in is not tested with vLLM {version}"
    return "on"
