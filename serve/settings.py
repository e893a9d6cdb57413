"""How a checkpoint is served: defaults, the checkpoint's manifest, the command line, vLLM's flags.

Later ones win. A setting is declared here once, with its range, default and description; the recipe
(its `serve` section) and the options of the commands use the declaration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from checkpoint.config import read_json
from checkpoint.content import MANIFEST
from checkpoint.faults import BadInput, Fault, nearest, raise_if_any
from checkpoint.log import get_logger
from checkpoint.settings import Section
from checkpoint.video import Video
from serve.vllm_flags import (
    MEDIA_OPTIONS,
    lets_vllm_choose_length,
    samples_without_fps,
    setting_values,
)

logger = get_logger(__name__)

_HOST = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9])?|\[[0-9a-f:.]+\]")

_OLD_RATE = "video_pruning_rate"
"""Key of `serve` in manifests of version 0.1."""

KEY_CHARACTERS = "letters, digits and signs of ASCII, without spaces"
"""What a key may consist of: it is sent in an HTTP header."""

SectionType = TypeVar("SectionType", bound=Section)


def is_key(text: str) -> bool:
    """Return whether a text can be the key of requests."""
    return bool(text) and all("!" <= character <= "~" for character in text)


def _split(value: Any) -> Any:
    """Split the text of a command line at its commas; other values are left as they are."""
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(","))


def _host_name(text: str) -> str:
    """Return a host as URLs are compared with it: in small letters, other alphabets encoded."""
    try:
        host = text.lower().encode("idna").decode("ascii")
        shown = host.encode("ascii").decode("idna")
    except UnicodeError:
        host = shown = ""
    if not _HOST.fullmatch(host):
        raise ValueError("names of hosts, without scheme, port or path")
    if shown != text.lower() and not text.isascii():
        # Python's codec is IDNA of 2003, which makes another host of some: strasse.de of straße.de.
        # vLLM parses URLs by IDNA of 2008.
        raise ValueError(f"{host}, if that host is meant, or the name beginning with xn--")
    return host


def _key(text: str) -> str:
    if not is_key(text):
        raise ValueError(KEY_CHARACTERS)
    return text


def _path_text(value: Any) -> Any:
    """Refuse an empty text, which would mean the current directory."""
    if isinstance(value, str) and not value.strip():
        raise ValueError("a path that is not empty")
    return value


GivenPath = Annotated[Path, BeforeValidator(_path_text)]
"""A path; an empty one, as of a variable that is not set, is refused."""

HostName = Annotated[str, AfterValidator(_host_name)]
"""Name or address of a host."""


class Serve(Section):
    """What a recipe may fix about serving its checkpoint."""

    max_model_len: Annotated[int, Field(ge=256)] | None = None
    """Longest sequence in tokens; without it, the checkpoint's own limit."""
    max_images: Annotated[int, Field(ge=0)] = 16
    """Most images per prompt."""
    max_videos: Annotated[int, Field(ge=0)] = 1
    """Most videos per prompt; by default one, because a clip takes about a whole prefill step."""


class ServeSettings(Serve):
    """All settings of one server: the recipe's, how video is seen, and those of the machine."""

    video: Video = Video()
    """How clips are sampled and pruned."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """TCP port; 0 takes a free one."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    """Share of the GPU's memory that vLLM may take; without it, vLLM's own default."""
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    """Number of GPUs that the weights are split over."""
    api_key: Annotated[str, AfterValidator(_key)] | None = Field(default=None, repr=False)
    """Key that every request must carry; from VLLM_API_KEY when it is not given."""
    ssl_certfile: GivenPath | None = None
    """TLS certificate; with it the server speaks https."""
    ssl_keyfile: GivenPath | None = None
    """Private key of the certificate."""
    allowed_local_media_path: GivenPath | None = None
    """Directory that requests may name with file:// URLs; without it, none."""
    allowed_media_domains: Annotated[tuple[HostName, ...], BeforeValidator(_split)] = ()
    """Hosts, with commas between them, that requests may name with http:// and https:// URLs;
    without them, none. Redirects are not followed."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the activations of what is not quantized; float32 on a CPU is for comparisons."""
    replayssm: bool = False
    """Keep the last 16 tokens beside each Mamba state, write the state once for all of them (vLLM's
    ReplaySSM, in its V1 model runner), and keep it in float16. Needs a GPU and the plug-in."""
    nvfp4_as_fp8: bool = False
    """Convert NVFP4 weights to FP8 while loading, on a GPU with FP8 and without FP4 arithmetic,
    where vLLM would multiply in BF16. Needs the plug-in."""


def settings_for(
    directory: Path, overrides: Mapping[str, Any] | None = None, flags: Sequence[str] = ()
) -> ServeSettings:
    """Return how to serve a directory.

    Logs a warning when clips will be seen otherwise than the manifest says.

    Args:
        directory: A checkpoint, with or without a manifest.
        overrides: New values by dotted name, as `video.fps` or `port`; None means "not given".
        flags: Flags of `vllm serve` that will be added; those that mean a setting win.

    Raises:
        BadInput: With every fault of the manifest, the overrides and the flags.
    """
    manifest = _read_manifest(directory)
    values = _given(overrides or {}) | setting_values(flags)
    if samples_without_fps(flags):
        consequence = "vLLM samples every clip alike, however short"
        logger.warning("%s gives no fps for videos: %s", MEDIA_OPTIONS, consequence)
    chooses_length = lets_vllm_choose_length(flags)
    if chooses_length:
        values.pop("max_model_len", None)
    if manifest is None:
        return override(ServeSettings(), values)
    faults: list[Fault] = []
    recorded = _recorded_settings(manifest, str(directory / MANIFEST), faults)
    if chooses_length:
        recorded = recorded.model_copy(update={"max_model_len": None})
    try:
        settings = override(recorded, values)
    except BadInput as bad:
        faults += bad.faults
    raise_if_any(faults)
    if "video" not in manifest:
        path = directory / MANIFEST
        logger.warning("%s has no video section: served with %s", path, settings.video)
    elif settings.video != recorded.video:
        made_for = f"{directory} was made for {recorded.video}"
        logger.warning("%s, and is served with %s", made_for, settings.video)
    return settings


def has_manifest(directory: Path) -> bool:
    """Return whether a checkpoint is an export of ours."""
    return (directory / MANIFEST).exists()


def gate_passed(directory: Path) -> bool | None:
    """Return whether the checkpoint passed its accuracy gate; None when the manifest does not say
    so, or there is none.

    Raises:
        BadInput: The manifest cannot be read.
    """
    manifest = _read_manifest(directory) or {}
    gate = manifest.get("gate") or {}
    return gate.get("passed")


def override(settings: ServeSettings, values: Mapping[str, Any]) -> ServeSettings:
    """Return `settings` with other values.

    Args:
        settings: What applies where `values` gives nothing.
        values: New values by dotted name, as `video.fps` or `port`; None means "not given".

    Raises:
        BadInput: With every value that is out of range or of the wrong type.
    """
    changed = settings.model_dump()
    for name, value in _given(values).items():
        section, _, field = name.rpartition(".")
        if section:
            changed[section][field] = value
        else:
            changed[field] = value
    try:
        return ServeSettings.model_validate(changed)
    except ValidationError as error:
        raise BadInput(*validation_faults(error, ServeSettings)) from None


def validation_faults(
    error: ValidationError, section: type[Section], prefix: str = ""
) -> list[Fault]:
    """Return pydantic's errors as faults that name the setting, the value and what is allowed.

    Args:
        error: What pydantic raised.
        section: The section that was validated.
        prefix: Put before the setting's name.
    """
    faults = []
    for detail in error.errors():
        name = prefix + ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            *parents, last = detail["loc"]
            known = Video.model_fields if parents else section.model_fields
            faults.append(Fault(name, "is not a setting", nearest(str(last), known)))
            continue
        allowed = detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        # A key is a secret, and messages end up in logs.
        is_secret = detail["loc"][-1:] == ("api_key",)
        what = "cannot be used" if is_secret else f"is {detail['input']!r:.80}"
        faults.append(Fault(name, what, f"allowed: {allowed}"))
    return faults


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return the manifest; None when the directory has none.

    Raises:
        BadInput: It cannot be read.
    """
    path = directory / MANIFEST
    if not path.exists():
        return None
    manifest = read_json(path)
    gate = manifest.get("gate")
    if gate is not None and not isinstance(gate, dict):
        raise BadInput(_not_an_object(f"{path}: gate"))
    return manifest


def _recorded_settings(
    manifest: Mapping[str, Any], where: str, faults: list[Fault]
) -> ServeSettings:
    """Return the manifest's settings over the defaults; what is wrong is added to `faults`."""
    serve = manifest.get("serve")
    if isinstance(serve, dict) and _OLD_RATE in serve:
        what = "is from version 0.1, whose manifests are not read"
        section = f'"video": {{"pruning_rate": {serve[_OLD_RATE]!r:.40}}}'
        remedy = f"remove it, and write {section} beside serve"
        faults.append(Fault(f"{where}: serve.{_OLD_RATE}", what, remedy))
        serve = None
    recorded = _read_section(Serve, serve, f"{where}: serve", faults)
    video = _read_section(Video, manifest.get("video"), f"{where}: video", faults)
    return ServeSettings(video=video, **recorded.model_dump())


def _read_section(
    section: type[SectionType], value: Any, where: str, faults: list[Fault]
) -> SectionType:
    """Return a section of the manifest; the defaults when it is absent or wrong."""
    if value is None:
        return section()
    if not isinstance(value, dict):
        faults.append(_not_an_object(where))
        return section()
    try:
        return section.model_validate(value, strict=True)
    except ValidationError as error:
        faults += validation_faults(error, section, f"{where}.")
        return section()


def _not_an_object(where: str) -> Fault:
    return Fault(where, "is not a JSON object", "write the manifest again")
