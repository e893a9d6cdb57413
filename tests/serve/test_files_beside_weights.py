"""The files beside the weights, variables, and files that disagree, before vLLM starts."""

import json
import os

import pytest
from editing import edit_json

from checkpoint.config import read_config
from checkpoint.faults import BadInput
from serve.companions import GENERATION, SAMPLING, companion_faults
from serve.environment import find_environment
from serve.precision import OLD_CONFIG, disagreement_faults, read_quantization
from serve.variables import PLUGIN_NAME, PLUGINS_VARIABLE, WHOLE_NUMBERS, variable_faults


def faults(directory):
    return [str(fault) for fault in companion_faults(directory)]


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "generation_config.json", "preprocessor_config.json", "vocab.txt"],
)
def test_nothing_outside_of_the_directory_is_read(tiny_copy, tmp_path, name):
    outside = tmp_path / "outside"
    outside.write_text("a secret")
    (tiny_copy / name).unlink(missing_ok=True)
    (tiny_copy / name).symlink_to(outside)
    (fault,) = faults(tiny_copy)
    assert f"{name}: is a link out of the checkpoint" in fault


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json"])
def test_a_pipe_that_vllm_would_wait_at_is_refused(tiny_copy, name):
    (tiny_copy / name).unlink()
    os.mkfifo(tiny_copy / name)
    (fault,) = faults(tiny_copy)
    assert "is a named pipe, not a file" in fault


def test_other_files_and_links_inside_are_left_alone(tiny_copy, tmp_path):
    (tiny_copy / "README.md").symlink_to(tmp_path)
    os.mkfifo(tiny_copy / "notes")
    (tiny_copy / "template").write_text("{{ messages }}")
    (tiny_copy / "chat_template.jinja").unlink()
    (tiny_copy / "chat_template.jinja").symlink_to("template")
    assert faults(tiny_copy) == []


@pytest.mark.parametrize(("content", "reason"), [(b"", "is empty"), (b"\xff", "is not UTF-8")])
def test_a_template_that_is_no_text_is_refused(tiny_copy, content, reason):
    (tiny_copy / "chat_template.jinja").write_bytes(content)
    (fault,) = faults(tiny_copy)
    assert reason in fault


BAD_SAMPLING = [
    ("temperature", -1),
    ("temperature", "hot"),
    ("temperature", True),
    ("top_k", 1.5),
    ("top_k", -2),
    ("top_p", 0),
    ("top_p", 1.1),
    ("min_p", -0.1),
    ("repetition_penalty", 0),
    ("presence_penalty", 3),
    ("max_new_tokens", 0),
    ("eos_token_id", "x"),
    ("eos_token_id", [2, -1]),
]


@pytest.mark.parametrize(("name", "value"), BAD_SAMPLING)
def test_what_would_refuse_every_request_is_refused_first(tiny_copy, name, value):
    (tiny_copy / GENERATION).write_text(json.dumps({name: value}))
    (fault,) = faults(tiny_copy)
    assert f"{GENERATION}: {name} is " in fault


def test_a_usual_generation_config_passes(tiny_copy):
    usual = {name: most for name, (_, most) in SAMPLING.items()} | {"eos_token_id": [2, 12]}
    for content in (usual, {"temperature": 0, "top_k": -1, "eos_token_id": 2}, {"top_p": None}):
        (tiny_copy / GENERATION).write_text(json.dumps(content))
        assert faults(tiny_copy) == []
    (tiny_copy / GENERATION).unlink()
    assert faults(tiny_copy) == []


def quantized(directory, algo, older):
    edit_json(
        directory / "config.json", lambda raw: raw.update(quantization_config={"quant_algo": algo})
    )
    (directory / OLD_CONFIG).write_text(json.dumps({"quantization": {"quant_algo": older}}))
    return read_config(directory)


def test_files_that_disagree_about_the_precision_are_refused(tiny_copy):
    assert list(disagreement_faults(quantized(tiny_copy, "FP8", "fp8"))) == []
    (fault,) = disagreement_faults(quantized(tiny_copy, "NVFP4", "FP8"))
    assert "quant_algo is FP8, and config.json says NVFP4" in str(fault)
    (tiny_copy / OLD_CONFIG).unlink()
    assert list(disagreement_faults(read_config(tiny_copy))) == []


@pytest.mark.parametrize("section", [5, "FP8", [], True])
def test_a_precision_that_is_no_object_is_a_fault(tiny_copy, section):
    edit_json(tiny_copy / "config.json", lambda raw: raw.update(quantization_config=section))
    with pytest.raises(BadInput, match=r"quantization_config is .* not a JSON object"):
        read_quantization(read_config(tiny_copy))


@pytest.mark.parametrize("script", ["true", "echo hello", "echo 5", "echo '{}'"])
def test_what_is_no_interpreter_is_told_so(interpreter, script):
    interpreter(script)
    with pytest.raises(BadInput, match="is no Python interpreter"):
        find_environment()


@pytest.fixture
def unset(monkeypatch):
    for name in (*WHOLE_NUMBERS, PLUGINS_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("name", WHOLE_NUMBERS)
def test_variables_that_end_vllm_are_refused(unset, name):
    assert list(variable_faults()) == []
    for text in ("", "abc", "nan", "-1", "1.5"):
        unset.setenv(name, text)
        (fault,) = variable_faults()
        assert str(fault).startswith(f"{name}: is {text!r} (give a whole number of at least")
    unset.setenv(name, "1")
    assert list(variable_faults()) == []


@pytest.mark.parametrize(
    ("names", "count"), [("", 1), ("other", 1), (PLUGIN_NAME, 0), (f"other,{PLUGIN_NAME}", 0)]
)
def test_a_vllm_that_is_told_to_load_other_plug_ins_is_refused(unset, names, count):
    """Without ours it wants to run Python files of the checkpoint, and answers bad media by 500."""
    unset.setenv(PLUGINS_VARIABLE, names)
    assert len(list(variable_faults())) == count
