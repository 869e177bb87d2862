"""Means, deviations, paired differences and the choice of a point, against arithmetic that is written out here."""

import math
import os
import statistics

import numpy as np
import pytest
from rich.text import Text

from sekd.eval.records import Item, Score, TaskResult
from sekd.eval.statistics import compare_scores, estimate_together, find_seed_errors, summarize
from sekd.metric_kinds import MetricKind
from sekd.sweep.scores import Column, make_columns, make_log_columns
from sekd.sweep.table import Line, as_csv, choose_places, make_cell, make_rows, show_rows

RIGHT = {  # by model: which of six items each answers rightly
    "full 1": [1, 0, 1, 1, 0, 0],
    "full 2": [1, 1, 1, 0, 0, 0],
    "se 1": [1, 1, 1, 1, 0, 1],
    "se 2": [1, 1, 0, 0, 1, 0],
}
LINES = [Line("Full KD", "", {1: 0, 2: 1}), Line("SE-KD", "", {1: 2, 2: 3})]


def make_result(right, task="arc_easy", split="test", metric="acc"):
    items = [Item(i, "p", correct=float(r), metrics={metric: float(r)}) for i, r in enumerate(right)]
    return TaskResult(task, metric, summarize(items), items, {"split": split}, 1.0)


@pytest.fixture
def columns():
    return make_columns([{"arc_easy": make_result(right)} for right in RIGHT.values()], [])


def test_mean_deviation_and_difference_by_hand(columns):
    (column,) = columns
    means = [statistics.mean(right) for right in RIGHT.values()]
    full, se = (make_cell(column, line, LINES[0]) for line in LINES)
    assert full.mean == pytest.approx((means[0] + means[1]) / 2)
    assert full.deviation == pytest.approx(statistics.stdev(means[:2]))
    assert full.difference is None
    d = np.array(list(RIGHT.values())[2:]) - np.array(list(RIGHT.values())[:2])  # [seeds items]
    seeds, items = d.shape
    assert se.difference == pytest.approx(d.mean())
    # the mean squares of a crossed layout with one observation a cell
    by_seed, by_item = d.mean(1), d.mean(0)
    rest = d - by_seed[:, None] - by_item + d.mean()
    ms_both = np.square(rest).sum() / ((seeds - 1) * (items - 1))
    over_seeds, over_items = by_seed.var(ddof=1) / seeds, by_item.var(ddof=1) / items
    total = max(over_seeds + over_items - ms_both / (seeds * items), over_seeds, over_items)
    assert se.errors.seeds == pytest.approx(math.sqrt(over_seeds))
    assert se.errors.items == pytest.approx(math.sqrt(over_items))
    assert se.errors.total == pytest.approx(math.sqrt(total))


def test_one_seed_has_the_paired_error_over_items(columns):
    (column,) = columns
    lines = [Line("Full KD", "", {1: 0}), Line("SE-KD", "", {1: 2})]
    cell = make_cell(column, lines[1], lines[0])
    items = [make_result(RIGHT[name]).items for name in ("full 1", "se 1")]
    expected = compare_scores(*items)["acc"]
    assert (cell.difference, cell.errors.total) == pytest.approx((expected.value, expected.stderr))
    assert cell.deviation is None
    assert cell.errors.seeds is None


def test_the_total_error_covers_new_seeds_and_new_items():
    """Differences with known effects of seeds, items and both: the mean squared error of the mean is as estimated."""
    generator = np.random.default_rng(0)
    seeds, items, draws, squares = 4, 50, [], []
    for _ in range(3000):
        d = 0.3 * generator.normal(size=(seeds, 1)) + generator.normal(size=(1, items))
        d = d + 2.0 * generator.normal(size=(seeds, items))
        deviations = (d - d.mean(1, keepdims=True)) / items * math.sqrt(items / (items - 1))
        errors = find_seed_errors(d.mean(1), deviations)
        draws.append(d.mean())
        squares.append(errors.total**2)
    # the bound from below by the larger part makes it a little too large
    assert 0.98 < np.mean(squares) / np.var(draws) < 1.15
    assert find_seed_errors(np.array([1.0, 3.0]), None).total == pytest.approx(1.0)
    assert find_seed_errors(np.array([1.0]), None).total is None


def test_estimates_are_on_the_items_of_all_models():
    a, b = (make_result(RIGHT[name]).items for name in ("full 1", "se 1"))
    b = [Item(3, "p", metrics={"acc": 1.0}, skipped="too long") if item.index == 3 else item for item in b]
    first, second = estimate_together([a, b])["acc"]
    assert first.value == pytest.approx(statistics.mean([1, 0, 1, 0, 0]))
    assert second.value == pytest.approx(statistics.mean([1, 1, 1, 0, 1]))
    assert len(first.deviations) == len(second.deviations) == 5
    with pytest.raises(ValueError, match="same index"):
        estimate_together([a, [*b, b[0]]])


def test_the_mean_of_a_suite_counts_each_task_once():
    parts = {"arc_easy": "validation", "gsm8k": "train[7000:]", "hellaswag": "train[:2000]", "piqa": "train[:2000]"}
    metrics = dict.fromkeys(parts, "acc") | {"gsm8k": "math_verify"}
    generator = np.random.default_rng(1)
    right = {task: generator.integers(0, 2, size=(4, 5 + 3 * i)) for i, task in enumerate(parts)}
    models = [
        {t: make_result(right[t][model], t, split, metrics[t]) for t, split in parts.items()} for model in range(4)
    ]
    column = make_columns(models, ["validation"])[0]
    assert (column.label, column.shown, column.is_main) == ("validation accuracy", True, True)
    assert column.values[0] == pytest.approx(np.mean([right[task][0].mean() for task in parts]))
    cell = make_cell(column, LINES[1], LINES[0])
    d = {task: r[2:] - r[:2] for task, r in right.items()}
    assert cell.difference == pytest.approx(np.mean([x.mean() for x in d.values()]))
    over_items = sum(x.mean(0).var(ddof=1) / x.shape[1] for x in d.values()) / len(parts) ** 2
    by_seed = np.mean([x.mean(1) for x in d.values()], axis=0)
    assert cell.errors.items == pytest.approx(math.sqrt(over_items))
    assert cell.errors.seeds == pytest.approx(math.sqrt(by_seed.var(ddof=1) / 2))
    del models[3]["piqa"]
    assert make_columns(models, ["validation"])[0].values[3] is None


def test_other_settings_are_not_compared():
    models = [{"arc_easy": make_result([1, 0], split=split)} for split in ("test", "train")]
    with pytest.raises(ValueError, match=r"on arc_easy with other settings \(split: test and train\)"):
        make_columns(models, [])


def test_the_best_point_of_each_method():
    points = [("A", "low"), ("A", "high"), ("B", "low"), ("B", "high")]
    lines = [Line(*point, {1: 2 * i, 2: 2 * i + 1}) for i, point in enumerate(points)]
    values = [0.1, 0.4, 0.3, 0.3, 0.9, None, 0.2, 0.2]
    column = Column("x", MetricKind(True), values, [None] * 8)
    chosen = {"A": "high", "B": "high"}
    assert choose_places(lines, column, True) == chosen, "B, low is better, but lacks a seed"
    assert choose_places(lines, column, False) == chosen | {"A": "low"}
    assert choose_places(lines, Column("x", MetricKind(True), [None] * 8, [None] * 8), True) == {}


def test_rows_and_csv(columns):
    lines = [Line("Teacher", "", {None: 0}), *LINES]
    rows = make_rows(columns, lines, LINES[0])
    assert rows[0] == ["method", "seeds", "arc_easy acc %"]
    assert rows[1] == ["Teacher", "", "50.0"]
    assert rows[2] == ["Full KD", "2", "50.0 ± 0.0"]
    assert rows[3][:2] == ["SE-KD", "2"]
    assert rows[3][2].startswith("66.7 ± 23.6 (+16.7 ± ")
    csv = as_csv(columns, lines, LINES[0]).splitlines()
    assert csv[1] == "Teacher,,arc_easy acc,0.5,,1,True,,,,"
    assert csv[3].startswith("SE-KD,,arc_easy acc,0.6666")


def test_a_grid_of_one_key_names_it_in_the_header(columns):
    lines = [Line("Teacher", "", {None: 0}), *(Line(line.method, "lr 0.1", line.models) for line in LINES)]
    rows = make_rows(columns, lines, lines[1])
    assert rows[0][:3] == ["method", "lr", "seeds"]
    assert [row[1] for row in rows[1:]] == ["", "0.1", "0.1"]
    lines = [Line("Teacher", "", {None: 0}), *(Line(line.method, "lr 0.1, k 2", line.models) for line in LINES)]
    rows = make_rows(columns, lines, lines[1])
    assert [row[1] for row in rows] == ["point", "", "lr 0.1, k 2", "lr 0.1, k 2"]


def test_a_narrow_window_shows_whole_columns(monkeypatch, capsys):
    rows = [
        ["method", "seeds", *(f"score {i}" for i in range(9))],
        ["SE-KD 20%", "3", *["43.5 ± 1.1 (+0.8 ± 0.4)"] * 9],
    ]
    show_rows(rows, [])
    whole = capsys.readouterr().out
    assert whole.count("43.5 ± 1.1") == whole.count("(+0.8 ± 0.4)") == 9
    monkeypatch.setenv("COLUMNS", "60")
    # datasets may have replaced os.environ, and rich keeps the object of its import.
    monkeypatch.setattr("rich.console.Console._environ", os.environ)
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    show_rows(rows, [])
    narrow = capsys.readouterr().out
    assert narrow.count("43.5 ± 1.1") == narrow.count("(+0.8 ± 0.4)") == 2
    assert max(len(Text.from_ansi(line)) for line in narrow.splitlines()) <= 60
    assert "the window has room for 4 of 11 columns; table.md has all" in narrow


def test_logs_are_paired_by_seed():
    logs = [{"eval_forward_kl": v, "eval_loss": v} for v in (1.0, 2.0, 0.5, 1.1)]
    columns = make_log_columns(logs, "eval_forward_kl")
    assert [column.shown for column in columns] == [True, False]
    cell = make_cell(columns[0], LINES[1], LINES[0])
    assert cell.difference == pytest.approx(-0.7)
    assert cell.errors.total == pytest.approx(statistics.stdev([-0.5, -0.9]) / math.sqrt(2))
    assert Score(1.0, None, 1).higher_is_better
