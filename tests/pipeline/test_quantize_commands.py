"""A command does what its name says, and ends with a sentence whatever stops it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint.faults import BadInput, Terminated, raise_on_termination
from pipeline.command import purpose_faults, split_recipe
from pipeline.run import run
from recipes.loading import SHIPPED, load_recipe
from tests.forked import run_forked

ROOT = SHIPPED.parent


def purpose(recipe: str, module: str, formats=(), distils=False, overrides=()) -> str:
    loaded = load_recipe(SHIPPED / "tiny" / recipe, overrides)
    return "\n".join(str(fault) for fault in purpose_faults(loaded, module, formats, distils))


def test_qad_needs_a_distillation():
    assert "distill: is missing" in purpose("nvfp4.yaml", "quantize.qad", distils=True)
    assert purpose("nvfp4_qad.yaml", "quantize.qad", distils=True) == ""


def test_ptq_does_not_distil():
    assert "distill: is given" in purpose("nvfp4_qad.yaml", "quantize.nvfp4", ["nvfp4"])
    without = purpose("nvfp4_qad.yaml", "quantize.nvfp4", ["nvfp4"], overrides=["distill=null"])
    assert without == ""


def test_a_format_s_command_needs_a_rule_with_the_format():
    assert "has no rule with nvfp4" in purpose("fp8.yaml", "quantize.nvfp4", ["nvfp4"])
    mixed = ["quantize.layers=[{format: nvfp4}, {format: fp8, kind: mamba}]"]
    assert purpose("fp8.yaml", "quantize.nvfp4", ["nvfp4"], overrides=mixed) == ""
    assert purpose("fp8.yaml", "quantize.fp8", ["fp8"], overrides=mixed) == ""


@pytest.mark.parametrize("line", ["r.yaml a=1 b=2", "a=1 r.yaml b=2", "a=1 b=2 r.yaml"])
def test_the_recipe_may_stand_among_its_fields(line):
    assert split_recipe(line.split()) == (Path("r.yaml"), ["a=1", "b=2"])


def test_without_a_recipe_there_are_fields_only():
    assert split_recipe(["a=1", "=2"]) == (None, ["a=1", "=2"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.yaml", "k=1", "b.yaml"], "'b.yaml': is a second recipe, after 'a.yaml'"),
        (["k=1", ""], "'': is not a recipe and not key=value"),
    ],
)
def test_words_that_are_neither_are_refused(words, message):
    with pytest.raises(BadInput) as caught:
        split_recipe(words)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["quantize.nvfp4", "recipes/tiny/fp8.yaml"], "quantize.layers: has no rule"),
        (["quantize.qad", "recipes/tiny/nvfp4.yaml"], "distill: is missing"),
        (["quantize.fp8", "accuracy.seed=0"], "accuracy.seed: is 0 like calibrate.seed"),
        (["quantize.qad", "accuracy.seed=2000003"], "accuracy.seed: is 2000003 like distill.seed"),
    ],
)
def test_a_recipe_for_something_else_ends_with_exit_2(command, message):
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_signal_leaves_nothing_half_done_and_says_how_to_go_on(
    tiny, tmp_path, monkeypatch, caplog
):
    def stop(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        yield

    monkeypatch.setattr("pipeline.layer_by_layer.LayerByLayer.packed_layers", stop)

    before = signal.getsignal(signal.SIGTERM)
    overrides = [f"model={tiny}", f"output={tmp_path / 'out'}", "accuracy.tasks=null"]
    recipe = load_recipe(SHIPPED / "tiny" / "fp8.yaml", ["quantize.memory=layers", *overrides])
    raise_on_termination()
    try:
        with pytest.raises(Terminated):
            run(recipe)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "the same command starts again" in caplog.text
    assert os.listdir(tmp_path) == []


STOPPED = """
import os, signal, sys
from checkpoint.faults import main, raise_on_termination
raise_on_termination()
main(lambda: os.kill(os.getpid(), int(sys.argv[1])) or 0)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_every_signal_that_stops_a_command_ends_it_with_a_word_and_its_status(number):
    result = subprocess.run(
        [sys.executable, "-c", STOPPED, str(int(number))], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 128 + number
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


def test_an_error_of_the_operating_system_is_one_sentence_with_what_to_do(tmp_path):
    name = "x" * 300
    result = run_forked("quantize.fp8", f"output={tmp_path / name}")
    assert result.returncode == 2
    assert "File name too long (give a shorter path)" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_export_that_was_not_measured_is_served_with_a_warning(fp8_copy, caplog):
    from serve.__main__ import warn_about_gate

    manifest = json.loads((fp8_copy / "hybridquant.json").read_text())
    warn_about_gate(fp8_copy)
    assert caplog.text == ""
    (fp8_copy / "hybridquant.json").write_text(json.dumps(manifest | {"gate": {"passed": None}}))
    warn_about_gate(fp8_copy)
    assert "has not been verified and measured" in caplog.text
