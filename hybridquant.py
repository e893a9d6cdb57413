"""Runs a command of the project: `hybridquant COMMAND …`, or `python -m hybridquant COMMAND …`.

    hybridquant --help
    hybridquant quantize fp8 recipes/fp8.yaml model=BF16_DIR output=OUT
    hybridquant verify OUT --source BF16_DIR

A thin table over the modules: `hybridquant verify …` is `python -m export.verify …`. Nothing but
the module of the command is imported. A new command is one line of `COMMANDS`.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import runpy
import sys
from dataclasses import dataclass

from checkpoint.command import use_command_names
from checkpoint.faults import BadInput, Fault, main, nearest

__version__ = "0.2.0"

HELP_OPTIONS = ("-h", "--help")

_VERBOSITY = re.compile(r"-[vq]+|--verbose|--quiet")
"""Options of every command, which may stand in front of it as well."""

REPORTED_PACKAGES = ("torch", "transformers", "nvidia-modelopt")
"""Distributions whose versions `hybridquant --version` prints beside ours."""


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        module: What `python -m` would run.
        summary: What it does, in a line of `hybridquant --help`.
        variants: Names of the modules below `module`; the command's second word names one of them;
            empty when the command is one word.
    """

    module: str
    summary: str
    variants: tuple[str, ...] = ()


COMMANDS = {
    "quantize": Command(
        "quantize", "quantize, export, verify and measure", ("fp8", "nvfp4", "qad")
    ),
    "verify": Command("export.verify", "check an exported directory from its files"),
    "accuracy": Command("accuracy", "compare the answers of two checkpoints"),
    "repair": Command("export.repair", "repair what needs no calibration"),
    "report": Command("export.publish.report", "write an HTML page about an export"),
    "card": Command("export.publish.card", "write an export's model card"),
    "upload": Command("export.publish.upload", "send an export to the Hugging Face Hub"),
    "serve": Command("serve", "start vLLM on a checkpoint, EVS on"),
    "ask": Command("serve.ask", "ask a served checkpoint one question"),
    "demo": Command("serve.demo", "serve, ask, and count what EVS saves"),
    "sweep": Command("serve.sweep", "find the EVS rate: accuracy and load at several rates"),
    "bench": Command("serve.bench", "measure a served checkpoint, or two, under load"),
    "tune": Command("serve.tune", "tune vLLM's Mamba kernel for this GPU"),
    "setup-serve": Command("serve.setup_environment", "prepare an environment that has vLLM"),
    "tiny": Command("tiny", "write the tiny checkpoint"),
    "synthetic": Command("checkpoint.synthetic", "write a random checkpoint of the full size"),
}

HELP = """\
usage: hybridquant COMMAND [ARGUMENT …]

Quantize, verify, measure and serve hybrid Mamba-Transformer vision models.

{commands}

hybridquant COMMAND --help shows a command's arguments, --version the versions.
Exit status: 0 done, gate passed; 1 gate or verification failed; 2 bad input."""


def help_text() -> str:
    """Return the text of `hybridquant --help`: at most 24 lines of 80 columns."""
    lines = []
    for name, command in COMMANDS.items():
        shown = f"{name} {'|'.join(command.variants)}"
        lines.append(f"  {shown:<24} {command.summary}")
    return HELP.format(commands="\n".join(lines))


def version_text() -> str:
    """Return our version and, in parentheses, those of Python and of the packages we run on."""
    found = [f"python {platform.python_version()}"]
    for name in REPORTED_PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return f"hybridquant {__version__} ({', '.join(found)})"


def find_module(arguments: list[str]) -> tuple[str, list[str]]:
    """Split a command line into the module of its command and the command's own arguments.

    Args:
        arguments: The command line without the program's name; not empty.

    Returns:
        The module's name and what follows the command.

    Raises:
        BadInput: When the command line does not begin with a command.
    """
    name, *rest = arguments
    if name not in COMMANDS:
        raise BadInput(Fault(name, "is not a command", nearest(name, COMMANDS)))
    command = COMMANDS[name]
    if not command.variants:
        return command.module, rest
    if not rest:
        choices = ", ".join(command.variants)
        raise BadInput(Fault(name, "is half of a command", f"add one of {choices}"))
    variant, *rest = rest
    if variant not in command.variants:
        remedy = nearest(variant, command.variants)
        raise BadInput(Fault(f"{name} {variant}", "is not a command", remedy))
    return f"{command.module}.{variant}", rest


def in_order(arguments: list[str]) -> list[str]:
    """Put the options that every command has behind the words of the command.

    Args:
        arguments: The command line without the program's name; not empty.
    """
    name, *rest = _word_first(arguments)
    if name in COMMANDS and COMMANDS[name].variants:
        rest = _word_first(rest)
    return [name, *rest]


def _word_first(arguments: list[str]) -> list[str]:
    count = 0
    while arguments[count + 1 :] and _VERBOSITY.fullmatch(arguments[count]):
        count += 1
    return [*arguments[count : count + 1], *arguments[:count], *arguments[count + 1 :]]


def command_names(program: str) -> dict[str, str]:
    """Return what a user types for each module that a command runs, such as `hybridquant verify`.

    Args:
        program: How the user has called us.
    """
    names = {}
    for name, command in COMMANDS.items():
        if not command.variants:
            names[command.module] = f"{program} {name}"
        for variant in command.variants:
            names[f"{command.module}.{variant}"] = f"{program} {name} {variant}"
    return names


def wants_overview(arguments: list[str]) -> bool:
    """Return whether the command line asks for `help_text` and not for the help of a module."""
    name, *rest = arguments
    if name in HELP_OPTIONS:
        return True
    if name not in COMMANDS or not rest:
        return False
    is_half = len(COMMANDS[name].variants) > 0
    return is_half and rest[0] in HELP_OPTIONS


def run_command(arguments: list[str], program: str = "hybridquant") -> int:
    """Run a command line.

    Args:
        arguments: The command line without the program's name.
        program: How the user has called us, for help and messages.

    Returns:
        The exit status. A command's module leaves the process with its own by `SystemExit`.

    Raises:
        BadInput: When the command line does not begin with a command.
    """
    if not arguments:
        print(help_text(), file=sys.stderr)
        return 2
    arguments = in_order(arguments)
    if wants_overview(arguments):
        print(help_text())
        return 0
    if arguments[0] == "--version":
        print(version_text())
        return 0
    module, rest = find_module(arguments)
    use_command_names(command_names(program))
    sys.argv = [f"python -m {module}", *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def console(program: str = "hybridquant") -> None:
    """Run the process's command line and leave the process with its exit status.

    Args:
        program: As in `run_command`.
    """
    main(lambda: run_command(sys.argv[1:], program))


if __name__ == "__main__":
    console("python -m hybridquant")
