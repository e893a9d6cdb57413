"""The one or two servers of `serve.bench`: checked together, started, or found where they run."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.config import read_config
from checkpoint.endpoint import KEY_VARIABLE, connect, first_model, is_url
from checkpoint.faults import BadInput, Fault, raise_if_any
from checkpoint.log import get_logger
from checkpoint.naming import path_endings, shortest_different
from serve.bench_runs import Target
from serve.environment import ServeEnvironment
from serve.options import given_settings
from serve.own_server import own_server
from serve.precision import precision_name
from serve.preflight import checked_settings, preflight, token_faults
from serve.process import running_server
from serve.recorded_command import without_key
from serve.settings import ServeSettings
from serve.vllm_flags import CheckedFlags
from serve.workloads import WORKLOADS_WITH

logger = get_logger("serve.bench")

SHARED_MEMORY = 0.45
"""Share of the GPU's memory for each of two servers."""


@dataclass(frozen=True)
class Running:
    """A server that is measured, and what the file says about it.

    Attributes:
        target: How it is reached.
        described: An entry of `servers`.
        leader: The process that leads its session; None for a URL.
    """

    target: Target
    described: dict[str, Any]
    leader: int | None


@dataclass(frozen=True)
class Planned:
    """A server that will be started.

    Attributes:
        name: What its rows are called.
        directory: The checkpoint.
        settings: How it is served.
        flags: Further flags of vLLM.
    """

    name: str
    directory: Path
    settings: ServeSettings
    flags: Sequence[str]


def root_of(url: str) -> str:
    """Return a URL without `/v1`."""
    return url.rstrip("/").removesuffix("/v1")


@contextlib.contextmanager
def started_servers(
    planned: Sequence[Planned | Running], environment: ServeEnvironment
) -> Iterator[list[Running]]:
    """Start those of the one or two servers that do not run yet."""
    with contextlib.ExitStack() as stack:
        running = []
        for server in planned:
            if isinstance(server, Planned):
                running.append(stack.enter_context(_started(server, environment)))
            else:
                running.append(server)
        yield running


def media_faults(workload: str, settings: ServeSettings) -> Iterator[Fault]:
    """Yield a fault where a server takes none of the media that each request of a workload has."""
    for kind, name, most in (
        ("image", "max_images", settings.max_images),
        ("video", "max_videos", settings.max_videos),
    ):
        if most == 0 and workload in WORKLOADS_WITH[kind]:
            what = f"is 0, and requests of the workload {workload} have one {kind} each"
            yield Fault(name, what, "give 1 or more, or another --workload")


def planned_servers(
    options: argparse.Namespace, flags: Sequence[CheckedFlags], environment: ServeEnvironment
) -> list[Planned | Running]:
    """Check both servers before the first is started.

    Args:
        options: The command's.
        flags: Flags of vLLM of each server.
        environment: Where vLLM is.

    Raises:
        BadInput: With every fault of the directories, their settings and the servers that run.
    """
    targets = [options.target]
    if options.against:
        targets.append(options.against)
    overrides = given_settings(options) | {"port": 0}
    directories = [target for target in targets if not is_url(target)]
    if len(directories) == 2 and environment.device.kind == "cuda":
        overrides.setdefault("gpu_memory_utilization", SHARED_MEMORY)
    faults: list[Fault] = []
    planned: list[Planned | Running] = []
    for name, target, of_server in zip(server_names(targets), targets, flags, strict=True):
        try:
            if is_url(target):
                planned.append(_found(target, name, options))
                continue
            server = _checked(target, name, of_server, overrides, environment)
            planned.append(server)
            tokens = options.output_tokens
            faults += token_faults("--output-tokens", tokens, server.directory, server.settings)
            faults += media_faults(options.workload, server.settings)
        except BadInput as bad:
            faults += bad.faults
    # Flags and settings of both servers have the same faults.
    raise_if_any(list(dict.fromkeys(faults)))
    _warn_of_the_same(planned)
    return planned


def _checked(
    target: str,
    name: str,
    flags: Sequence[str],
    overrides: Mapping[str, Any],
    environment: ServeEnvironment,
) -> Planned:
    """Check a directory and how it will be served.

    Raises:
        BadInput: With every fault.
    """
    directory = Path(target)
    settings = checked_settings(directory, overrides, flags, environment)
    preflight(directory, settings, environment, flags)
    return Planned(name, directory, settings, flags)


def _warn_of_the_same(planned: Sequence[Planned | Running]) -> None:
    """Warn where two servers differ in nothing."""
    compared = []
    for server in planned:
        if isinstance(server, Planned):
            compared.append((server.directory.resolve(), server.settings, list(server.flags)))
    if len(compared) == 2 and compared[0] == compared[1]:
        what = "is the same directory with the same flags"
        logger.warning("--against %s: the ratios will show how far times vary by themselves", what)


@contextlib.contextmanager
def _started(planned: Planned, environment: ServeEnvironment) -> Iterator[Running]:
    """Serve a directory for the length of a `with` block."""
    path, flags = planned.directory, planned.flags
    with running_server(path, planned.settings, flags, environment=environment) as server:
        reached = own_server(server.settings)
        described = {
            "name": planned.name,
            "target": path.name,
            "precision": precision_name(read_config(path)),
            "video_pruning_rate": server.settings.video.pruning_rate,
            "flags": shlex.join(without_key(flags)),
        }
        target = Target(planned.name, reached.url, server.model, reached.api_key)
        yield Running(target, described, server.process.pid)


def server_names(targets: Sequence[str]) -> list[str]:
    """Return short names that tell servers apart: the last part of a directory's path and the host
    of a URL, or as much more of both as they differ by.

    Args:
        targets: Directories or URLs. The same directory with other flags is `export (2)`.
    """
    return shortest_different([_names_of(target) for target in targets])


def _names_of(target: str) -> list[str]:
    """What a directory or a URL may be called, from its shortest name to the full one."""
    if is_url(target):
        address = root_of(target).partition("://")[2]
        return [address.partition("/")[0], address, root_of(target)]
    return path_endings(Path(target))


def _found(url: str, name: str, options: argparse.Namespace) -> Running:
    """A server that runs already.

    Raises:
        BadInput: None answers there.
    """
    root = root_of(url)
    key = options.api_key or os.environ.get(KEY_VARIABLE)
    model = first_model(connect(root, key))
    described: dict[str, Any] = {"name": name, "target": root}
    for unknown in ("precision", "video_pruning_rate", "flags"):
        described[unknown] = None
    return Running(Target(name, root, model, key, is_own=False), described, None)
