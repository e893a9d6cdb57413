"""Directories of one name are told apart by as much of their paths as that takes."""

from pathlib import Path

import pytest

from checkpoint.naming import directory_names


@pytest.mark.parametrize(
    ("directories", "names"),
    [
        (["/runs/export"], ["export"]),
        (["/runs/a/export", "/runs/b/export", "/runs/fp8"], ["a/export", "b/export", "runs/fp8"]),
        (["/a/x/export", "/b/x/export"], ["a/x/export", "b/x/export"]),
        (["/export", "/runs/export"], ["/export", "runs/export"]),
        (["/export", "/export", "/export"], ["export", "export (2)", "export (3)"]),
        (["/a", "/a", "/a (2)"], ["a", "a (2)", "a (2) (2)"]),
    ],
)
def test_names_are_as_short_as_they_can_be(directories, names):
    assert directory_names([Path(directory) for directory in directories]) == names


def test_links_and_relative_paths_are_followed_and_a_circle_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "circle").symlink_to("circle")
    monkeypatch.chdir(tmp_path / "real")
    assert directory_names([Path("."), tmp_path / "circle"]) == ["real", "circle"]
    assert directory_names([tmp_path / "link", Path("/other/real")]) == [
        f"{tmp_path.name}/real",
        "other/real",
    ]
