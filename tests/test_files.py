"""Files are written whole or not at all."""

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
    assert [p.name for p in tmp_path.iterdir() if p.name != "file.tmp"] == ["file"]
