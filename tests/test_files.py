"""Files are written whole or not at all."""

import os

import pytest

from sekd.files import write_atomically


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(str(path), "\ud800")
    assert path.read_text() == "old"
    write_atomically(str(path), "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_two_writers_have_a_temporary_file_each(tmp_path, monkeypatch):
    """The first one is at its last step while the second one writes."""
    path, replace = str(tmp_path / "file"), os.replace

    def replace_late(source, target):
        monkeypatch.setattr(os, "replace", replace)
        write_atomically(path, "second")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_late)
    write_atomically(path, "first")
    assert (tmp_path / "file").read_text() == "first"
