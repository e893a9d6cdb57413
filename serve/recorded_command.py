"""Command lines as result files show them: without the server's key."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from serve.vllm_flags import canonical


def shown_command(module: str, arguments: Sequence[str]) -> str:
    """Return a command line for a result file, without the server's key."""
    return shlex.join(["python", "-m", module, *without_key(arguments)])


def without_key(arguments: Sequence[str]) -> list[str]:
    """Return arguments with the word KEY in place of the server's key."""
    shown: list[str] = []
    for part in arguments:
        name, equals, _ = part.partition("=")
        if shown and _gives_key(shown[-1]):
            shown.append("KEY")
        elif equals and _gives_key(name):
            shown.append(f"{name}=KEY")
        else:
            shown.append(part)
    return shown


def _gives_key(flag: str) -> bool:
    """Return whether a flag is --api-key, or the beginning of its name, which parsers take too."""
    return flag.startswith("--ap") and "--api-key".startswith(canonical(flag))
