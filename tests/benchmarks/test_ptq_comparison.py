"""The comparisons run whole on a CPU, so that no GPU's time is spent on finding their mistakes."""

import sys

import pytest

from benchmarks import processes, ptq, ptq_ways
from checkpoint.faults import BadInput


@pytest.mark.parametrize(("layers", "same"), [(True, True), (False, None)])
def test_every_way_is_measured_in_one_run(tiny, tmp_path, layers, same):
    result = ptq_ways.measure(
        tiny, tmp_path, "fp8", samples=2, tokens=40, device="cpu", layers=layers
    )
    assert result["streamed_bytes_equal"] is same
    assert result["faults"] == []
    ours = {"ours", "streamed"} if layers else {"ours"}
    assert set(result["times_faster_than_stock"]) == ours
    assert min(result["seconds"].values()) > 0
    # Stock ModelOpt writes the language model only.
    assert result["written_gb"] > result["stock_written_gb"] > 0


def test_a_measurement_that_was_stopped_is_resumed(tiny, tmp_path, monkeypatch):
    def measure():
        return ptq_ways.measure(tiny, tmp_path, "fp8", samples=1, tokens=24, device="cpu")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ptq_ways, "measure_stock", stop)
        with pytest.raises(KeyboardInterrupt):
            measure()
    monkeypatch.setattr(ptq_ways, "measure_whole", stop)
    monkeypatch.setattr(ptq_ways, "measure_layers", stop)
    result = measure()
    assert {"raw forward 3", "streamed: verify", "stock: export"} <= set(result["seconds"])
    # A finished measurement is not kept, so the next one starts from the beginning.
    with pytest.raises(KeyboardInterrupt):
        measure()


def test_a_measurement_that_is_not_possible_is_refused(monkeypatch, tmp_path):
    given = ["x", str(tmp_path), "--work", str(tmp_path), "--json", str(tmp_path / "j")]
    monkeypatch.setattr(sys, "argv", [*given, "--device", "cpu", "--format", "nvfp4"])
    with pytest.raises(BadInput, match="stock ModelOpt cannot quantize to nvfp4 on a CPU"):
        ptq._run()


def test_more_processes_than_gpus_are_refused(monkeypatch, tmp_path):
    given = ["x", "--work", str(tmp_path), "--json", "j", "--processes", "99"]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(BadInput, match="99 are too many"):
        processes._run()


def test_the_error_of_a_command_that_fails_has_the_end_of_its_output():
    with pytest.raises(RuntimeError, match=r"(?s)exit status 2.*nowhere"):
        processes.launched(("-m", "quantize.fp8", "nowhere.yaml"), "cpu")
