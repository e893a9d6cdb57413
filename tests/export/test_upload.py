"""The upload against a stand-in for the Hub, over HTTP: what is sent, resumed, refused and said."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint.faults import BadInput, Fault
from export.publish.facts import read_facts
from export.publish.hub import Target, check_target
from export.publish.model_card import MARK, Verdict
from export.publish.upload import _run, refusals, send, uploaded_files
from tests.editing import edit_json
from tests.export.hub_stand_in import DROP, Repository, StoredFile, running_hub

ROOT = Path(__file__).parents[2]
TOKEN = "hf_TheTokenOfThisTest0123456789"
NAME = "acme/tiny-fp8"
ALWAYS = {status: [status] * 50 for status in (403, 409)}
"""The client tries a commit of many files again in smaller parts."""

ORIGIN = ("--base-model", "acme/tiny", "--license", "apache-2.0")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running_hub(TOKEN) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


@pytest.fixture
def facts(fp8_copy):
    return read_facts(fp8_copy)


def upload(facts, **target) -> list[Fault]:
    return send(facts, Target(NAME, **target), uploaded_files(facts))


def refused(facts, **target) -> str:
    with pytest.raises(BadInput) as caught:
        upload(facts, **target)
    (fault,) = caught.value.faults
    assert TOKEN not in str(fault)
    return str(fault)


def digests(directory: Path, names: list[str]) -> dict[str, str]:
    return {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in names}


def test_the_exports_files_are_sent_and_nothing_else(facts, hub):
    for name in ("notes.txt", "optimizer.pt", ".env"):
        (facts.directory / name).write_text("mine")
    (facts.directory / "report.html").write_text("<p>")
    assert upload(facts) == []
    sent = set(hub.files(NAME))
    assert sent == {path.name for path in facts.directory.iterdir()} - {
        "notes.txt",
        "optimizer.pt",
        ".env",
    }
    assert not hub.repositories[NAME].private


def test_only_what_the_manifest_records_is_sent(facts, hub):
    names = ["config.json", "model-00001-of-00011.safetensors"]
    recorded = {
        name: {"sha256": digest} for name, digest in digests(facts.directory, names).items()
    }
    edit_json(facts.directory / "hybridquant.json", lambda raw: raw.update(files=recorded))
    assert uploaded_files(read_facts(facts.directory)) == sorted([*names, "hybridquant.json"])


@pytest.mark.parametrize(
    "name", ["../outside.json", "/etc/hostname", "nowhere.json", "linked.json"]
)
def test_a_manifest_that_names_files_elsewhere_is_refused(facts, tmp_path, name):
    (tmp_path / "outside.json").write_text("{}")
    (facts.directory / "linked.json").symlink_to(tmp_path / "outside.json")
    edit_json(facts.directory / "hybridquant.json", lambda raw: raw.update(files={name: "0" * 64}))
    with pytest.raises(BadInput, match=r"is a link out of|no such file"):
        uploaded_files(read_facts(facts.directory))


def test_git_lfs_carries_the_same_bytes(facts, hub, monkeypatch):
    """What a client without Xet's library does."""
    monkeypatch.setattr("huggingface_hub.hf_api.is_xet_available", lambda: False)
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
    assert upload(facts) == []
    weights = [name for name in uploaded_files(facts) if name.endswith(".safetensors")]
    stored = {hashlib.sha256(data).hexdigest() for data in hub.objects.values()}
    assert stored == set(digests(facts.directory, weights).values())


def test_a_second_run_sends_nothing_again(facts, hub):
    upload(facts)
    commits = len(hub.paths("/commit/"))
    assert upload(facts) == []
    assert len(hub.paths("/commit/")) == commits


def test_an_upload_that_broke_off_goes_on(facts, hub):
    hub.plan("/commit/", *ALWAYS[403])
    assert "the Hub answered 403 Forbidden" in refused(facts)
    assert hub.files(NAME) == {}
    hub.planned.clear()
    assert upload(facts) == []
    assert set(hub.files(NAME)) == set(uploaded_files(facts))


def test_a_dropped_connection_is_tried_again(facts, hub):
    hub.plan("/preupload/", DROP)
    assert upload(facts) == []
    assert len(hub.paths("/preupload/")) == 2


def test_a_connection_that_fails_is_one_sentence(facts, hub):
    hub.plan("/repos/create", DROP)
    message = refused(facts)
    assert message.startswith(f"{NAME}: the connection failed")
    assert message.endswith("(run the same command again: what was sent stays)")


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "401 Unauthorized: planned by the test (the token is missing, wrong or expired"),
        (403, "403 Forbidden: planned by the test (the token may not write there"),
        (429, "429 Too Many Requests: planned by the test (wait some minutes and run again"),
        (503, "503 Service Unavailable: planned by the test (the Hub's fault: run again later)"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(facts, hub, status, said):
    hub.plan("/repos/create", status)
    assert f"{NAME}: the Hub answered {said}" in refused(facts)


def test_a_conflict_with_another_commit_is_one_sentence(facts, hub):
    hub.plan("/commit/", *ALWAYS[409])
    said = "409 Conflict: planned by the test (somebody else is changing it: run again)"
    assert f"{NAME}: the Hub answered {said}" in refused(facts)


def test_too_many_requests_for_a_moment_are_waited_for(facts, hub):
    hub.plan("/preupload/", 429)
    assert upload(facts) == []


def test_a_storage_that_refuses_is_one_sentence(facts, hub):
    hub.plan("/cas/v1/xorbs/", *ALWAYS[403])
    assert refused(facts).startswith(f"{NAME}: not sent: ")


def test_a_wrong_token_is_one_sentence(facts, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_AnotherToken")
    assert "the token is missing, wrong or expired" in refused(facts)


def test_without_a_token_nothing_is_asked(facts, hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "there is no token in the environment and no login" in refused(facts)
    assert hub.requests == []


def test_a_name_that_exists_with_another_models_weights_is_refused(facts, hub):
    """vLLM would load a second set of weights that lies beside ours."""
    hub.repositories[NAME] = Repository()
    hub.files(NAME)["model.safetensors"] = StoredFile(7, "0" * 40, "1" * 64)
    message = refused(facts)
    assert "exists and holds 1 files of another model, such as model.safetensors" in message
    assert hub.paths("/preupload/") == []


def test_a_public_name_that_exists_is_not_taken_for_private(facts, hub):
    hub.repositories[NAME] = Repository(private=False)
    assert "exists and is public, though --private was given" in refused(facts, is_private=True)
    assert hub.paths("/preupload/") == []


def test_a_private_repository_and_a_branch(facts, hub):
    assert upload(facts, is_private=True, revision="fp8-v2") == []
    assert hub.repositories[NAME].private
    assert hub.files(NAME) == {}
    assert set(hub.files(NAME, "fp8-v2")) == set(uploaded_files(facts))


@pytest.mark.parametrize("name", ["config.json", "model-00003-of-00011.safetensors"])
def test_a_file_that_differs_on_the_hub_is_found(facts, hub, monkeypatch, name):
    upload(facts)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda *_, **__: None)
    hub.files(NAME)[name].oid = "7" * 40
    if hub.files(NAME)[name].sha256:
        hub.files(NAME)[name].sha256 = "7" * 64
    del hub.files(NAME)["tokenizer.json"]
    found = {fault.where: fault.what for fault in upload(facts)}
    assert found == {
        f"{NAME}/{name}": "differs on the Hub from the file here",
        f"{NAME}/tokenizer.json": "is not on the Hub",
    }


@pytest.mark.parametrize("name", ["tiny", "acme/tiny/fp8", "acme/", "../tiny", "acme/a b", ""])
def test_what_is_no_name_on_the_hub_is_refused(name):
    with pytest.raises(BadInput, match="is not a name on the Hub"):
        check_target(Target(name))


def test_what_must_not_be_published(fp8_copy):
    sound = Verdict((), compared=False)
    assert list(refusals(read_facts(fp8_copy), sound)) == []
    broken = Verdict((Fault("x", "is wrong"),), compared=False)
    assert list(refusals(read_facts(fp8_copy), broken)) == [
        "verification found 1 faults, such as x: is wrong"
    ]
    gate = {"passed": False, "missed": ["KL is 0.3, allowed is at most 0.1"]}
    edit_json(fp8_copy / "hybridquant.json", lambda raw: raw.update(gate=gate))
    assert list(refusals(read_facts(fp8_copy), sound)) == [
        "the accuracy gate failed: KL is 0.3, allowed is at most 0.1"
    ]
    (fp8_copy / "hybridquant.json").unlink()
    assert list(refusals(read_facts(fp8_copy), sound)) == ["the accuracy gate was not measured"]


def test_a_failed_gate_is_refused_and_sent_anyway_with_a_card_that_says_so(fp8_copy, hub, capsys):
    edit_json(fp8_copy / "hybridquant.json", lambda raw: raw["gate"].update(passed=False))
    assert _run([str(fp8_copy), NAME, *ORIGIN]) == 1
    assert hub.requests == []
    assert _run([str(fp8_copy), NAME, *ORIGIN, "--anyway"]) == 0
    assert capsys.readouterr().out == f"{hub.url}/{NAME}\n"
    card = (fp8_copy / "README.md").read_text()
    assert "> Uploaded although the accuracy gate failed" in card
    assert "README.md" in hub.files(NAME)


def test_a_dry_run_writes_and_asks_nothing(fp8_copy, hub, capsys):
    before = sorted(fp8_copy.rglob("*"))
    assert _run([str(fp8_copy), NAME, *ORIGIN, "--dry-run"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["0", ".eval_results/hybridquant.yaml"]
    assert "bytes in 22 files to" in shown[-1]
    assert shown[-1].endswith(f"{hub.url}/{NAME}")
    assert sorted(fp8_copy.rglob("*")) == before
    assert hub.requests == []


def test_a_card_that_a_user_has_edited_stays(fp8_copy, hub):
    mine = f"---\nlicense: mit\n---\n{MARK}\nmy words"
    (fp8_copy / "README.md").write_text(mine)
    assert _run([str(fp8_copy), NAME]) == 0
    assert (fp8_copy / "README.md").read_text() == mine


def test_the_command_never_shows_or_writes_the_token(fp8, hub, tmp_path):
    folder = Path(shutil.copytree(fp8, tmp_path / "work" / "tiny-fp8"))
    home = tmp_path / "home"
    variables = os.environ | {"HF_HOME": str(home), "PYTHONPATH": f"{ROOT}:{ROOT / 'plugin'}"}
    command = [sys.executable, "-m", "hybridquant", "upload", str(folder), NAME, *ORIGIN, "-v"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=variables, cwd=tmp_path / "work"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub.url}/{NAME}\n"
    assert TOKEN not in done.stdout + done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []
    sent = [body for _, _, body in hub.requests if TOKEN.encode() in body]
    assert sent == []
    assert json.loads((folder / "hybridquant.json").read_text())["gate"]["passed"] is True
