"""Two runs never work in one directory."""

import signal
import subprocess
import sys

import pytest

from checkpoint.faults import BadInput
from checkpoint.lock import LOCK, lock_faults, locked_directory
from checkpoint.run_state import RunState

HOLD = """
import sys, time
from pathlib import Path
from checkpoint.lock import locked_directory
with locked_directory(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of the state of `out`."""
    directory = tmp_path / ".out.run"
    directory.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_run_is_told_who_works_there(holder, tmp_path):
    state = RunState(tmp_path / "out", {})
    (fault,) = state.faults()
    assert f"process {holder.pid} on " in str(fault)
    with pytest.raises(BadInput, match="another run is working here"):
        with state.locked():
            pass


def test_a_kill_releases_the_lock(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert list(lock_faults(tmp_path / ".out.run")) == []
    with locked_directory(tmp_path / ".out.run"):
        pass


def test_a_lock_is_released_at_the_end_of_its_block(tmp_path):
    with locked_directory(tmp_path):
        assert len(list(lock_faults(tmp_path))) == 1
    assert list(lock_faults(tmp_path)) == []


@pytest.mark.parametrize("made", ["files", "file", "link"])
def test_what_no_run_has_made_is_neither_used_nor_removed(tmp_path, made):
    directory = tmp_path / ".out.run"
    if made == "files":
        directory.mkdir()
        (directory / "notes.txt").write_text("mine")
    elif made == "file":
        directory.write_text("mine")
    else:
        (tmp_path / "elsewhere").mkdir()
        directory.symlink_to(tmp_path / "elsewhere")
    (fault,) = RunState(tmp_path / "out", {}).faults()
    assert "no run has made it" in str(fault)


def test_what_was_killed_before_it_wrote_anything_is_used_again(tmp_path):
    state = RunState(tmp_path / "out", {})
    with state.locked():
        pass
    assert list(state.faults()) == []
    (state.directory / "left.partial").touch()
    with state.locked():
        state.begin()
    assert sorted(path.name for path in state.directory.iterdir()) == [LOCK, "run.json"]
