"""What a run leaves on disk: resumed when nothing has changed, never in the way of a new run."""

import hashlib

import pytest

from checkpoint.config import read_json
from checkpoint.faults import BadInput
from checkpoint.run_state import RunState, file_digest, file_stamp, identity_of

IDENTITY = {"quantize.algorithm": "max", "calibrate.seed": 0}


@pytest.fixture
def state(tmp_path):
    return RunState(tmp_path / "out", IDENTITY)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def faults(state) -> str:
    return "\n".join(str(fault) for fault in state.faults())


def test_nothing_exists_before_a_run_begins(state, tmp_path):
    assert not state.is_begun
    assert not state.is_written
    assert state.progress() == {}
    assert faults(state) == ""
    assert names(tmp_path) == []


def test_a_state_lies_beside_the_output_and_is_named_after_it(state, tmp_path):
    state.begin()
    assert names(tmp_path) == [".out.run"]
    assert state.directory == tmp_path / ".out.run"
    assert state.checkpoint.parent == state.directory


def test_a_relative_output_has_its_state_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert RunState(tmp_path / "out", {}).directory == RunState(type(tmp_path)("out"), {}).directory


def test_a_begun_run_with_nothing_finished_has_nothing_to_resume(state):
    state.begin()
    assert not state.is_begun


def test_what_is_recorded_adds_up_and_is_resumed(state):
    state.begin()
    state.record(layers=3)
    state.record(saved=2)
    state.record(layers=4)
    again = RunState(state.output, IDENTITY)
    assert again.is_begun
    assert again.progress() == {"layers": 4, "saved": 2}
    assert faults(again) == ""


def test_begin_keeps_what_there_is_to_resume(state):
    state.begin()
    state.record(layers=1)
    (state.directory / "calibrate-1-0").write_text("activations")
    RunState(state.output, IDENTITY).begin()
    assert (state.directory / "calibrate-1-0").read_text() == "activations"
    assert state.progress() == {"layers": 1}


def test_a_state_with_nothing_to_resume_from_is_replaced_silently(state, caplog, capsys):
    state.begin()
    (state.directory / "half").write_text("of an earlier run")
    other = RunState(state.output, {"calibrate.seed": 7})
    assert faults(other) == ""
    other.begin()
    assert names(state.directory) == ["lock", "run.json"]
    assert read_json(state.directory / "run.json") == {"calibrate.seed": 7}
    assert caplog.records == []
    assert capsys.readouterr() == ("", "")


def test_every_difference_from_the_run_that_was_begun_is_named(state):
    state.begin()
    state.record(layers=1)
    other = RunState(state.output, {"quantize.algorithm": "mse", "device": "cuda"})
    found = faults(other)
    assert "quantize.algorithm: was max when" in found
    assert "is mse (restore it to resume the run, or remove" in found
    assert "calibrate.seed: was 0 when" in found
    assert "device: was None when" in found
    assert len(found.splitlines()) == 3


def test_a_long_value_is_shortened(state):
    state.begin()
    state.record(layers=1)
    other = RunState(state.output, IDENTITY | {"calibrate.seed": "x" * 10_000})
    assert len(faults(other)) < 1000


def test_publishing_gives_the_output_its_name_and_says_that_it_is_written(state, tmp_path):
    state.begin()
    state.checkpoint.mkdir()
    (state.checkpoint / "config.json").write_text("{}")
    state.publish()
    assert names(tmp_path / "out") == ["config.json"]
    assert state.is_written
    assert state.is_begun


def test_a_kill_between_rename_and_verdict_leaves_a_run_that_is_written(state):
    state.begin()
    state.checkpoint.mkdir()
    state.publish()
    again = RunState(state.output, IDENTITY)
    assert again.is_written
    again.remove_if_useless()
    assert again.is_written


def test_a_kill_before_the_rename_leaves_a_run_that_is_not_written(state, monkeypatch):
    state.begin()
    state.checkpoint.mkdir()
    state.record(written=True)  # the first half of `publish`
    assert not state.is_written
    state.publish()
    assert state.is_written


def test_an_output_that_was_removed_afterwards_is_not_written(state):
    state.begin()
    state.checkpoint.mkdir()
    state.publish()
    state.output.rmdir()
    assert not state.is_written
    assert not state.is_begun  # its weights are gone, so there is nothing to resume from


def test_removing_leaves_the_output_alone(state, tmp_path):
    state.begin()
    state.checkpoint.mkdir()
    state.publish()
    state.remove()
    assert names(tmp_path) == ["out"]
    assert not state.is_begun


def test_a_useless_state_is_removed_and_a_useful_one_kept(state, tmp_path):
    state.begin()
    state.remove_if_useless()
    assert names(tmp_path) == []
    state.begin()
    state.record(layers=1)
    state.remove_if_useless()
    assert state.progress() == {"layers": 1}


def test_a_kill_while_a_state_is_removed_leaves_it_whole_or_gone(state, monkeypatch):
    state.begin()
    state.record(layers=1)

    def killed(path, **options):
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        state.remove()
    assert not state.is_begun
    assert state.progress() == {}


def test_an_identity_is_flat_and_survives_json(tmp_path):
    parts = {"quantize": {"layers": [{"format": "fp8"}], "auto": None}, "source": tmp_path, "n": 1}
    flat = identity_of(parts)
    assert flat == {
        "quantize.layers": [{"format": "fp8"}],
        "quantize.auto": None,
        "source": str(tmp_path),
        "n": 1,
    }
    state = RunState(tmp_path / "out", flat)
    state.begin()
    state.record(layers=1)
    assert faults(RunState(tmp_path / "out", identity_of(parts))) == ""


def test_a_file_is_stamped_by_size_and_time_and_digested_by_content(tmp_path):
    path = tmp_path / "a"
    assert file_stamp(path) == []
    assert file_digest(path) == ""
    path.write_text("content")
    assert file_stamp(path) == [7, path.stat().st_mtime_ns]
    assert file_digest(path) == hashlib.sha256(b"content").hexdigest()


def test_what_another_run_has_done_since_the_check_is_seen_under_the_lock(state):
    assert faults(state) == ""
    other = RunState(state.output, {"quantize.algorithm": "max", "calibrate.seed": 7})
    with other.locked():
        other.begin()
        other.record(distilled=20)
    with pytest.raises(BadInput, match=r"calibrate\.seed: was 7 when"), state.locked():
        pass
    assert other.progress() == {"distilled": 20}
    other.remove()
    state.output.mkdir()
    with pytest.raises(BadInput, match="out: exists already"), state.locked():
        pass
    assert not state.directory.exists()


@pytest.mark.parametrize("name", ["run.json", "progress.json"])
@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_state_says_how_to_start_again(state, name, content):
    state.begin()
    state.record(distilled=20)
    (state.directory / name).write_text(content)
    remedy = f"restore it to resume the run, or remove {state.directory} to start again"
    with pytest.raises(BadInput) as caught:
        faults(state)
    (fault,) = caught.value.faults
    assert (fault.where, fault.remedy) == (str(state.directory / name), remedy)
