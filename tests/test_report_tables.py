"""The tables of a report: scores over seeds, the best and the second marked, references first."""

import csv
import io
import json
import math
from dataclasses import replace

import pytest

from sekd.eval.records import Item, Score, TaskResult
from sekd.metric_kinds import ACCURACY, MetricKind
from sekd.report.read import Reference, RunRecord, read_sweep
from sekd.report.tables import TableCell, make_table, make_tables
from sekd.sweep.scores import Column
from sekd.sweep.table import Line, write_results

LINES = [
    Line("teacher", "", {None: 0}),
    Line("Full KD", "", {0: 1, 1: 2}, {0: "full-0", 1: "full-1"}),
    Line("SE-KD", "", {0: 3, 1: 4}, {0: "sekd-0", 1: "sekd-1"}),
    Line("Random", "", {0: 5}, {0: "random-0"}),
]
COLUMNS = [
    Column("perplexity", MetricKind(False, digits=2), [1.0, 5.0, 7.0, 4.0, 4.0, 9.0], [None] * 6),
    Column("hidden", MetricKind(), [0.0] * 6, [None] * 6, shown=False),
    Column("accuracy", ACCURACY, [0.99, 0.5, 0.6, 0.7, 0.8, None], [None] * 6, is_main=True),
]


def test_the_best_method_is_bold_and_the_teacher_is_no_method():
    table = make_table("t", COLUMNS, LINES)
    assert table.columns == ["method", "accuracy % ↑", "perplexity ↓"]
    assert [row[0].text for row in table.rows] == ["teacher", "Full KD", "SE-KD", "Random"]
    spread = 100 * math.sqrt(0.005)
    assert [row[1] for row in table.rows] == [
        TableCell("99.0"),
        TableCell(f"55.0 ± {spread:.1f}", second=True),
        TableCell(f"75.0 ± {spread:.1f}", best=True),
        TableCell("-"),
    ]
    assert [(row[2].best, row[2].second) for row in table.rows] == [
        (False, False),
        (False, True),
        (True, False),
        (False, False),
    ]


def test_one_method_alone_is_not_the_best():
    table = make_table("t", COLUMNS, LINES[:2])
    assert not any(cell.best or cell.second for row in table.rows for cell in row)


def test_a_sweep_gives_the_table_that_it_wrote(tmp_path):
    write_results(str(tmp_path), COLUMNS, LINES, LINES[1], {"sweep": "s.yaml", "baseline": "Full KD"})
    content = json.loads((tmp_path / "results.json").read_text())
    assert [line["runs"] for line in content["lines"]][2] == {"0": "sekd-0", "1": "sekd-1"}
    sweep = read_sweep(str(tmp_path))
    assert sweep is not None
    (table,) = make_tables([], [], [sweep], [])
    plain = make_table("t", COLUMNS, LINES)
    assert table.columns == plain.columns
    assert [[(c.best, c.second) for c in row] for row in table.rows] == [
        [(c.best, c.second) for c in row] for row in plain.rows
    ]
    assert "(+20.0" in table.rows[2][1].text


def make_run(label, group, seed, value):
    logs = [{"step": 1, "eval_forward_kl": 9.0}, {"step": 2, "eval_forward_kl": value, "eval_runtime": 3.0}]
    return RunRecord(label, label, group, {"seed": seed}, logs, "finished")


def test_the_last_evaluation_in_training_is_a_table_of_groups():
    runs = [make_run("a0", "a", 0, 0.1), make_run("a1", "a", 1, 0.3), make_run("b", "b", 0, 0.4)]
    (table,) = make_tables(runs, [Reference("teacher", {})], [], [])
    assert table.columns == ["method", "eval_forward_kl ↓"]
    assert [[cell.text for cell in row] for row in table.rows] == [["a", "0.200 ± 0.141"], ["b", "0.400"]]
    assert table.rows[0][1].best


def test_tables_are_files_that_no_text_breaks():
    table = make_table("t", COLUMNS[:1], [Line("a|b\n<script>", "", {0: 1}), *LINES[2:]])
    markdown = table.as_markdown()
    assert "| a\\|b <script> | <u>5.00</u> |" in markdown
    assert "| SE-KD | **4.00 ± 0.00** |" in markdown
    rows = [*csv.reader(io.StringIO(table.as_csv()))]
    assert rows[1][0] == "a|b\n<script>"
    assert len(rows) == 4


@pytest.mark.parametrize("value", [math.nan, None])
def test_a_score_that_is_missing_is_not_the_best(value):
    columns = [Column("accuracy", ACCURACY, [0.9, value, value, 0.7, 0.8, 0.1], [None] * 6, is_main=True)]
    table = make_table("t", columns, LINES)
    assert [row[1].best for row in table.rows] == [False, False, True, False]


def make_result(value, **settings):
    items = [Item(index=0, prompt="p", answer="a", outputs=("a",), correct=value)]
    return TaskResult("gsm8k", "math_verify", {"math_verify": Score(value, None, 1)}, items, settings, 1.0)


def test_one_task_of_a_suite_is_shown_and_other_settings_are_left_out():
    results = {"gsm8k": make_result(1.0, limit=1), "other": make_result(0.5, backend="hf")}
    runs = [replace(make_run("a", "a", 0, 0.1), results=results, logs=[])]
    changed = results | {"other": make_result(0.5, backend="vllm")}
    runs.append(replace(make_run("b", "b", 0, 0.1), results=changed, logs=[]))
    notes = []
    (table,) = make_tables(runs, [Reference("teacher", results)], [], notes)
    assert table.columns == ["method", "gsm8k math_verify % ↑"]
    assert [row[0].text for row in table.rows] == ["teacher", "a", "b"]
    assert notes == ["The scores of other are left out: its settings differ between the models."]
