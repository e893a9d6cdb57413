"""Importing a module changes nothing; a command prepares the libraries, its kernels first."""

import ast
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import checkpoint
from checkpoint.libraries import (
    find_mamba_kernels,
    language_model_classes,
    model_classes,
    prepare_libraries,
)

ROOT = Path(checkpoint.__file__).parents[1]
ROOMS = (
    "accuracy",
    "benchmarks",
    "calibrate",
    "checkpoint",
    "export",
    "pipeline",
    "quantize",
    "recipes",
    "serve",
    "tiny",
)
PLUGIN = "plugin/hybridquant_vllm"
MODEL_CLASSES = "transformers.models.nemotron"
"""Beginning of the modules that bind the Mamba-2 scan when they are imported."""


# The kernels


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with CUDA and a folder for packages; what is imported from it is forgotten."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("mamba_ssm", "selective_scan_cuda"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def install(folder, source):
    (folder / "mamba_ssm").mkdir()
    (folder / "mamba_ssm" / "__init__.py").write_text(source)


def test_mamba_ssm_without_its_compiled_extension_is_used(gpu):
    # mamba_ssm 2.3.2 built with MAMBA_SKIP_CUDA_BUILD=TRUE: its import fails, and transformers
    # runs plain PyTorch without a message.
    install(gpu, "import selective_scan_cuda")
    assert find_mamba_kernels() is None
    assert "mamba_ssm" in sys.modules


def test_a_mamba_ssm_that_does_not_import_is_named_with_its_reason(gpu):
    install(gpu, "import einops_that_is_not_there")
    assert find_mamba_kernels() == (
        "mamba_ssm does not import: ModuleNotFoundError: No module named 'einops_that_is_not_there'"
    )


def test_a_missing_mamba_ssm_is_named(gpu):
    assert find_mamba_kernels() == "mamba_ssm is not installed"


def test_without_cuda_mamba_ssm_is_kept_out(gpu, monkeypatch):
    # Where it imports on a CPU, transformers binds its Triton kernels, which refuse every tensor
    # there.
    install(gpu, "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_mamba_kernels() == "there is no CUDA device"
    with pytest.raises(ImportError):
        import mamba_ssm  # noqa: F401


# What a command prepares


def test_a_command_hears_that_the_kernels_come_too_late(monkeypatch, caplog):
    monkeypatch.delitem(sys.modules, "mamba_ssm", raising=False)
    monkeypatch.setitem(sys.modules, f"{MODEL_CLASSES}_h.modeling_nemotron_h", torch)
    with caplog.at_level(logging.WARNING, "hybridquant"):
        prepare_libraries()
    (record,) = caplog.records
    assert "imported before its kernels were prepared" in record.getMessage()


def test_preparing_twice_gives_no_warning(caplog):
    with caplog.at_level(logging.WARNING, "hybridquant"):
        prepare_libraries()
        prepare_libraries()
    assert caplog.records == []


def test_transformers_is_silent_afterwards(monkeypatch):
    from transformers import logging as transformers_logging

    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    prepare_libraries()
    assert transformers_logging.get_verbosity() == logging.ERROR
    assert not transformers_logging.is_progress_bar_enabled()


def heard_after_preparing() -> list[str]:
    """Which of three warnings are shown after `prepare_libraries`."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        prepare_libraries()
        for text in (
            "transformers 5.19.0 is not tested with current version of modelopt and may cause"
            " issues.",
            "Distributed training is initialized but no parallel_state is set for a class.",
            "something else",
        ):
            warnings.warn(text, stacklevel=1)
    return [str(warning.message) for warning in seen]


def test_two_warnings_of_modelopts_are_ignored_and_no_other(monkeypatch):
    assert heard_after_preparing() == ["something else"]
    monkeypatch.setenv("RANK", "0")
    assert heard_after_preparing() == ["something else"]


def test_what_libraries_warn_of_is_heard_from_the_first_process_alone(monkeypatch):
    monkeypatch.setattr(os, "environ", {"RANK": "1"})
    assert heard_after_preparing() == []
    assert os.environ == {"RANK": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    monkeypatch.setattr(os, "environ", {"RANK": "0"})
    heard_after_preparing()
    assert os.environ == {"RANK": "0"}


def test_modelopt_still_warns_of_processes_in_the_words_that_are_ignored(monkeypatch):
    """Trap of ModelOpt 0.47: it asks for a state that only tensor parallelism needs."""
    from modelopt.torch.quantization.nn import QuantModuleRegistry

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.warns(UserWarning, match="^Distributed training is initialized but no parallel_"):
        QuantModuleRegistry.convert(torch.nn.Linear(4, 4))


# What an import changes


def python_files(folder: str) -> list[Path]:
    """Every module of a room. The released checkpoint's Python file is data."""
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        if "released" not in path.parts:
            found.append(path)
    return found


def module_name(path: Path, base: Path) -> str:
    parts = list(path.relative_to(base).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def imports_of(nodes: list[ast.stmt]) -> set[str]:
    """Modules that statements import; `a.b` and `a.b.c` for `from a.b import c`."""
    found = set()
    for statement in nodes:
        for node in ast.walk(statement):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module))
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_executed_at_import(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.If):
        return ast.unparse(statement.test) not in ("TYPE_CHECKING", "__name__ == '__main__'")
    return not isinstance(statement, ast.FunctionDef | ast.ClassDef)


def top_imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return imports_of([node for node in tree.body if is_executed_at_import(node)])


MEDDLER = """
import logging, os, sys, warnings
import torch, transformers

transformers.logging.set_verbosity_error()
warnings.filterwarnings("ignore", message="x")
sys.modules["mamba_ssm"] = None
logging.basicConfig()
os.environ["MEDDLED"] = "1"
torch.rand(1)
transformers.PreTrainedModel.from_pretrained = classmethod(lambda cls: None)
print("hello")
"""
"""A module that changes something of each kind, by which the test tests itself."""


ELSEWHERE = {"vllm", "lm_eval", "vlmeval", "worker_protocol"}
"""What is imported in vLLM's and in the harnesses' environment alone."""


@pytest.fixture(scope="module")
def modules_by_room():
    """Names of the modules to import, by room, without those that run in other environments."""
    rooms = {}
    for room in (*ROOMS, PLUGIN):
        base = ROOT / "plugin" if room == PLUGIN else ROOT
        names = []
        for path in python_files(room):
            packages = {name.partition(".")[0] for name in top_imports(path)}
            if not packages & ELSEWHERE:
                names.append(module_name(path, base))
        rooms[room] = names
    return rooms


@pytest.fixture(scope="module")
def imported(modules_by_room, tmp_path_factory):
    """What importing every module of every room has changed, by room.

    The room `meddler` is that of `MEDDLER`; `libraries` is what the libraries themselves printed.
    """
    folder = tmp_path_factory.mktemp("libraries")
    rooms = {**modules_by_room, "meddler": ["meddler", "nowhere"]}
    (folder / "meddler.py").write_text(MEDDLER)
    (folder / "modules.json").write_text(json.dumps(rooms))
    script = Path(__file__).with_name("library_state.py")
    path = f"{ROOT}:{ROOT / 'plugin'}:{folder}"
    done = subprocess.run(
        [sys.executable, script, folder / "modules.json", folder / "out.json"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text()) | {"libraries": done.stderr}


def test_no_room_is_left_out(modules_by_room):
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms - {"tests"} == set(ROOMS)
    assert sum(len(names) for names in modules_by_room.values()) > 110
    assert "hybridquant_vllm" in modules_by_room[PLUGIN]


@pytest.mark.parametrize("room", [*ROOMS, PLUGIN])
def test_every_module_of_a_room_imports(room, imported):
    assert imported[room]["failed"] == []


@pytest.mark.parametrize("room", [*ROOMS, PLUGIN])
def test_importing_a_room_leaves_the_libraries_as_they_were(room, imported):
    assert imported[room]["changed"] == []


@pytest.mark.parametrize("room", [*ROOMS, PLUGIN])
def test_importing_a_room_prints_nothing(room, imported):
    assert imported[room]["printed"] == ""


@pytest.mark.parametrize(
    "change",
    [
        "transformers' verbosity",
        "warnings.filters",
        "modules set to None",
        "handlers",
        "environment",
        "torch's random state",
        "transformers.modeling_utils.PreTrainedModel.from_pretrained was replaced",
    ],
)
def test_a_change_of_each_kind_would_be_seen(change, imported):
    assert change in "\n".join(imported["meddler"]["changed"])


def test_a_print_and_a_module_that_does_not_import_would_be_seen(imported):
    assert imported["meddler"]["printed"] == "hello\n"
    assert imported["meddler"]["failed"] == [
        "nowhere: ModuleNotFoundError: No module named 'nowhere'"
    ]


def test_modelopt_still_warns_in_the_words_that_are_ignored(imported):
    """When this fails, the filter in `prepare_libraries` has no purpose left, or misses it."""
    assert "is not tested with current version of modelopt" in imported["libraries"]


# Which modules are imported when


@pytest.fixture(scope="module")
def project():
    """Every module of the rooms with its path."""
    found = {}
    for room in ROOMS:
        for path in python_files(room):
            found[module_name(path, ROOT)] = path
    return found


def reached(start: set[str], project: dict[str, Path]) -> set[str]:
    """Modules imported, directly or not, when the modules `start` are imported."""
    found = set()
    waiting = list(start)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        parent = name.rpartition(".")[0]
        if parent:
            waiting.append(parent)
        if name in project:
            waiting.extend(top_imports(project[name]))
    return found


def commands(project: dict[str, Path]) -> dict[str, Path]:
    """Modules that end a process by `checkpoint.faults.main`."""
    found = {}
    for name, path in project.items():
        if "checkpoint.faults.main" in top_imports(path):
            found[name] = path
    return found


def imports_at_run_time(path: Path) -> set[str]:
    """Modules that a file imports anywhere, but for type checkers."""
    nodes = []
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        is_for_types = isinstance(statement, ast.If) and not is_executed_at_import(statement)
        if not is_for_types or ast.unparse(statement.test) != "TYPE_CHECKING":
            nodes.append(statement)
    return imports_of(nodes)


def test_everybody_takes_the_model_classes_where_the_kernels_are_looked_for(project):
    """An import elsewhere may come first, and then a GPU runs Mamba-2 in plain PyTorch."""
    files = [*project.values(), *sorted((ROOT / "tests").rglob("*.py"))]
    assert len(files) > 150
    strays = []
    for path in files:
        for name in imports_at_run_time(path):
            if name.startswith(MODEL_CLASSES):
                strays.append(f"{path.relative_to(ROOT)}: {name}")
    assert strays == []


@pytest.mark.parametrize("classes", [language_model_classes, model_classes])
def test_the_kernels_are_looked_for_before_the_model_classes_are_imported(classes, monkeypatch):
    called = []

    def find():
        called.append("find_mamba_kernels")

    def import_module(name):
        called.append(name)
        return SimpleNamespace()

    monkeypatch.setattr("checkpoint.libraries.find_mamba_kernels", find)
    monkeypatch.setattr("importlib.import_module", import_module)
    classes()
    first, then = called
    assert first == "find_mamba_kernels"
    assert then.startswith(MODEL_CLASSES)


def test_every_command_that_loads_the_model_prepares_the_libraries(project):
    found = commands(project)
    assert len(found) >= 8
    for name, path in found.items():
        if "checkpoint.native" in reached(imports_at_run_time(path), project):
            assert "prepare_libraries()" in path.read_text(encoding="utf-8"), name


@pytest.mark.parametrize(
    "module", ["recipes.loading", "recipes.reference", "pipeline.command", "pipeline.first_checks"]
)
def test_a_mistake_in_a_recipe_does_not_wait_for_torch(module, project):
    names = reached({module}, project)
    heavy = {name for name in names if name.partition(".")[0] in ("torch", "modelopt")}
    assert heavy == set()


TORCH_FREE = (
    "checkpoint.atomic",
    "checkpoint.command",
    "checkpoint.config",
    "checkpoint.dtypes",
    "checkpoint.family",
    "checkpoint.faults",
    "checkpoint.log",
    "checkpoint.naming",
    "checkpoint.processes",
    "checkpoint.run_state",
    "checkpoint.settings",
    "checkpoint.video",
    "checkpoint.weight_files",
)


@pytest.mark.parametrize("module", TORCH_FREE)
def test_what_serving_needs_imports_neither_torch_nor_transformers(module, project):
    names = reached({module}, project)
    heavy = {name for name in names if name.partition(".")[0] in ("torch", "transformers")}
    assert heavy == set()


def test_the_server_and_the_client_import_neither_torch_nor_transformers(project):
    start = {name for name in project if name.partition(".")[0] == "serve"}
    names = reached(start, project)
    heavy = {name for name in names if name.partition(".")[0] in ("torch", "transformers")}
    assert heavy == set()
