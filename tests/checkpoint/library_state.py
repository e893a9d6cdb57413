"""Runs in a process of its own: what importing the modules of the rooms changes in the libraries.

    python tests/checkpoint/library_state.py MODULES.json OUT.json

MODULES.json has the names of the modules of each room. The libraries themselves are imported first,
so that a change is the room's doing and not a library's. Then every room is imported in a fork, and
OUT.json receives, per room, the modules that do not import, the changes and what was printed.
"""

import importlib
import json
import logging
import os
import random
import signal
import sys
import tempfile
import types
import warnings
from pathlib import Path

LIBRARIES = (
    "accelerate",
    "av",
    "datasets",
    "huggingface_hub",
    "modelopt.torch.distill",
    "modelopt.torch.export",
    "modelopt.torch.opt",
    "modelopt.torch.quantization",
    "numpy",
    "omegaconf",
    "openai",
    "PIL.ImageDraw",
    "PIL.ImageFont",
    "pydantic",
    "requests",
    "rich.console",
    "rich.logging",
    "rich.table",
    "safetensors.torch",
    "tokenizers",
    "torch.distributed.fsdp",
    "tqdm",
    "transformers",
    "transformers.models.nemotron_h.modeling_nemotron_h",
    "transformers.models.nemotron_h_omni.modeling_nemotron_h_omni",
    "transformers.trainer",
)
"""Everything that the rooms import from elsewhere. What a library changes when it is imported is
its own affair."""

WATCHED = ("accelerate", "datasets", "modelopt", "safetensors", "torch", "transformers")
"""Libraries whose functions must stay what they are."""

FUNCTIONS = (types.FunctionType, classmethod, staticmethod, property)


def functions() -> dict[str, object]:
    """Every function of the watched libraries' modules and classes, by where it is found."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some deprecated names warn when they are looked at
        for name, module in list(sys.modules.items()):
            if module is not None and name.partition(".")[0] in WATCHED:
                found.update(functions_of(name, module))
    return found


def functions_of(name: str, module: types.ModuleType) -> dict[str, object]:
    """The functions of one module and of the classes that are defined there."""
    found: dict[str, object] = {}
    for attribute, value in list(vars(module).items()):
        if isinstance(value, types.FunctionType):
            found[f"{name}.{attribute}"] = value
        elif isinstance(value, type) and value.__module__ == name:
            for method, inner in list(vars(value).items()):
                if isinstance(inner, FUNCTIONS):
                    found[f"{name}.{attribute}.{method}"] = inner
    return found


def settings() -> dict[str, object]:
    """What a process has one of, by name."""
    import numpy
    import torch
    import transformers

    loggers = ("root", "transformers", "hybridquant")
    return {
        "transformers' verbosity": transformers.logging.get_verbosity(),
        "transformers' progress bars": transformers.logging.is_progress_bar_enabled(),
        "warnings.filters": [str(entry) for entry in warnings.filters],
        "modules set to None": [name for name, module in sys.modules.items() if module is None],
        "handlers": {name: str(logging.getLogger(name).handlers) for name in loggers},
        "levels": {name: logging.getLogger(name).level for name in loggers},
        "environment": dict(os.environ),
        "working directory": os.getcwd(),
        "signal handlers": [str(signal.getsignal(number)) for number in (1, 2, 15)],
        "sys.excepthook": str(sys.excepthook),
        "sys.meta_path": [str(finder) for finder in sys.meta_path],
        "stdout": str(sys.stdout),
        "torch's default dtype": str(torch.get_default_dtype()),
        "torch's threads": torch.get_num_threads(),
        "torch's gradients": torch.is_grad_enabled(),
        "torch's random state": torch.get_rng_state().tolist(),
        "NumPy's random state": str(numpy.random.get_state()),
        "Python's random state": random.getstate(),
    }


def changes(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """Sentences about the settings that differ."""
    found = []
    for name, value in after.items():
        if value != before[name]:
            found.append(f"{name}: {str(before[name])[-300:]} → {str(value)[-300:]}")
    return found


def replaced(before: dict[str, object]) -> list[str]:
    """Functions that are not what they were."""
    after = functions()
    found = []
    for name, function in before.items():
        if after.get(name) is not function:
            found.append(f"{name} was replaced")
    return found


def try_room(modules: list[str], known: dict[str, object]) -> dict[str, object]:
    """Import the modules of a room in this process."""
    failed = []
    before = settings()
    for name in modules:
        try:
            importlib.import_module(name)
        except BaseException as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
    return {"failed": failed, "changed": changes(before, settings()) + replaced(known)}


def in_fork(modules: list[str], known: dict[str, object]) -> dict[str, object]:
    """Import the modules of a room in a fork of this process."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        printed = Path(folder) / "printed"
        child = os.fork()
        if child == 0:
            descriptor = os.open(printed, os.O_WRONLY | os.O_CREAT)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            answer.write_text(json.dumps(try_room(modules, known)))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        os.waitpid(child, 0)
        return json.loads(answer.read_text()) | {"printed": printed.read_text()}


def main() -> None:
    rooms = json.loads(Path(sys.argv[1]).read_text())
    for name in LIBRARIES:
        importlib.import_module(name)
    known = functions()
    result = {}
    for room, modules in rooms.items():
        result[room] = in_fork(modules, known)
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
