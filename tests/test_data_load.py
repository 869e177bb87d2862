"""Files become rows."""

import json

import pytest
from datasets import Dataset

from sekd.data.load import load_rows


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty.jsonl is empty"):
        load_rows(str(tmp_path / "empty.jsonl"))
    (tmp_path / "broken.jsonl").write_text('{"text": "w1"\n{{{')
    with pytest.raises(ValueError, match=r"broken.jsonl' cannot be read as json"):
        load_rows(str(tmp_path / "broken.jsonl"))


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
