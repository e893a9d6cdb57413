"""Files beside the weights: what is copied, what is found broken, what must not be read."""

import os
import socket

import pytest

from checkpoint.faults import BadInput
from checkpoint.opened import check_companions, open_bf16
from tests.editing import edit_json, edit_tensors


def fault_of(directory) -> str:
    with pytest.raises(BadInput) as caught:
        check_companions(open_bf16(directory))
    assert len(caught.value.faults) == 1, caught.value
    return str(caught.value)


def test_only_what_belongs_to_the_model_is_copied(tiny_copy):
    (tiny_copy / "checkpoint-500").mkdir()
    for name in ("pytorch_model.bin", "model.gguf", "train.py", "rng_state.pth"):
        (tiny_copy / name).write_bytes(b"x")
    (tiny_copy / "helper.py").write_text("VALUE = 1\n")
    with (tiny_copy / "configuration.py").open("a") as file:
        file.write("\nfrom .helper import VALUE\n")
    (tiny_copy / "LICENSE").write_text("terms")
    found = open_bf16(tiny_copy).companions
    assert {"LICENSE", "configuration.py", "helper.py", "tokenizer.json"} <= set(found.digests)
    left_out = ("checkpoint-500/", "model.gguf", "pytorch_model.bin", "rng_state.pth", "train.py")
    assert found.left_out == left_out
    assert "leaves out 5: checkpoint-500/, model.gguf" in found.summary()


def test_the_model_card_in_all_its_parts_and_the_licence_are_copied(tiny_copy, tmp_path):
    documents = ["MODEL_CARD.md", "bias.md", "safety.md", "privacy.md", "explainability.md"]
    documents += ["README.md", "LICENSE.txt", "license-2.0", "NOTICE", "Copying", "CITATION.cff"]
    others = ["README.md.bak", "LICENSE~", "notes.txt", "train.log"]
    for name in (*documents, *others):
        (tiny_copy / name).write_text(name)
    (tiny_copy / "NOTICE.empty").touch()
    (tiny_copy / "LICENSES").mkdir()
    found = open_bf16(tiny_copy).companions
    assert set(documents) <= set(found.digests)
    assert set(found.left_out) == {*others, "NOTICE.empty", "LICENSES/"}
    found.copy_to(tmp_path / "out")
    for name in documents:
        assert (tmp_path / "out" / name).read_text() == name


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "{}", '{"a": [', "version https://git-lfs.github.com\n"])
def test_a_broken_companion_is_one_sentence(tiny_copy, name, content):
    (tiny_copy / name).write_text(content)
    assert f"{name}: " in fault_of(tiny_copy)


def test_a_missing_and_a_broken_template_are_found(tiny_copy):
    (tiny_copy / "chat_template.jinja").write_text("{% if %}")
    assert "is not a chat template" in fault_of(tiny_copy)
    (tiny_copy / "chat_template.jinja").unlink()
    edit_json(tiny_copy / "tokenizer_config.json", lambda raw: raw.pop("chat_template"))
    assert "no chat is possible" in fault_of(tiny_copy)


def test_a_companion_that_changes_during_the_run_is_refused(tiny_copy, tmp_path):
    companions = open_bf16(tiny_copy).companions
    (tiny_copy / "generation_config.json").write_text('{"a": 1}')
    with pytest.raises(BadInput, match=r"generation_config\.json: has changed during the run"):
        companions.copy_to(tmp_path / "out")


def test_a_pipe_and_a_link_out_of_the_directory_are_refused(tiny_copy, tmp_path):
    (tmp_path / "secret").write_text("{}")
    (tiny_copy / "README.md").symlink_to(tmp_path / "secret")
    assert "is a link out of the checkpoint" in fault_of(tiny_copy)
    (tiny_copy / "README.md").unlink()
    os.mkfifo(tiny_copy / "README.md")
    assert "is a named pipe" in fault_of(tiny_copy)


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path.name)  # from its directory: an address has 108 bytes at most


def link_to_device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (make_pipe, "is a named pipe, not a file"),
        (make_socket, "is a socket, not a file"),
        (link_to_device, "is a device, not a file"),
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "configuration.py",
        "MODEL_CARD.md",
        "LICENSE",
    ],
)
def test_what_is_no_file_is_refused_and_not_read(tiny_copy, monkeypatch, name, make, what):
    monkeypatch.chdir(tiny_copy)
    (tiny_copy / name).unlink(missing_ok=True)
    make(tiny_copy / name)
    assert f"{name}: {what}" in fault_of(tiny_copy)


def test_the_links_of_a_hub_snapshot_are_read(tiny, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for file in tiny.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    check_companions(open_bf16(snapshot))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('{"a": ' + "[" * 100_000, "nested more than"),
        ('{"a": ' + "[" * 200 + "]" * 200 + "}", "nested more than 100 levels"),
        ('{"a": ' + "9" * 5000 + "}", "cannot be read as JSON"),
        ('{"a": ' + "9" * 4000 + "}", "more than 64 bits"),
    ],
)
def test_an_extreme_config_is_refused(tiny_copy, content, what):
    (tiny_copy / "config.json").write_text(content)
    with pytest.raises(BadInput, match=what):
        open_bf16(tiny_copy)


def test_an_endless_ignore_list_is_refused(tiny_copy):
    section = {"ignore": ["x"] * 100_000}
    edit_json(tiny_copy / "config.json", lambda raw: raw.update(quantization_config=section))
    with pytest.raises(BadInput, match="ignore has 100,000 entries"):
        open_bf16(tiny_copy)


@pytest.mark.parametrize("wrapper", ["base_model.model.", "module.", "_orig_mod.", "mine.own."])
def test_a_common_prefix_is_one_fault(tiny_copy, wrapper):
    def rename(tensors):
        for name in list(tensors):
            tensors[wrapper + name] = tensors.pop(name)

    edit_tensors(tiny_copy, rename)
    with pytest.raises(BadInput) as caught:
        open_bf16(tiny_copy)
    (fault,) = caught.value.faults
    assert f"tensor names contain '{wrapper}'" in fault.what


def test_an_adapter_that_is_not_merged_is_one_fault(tiny_copy):
    def adapt(tensors):
        for name in [name for name in tensors if name.endswith("q_proj.weight")]:
            tensors[name.replace("weight", "lora_A.default.weight")] = tensors[name].clone()

    edit_tensors(tiny_copy, adapt)
    with pytest.raises(BadInput, match="adapter that is not merged") as caught:
        open_bf16(tiny_copy)
    assert len(caught.value.faults) == 1
