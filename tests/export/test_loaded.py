"""`verify --load`: the real vLLM loads an export, says which layers it quantizes, and answers."""

import contextlib
import shutil
from pathlib import Path

import pytest

from checkpoint.config import read_config
from checkpoint.faults import BadInput
from export.layout import linear_formats
from export.loaded import (
    Loaded,
    kernel_lines,
    kernels_of,
    layer_faults,
    load_and_ask,
    read_report,
)
from serve.process import running_server
from tests.editing import edit_json

PLUGIN = Path(__file__).parents[2] / "plugin"
IN_PROJ = "language_model.backbone.layers.0.mixer.in_proj"
MODULE = "language_model.model.layers.0.mixer.in_proj"


@pytest.fixture(scope="module")
def loaded_and_log(fp8, tmp_path_factory) -> tuple[Loaded, str]:
    """What was found, and what vLLM printed meanwhile."""
    log = tmp_path_factory.mktemp("loaded") / "vllm.log"

    @contextlib.contextmanager
    def logged(*arguments, **options):
        with running_server(*arguments, log=log, **options) as server:
            yield server

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(PLUGIN))  # this plug-in, whatever is installed
        patch.setattr("export.loaded.running_server", logged)
        return load_and_ask(fp8), log.read_text()


@pytest.fixture(scope="module")
def loaded(loaded_and_log) -> Loaded:
    return loaded_and_log[0]


@pytest.mark.server
def test_every_layer_of_an_export_runs_quantized_and_questions_are_answered(loaded, tiny_config):
    assert loaded.faults == []
    fused = 2 * tiny_config.pattern.count("*")  # of q, k and v, vLLM makes one
    assert sum(kernels_of(loaded.layers).values()) == 24 - fused
    assert set(kernels_of(loaded.layers)) == {"ReferenceFp8Kernel"}
    methods = {layer["name"]: layer["method"] for layer in loaded.layers}
    assert methods["language_model.lm_head"].startswith("Unquantized")


def report_of(config, kernel, **others):
    """A report in which every quantized linear runs by a kernel, or by another of its last name."""
    modules = {config.family.fused_module(linear) for linear in linear_formats(config)}
    layers = []
    for name in sorted(modules):
        used = others.get(name.rpartition(".")[2], kernel)
        layers.append({"name": name, "method": "Fp8LinearMethod", "kernel": used})
    return layers


def test_it_is_said_how_many_linears_a_kernel_runs_and_why_vllm_counts_fewer(fp8):
    config = read_config(fp8)
    assert kernel_lines(config, report_of(config, "Fp8Kernel")) == [
        "vLLM runs 24 linears by Fp8Kernel, in 20 layers: "
        "it runs q_proj + k_proj + v_proj as qkv_proj"
    ]
    assert kernel_lines(config, report_of(config, "Fp8Kernel", qkv_proj="Other")) == [
        "vLLM runs 18 linears by Fp8Kernel",
        "vLLM runs 6 linears by Other, in 2 layers: it runs q_proj + k_proj + v_proj as qkv_proj",
    ]


@pytest.mark.server
def test_vllm_is_not_told_the_format_and_warns_of_the_reference_kernel_once(loaded_and_log):
    _, log = loaded_and_log
    assert "quantization=modelopt," in log
    assert log.count("FP8 (W8A8) layers run on a REFERENCE kernel") == 1


@pytest.mark.server
@pytest.mark.parametrize(
    ("section", "what"),
    [
        ({"quant_algo": "NVFP4"}, f"{MODULE}: runs by ReferenceFp8Kernel, not in NVFP4"),
        ({"ignore": [IN_PROJ, "*lm_head*"]}, f"{MODULE}: is quantized by ReferenceFp8Kernel"),
    ],
)
def test_a_directory_that_says_otherwise_than_vllm_runs(loaded, fp8, tmp_path, section, what):
    directory = Path(shutil.copytree(fp8, tmp_path / "fp8"))
    edit_json(directory / "config.json", lambda c: c["quantization_config"].update(section))
    faults = [str(fault) for fault in layer_faults(read_config(directory), loaded.layers)]
    assert any(what in fault for fault in faults), faults


@pytest.mark.server
def test_a_layer_that_runs_in_bf16_is_a_fault(loaded, fp8):
    config = read_config(fp8)
    layers = [dict(layer) for layer in loaded.layers]
    for layer in layers:
        if layer["name"] == MODULE:
            layer["method"] = "UnquantizedLinearMethod"
    (fault,) = layer_faults(config, layers)
    assert fault.what == "runs in BF16, not in FP8"
    (fault,) = layer_faults(config, [layer for layer in layers if layer["name"] != MODULE])
    assert fault.what == "is not a layer that vLLM has loaded"


def test_a_plugin_that_does_not_report_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="which layers it quantizes"):
        read_report(tmp_path / "nothing.json")
