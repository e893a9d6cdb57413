"""A run a layer at a time: the whole path's bytes, in one process and in two, and after any number
of kills.
"""

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
from checkpoint.synthetic import write_synthetic
from export.manifest import read_manifest
from pipeline import streaming
from pipeline.run import run
from quantize.stream_state import StreamState
from recipes.schema import load_recipe
from tests.editing import edit_tensors

RECIPE = Path("recipes/tiny/fp8.yaml")
MIXED = "quantize.layers=[{format: nvfp4}, {format: fp8, kind: mamba}, {format: bf16, layers: [1]}]"


def overrides(tiny, output, *more):
    """Nine short samples of three lengths, so that some run together."""
    samples = tiny.parent / "streamed.jsonl"
    if not samples.exists():
        turns = [
            {"role": "user", "content": "word " * (5 + 20 * (n % 3)) + str(n)} for n in range(9)
        ]
        samples.write_text("".join(json.dumps({"messages": [turn]}) + "\n" for turn in turns))
    sources = [
        f"{section}.sources=[{{type: jsonl, path: {samples}}}]"
        for section in ("calibrate", "accuracy")
    ]
    few = [
        "calibrate.samples=9",
        "accuracy.samples=3",
        "accuracy.tasks=null",
        MIXED,
        "quantize.kv_cache=fp8",
    ]
    return [*few, *sources, "quantize.memory=stream", f"model={tiny}", f"output={output}", *more]


def stream(tiny, output, *more):
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
    assert stream(tiny, output, "quantize.memory=whole") in (0, 1)
    return output


def assert_same(output: Path, whole: Path) -> None:
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(output) for path in output.rglob("*") if path.is_file())
    for file in files:
        if file.name != "hybridquant.json":
            assert (output / file).read_bytes() == (whole / file).read_bytes(), file
    ours, theirs = read_manifest(output), read_manifest(whole)
    assert ours.calibration == theirs.calibration
    assert ours.gate == theirs.gate


def test_layer_by_layer_gives_the_whole_paths_bytes_and_verdict(tiny, tmp_path, whole):
    stream(tiny, tmp_path / "out")
    assert_same(tmp_path / "out", whole)
    assert os.listdir(tmp_path) == ["out"]


def test_activations_beyond_the_budget_go_to_a_file_and_change_nothing(tiny, tmp_path, whole):
    stream(tiny, tmp_path / "out", "quantize.host_memory_gb=1.0e-5")
    assert_same(tmp_path / "out", whole)


def test_samples_one_by_one_give_the_same_bytes(tiny, tmp_path, whole):
    stream(tiny, tmp_path / "out", "quantize.batch_tokens=1")
    assert_same(tmp_path / "out", whole)


class Stop(Exception):
    pass


def stop_after(monkeypatch, layers, saves=True):
    """End the run as abruptly as a kill once so many layers are recorded."""
    finish = StreamState.finish_layer

    def recorded(self, done):
        finish(self, done)
        if done == layers:
            raise Stop

    monkeypatch.setattr(StreamState, "finish_layer", recorded)
    monkeypatch.setattr(StreamState, "due", lambda self, size: saves)


@pytest.mark.parametrize("saves", [True, False], ids=["saved at every layer", "never saved"])
def test_a_stopped_run_goes_on_after_the_last_layer_it_wrote(
    tiny, tmp_path, whole, monkeypatch, saves
):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 4, saves)
        with pytest.raises(Stop):
            stream(tiny, output)
    assert not output.exists()
    packed = []
    quantize = streaming.quantize_layers

    def watched(*arguments):
        for layer in quantize(*arguments):
            packed.extend(linear.name.split(".")[3] for linear in layer.linears)
            yield layer

    monkeypatch.setattr(streaming, "quantize_layers", watched)
    stream(tiny, output)
    assert sorted(set(map(int, packed))) == list(range(4, 10)), (
        "finished layers were quantized again"
    )
    assert_same(output, whole)


@pytest.fixture
def stopped(tiny_copy, tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A copy of the checkpoint and the output of a run of it, stopped after two layers."""
    overrides(tiny_copy, tmp_path / "out")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stop):
            stream(tiny_copy, tmp_path / "out")
    return tiny_copy, tmp_path / "out"


def test_another_recipe_another_source_or_other_samples_are_refused(stopped):
    tiny, output = stopped
    state = output.with_name(".out.stream")
    with pytest.raises(
        BadInput, match=rf"quantize.kv_cache: was fp8 when .* remove {state} to start anew"
    ):
        stream(tiny, output, "quantize.kv_cache=null")
    samples = tiny.parent / "streamed.jsonl"
    before = samples.read_text()
    samples.write_text(before.replace("word word", "word work", 1))
    with pytest.raises(BadInput, match="the samples have changed since"):
        stream(tiny, output)
    samples.write_text(before)
    edit_tensors(tiny, lambda tensors: tensors["mlp1.1.weight"].add_(0.01))
    with pytest.raises(BadInput, match=r"source\.model\.safetensors: was"):
        stream(tiny, output)
    assert state.exists()


def test_memory_that_does_not_suffice_in_mid_run_is_advice_and_the_run_can_go_on(
    tiny, tmp_path, whole, monkeypatch
):
    output, passed = tmp_path / "out", []

    def full(*arguments, **options):
        passed.append(1)
        if len(passed) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return quantize_model(*arguments, **options)

    from quantize.layerwise import quantize_model

    with monkeypatch.context() as patch:
        patch.setattr("quantize.layerwise.quantize_model", full)
        patch.setattr(StreamState, "due", lambda self, size: True)
        with pytest.raises(
            BadInput,
            match=r"cpu ran out of memory after . of 10 layers: .*the same command goes on",
        ):
            stream(tiny, output)
    stream(tiny, output)
    assert_same(output, whole)


def test_a_recipe_with_distillation_cannot_stream(tiny, tmp_path):
    with pytest.raises(
        BadInput, match=r"quantize\.memory: a recipe with distill needs the whole model"
    ):
        stream(tiny, tmp_path / "out", "distill={steps: 1, batch: 1}")


def test_an_algorithm_other_than_max_cannot_stream(tiny, tmp_path):
    recipe = load_recipe(RECIPE, overrides(tiny, tmp_path / "out"))
    other = recipe.quantize.model_copy(update={"algorithm": "mse"})
    with pytest.raises(
        BadInput, match=r"quantize\.memory: stream knows max calibration only, not mse"
    ):
        run(recipe.model_copy(update={"quantize": other}))


def test_several_processes_cannot_each_hold_the_whole_model(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.plan.RANKS", 2)
    with pytest.raises(
        BadInput, match=r"quantize\.memory: 2 processes share samples layer by layer"
    ):
        stream(tiny, tmp_path / "out", "quantize.memory=whole")


def command(tiny, output, *launcher) -> subprocess.Popen:
    arguments = [
        sys.executable,
        *launcher,
        "-m",
        "quantize.fp8",
        str(RECIPE),
        *overrides(tiny, output),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )


def test_killed_at_many_random_points_it_ends_with_the_bytes_of_an_uninterrupted_run(
    tiny, tmp_path, whole
):
    """Each life is forked with everything imported, so it costs a second or two; ended ones begin
    anew.
    """
    output, state, kills = tmp_path / "out", tmp_path / ".out.stream", 0
    recipe = load_recipe(RECIPE, overrides(tiny, output))
    generator = random.Random(0)
    start = time.monotonic()
    assert live(recipe, 600)
    length = time.monotonic() - start
    while True:  # each turn an output, made in as many lives as it takes
        assert_same(output, whole)
        shutil.rmtree(output)
        if kills >= 8:
            break
        while not live(recipe, generator.uniform(0, length)):
            kills += 1
            if not state.exists() and output.exists():  # killed after its last act
                break


def live(recipe, seconds: float) -> bool:
    """Run a recipe in a process of its own and kill it after so many seconds; whether it ended
    before.
    """
    end = time.monotonic() + seconds
    child = os.fork()
    if child == 0:
        try:
            # A fork leaves torch's thread pool behind; two threads that ask for a new one at once
            # fail an assertion.
            torch.set_num_threads(1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os._exit(run(recipe))
        except BaseException:
            os._exit(99)
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.005)
    assert os.waitstatus_to_exitcode(ended[1]) in (0, 1), "a life ended by itself with an error"
    return True


def test_two_processes_share_the_samples_and_find_the_same_scales(tiny, tmp_path, whole):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    process = command(tiny, tmp_path / "out", *torchrun)
    _, errors = process.communicate(timeout=300)
    assert process.returncode in (0, 1), errors.decode()
    assert_same(tmp_path / "out", whole)
    assert os.listdir(tmp_path) == ["out"]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    tiny, tmp_path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=13_000_000)  # the weights alone would fit
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        BadInput, match=r"needs .* with the activations kept beside it, 0\.01 GB are free"
    ):
        stream(tiny, tmp_path / "out", "calibrate.samples=3000")
    assert os.listdir(tmp_path) == []


def test_a_device_that_is_too_small_streams_and_one_too_small_for_that_is_refused(
    tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("pipeline.plan._workspace", lambda config: 0.0)
    monkeypatch.setattr(
        "pipeline.plan.device_available", lambda device: 7_000_000
    )  # all 7.3 MB do not fit
    stream(tiny, tmp_path / "out", "quantize.memory=auto")
    assert (
        "layer by layer: the whole model needs 0.01 GB, 0.01 GB are free" in capsys.readouterr().err
    )
    monkeypatch.setattr("pipeline.plan.device_available", lambda device: 100_000)
    with pytest.raises(
        BadInput, match=r"memory of cpu: needs 0.0. GB, 0.00 GB are free \(end what else uses it"
    ):
        stream(tiny, tmp_path / "small", "quantize.memory=auto")


@pytest.fixture(scope="module")
def medium(tmp_path_factory) -> Path:
    """1.56 GB of the 12B's kinds of layers."""
    out = tmp_path_factory.mktemp("medium") / "bf16"
    write_synthetic(out, "medium", device="cpu")
    return out


def within(medium, output, limit: int, memory: str) -> subprocess.CompletedProcess:
    sample = medium.parent / "one.jsonl"
    sample.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}))
    sources = [
        f"{section}.sources=[{{type: jsonl, path: {sample}}}]"
        for section in ("calibrate", "accuracy")
    ]
    few = [
        "accuracy.tasks=null",
        "calibrate.samples=1",
        "accuracy.samples=1",
        "quantize.host_memory_gb=0.01",
        f"quantize.memory={memory}",
    ]
    arguments = [str(limit), *few, *sources, f"model={medium}", f"output={output}"]
    command = [sys.executable, "-m", "tests.pipeline.run_within_memory", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_a_model_larger_than_the_memory_allowed_is_quantized_a_layer_at_a_time(medium, tmp_path):
    """The kernel refuses more than 1.5 GB; the model has 1.56, half of it vocabulary, and takes 3.4
    as a whole.
    """
    result = within(medium, tmp_path / "out", 1_500_000_000, "stream")
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "out" / "model.safetensors").exists()
    refused = within(medium, tmp_path / "whole", 1_500_000_000, "whole")
    assert refused.returncode == 2, refused.stderr[-3000:]
    assert "memory: the run ran out of memory" in refused.stderr
    assert "Traceback" not in refused.stderr
