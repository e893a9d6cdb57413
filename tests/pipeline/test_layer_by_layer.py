"""A run layer by layer: the bytes of the whole model, in one process, in two, and after kills."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from checkpoint.faults import BadInput
from checkpoint.processes import Processes
from export.manifest import read_manifest
from pipeline import layer_by_layer
from pipeline.layer_state import LayerState
from pipeline.run import run
from recipes.loading import SHIPPED, load_recipe
from tests.editing import edit_tensors

RECIPE = SHIPPED / "tiny" / "fp8.yaml"
ROOT = SHIPPED.parent
MIXED = "quantize.layers=[{format: nvfp4}, {format: fp8, kind: mamba}, {format: bf16, layers: [1]}]"
LAYERS = 10


def overrides(tiny, output, *more):
    """Nine short samples of three lengths, so that some run together."""
    samples = tiny.parent / "samples.jsonl"
    if not samples.exists():
        lines = []
        for number in range(9):
            content = "word " * (5 + 20 * (number % 3)) + str(number)
            lines.append(json.dumps({"messages": [{"role": "user", "content": content}]}))
        samples.write_text("\n".join(lines) + "\n")
    given = {
        "calibrate.samples": 9,
        "accuracy.samples": 3,
        "accuracy.tasks": "null",
        "quantize.kv_cache": "fp8",
        "calibrate.sources": f"[{{type: jsonl, path: {samples}}}]",
        "accuracy.sources": f"[{{type: jsonl, path: {samples}}}]",
        "quantize.memory": "layers",
        "model": tiny,
        "output": output,
    }
    for text in more:
        key, _, value = text.partition("=")
        given[key] = value
    return [MIXED, *(f"{key}={value}" for key, value in given.items())]


def run_layers(tiny, output, *more):
    return run(load_recipe(RECIPE, overrides(tiny, output, *more)))


@pytest.fixture(scope="module")
def one_thread():
    """As the processes that torchrun starts: sums are then made in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory, one_thread) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    assert run_layers(tiny, output, "quantize.memory=whole") in (0, 1)
    return output


def files_of(directory: Path) -> list[Path]:
    return sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())


def assert_same(output: Path, whole: Path) -> None:
    assert files_of(output) == files_of(whole)
    for file in files_of(whole):
        if file.name != "hybridquant.json":
            assert (output / file).read_bytes() == (whole / file).read_bytes(), file
    ours = read_manifest(output)
    theirs = read_manifest(whole)
    assert ours.calibration == theirs.calibration
    assert ours.gate == theirs.gate


def test_layer_by_layer_gives_the_whole_models_bytes_and_verdict(tiny, tmp_path, whole):
    run_layers(tiny, tmp_path / "out")
    assert_same(tmp_path / "out", whole)
    assert os.listdir(tmp_path) == ["out"]


def test_activations_beyond_the_budget_go_to_a_file_and_change_nothing(tiny, tmp_path, whole):
    run_layers(tiny, tmp_path / "out", "quantize.host_memory_gb=1.0e-5")
    assert_same(tmp_path / "out", whole)


def test_samples_one_by_one_give_the_same_bytes(tiny, tmp_path, whole):
    run_layers(tiny, tmp_path / "out", "quantize.batch_tokens=1")
    assert_same(tmp_path / "out", whole)


class Stop(Exception):
    pass


@contextlib.contextmanager
def stopped_after(monkeypatch, layers, saves=True):
    """End a run as abruptly as a kill once so many layers are recorded."""
    record = LayerState.record_layers

    def recorded(self, count):
        record(self, count)
        if count == layers:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(LayerState, "record_layers", recorded)
        patch.setattr(LayerState, "save_is_due", lambda self, size: saves)
        with pytest.raises(Stop):
            yield


@pytest.mark.parametrize("saves", [True, False], ids=["saved at every layer", "never saved"])
def test_a_stopped_run_resumes_after_the_last_layer_it_wrote(
    tiny, tmp_path, whole, monkeypatch, saves
):
    output = tmp_path / "out"
    with stopped_after(monkeypatch, 4, saves):
        run_layers(tiny, output)
    assert not output.exists()
    packed = set()
    quantize = layer_by_layer.quantize_layers

    def watched(*arguments):
        for layer in quantize(*arguments):
            if layer.linears:
                packed.add(layer.index)
            yield layer

    monkeypatch.setattr(layer_by_layer, "quantize_layers", watched)
    run_layers(tiny, output)
    assert packed == set(range(4, LAYERS)), "finished layers were quantized again"
    assert_same(output, whole)


@pytest.fixture
def stopped(tiny_copy, tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A copy of the checkpoint and the output of a run of it, stopped after two layers."""
    with stopped_after(monkeypatch, 2):
        run_layers(tiny_copy, tmp_path / "out")
    return tiny_copy, tmp_path / "out"


def test_another_recipe_another_source_or_other_samples_are_refused(stopped):
    tiny, output = stopped
    state = output.with_name(".out.run")
    changed = rf"quantize\.kv_cache: was fp8 when .* remove {state} to start again"
    with pytest.raises(BadInput, match=changed):
        run_layers(tiny, output, "quantize.kv_cache=null")
    with pytest.raises(BadInput, match=r"video\.pruning_rate: was 0\.75 when"):
        run_layers(tiny, output, "video.pruning_rate=0.5")
    samples = tiny.parent / "samples.jsonl"
    before = samples.read_text()
    samples.write_text(before.replace("word word", "word work", 1))
    with pytest.raises(BadInput, match=r"samples\..*samples\.jsonl: was"):
        run_layers(tiny, output)
    samples.write_text(before)
    edit_tensors(tiny, lambda tensors: tensors["mlp1.1.weight"].add_(0.01))
    with pytest.raises(BadInput, match=r"source\.model\.safetensors: was"):
        run_layers(tiny, output)
    assert state.exists()


def test_a_picture_that_has_changed_is_refused(tiny, tmp_path, monkeypatch):
    """The file of messages is the same: the picture's time of change finds it, and where that is
    the same too, the digest of the prompts.
    """
    from PIL import Image

    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.bmp")
    part = {"type": "image", "image": "a.bmp"}
    turn = {"role": "user", "content": [part, {"type": "text", "text": "Which?"}]}
    (tmp_path / "samples.jsonl").write_text(json.dumps({"messages": [turn]}))
    sources = f"calibrate.sources=[{{type: jsonl, path: {tmp_path / 'samples.jsonl'}}}]"
    with stopped_after(monkeypatch, 2):
        run_layers(tiny, tmp_path / "out", sources)
    before = (tmp_path / "a.bmp").stat()
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "a.bmp")
    with pytest.raises(BadInput, match=rf"media\.{tmp_path}: was 1 file, newest a\.bmp"):
        run_layers(tiny, tmp_path / "out", sources)
    assert (tmp_path / "a.bmp").stat().st_size == before.st_size
    os.utime(tmp_path / "a.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BadInput, match="the samples have changed since"):
        run_layers(tiny, tmp_path / "out", sources)


def test_too_little_memory_in_the_middle_is_advice_and_the_run_can_be_resumed(
    tiny, tmp_path, whole, monkeypatch
):
    from quantize import layerwise

    output = tmp_path / "out"
    quantize_model = layerwise.quantize_model
    calls = []

    def full(*arguments, **options):
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return quantize_model(*arguments, **options)

    advice = r"cpu ran out of memory after . of 10 layers: .*the same command resumes"
    with monkeypatch.context() as patch:
        patch.setattr(layerwise, "quantize_model", full)
        patch.setattr(LayerState, "save_is_due", lambda self, size: True)
        with pytest.raises(BadInput, match=advice):
            run_layers(tiny, output)
    run_layers(tiny, output)
    assert_same(output, whole)


def test_a_recipe_with_distillation_needs_the_whole_model(tiny, tmp_path):
    message = r"quantize\.memory: a recipe with distill needs the whole model"
    with pytest.raises(BadInput, match=message):
        run_layers(tiny, tmp_path / "out", "distill={steps: 1, batch: 1}")


def test_an_algorithm_other_than_max_needs_the_whole_model(tiny, tmp_path):
    message = r"quantize\.memory: layer by layer only max calibration runs, not mse"
    with pytest.raises(BadInput, match=message):
        run_layers(tiny, tmp_path / "out", "quantize.algorithm=mse")


def test_several_processes_cannot_each_hold_the_whole_model(tiny, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def two(device):
        yield Processes(0, 2)

    monkeypatch.setattr("pipeline.run.joined_processes", two)
    message = r"quantize\.memory: 2 processes share samples layer by layer"
    with pytest.raises(BadInput, match=message):
        run_layers(tiny, tmp_path / "out", "quantize.memory=whole")


def test_killed_at_many_random_points_it_ends_with_the_bytes_of_an_uninterrupted_run(
    tiny, tmp_path, whole
):
    """Each attempt is forked with everything imported, so it takes a second or two."""
    output = tmp_path / "out"
    state = tmp_path / ".out.run"
    recipe = load_recipe(RECIPE, overrides(tiny, output))
    generator = random.Random(0)
    start = time.monotonic()
    assert ended(recipe, 600)
    length = time.monotonic() - start
    kills = 0
    while True:  # each turn an output, made in as many attempts as it takes
        assert_same(output, whole)
        shutil.rmtree(output)
        if kills >= 8:
            break
        while not ended(recipe, generator.uniform(0, length)):
            kills += 1
            if not state.exists() and output.exists():  # killed after its last act
                break


def ended(recipe, seconds: float) -> bool:
    """Run a recipe in a process of its own and kill it after a time; whether it ended before."""
    end = time.monotonic() + seconds
    child = os.fork()
    if child == 0:
        try:
            # A fork leaves torch's thread pool behind; two threads that start a new one at once
            # fail an assertion.
            torch.set_num_threads(1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os._exit(run(recipe))
        except BaseException:
            os._exit(99)
    while True:
        process, status = os.waitpid(child, os.WNOHANG)
        if process:
            break
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.005)
    assert os.waitstatus_to_exitcode(status) in (0, 1), "a run ended by itself with an error"
    return True


def test_two_processes_share_the_samples_and_find_the_same_scales(tiny, tmp_path, whole):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *torchrun, "-m", "quantize.fp8", str(RECIPE)]
    command += overrides(tiny, tmp_path / "out", "calibrate.samples=10")  # there are nine
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode in (0, 1), result.stderr
    assert_same(tmp_path / "out", whole)
    assert os.listdir(tmp_path) == ["out"]
    fewer = "calibrate.sources: 9 samples, where calibrate.samples asks for 10"
    assert result.stderr.count(fewer) == 1
    assert "Warning" not in result.stderr


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    tiny, tmp_path, monkeypatch
):
    # The weights alone would fit.
    usage = shutil.disk_usage(tmp_path)._replace(free=13_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = r"needs .* with what is kept beside it, 0\.01 GB are free"
    endless = "calibrate.sources=[{type: synthetic, kinds: {text: 1}}]"
    with pytest.raises(BadInput, match=message):
        run_layers(tiny, tmp_path / "out", "calibrate.samples=3000", endless)
    assert os.listdir(tmp_path) == []


def test_a_small_device_runs_layer_by_layer_and_one_too_small_for_that_is_refused(
    tiny, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("checkpoint.layer_cost.cpu_workspace", lambda checkpoint: 0.0)
    # All 7.3 MB do not fit.
    monkeypatch.setattr("pipeline.plan.device_available", lambda device: 7_000_000)
    with caplog.at_level("INFO", logger="hybridquant"):
        run_layers(tiny, tmp_path / "out", "quantize.memory=auto")
    reason = "layer by layer: the whole model needs 0.01 GB, 0.01 GB are free"
    assert reason in caplog.text
    monkeypatch.setattr("pipeline.plan.device_available", lambda device: 100_000)
    message = r"memory of cpu: needs 0.0. GB, 0.00 GB are free \(end what else uses it"
    with pytest.raises(BadInput, match=message):
        run_layers(tiny, tmp_path / "small", "quantize.memory=auto")


def within(medium, output, limit: int) -> dict[str, dict]:
    """Exit status and stderr of a run in each way of running, under a limit in bytes."""
    sample = output / "one.jsonl"
    sample.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}))
    given = {
        "accuracy.tasks": "null",
        "calibrate.samples": 1,
        "accuracy.samples": 1,
        "quantize.host_memory_gb": 0.01,
        "calibrate.sources": f"[{{type: jsonl, path: {sample}}}]",
        "accuracy.sources": f"[{{type: jsonl, path: {sample}}}]",
        "model": medium,
    }
    arguments = [f"{key}={value}" for key, value in given.items()]
    program = "tests.pipeline.run_within_memory"
    command = [sys.executable, "-m", program, str(limit), str(output), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_model_larger_than_the_memory_allowed_is_quantized_layer_by_layer(medium, tmp_path):
    """The kernel refuses more than 1.5 GB; the model has 1.56 and takes 3.4 as a whole."""
    found = within(medium, tmp_path, 1_500_000_000)
    assert found["layers"]["status"] == 0, found["layers"]["stderr"][-3000:]
    assert (tmp_path / "layers" / "config.json").exists()
    refused = found["whole"]
    assert refused["status"] == 2, refused["stderr"][-3000:]
    assert "memory: the run ran out of memory" in refused["stderr"]
    assert "Traceback" not in refused["stderr"]
