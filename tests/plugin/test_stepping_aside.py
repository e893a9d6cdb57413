"""When the plug-in leaves vLLM as it is."""

import pytest

from hybridquant_vllm.fast_video import reason_to_step_aside
from serve.environment import CPU, ServeEnvironment
from serve.fast_video import fast_video_of


@pytest.fixture
def vllm(tmp_path):
    """A folder as vLLM's, whose model has no normalization on the device."""
    source = tmp_path / "model_executor" / "models" / "nano_nemotron_vl.py"
    source.parent.mkdir(parents=True)
    source.write_text("class NemotronH_Nano_VL_V2: ...\n")
    return tmp_path


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0", "0.33.1.dev3"])
def test_tested_releases_are_changed(version, vllm):
    assert reason_to_step_aside(version, vllm) is None


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0.0", "0.34.0rc1"])
def test_others_are_left_alone_with_a_reason(version, vllm):
    reason = reason_to_step_aside(version, vllm)
    assert reason == f"it is tested with vLLM 0.32 and 0.33, not with {version}"


def test_a_vllm_that_normalizes_on_the_device_is_left_alone(vllm):
    source = vllm / "model_executor" / "models" / "nano_nemotron_vl.py"
    source.write_text("class NemotronH_Nano_VL_V2:\n    supports_mm_device_do_normalize = True\n")
    assert "normalizes this model's frames" in reason_to_step_aside("0.33.2", vllm)


def test_a_vllm_without_the_model_is_left_alone(tmp_path):
    assert "has no" in reason_to_step_aside("0.33.0", tmp_path)


@pytest.mark.parametrize(
    ("vllm_version", "plugin", "switch", "state"),
    [
        ((0, 33, 0), "0.2.1", "1", "on"),
        ((0, 33, 0), "0.2.1", "0", "off, HYBRIDQUANT_FAST_VIDEO is 0"),
        ((0, 33, 0), None, "1", "off, the plug-in is not installed"),
        ((0, 33, 0), "0.1.0", "1", "off, the plug-in 0.1.0 is too old"),
        ((0, 34, 0), "0.2.1", "1", "off, the plug-in is not tested with vLLM 0.34.0"),
    ],
)
def test_serve_says_whether_it_is_on(vllm_version, plugin, switch, state, tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIDQUANT_FAST_VIDEO", switch)
    environment = ServeEnvironment(tmp_path, vllm_version, CPU, plugin)
    assert str(fast_video_of(environment)).startswith(state)
