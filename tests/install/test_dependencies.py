"""Every distribution that we import is declared in pyproject.toml, and no other."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = {path.parent.name for path in ROOT.glob("*/__init__.py")}
FOLDERS = sorted(ROOMS | {"dev", "plugin", "tests"})
OURS = ROOMS | {"dev", "hybridquant", "hybridquant_vllm", "tests"}

SERVE_ENVIRONMENT = {
    "plugin": {"vllm", "transformers"},
    "serve": {"annotated_types", "triton", "vllm"},
}
"""What folders import that belongs to the serve environment: vLLM brings it."""

EVAL_ENVIRONMENT = ROOT / "accuracy" / "suites" / "workers"
"""What runs in the environment of the benchmark harnesses; requirements-eval.txt pins what it has.
"""

MEASURED_ONLY = {"tests", "benchmarks", "dev"}
"""Folders that are not installed with us; what they import may also be a development dependency."""

ELSEWHERE = {"vllm", "mamba_ssm"}
"""What tests and benchmarks import in the serve environment or on a GPU machine."""

NEEDED_BY_OTHERS = {
    "requests": "modelopt/torch/utils/dataset_utils.py",
}
"""Distributions that a library imports for us without requiring them, and the file that does."""


def normalized(name: str) -> str:
    """A distribution's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def imported_packages(path: Path) -> Iterator[str]:
    """Top-level names that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            yield node.module.split(".")[0]


def third_party(folder: Path) -> dict[str, Path]:
    """Top-level names that are neither ours nor Python's, with a file that imports each."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        if path.is_relative_to(EVAL_ENVIRONMENT):
            continue
        for name in imported_packages(path):
            if name not in OURS and name not in sys.stdlib_module_names:
                found[name] = path
    return found


def declared(requirements: list[str]) -> set[str]:
    return {normalized(re.match(r"[\w.-]+", line).group()) for line in requirements}


@pytest.fixture(scope="module")
def project() -> dict:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]


@pytest.fixture(scope="module")
def distributions() -> dict[str, set[str]]:
    """Distributions by folder of ours, as far as the quantization environment has to have them."""
    by_package = packages_distributions()
    found = {}
    for folder in (ROOT / name for name in FOLDERS):
        found[folder.name] = set()
        for name, path in third_party(folder).items():
            beside = folder.name == "tests" and any(ROOT.glob(f"tests/**/{name}.py"))
            if name in SERVE_ENVIRONMENT.get(folder.name, set()) or beside:
                continue
            if folder.name in MEASURED_ONLY and name in ELSEWHERE:
                continue
            owners = by_package.get(name)
            assert owners, f"{path} imports {name}, which no installed distribution provides"
            found[folder.name].add(normalized(owners[0]))
    return found


def test_what_is_imported_is_declared(project, distributions):
    runtime = declared(project["dependencies"])
    development = declared(project["optional-dependencies"]["dev"])
    for folder, names in distributions.items():
        allowed = runtime | development if folder in MEASURED_ONLY else runtime
        assert names <= allowed, f"{folder}/ imports what pyproject.toml does not declare"


def test_what_is_declared_is_imported(project, distributions):
    installed = [names for folder, names in distributions.items() if folder not in MEASURED_ONLY]
    imported = set().union(*installed)
    unused = declared(project["dependencies"]) - imported - set(NEEDED_BY_OTHERS)
    assert not unused, "declared in pyproject.toml, but nothing that is installed imports it"


@pytest.mark.parametrize("name", NEEDED_BY_OTHERS)
def test_what_others_need_they_still_import(name):
    """A release of the library that no longer does takes the line out of pyproject.toml."""
    site = Path(__import__(NEEDED_BY_OTHERS[name].split("/")[0]).__path__[0]).parent
    assert name in set(imported_packages(site / NEEDED_BY_OTHERS[name]))


def test_the_workers_import_what_the_eval_environment_has_and_nothing_of_ours():
    lines = (ROOT / "requirements-eval.txt").read_text(encoding="utf-8").splitlines()
    pinned = {normalized(line.split("==")[0]) for line in lines if "==" in line}
    beside = {path.stem for path in EVAL_ENVIRONMENT.glob("*.py")}
    for path in EVAL_ENVIRONMENT.glob("*.py"):
        names = set(imported_packages(path)) - sys.stdlib_module_names - beside
        assert {normalized(name) for name in names} <= pinned


def test_the_eval_environment_has_no_torch():
    lines = (ROOT / "requirements-eval.txt").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if line.startswith("torch")]


def test_ranges_are_declared_and_pins_are_in_the_lock_file(project):
    assert not [line for line in project["dependencies"] if "==" in line]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pinned = {normalized(line.split("==")[0]) for line in lines if "==" in line}
    # torch is pinned in Makefile: which build of it is for the device to say.
    wanted = declared(project["dependencies"]) | declared(project["optional-dependencies"]["dev"])
    assert wanted - pinned == {"torch"}
    assert "TORCH := torch==" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_pins_lie_within_the_ranges(project):
    from packaging.requirements import Requirement

    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    pins = {normalized(name): version for name, version in pins.items()}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    pins["torch"] = re.search(r"^TORCH := torch==(.+)$", makefile, re.MULTILINE).group(1)
    for line in project["dependencies"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[normalized(requirement.name)]), line
