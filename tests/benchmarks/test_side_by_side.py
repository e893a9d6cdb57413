"""The side-by-side measurement runs whole on a CPU, so that a GPU's time is not spent on finding its mistakes."""

import sys

import pytest

from benchmarks import processes, ptq
from checkpoint.faults import BadInput


def test_whole_streamed_and_stock_are_measured_in_one_run(tiny, tmp_path):
    result = ptq.measure(tiny, tmp_path, "fp8", samples=2, tokens=40, device="cpu")
    assert result["streamed_bytes_equal"]
    assert result["faults"] == []
    assert set(result["times_faster_than_stock"]) == {"ours", "streamed"}
    assert min(result["seconds"].values()) > 0
    assert result["written_gb"] > result["stock_written_gb"] > 0, "stock writes the language model alone"


def test_a_measurement_cut_off_goes_on_with_what_it_has(tiny, tmp_path, monkeypatch):
    asked = (tiny, tmp_path, "fp8", 1, 24, "cpu")

    def cut_off(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ptq, "_measure_stock", cut_off)
        with pytest.raises(KeyboardInterrupt):
            ptq.measure(*asked)
    monkeypatch.setattr(ptq, "_measure_ours", cut_off)
    monkeypatch.setattr(ptq, "_measure_streamed", cut_off)
    result = ptq.measure(*asked)
    assert {"raw forward", "streamed: verify", "stock: export"} <= set(result["seconds"])
    with pytest.raises(KeyboardInterrupt):
        ptq.measure(*asked)  # what is done is done: the next one measures everything again


def test_a_measurement_that_cannot_run_is_refused(monkeypatch, tmp_path):
    given = ["x", str(tmp_path), "--work", str(tmp_path), "--json", str(tmp_path / "j"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*given, "--format", "nvfp4"])
    with pytest.raises(BadInput, match="stock ModelOpt cannot quantize to nvfp4 on a CPU"):
        ptq._run()


def test_more_processes_than_gpus_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["x", "--work", str(tmp_path), "--json", "j", "--processes", "99"])
    with pytest.raises(BadInput, match="CUDA devices are there"):
        processes._run()


def test_a_command_that_fails_says_what_it_said():
    with pytest.raises(RuntimeError, match=r"(?s)exit status 2.*nowhere"):
        processes.launched(("-m", "quantize.fp8", "nowhere.yaml"), "cpu")
