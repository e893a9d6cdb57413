"""The gate of a recipe that names a benchmark: both sides are served, and the manifest says it."""

import json
from pathlib import Path

import pytest

from pipeline.suites import measure_suites
from recipes.loading import SHIPPED, load_recipe

# The stub answers "100" to all six questions: 95 % certain is a loss of at most 46 points.
ENOUGH, TOO_LITTLE = 60, 1.5


def recipe(output: Path, data: Path, max_loss: float):
    section = f"names: [chartqa], own_data: true, data: {data}, max_loss: {max_loss}"
    overrides = [f"output={output}", f"accuracy.suites={{{section}}}"]
    return load_recipe(SHIPPED / "tiny/fp8.yaml", overrides)


def gate_of(directory: Path) -> dict:
    return json.loads((directory / "hybridquant.json").read_text())["gate"]


@pytest.mark.parametrize(("max_loss", "passes"), [(ENOUGH, True), (TOO_LITTLE, False)])
def test_the_benchmark_decides_the_gate(folder, tiny, fp8_copy, dying, max_loss, passes):
    dying()
    assert measure_suites(recipe(fp8_copy, folder, max_loss), tiny) is passes
    gate = gate_of(fp8_copy)
    assert gate["passed"] is passes
    row = gate["suites"]["variants"][0]["rows"][0]
    assert (row["task"], row["items"]) == ("chartqa", 6)
    assert row["outcome"] == ("passed" if passes else "too small")
    assert "agreement" in gate  # what was measured in process stays


def test_without_data_the_result_stays_as_it_is(tiny, fp8_copy, tmp_path, dying, caplog):
    dying()
    before = gate_of(fp8_copy)
    assert measure_suites(recipe(fp8_copy, tmp_path / "empty", ENOUGH), tiny)
    assert gate_of(fp8_copy) == before
    assert "the benchmarks are not measured" in caplog.text
    assert "--suite report" in caplog.text
