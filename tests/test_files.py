"""Files are written whole or not at all."""

import fcntl
import os
import threading

import pytest

from sekd.files import LOOK, is_locked, lock_folder, write_atomically


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
        write_atomically(path, "second", is_shared=True)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_late)
    write_atomically(path, "first", is_shared=True)
    assert (tmp_path / "file").read_text() == "first"


def test_what_a_killed_write_leaves_goes_with_the_next_one(tmp_path):
    """A resumed run must have the files of an undisturbed one, and no others."""
    if (child := os.fork()) == 0:
        os.replace = lambda *_: os._exit(9)
        write_atomically(str(tmp_path / "file"), "of a process that dies")
    os.waitpid(child, 0)
    assert len([*tmp_path.iterdir()]) == 1
    write_atomically(str(tmp_path / "file"), "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "new")]


def test_looking_at_a_lock_takes_it_from_nobody(tmp_path):
    folder, refusal = str(tmp_path), ValueError("taken")
    assert not is_locked(folder)
    with lock_folder(folder, refusal):
        assert is_locked(folder)
    assert not is_locked(folder)
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)  # as is_locked does for an instant
    threading.Timer(LOOK / 2, os.close, [handle]).start()
    with lock_folder(folder, refusal):
        pass
