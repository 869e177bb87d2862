"""Files become the rows of a task, or one line that says what is wrong with which file."""

import json
import os
import re

import pytest
from datasets import Dataset
from harness_helpers import FILES, SHARED, write_rows

from sekd.eval.prepared import TaskOptions, prepare_task
from sekd.eval.task_data import find_file, hash_rows, load_task_rows
from sekd.eval.tasks import TASKS

ROWS = [{"goal": f"goal {i}", "sol1": "a", "sol2": "b", "label": i % 2} for i in range(10)]
SCHEMA = r"each row has goal \(text or empty\), .*, label \(number\); the hub has these rows as baber/piqa"


@pytest.fixture
def folder(tmp_path):
    write_rows(tmp_path / "piqa" / "validation.jsonl", ROWS)
    return str(tmp_path)


def test_where_files_are(tmp_path, folder):
    path = os.path.join(folder, "piqa", "validation.jsonl")
    assert find_file("piqa", "validation", [folder]) == path
    assert find_file("piqa", "validation", [str(tmp_path / "piqa")]) == path  # the folder is named as the task
    assert find_file("piqa", "validation", [str(tmp_path / "piqa") + "/"]) == path
    assert find_file("arc_easy", "validation", [str(tmp_path / "piqa")]) is None
    assert find_file("piqa", "test", [folder]) is None
    write_rows(tmp_path / "other" / "piqa" / "test.jsonl", ROWS)
    assert find_file("piqa", "test", [folder, str(tmp_path / "other")]) == str(tmp_path / "other/piqa/test.jsonl")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_kinds_of_files_have_the_same_rows_and_hash(tmp_path, kind):
    (tmp_path / "piqa").mkdir()
    data, path = Dataset.from_list(ROWS), str(tmp_path / "piqa" / f"validation.{kind}")
    getattr(data, "to_json" if "json" in kind else f"to_{kind}")(path)
    rows = load_task_rows("piqa", "validation", [str(tmp_path)])
    assert [*rows] == ROWS
    assert hash_rows(rows) == hash_rows(ROWS)


def test_slices(folder):
    load = lambda split: [row["goal"] for row in load_task_rows("piqa", split, [folder])]  # noqa: E731
    assert load("validation[7:]") == ["goal 7", "goal 8", "goal 9"]
    assert load("validation[:2]") == ["goal 0", "goal 1"]
    assert load("validation[:20%]") == ["goal 0", "goal 1"]
    assert load("validation[-1:]") == ["goal 9"]


def test_hash_of_rows():
    """It is of the values that count, in any order of columns."""
    row = {"a": 1, "b": {"c": "x", "d": None}, "e": None}
    assert hash_rows([row]) == hash_rows([{"b": {"c": "x"}, "a": "1"}])  # None is absent at every level
    assert hash_rows([row], ["a", "b.c"]) == hash_rows([{**row, "extra": 3}], ["a", "b.c"])
    others = ([{**row, "a": 2}], [row, row], [{**row, "b": {"c": "y"}}], [], [{**row, "a": 1.0}], [{**row, "e": ""}])
    assert len({hash_rows(rows) for rows in ([row], *others)}) == 7
    assert len(hash_rows([row])) == 12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"goal": "x", "sol', "cannot be read as json: .*; "),
        ("", r"piqa: .*validation.jsonl' .*is empty; |validation.jsonl is empty; "),
        (
            '{"goal": "x", "sol1": "a"}\n',
            r"validation.jsonl, row 1: sol2 is null and must be of the kind 'text or empty'; ",
        ),
        (
            json.dumps(ROWS[0]) + "\n" + json.dumps({**ROWS[1], "label": None}) + "\n",
            "validation.jsonl, row 2: label is null and must be of the kind 'number'; ",
        ),
        (
            json.dumps({**ROWS[0], "label": "x" * 99}),
            r'row 1: label is "x{56}\.\.\. and must be of the kind \'number\'; ',
        ),
    ],
)
def test_damaged_files(tmp_path, folder, text, message):
    (tmp_path / "piqa" / "validation.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message + SCHEMA) as error:
        load_task_rows("piqa", "validation", [folder])
    assert "\n" not in str(error.value)


def test_damaged_parquet(tmp_path, folder):
    (tmp_path / "piqa" / "test.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"piqa/test.parquet: .*" + SCHEMA):
        load_task_rows("piqa", "test", [folder])


def test_missing_files_and_folders(tmp_path, folder):
    message = rf"piqa: no file {folder}/piqa/train.jsonl \(or .json, .csv, .parquet\); {SCHEMA}"
    with pytest.raises(ValueError, match=message):
        load_task_rows("piqa", "train[:5]", [str(tmp_path / "piqa"), folder])
    with pytest.raises(ValueError, match=r"data_dir '/no/such': no such folder"):
        load_task_rows("piqa", "validation", [folder, "/no/such"])
    with pytest.raises(
        ValueError, match=rf"no file {folder}/wikitext/test.jsonl .*; the hub has these rows as org/w \(c\)"
    ):
        load_task_rows("wikitext", "test", [folder], ("org/w", "c"))


def test_splits_that_are_no_splits(folder):
    with pytest.raises(ValueError, match=r"piqa: split 'validation\[5' is not like"):
        load_task_rows("piqa", "validation[5", [folder])
    with pytest.raises(ValueError, match=r"split 'validation\[10:\]' of .*validation.jsonl has no rows"):
        load_task_rows("piqa", "validation[10:]", [folder])


def test_the_hub_cannot_be_reached():
    """The tests set HF_HUB_OFFLINE."""
    with pytest.raises(
        ValueError, match=r"'ChilleD/SVAMP': .*; each row has Body \(text\).*as ChilleD/SVAMP; .*--data-dir"
    ):
        load_task_rows("svamp", "test")


@pytest.mark.slow
def test_rows_that_only_the_templates_refuse(tmp_path):
    """Of a task that TASKS does not have, only lm-eval knows the columns."""
    pytest.importorskip("lm_eval")
    row = {"question": "q", "correct_answer": "a", "distractor1": "b", "distractor2": "c", "distractor3": "d"}
    for rows, message in (
        ([row], "sciq: lm-eval cannot read the rows of split test"),
        ([row | {"support": "s"}, row | {"support": None}], "sciq: a row of split test makes no prompt"),
    ):
        write_rows(tmp_path / "sciq" / "test.jsonl", rows)
        with pytest.raises(ValueError, match=message):
            prepare_task("sciq", None, TaskOptions(data_dirs=(str(tmp_path),)))


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("task", FILES)
def test_shared_rows_are_in_the_schema(task):
    split = os.path.basename(FILES[task]).partition(".")[0]
    with open(SHARED / FILES[task]) as lines:
        count = sum(1 for _ in lines)
    assert len(load_task_rows(task, split, [str(SHARED / "eval"), str(SHARED / "gsm8k")])) == count


PROBLEMS = {
    "piqa": ({"goal": "g", "sol1": "a", "sol2": "b", "label": -1}, "label -1 is none of the 2 choices"),
    "hellaswag": (
        {"activity_label": "a", "ctx_a": "a", "ctx_b": "", "endings": ["x", "y"], "label": "2"},
        "label 2 is none of the 2 choices",
    ),
    "arc_easy": (
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "C"},
        "answerKey 'C' is not among the labels",
    ),
    "arc_challenge": (
        {"question": "q", "choices": {"text": ["x", "y", "z"], "label": ["A", "B"]}, "answerKey": "A"},
        "choices have 3 texts and 2 labels",
    ),
    "gsm8k": ({"question": "q", "answer": "9 + 9\n#### "}, "answer '' has no number"),
    "svamp": ({"Body": "b", "Question": "q", "Answer": "two"}, "answer 'two' has no number"),
    "ifeval": (
        {"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:none"], "kwargs": [{}]},
        "instruction_id_list has 'punctuation:none'",
    ),
}


@pytest.mark.parametrize("task", PROBLEMS)
def test_a_row_that_cannot_be_scored_is_named(tmp_path, task):
    """Otherwise a model would have 0 % on rows without labels, as test rows often are."""
    row, problem = PROBLEMS[task]
    split = TASKS[task].split
    path = tmp_path / task / f"{split}.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"{task}: .*row 1: {re.escape(problem)}"):
        load_task_rows(task, split, [str(tmp_path)])
