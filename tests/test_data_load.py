"""Files become rows."""

import json

import pytest
from datasets import Dataset, load_dataset

from sekd.data.load import load_rows, share_rows


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty.jsonl is empty"):
        load_rows(str(tmp_path / "empty.jsonl"))
    (tmp_path / "broken.jsonl").write_text('{"text": "w1"\n{{{')
    with pytest.raises(ValueError, match=r"broken.jsonl' cannot be read as json"):
        load_rows(str(tmp_path / "broken.jsonl"))


@pytest.mark.parametrize("streaming", [False, True])
def test_files_and_folders_with_brackets_in_their_names(tmp_path, streaming):
    folder = tmp_path / "data[v2]"
    folder.mkdir()
    (folder / "a[1].jsonl").write_text('{"text": "w1"}\n')
    for name in (folder, folder / "a[1].jsonl"):
        assert [*load_rows(str(name), streaming=streaming)] == [{"text": "w1"}]
    with pytest.raises(ValueError, match=r"a\[2\].jsonl': no such file"):
        load_rows(str(folder / "a[2].jsonl"))


@pytest.mark.parametrize(
    ("split", "other", "shared"),
    [
        ("train", "train[:2]", True),
        ("train[2:]", "test[:2]", False),  # local files are one split
        ("train[:75%]", "train[75%:]", False),
        ("train[:4]", "train[3:]", True),
        ("train[:1]+train[4:]", "train[1:4]", False),
        ("train[:1]+train[3:]", "train[1:4]", True),
    ],
)
def test_which_splits_of_files_share_rows(tmp_path, split, other, shared):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name}{i}"}}\n' for i in range(8)))
    name = str(tmp_path / "a.jsonl")
    texts = ({*load_rows(name, split=s)["text"]} for s in (split, other))
    assert (
        share_rows(name, split, name, other, load_rows(name, split=other)) == shared == bool(set.intersection(*texts))
    )
    for elsewhere, is_shared in ((str(tmp_path / "b.jsonl"), False), (f"{tmp_path}/[ab].jsonl", True)):
        assert share_rows(elsewhere, split, name, other, load_rows(name, split=other)) == is_shared
    stream = load_rows(name, streaming=True)
    assert share_rows(name, "train", name, "test", stream)
    assert not share_rows(str(tmp_path / "b.jsonl"), "train", name, "test", stream)


def test_which_splits_of_the_hub_share_rows(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name}{i}"}}\n' for i in range(8)))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "test")}
    for split, other, shared in (
        ("train", "test", False),
        ("train", "train[:8]", True),
        ("train[50%:]", "train[:50%]", False),
        ("all", "test[:1]", True),
        ("train+test[1:]", "test[:1]", False),
    ):
        rows = load_dataset("json", data_files=files, split=other)
        assert share_rows("org/data", split, "org/data", other, rows) == shared
        assert not share_rows("org/data", split, "org/other", other, rows)
    assert share_rows("org/data", "train", "org/data", "train", rows.to_iterable_dataset())
    assert not share_rows("org/data", "train", "org/data", "test", rows.to_iterable_dataset())


def test_files(tmp_path):
    rows = [{"text": f"w{i}", "n": i} for i in range(10)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "b.csv").write_text("text,m\nw50,1\nw51,2\n")
    Dataset.from_list(rows[:3]).to_parquet(tmp_path / "c.parquet")
    assert load_rows(str(tmp_path / "a.jsonl"))["n"][:] == list(range(10))
    assert load_rows(str(tmp_path / "a.jsonl"), split="train[:3]")["n"][:] == [0, 1, 2]
    assert load_rows(str(tmp_path / "a.jsonl"), split="train[80%:]")["n"][:] == [8, 9]
    with pytest.raises(ValueError, match="mixes kinds of files"):
        load_rows(str(tmp_path))
    (tmp_path / "d.jsonl").write_text('{"text": "w1", "other": 2}\n')
    together = load_rows(str(tmp_path / "*.jsonl"))
    assert together.column_names == ["text"]
    assert len(together) == 11
    assert len(load_rows(str(tmp_path / "c.parquet"))) == 3
    assert len(load_rows(str(tmp_path / "*.csv"))) == 2
    stream = load_rows(str(tmp_path / "a.jsonl"), streaming=True)
    assert [row["n"] for row in stream] == list(range(10))
    with pytest.raises(ValueError, match="slices a stream"):
        load_rows(str(tmp_path / "a.jsonl"), split="train[:3]", streaming=True)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "/nowhere/at/all"])
def test_a_missing_file_is_named(name):
    with pytest.raises(ValueError, match=f"dataset_name '{name}': no such file"):
        load_rows(name)
