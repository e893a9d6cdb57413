"""serve runs from either environment and imports torch in neither."""

import pkgutil
import subprocess
import sys

import pytest
from commands import ROOMS

import serve
from serve.environment import find_python

MODULES = [f"serve.{module.name}" for module in pkgutil.iter_modules(serve.__path__)]
HEAVY = ("torch", "transformers", "modelopt", "vllm", "openai", "PIL", "av")


@pytest.mark.parametrize("environment", ["quantize", "serve"])
def test_importing_serve_imports_nothing_heavy_and_changes_nothing(environment):
    python = sys.executable if environment == "quantize" else find_python()
    code = (
        "import importlib, logging, signal, sys\n"
        "before = signal.getsignal(signal.SIGINT)\n"
        f"for name in {MODULES!r}: importlib.import_module(name)\n"
        f"assert [name for name in {HEAVY!r} if name in sys.modules] == []\n"
        "assert logging.getLogger('hybridquant').handlers == []\n"
        "assert signal.getsignal(signal.SIGINT) is before\n"
    )
    done = subprocess.run([python, "-c", code], cwd=ROOMS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
    assert "serve.__main__" in MODULES
