"""Directories appear whole or not at all."""

import pytest
import torch

from checkpoint.atomic import finished_directory, save_tensors


def test_the_target_appears_only_at_the_end_with_readable_files(tmp_path):
    with finished_directory(tmp_path / "out") as partial:
        save_tensors({"a": torch.ones(2)}, partial / "a.safetensors")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a.safetensors").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_nothing(tmp_path, error):
    with pytest.raises(error), finished_directory(tmp_path / "out") as partial:  # noqa: PT012
        (partial / "file").write_text("half")
        raise error
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "stale").write_text("half")
    with finished_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("whole")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
