"""Files and directories appear whole or not at all, and what was there before stays until then."""

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
from checkpoint.atomic import (
    check_output,
    check_result_file,
    check_writable,
    remove_directory,
    rename_directory,
    replaced_directory,
    replaced_file,
    write_json,
    write_tensors,
    write_text,
)
from checkpoint.config import read_json
from checkpoint.faults import BadInput

UNWRITABLE = "\ud800"
"""A lone surrogate, which UTF-8 cannot encode."""


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_the_target_appears_only_at_the_end_with_readable_files(tmp_path):
    with replaced_directory(tmp_path / "out") as partial:
        write_tensors(partial / "a.safetensors", {"a": torch.ones(2)})
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a.safetensors").stat().st_mode & 0o777 == 0o644
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_no_directory(tmp_path, error):
    with pytest.raises(error), replaced_directory(tmp_path / "out") as partial:  # noqa: PT012
        (partial / "file").write_text("half")
        raise error
    assert names(tmp_path) == []


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "stale").write_text("half")
    with replaced_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("whole")
    assert names(tmp_path / "out") == ["file"]
    assert names(tmp_path) == ["out"]


def test_a_directory_is_created_below_parents_that_do_not_exist(tmp_path):
    with replaced_directory(tmp_path / "a" / "b" / "out") as partial:
        (partial / "file").write_text("whole")
    assert names(tmp_path / "a" / "b") == ["out"]


def write_half(path):
    with replaced_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError("in the body")


FAILING = {
    "replaced_file": (write_half, RuntimeError),
    "write_text": (lambda path: write_text(path, UNWRITABLE), UnicodeEncodeError),
    "write_json": (lambda path: write_json(path, {"a": UNWRITABLE}), UnicodeEncodeError),
    "write_json of what is not JSON": (lambda path: write_json(path, {"a": object()}), TypeError),
    "write_tensors": (lambda path: write_tensors(path, {"a": torch.ones(2, 2).T}), ValueError),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(name, tmp_path):
    write, error = FAILING[name]
    (tmp_path / "file").write_text("old")
    with pytest.raises(error):
        write(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path):
    (tmp_path / "file").write_text("old")
    with replaced_file(tmp_path / "file") as partial:
        partial.write_text("new")
        assert (tmp_path / "file").read_text() == "old"
    assert (tmp_path / "file").read_text() == "new"
    assert names(tmp_path) == ["file"]


def test_json_and_text_are_utf8(tmp_path):
    write_json(tmp_path / "a.json", {"größe": "日本"})
    assert read_json(tmp_path / "a.json") == {"größe": "日本"}
    assert "größe" in (tmp_path / "a.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_under_safetensors_is_an_os_error(tmp_path, monkeypatch, number):
    """safetensors 0.8 raises an exception of its own, with the system's error in its text."""
    from safetensors import SafetensorError

    def full(tensors, path, metadata):
        raise SafetensorError(f"I/O error: No space left on device (os error {number})")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=r"a\.safetensors") as caught:
        write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})
    assert caught.value.errno == number
    assert names(tmp_path) == []


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from checkpoint.atomic import write_tensors

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_tensors(Path(sys.argv[1]), {"a": torch.ones(10_000)})
except OSError as error:
    print(error.errno)
"""


def test_safetensors_own_error_of_the_system_has_the_form_that_write_tensors_expects(tmp_path):
    """A real failure, so that another wording in a later safetensors is noticed.

    The limit on the size of a file stands for a full disk. It holds for a process of its own.
    """
    path = tmp_path / "a.safetensors"
    path.write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, path],
        cwd=Path(checkpoint.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == [str(errno.EFBIG)], done.stderr
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.safetensors"]


def test_another_error_of_safetensors_stays_what_it_is(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def broken(tensors, path, metadata):
        raise SafetensorError("invalid dtype")

    monkeypatch.setattr("safetensors.torch.save_file", broken)
    with pytest.raises(SafetensorError, match="invalid dtype"):
        write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})


def test_a_directory_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    (tmp_path / "made" / "sub").mkdir(parents=True)
    for name in ("a", "b", "sub/c"):
        (tmp_path / "made" / name).write_text(name)
    flushed = []
    monkeypatch.setattr("os.fsync", lambda descriptor: flushed.append((tmp_path / "out").exists()))
    rename_directory(tmp_path / "made", tmp_path / "out")
    assert flushed == [False] * 3
    assert names(tmp_path / "out") == ["a", "b", "sub"]


def test_a_removed_directory_is_whole_until_it_is_out_of_its_place(tmp_path, monkeypatch):
    (tmp_path / "out" / "sub").mkdir(parents=True)
    remove = shutil.rmtree
    present = []

    def seen(path, **options):
        present.append((tmp_path / "out").exists())
        remove(path, **options)

    monkeypatch.setattr("shutil.rmtree", seen)
    remove_directory(tmp_path / "out")
    assert present == [True, False]  # what an earlier kill left, then what is removed now
    assert names(tmp_path) == []


def test_removing_a_directory_that_is_not_there_does_nothing(tmp_path):
    remove_directory(tmp_path / "out")
    assert names(tmp_path) == []


def output_fault(output, needed=0) -> str:
    with pytest.raises(BadInput) as caught:
        check_output(output, needed)
    return str(caught.value)


def test_an_output_that_exists_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    assert "exists already" in output_fault(tmp_path / "out")


def test_a_dangling_link_counts_as_an_output_that_exists(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    assert "exists already" in output_fault(tmp_path / "out")


def test_an_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file, not a directory" in output_fault(tmp_path / "file" / "out")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path):
    message = output_fault(tmp_path / "a" / "out", 10**18)
    assert "needs 1000000000.00 GB" in message
    assert "GB are free" in message
    assert names(tmp_path) == []


def test_a_file_of_results_is_checked_without_leaving_one(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    (tmp_path / "old.json").write_text("{}")
    for path, message in (
        (tmp_path, "is a directory"),
        (Path("/dev/null"), "is not a regular file"),
        (tmp_path / "checkpoint" / "config.json", "is a file of a checkpoint"),
        (tmp_path / "old.json" / "new.json", "cannot be written"),
        (tmp_path / ("a" * 300), "cannot be written: File name too long"),
    ):
        with pytest.raises(BadInput, match=message):
            check_result_file(path)
    for name in ("old.json", "folder/new.json"):
        check_result_file(tmp_path / name)
    assert not (tmp_path / "folder" / "new.json").exists()


def test_a_full_disk_takes_no_results(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("checkpoint.atomic.tempfile.TemporaryFile", full)
    with pytest.raises(BadInput, match="No space left on device"):
        check_writable(tmp_path)
