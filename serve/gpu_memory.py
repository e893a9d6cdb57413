"""Samples the GPU memory of servers with nvidia-smi while they are measured."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Mapping
from types import TracebackType

from serve.process import session_members

SECONDS = 0.5
"""Time between two samples."""


class GpuMemory:
    """Peak GPU memory of servers, sampled on a thread for the length of a `with` block.

    Args:
        leaders: By server, the process that leads its session; None for a server that was started
            elsewhere.
    """

    def __init__(self, leaders: Mapping[str, int | None]) -> None:
        self._leaders = leaders
        self._peaks: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, daemon=True)
        self._is_possible = shutil.which("nvidia-smi") is not None

    def __enter__(self) -> GpuMemory:
        if self._is_possible:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._is_possible:
            self._thread.join()

    def peak_mib(self, server: str) -> int | None:
        """Return the largest sample of a server in MiB; None without a GPU.

        Where nvidia-smi does not say which process uses how much, as in many containers, it is what
        all GPUs hold if there is one server, and None if there are two.
        """
        return self._peaks.get(server)

    def _sample_until_stopped(self) -> None:
        while not self._stop.is_set():
            for server, used in self._sample().items():
                self._peaks[server] = max(used, self._peaks.get(server, 0))
            self._stop.wait(SECONDS)

    def _sample(self) -> dict[str, int]:
        by_process = _used("--query-compute-apps=pid,used_memory")
        found = {}
        for server, leader in self._leaders.items():
            if leader is None:
                continue
            members = set(session_members(leader))
            used = sum(mib for pid, mib in by_process if pid in members)
            if used:
                found[server] = used
        if not found and len(self._leaders) == 1:
            (server,) = self._leaders
            found[server] = sum(mib for _, mib in _used("--query-gpu=index,memory.used"))
        return found


def _used(query: str) -> list[tuple[int, int]]:
    """Return the rows of a query of nvidia-smi for a number and a memory in MiB."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True)
    return parse_rows(done.stdout)


def parse_rows(text: str) -> list[tuple[int, int]]:
    """Parse rows of nvidia-smi such as `1234, 5678`; a row with `[N/A]` is left out."""
    rows = []
    for line in text.splitlines():
        first, _, second = line.partition(",")
        if first.strip().isdecimal() and second.strip().isdecimal():
            rows.append((int(first), int(second)))
    return rows
