"""Tables of what several runs show together: budgets, chosen samples, caches."""

import pytest
from cache_helpers import make_cache

from sekd.files import write_checked
from sekd.metric_kinds import ACCURACY
from sekd.report.more_tables import make_more_tables
from sekd.report.read import RunRecord, read_sweep
from sekd.sweep.scores import Column
from sekd.sweep.table import Line, write_results


def make_run(folder, group, **keys):
    return RunRecord(str(folder), group, group, keys, [], "finished")


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


def test_budgets_are_a_row_a_method(tmp_path):
    methods = {
        "Full KD": 1.0,
        "SE-KD 20%": 0.2,
        "SE-KD 5 %": 0.05,
        "Random 20%": 0.2,
        "Random 5%": 0.05,
        "Alone 1%": 0.01,
    }
    lines = [Line(name, "", {0: place}, {0: name}) for place, name in enumerate(methods)]
    column = Column("accuracy", ACCURACY, [0.9, 0.8, 0.7, 0.6, 0.5, 0.1], [None] * 6, is_main=True)
    write_results(str(tmp_path), [column], lines, lines[0], {"sweep": "s", "baseline": "Full KD"})
    sweep = read_sweep(str(tmp_path))
    runs = [make_run(tmp_path / name, name, position_fraction=share) for name, share in methods.items()]
    (table,) = make_more_tables(runs, [sweep])
    assert table.title == "accuracy by share of the positions"
    assert table.columns == ["method", "5 %", "20 %"]
    assert texts(table) == [["SE-KD", "70.0 (-20.0)", "80.0 (-10.0)"], ["Random", "50.0 (-40.0)", "60.0 (-30.0)"]]


def test_overlaps_of_chosen_samples(tmp_path):
    runs = []
    for name, kept in (("a", [1, 2, 3, 4]), ("b", [3, 4, 5, 6]), ("c", [1, 2])):
        (tmp_path / name).mkdir()
        write_checked(str(tmp_path / name / "samples.json"), {"kept": kept})
        runs.append(make_run(tmp_path / name, name))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "samples.json").write_text("{")
    runs.append(make_run(tmp_path / "d", "d"))
    (table,) = make_more_tables(runs, [])
    assert table.columns == ["", "a", "b", "c"]
    assert texts(table) == [["a", "100%", "50%", "100%"], ["b", "50%", "100%", "0%"], ["c", "100%", "0%", "100%"]]


def test_caches_and_what_they_take(tmp_path, tokenizer, pairs):
    store = make_cache(tmp_path / "cache", tokenizer, pairs)
    runs = [make_run("x", "x", teacher_cache=str(tmp_path / "cache")), make_run("y", "y", teacher_cache="none")]
    table, phases = make_more_tables(runs, [])
    (row,) = texts(table)
    size = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir() if path.suffix != ".json")
    assert float(row[3].replace(",", "")) == pytest.approx(size / 1e6, abs=0.006)
    assert int(row[1]) == 64
    assert float(row[4]) == pytest.approx(store.total("bytes") / store.total("rows"), abs=0.05)
    assert row[6] == "256"
    built = f"{store.manifest['seconds']:,.1f}"
    assert texts(phases) == [["x", "", built, "", built]]


def test_phases_are_means_over_seeds(tmp_path):
    runs = []
    for name, group, scoring, training in (("a", "A", 10.0, 100.0), ("b", "A", 20.0, 110.0), ("c", "C", None, 50.0)):
        (tmp_path / name).mkdir()
        if scoring is not None:
            write_checked(str(tmp_path / name / "samples.json"), {"kept": [1], "seconds": scoring})
        logs = [{"step": 1, "train_seconds": 1.0}, {"step": 2, "train_seconds": training}]
        runs.append(RunRecord(str(tmp_path / name), name, group, {"seed": 0}, logs, "finished"))
    (table,) = make_more_tables(runs, [])
    assert texts(table) == [["A", "15.0", "", "105.0", "120.0"], ["C", "", "", "50.0", "50.0"]]
    assert table.columns == ["method", "scoring samples, s", "building the cache, s", "training, s", "in all, s"]


def test_without_anything_in_common_there_is_no_table():
    assert make_more_tables([make_run("x", "x")], []) == []
