"""A checkpoint is whole, or it is not used."""

import os
import random

import pytest

from sekd.checkpoints import (
    UNFINISHED,
    RunRefused,
    check_checkpoint,
    find_checkpoint,
    finish_checkpoint,
    list_checkpoints,
    name_checkpoint,
    read_facts,
    rotate_checkpoints,
    set_later_aside,
)


def write(folder, step, run="run", **more):
    """A checkpoint with a file of random bytes, one in a folder, and an empty one."""
    written = name_checkpoint(str(folder / UNFINISHED), step)
    os.makedirs(os.path.join(written, "shards"), exist_ok=True)
    for name, size in (("optimizer.pt", 5000), ("shards/0.bin", 300), ("empty.bin", 0)):
        with open(os.path.join(written, name), "wb") as file:
            file.write(random.Random(f"{step}{name}").randbytes(size))
    return finish_checkpoint(written, {"step": step, "run": run, **more})


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "deleted": os.remove,
    "flipped": flip,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["optimizer.pt", "shards/0.bin", "checkpoint.json"])
def test_a_damaged_checkpoint_is_left_out(tmp_path, name, damage):
    first, second = write(tmp_path, 2), write(tmp_path, 4)
    assert find_checkpoint(str(tmp_path)) == second
    DAMAGES[damage](tmp_path / "checkpoint-4" / name)
    with pytest.raises(RunRefused, match="checkpoint-4"):
        check_checkpoint(second)
    assert find_checkpoint(str(tmp_path)) == first


def test_a_file_that_grew_is_damage(tmp_path):
    checkpoint = write(tmp_path, 2)
    with open(os.path.join(checkpoint, "empty.bin"), "w") as file:
        file.write("x")
    with pytest.raises(RunRefused, match=r"empty\.bin has other content than was written"):
        check_checkpoint(checkpoint)


def test_an_unfinished_one_has_no_name_and_leaves_nothing(tmp_path):
    os.makedirs(tmp_path / UNFINISHED / "checkpoint-6")
    assert list_checkpoints(str(tmp_path)) == {}
    with pytest.raises(RunRefused, match="there is no whole checkpoint in output_dir"):
        find_checkpoint(str(tmp_path))


def test_no_checkpoint_and_a_foreign_one(tmp_path):
    with pytest.raises(RunRefused, match="there is no such folder"):
        read_facts(str(tmp_path / "checkpoint-1"))
    os.makedirs(tmp_path / "checkpoint-1")
    with pytest.raises(RunRefused, match=r"has no checkpoint\.json, so it is not a whole checkpoint"):
        read_facts(str(tmp_path / "checkpoint-1"))


def test_a_step_that_is_saved_again(tmp_path):
    """Nothing is deleted before something takes its place: the first one stays if it is whole and of the same run."""
    write(tmp_path, 2, number=1)
    assert check_checkpoint(write(tmp_path, 2, number=2))["number"] == 1
    flip(tmp_path / "checkpoint-2" / "optimizer.pt")
    assert check_checkpoint(write(tmp_path, 2, number=3))["number"] == 3
    assert check_checkpoint(write(tmp_path, 2, run="another"))["run"] == "another"
    assert not (tmp_path / UNFINISHED).exists()


def test_rotation_keeps_the_newest_and_the_protected(tmp_path):
    paths = [write(tmp_path, step) for step in (2, 4, 10, 8)]
    for everything in (None, 0, -1):
        rotate_checkpoints(str(tmp_path), everything, set())
    assert [*list_checkpoints(str(tmp_path))] == [2, 4, 8, 10]
    rotate_checkpoints(str(tmp_path), 2, {paths[0], paths[2]})
    assert [*list_checkpoints(str(tmp_path))] == [2, 10], "by step, whatever was written last"
    rotate_checkpoints(str(tmp_path), 1, {paths[2]})
    assert [*list_checkpoints(str(tmp_path))] == [10]


def test_later_ones_are_set_aside_twice(tmp_path):
    for _ in range(2):
        write(tmp_path, 2)
        write(tmp_path, 4)
        set_later_aside(str(tmp_path), 2)
    assert [*list_checkpoints(str(tmp_path))] == [2]
    assert (tmp_path / "checkpoint-4.old" / "optimizer.pt").exists()
