"""Fixtures that every room shares: the tiny checkpoint, its config and model, exports of it."""

import logging
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch

from checkpoint.config import CheckpointConfig, read_json
from checkpoint.libraries import prepare_libraries
from checkpoint.log import NAMESPACE
from checkpoint.opened import Checkpoint, open_bf16
from checkpoint.tokenizer import RELEASED
from tiny.checkpoint import write_tiny

# Before any test module imports transformers' model classes; this file must not, at its top.
prepare_libraries()
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

# In the background of a shell, or under nohup, signals are ignored, and would be by the commands
# that tests start.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.SIG_DFL)

SHARED = ("server", "vllm_process", "medium")
"""Fixtures that several files share, and which take long to make."""


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, None, None]:
    """Give a whole file, and all that share a fixture of `SHARED`, to one process of `make test`.

    Groups with slow tests begin first, so that at the end no process waits long for the other.

    Trap: pytest-xdist 3.8 writes groups into the names of tests, where pytest 9.2 does not read
    them, and servers of a file were started in both processes.
    """
    groups = {}
    for item in items:
        groups[item] = _group_of(item)
        item.add_marker(pytest.mark.xdist_group(groups[item]))
    is_distributed = getattr(config.option, "loadgroup", False)
    if is_distributed:
        sizes = Counter(groups.values())
        slow = Counter(groups[item] for item in items if _is_slow(item))
        # Sorting is stable: tests of a group stay in their order.
        items.sort(key=lambda item: (-slow[groups[item]], -sizes[groups[item]], groups[item]))
    yield
    if is_distributed and not all("@" in item.nodeid for item in items):
        raise pytest.UsageError("pytest-xdist does not group tests: install requirements.txt")


@pytest.fixture(autouse=True)
def own_logging() -> Generator[None, None, None]:
    """Undo what a command does to logging that runs in the process of the tests."""
    logger = logging.getLogger(NAMESPACE)
    level = logger.level
    before = (logger.handlers, logger.propagate)
    yield
    logger.setLevel(level)
    logger.handlers, logger.propagate = before


def _group_of(item: pytest.Item) -> str:
    shared = [name for name in SHARED if name in getattr(item, "fixturenames", ())]
    return shared[0] if shared else str(item.path)


def _is_slow(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in ("server", "slow"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The directory of the tiny checkpoint; do not change it, take `tiny_copy`."""
    out = tmp_path_factory.mktemp("bf16") / "tiny"
    write_tiny(out)
    return out


@pytest.fixture
def tiny_copy(tiny, tmp_path) -> Path:
    """A copy of the tiny checkpoint that a test may change."""
    return Path(shutil.copytree(tiny, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny) -> Checkpoint:
    """The tiny checkpoint, opened."""
    return open_bf16(tiny)


@pytest.fixture(scope="session")
def tiny_config(tiny_checkpoint) -> CheckpointConfig:
    """The tiny checkpoint's configuration."""
    return tiny_checkpoint.config


@pytest.fixture
def tiny_model(tiny_checkpoint):
    """The tiny checkpoint as a model of its own, which a test may change."""
    from checkpoint.native import load_model

    return load_model(tiny_checkpoint)


@pytest.fixture(scope="session")
def full12b() -> CheckpointConfig:
    """The 12B's configuration."""
    return CheckpointConfig(RELEASED, read_json(RELEASED / "config.json"))


@pytest.fixture(scope="session")
def fp8_run(tiny, tmp_path_factory) -> tuple[int, Path]:
    """Exit status and output of the shipped tiny FP8 recipe, run once on few samples."""
    from pipeline.run import run
    from recipes.loading import SHIPPED, load_recipe

    output = tmp_path_factory.mktemp("fp8") / "tiny-fp8"
    overrides = [
        "calibrate.samples=7",
        "accuracy.samples=7",
        "accuracy.tasks={names: [document, text], items: 8, max_loss: 30}",
        f"model={tiny}",
        f"output={output}",
    ]
    return run(load_recipe(SHIPPED / "tiny/fp8.yaml", overrides)), output


@pytest.fixture(scope="session")
def fp8(fp8_run) -> Path:
    """The FP8 export; do not change it, take `fp8_copy`."""
    return fp8_run[1]


@pytest.fixture
def fp8_copy(fp8, tmp_path) -> Path:
    """A copy of the FP8 export that a test may change."""
    return Path(shutil.copytree(fp8, tmp_path / "fp8"))


@pytest.fixture(scope="session")
def nvfp4_export(tiny, tmp_path_factory) -> Callable[..., Path]:
    """A function that makes an export by the shipped tiny NVFP4 recipe, on few samples.

    Its arguments are further overrides.
    """
    from pipeline.run import run
    from recipes.loading import SHIPPED, load_recipe

    def export(*overrides: str, recipe: str = "nvfp4.yaml") -> Path:
        output = tmp_path_factory.mktemp("nvfp4") / "tiny-nvfp4"
        few = [
            "calibrate.samples=2",
            "accuracy.samples=1",
            "accuracy.tasks=null",
            f"model={tiny}",
            f"output={output}",
        ]
        run(load_recipe(SHIPPED / "tiny" / recipe, [*few, *overrides]))
        return output

    return export


@pytest.fixture(scope="session")
def nvfp4(nvfp4_export) -> Path:
    """The NVFP4 export; do not change it."""
    return nvfp4_export()


@pytest.fixture(scope="session")
def nvfp4_weight_only(nvfp4_export) -> Path:
    """The weight-only NVFP4 export; do not change it, copy it."""
    return nvfp4_export(recipe="nvfp4_weight_only.yaml")


@pytest.fixture(scope="session")
def medium(tmp_path_factory) -> Path:
    """1.56 GB of the 12B's kinds of layers; do not change it."""
    from checkpoint.synthetic import write_synthetic

    out = tmp_path_factory.mktemp("medium") / "bf16"
    write_synthetic(out, "medium", device="cpu")
    return out


@pytest.fixture(scope="session")
def vllm_process():
    """A process that has imported vLLM and runs scripts."""
    from vllm_process import running_vllm_process

    with running_vllm_process() as process:
        yield process


@pytest.fixture(scope="session")
def server(tiny):
    """The tiny checkpoint on a real vLLM, with EVS at the default rate, for every test that needs
    a server.
    """
    from serve.process import running_server
    from serve.settings import ServeSettings

    with running_server(tiny, ServeSettings(port=0)) as running:
        yield running
