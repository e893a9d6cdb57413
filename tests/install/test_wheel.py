"""The wheel holds everything: it is installed in a folder of its own and quantizes there."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import hybridquant

ROOT = Path(__file__).parents[2]
NOT_INSTALLED = {"benchmarks", "dev", "tests"}
ROOMS = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"plugin"}
INSTALLED = ROOMS - NOT_INSTALLED

# Writes, when an interpreter ends, which files its modules came from.
RECORDER = """
import atexit, json, os, pathlib, sys
def write():
    files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    out = pathlib.Path(os.environ["RECORDED_MODULES"]) / f"{os.getpid()}.json"
    out.write_text(json.dumps(files))
if "RECORDED_MODULES" in os.environ:
    atexit.register(write)
"""


def is_ours(name: str) -> bool:
    return name.split(".")[0] in INSTALLED | {"hybridquant", "hybridquant_vllm"}


def environment(**more: str) -> dict[str, str]:
    """The test's environment without what would lead an interpreter to this tree."""
    left_out = ("PYTHONPATH", "HYBRIDQUANT_SERVE_PYTHON")
    return {name: text for name, text in os.environ.items() if name not in left_out} | more


def run(*command: str | Path, **options) -> str:
    """Run a command and return its output; fail with all of it."""
    options.setdefault("env", environment())
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def new_environment(folder: Path) -> Path:
    """Create a virtual environment that finds the running interpreter's distributions, pip too.

    Returns the path of its interpreter.

    A .pth line adds a folder to sys.path without running that folder's own .pth files, so the
    editable install of this tree stays out.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    site = site_packages(folder)
    existing = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "existing.pth").write_text("\n".join(sorted(existing)) + "\n")
    return folder / "bin" / "python"


def site_packages(folder: Path) -> Path:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return folder / "lib" / version / "site-packages"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy: setuptools leaves build/ and egg-info/ beside the sources."""
    copy = tmp_path_factory.mktemp("wheel") / "tree"
    copy.mkdir()
    for name in INSTALLED:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("hybridquant.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "-w", "dist", ".")
    run(sys.executable, "-m", "pip", "wheel", *options, cwd=copy)
    return next((copy / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel; everything else comes from the running interpreter's."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    python = new_environment(folder)
    # The editable install of this tree is not this environment's to remove.
    options = ("--quiet", "--no-deps", "--no-index", "--ignore-installed")
    run(python, "-m", "pip", "install", *options, wheel)
    (site_packages(folder) / "record_modules.py").write_text(RECORDER)
    (site_packages(folder) / "record_modules.pth").write_text("import record_modules\n")
    return folder


def test_the_wheel_holds_every_file_of_the_rooms_and_no_other(wheel):
    expected = {"hybridquant.py"}
    for room in INSTALLED:
        for path in (ROOT / room).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                expected.add(path.relative_to(ROOT).as_posix())
    # The decoder that calibration imports, once more as a package.
    for path in (ROOT / "plugin" / "hybridquant_vllm").glob("*.py"):
        expected.add(f"hybridquant_vllm/{path.name}")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected


def test_the_version_of_the_wheel_is_the_modules(wheel, installed):
    assert wheel.name.startswith(f"hybridquant-{hybridquant.__version__}-")
    shown = run(installed / "bin" / "hybridquant", "--version")
    assert shown.startswith(f"hybridquant {hybridquant.__version__} (")


@pytest.mark.slow
def test_an_installed_wheel_quantizes_in_another_folder(installed, tmp_path):
    modules = tmp_path / "modules"
    modules.mkdir()
    folder = tmp_path / "work"
    folder.mkdir()
    few = ["calibrate.samples=2", "accuracy.samples=1", "accuracy.tasks=null"]
    run(
        installed / "bin" / "hybridquant",
        *("quantize", "fp8", *few),
        cwd=folder,
        env=environment(RECORDED_MODULES=str(modules)),
    )
    manifest = json.loads((folder / "out" / "tiny-fp8" / "hybridquant.json").read_text())
    assert manifest["gate"]["passed"] is True
    assert manifest["versions"]["hybridquant"] == hybridquant.__version__

    files = {}
    for record in modules.iterdir():
        files.update(json.loads(record.read_text()))
    ours = {name: file for name, file in files.items() if is_ours(name)}
    assert {"pipeline.run", "recipes.schema", "quantize.ptq", "export.write"} <= set(ours)
    elsewhere = {name: file for name, file in ours.items() if file and str(installed) not in file}
    assert not elsewhere


def test_an_installed_wheel_prepares_a_serve_environment(installed, tmp_path):
    folder = tmp_path / "serve"
    python = new_environment(folder)
    command = (installed / "bin" / "hybridquant", "setup-serve", python)
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {python}: has no vllm")

    metadata = site_packages(folder) / "vllm-0.33.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0\n")
    assert "installed the plug-in hybridquant-vllm" in run(*command)
    code = (
        "from importlib.metadata import entry_points as e; print(e(group='vllm.general_plugins'))"
    )
    assert "hybridquant_vllm:register" in run(python, "-c", code)
    assert (site_packages(folder) / "hybridquant_vllm" / "kernels.py").exists()
