"""mamba_ssm's kernels are found where only its Triton part is installed, and whatever is wrong with
it is said.
"""

import ast
import sys
from pathlib import Path

import pytest
import torch

from checkpoint.classes import find_kernels

ROOT = Path(__file__).parents[2]
CLASSES = ROOT / "checkpoint" / "classes.py"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with CUDA and a folder for packages; what is imported from it is forgotten again."""
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
    # mamba_ssm 2.3.2 built with MAMBA_SKIP_CUDA_BUILD=TRUE: its import fails, and transformers says
    # nothing.
    install(gpu, "import selective_scan_cuda")
    assert find_kernels() is None
    assert "mamba_ssm" in sys.modules


def test_a_mamba_ssm_that_does_not_import_is_named_with_its_reason(gpu):
    install(gpu, "import einops_that_is_not_there")
    assert find_kernels() == (
        "mamba_ssm does not import: ModuleNotFoundError: No module named 'einops_that_is_not_there'"
    )


def test_no_mamba_ssm_is_said(gpu):
    assert find_kernels() == "mamba_ssm is not installed"


def test_without_cuda_mamba_ssm_is_kept_out(gpu, monkeypatch):
    # Where it imports on a CPU, transformers binds its Triton kernels, which refuse every tensor
    # there.
    install(gpu, "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_kernels() == "there is no CUDA device"
    with pytest.raises(ImportError):
        import mamba_ssm  # noqa: F401


def imported(file):
    """Modules by line, of both kinds of import."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def test_everybody_takes_transformers_classes_where_the_kernels_were_looked_for():
    files = [
        file
        for room in ROOT.iterdir()
        if (room / "__init__.py").exists()
        for file in room.rglob("*.py")
    ]
    files += (ROOT / "tests").rglob("*.py")
    assert len(files) > 150
    strays = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in files
        if file != CLASSES
        for line, name in imported(file)
        if name.startswith("transformers.models.nemotron")
    ]
    assert strays == []


def test_the_kernels_are_looked_for_before_transformers_binds_its_scan():
    looked = next(
        node.lineno
        for node in ast.parse(CLASSES.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node) == "KERNELS_MISSING = find_kernels()"
    )
    assert looked < min(line for line, name in imported(CLASSES) if name.startswith("transformers"))
