"""Charts of several runs together: scores by budget, and memory."""

import json
import statistics

import pytest
from page_helpers import near
from test_report_more_tables import make_run

from sekd.metric_kinds import ACCURACY
from sekd.report.charts import make_charts
from sekd.report.figures import draw_chart
from sekd.report.page import Report, make_page
from sekd.report.read import RunRecord, read_run, read_sweep
from sekd.sweep.scores import Column
from sekd.sweep.table import Line, write_results

SHARES = {"Full KD": 1.0, "SE-KD 5%": 0.05, "SE-KD 20%": 0.2, "Random 5%": 0.05, "Random 20%": 0.2}
VALUES = {
    "Full KD": [0.9, 0.8],
    "SE-KD 5%": [0.6, 0.7],
    "SE-KD 20%": [0.8, 0.8],
    "Random 5%": [0.3, 0.5],
    "Random 20%": [0.5, 0.4],
}
MEMORY = {"whole": [(0.0, 10_000_000), (1.0, 90_000_000), (2.0, 0)], "part": [(0.0, 5_000_000), (1.5, 30_000_000)]}


@pytest.fixture
def charts(tmp_path):
    lines, values = [], []
    for name in VALUES:
        lines.append(Line(name, "", {seed: len(values) + seed for seed in (0, 1)}, {s: f"{name}-{s}" for s in (0, 1)}))
        values += VALUES[name]
    column = Column("accuracy", ACCURACY, values, [None] * len(values), is_main=True)
    write_results(str(tmp_path), [column], lines, lines[0], {"sweep": "s", "baseline": "Full KD"})
    runs = [
        make_run(tmp_path / f"{name}-{seed}", name, position_fraction=share)
        for name, share in SHARES.items()
        for seed in (0, 1)
    ]
    runs += [RunRecord(name, name, name, {}, [], "finished", memory=curve) for name, curve in MEMORY.items()]
    return runs, make_charts(runs, [read_sweep(str(tmp_path))])


def test_budgets_have_a_line_a_method_and_the_baseline(charts):
    budgets, _ = charts[1]
    lines = {line.label: line.points for line in budgets.lines}
    assert [*lines] == ["SE-KD", "Random", "Full KD"]
    for family in ("SE-KD", "Random"):
        assert [point[0] for point in lines[family]] == [5.0, 20.0]
        for x, mean, low, high in lines[family]:
            values = [100 * value for value in VALUES[f"{family} {x:.0f}%"]]
            spread = statistics.stdev(values)
            assert (mean, low, high) == pytest.approx(
                (statistics.fmean(values), statistics.fmean(values) - spread, statistics.fmean(values) + spread)
            )
    assert {point[1:] for point in lines["Full KD"]} == {lines["Full KD"][0][1:]}
    assert lines["Full KD"][0][1] == pytest.approx(85.0)


def test_memory_has_a_line_a_run_in_a_unit_that_fits(charts):
    _, memory = charts[1]
    assert memory.unit == "MB"
    assert {line.label: [point[:2] for point in line.points] for line in memory.lines} == {
        name: [(x, y / 1e6) for x, y in curve] for name, curve in MEMORY.items()
    }


def test_the_page_draws_the_charts_and_reads_their_values(page, charts, tmp_path):
    runs, made = charts
    path = tmp_path / "report.html"
    path.write_text(make_page(Report("charts", runs, [], made)))
    page.open(path)
    for name, lines in (("#tables", 3), ("#time", 2)):
        assert len(page.texts(f"{name} .more-chart svg .line")) == lines
    page.focus("#tables .chart")
    readout = dict(
        line.rsplit(" ", 1)
        for line in page.run(
            "return [...document.querySelectorAll('#tables .readout tr')].map("
            "(row) => `${row.querySelector('th').textContent} ${row.cells[2].textContent}`)"
        )
    )
    assert page.text("#tables .readout p") == "20 % of the positions"
    assert {name: float(value) for name, value in readout.items()} == {
        "SE-KD": near(80.0, 1),
        "Random": near(45.0, 1),
        "Full KD": near(85.0, 1),
    }
    assert page.text("#tables .more-chart h3") == "accuracy by share of the positions %"
    page.run("document.querySelector('#tables .more-chart button').click()")
    assert len(page.texts("#tables .more-chart svg .line")) == 2
    assert len(page.texts("#time .more-chart svg .line")) == 2, "another chart keeps its lines"


def test_charts_are_drawn_as_files(charts, tmp_path):
    for chart in charts[1]:
        axis = draw_chart(chart).axes[0]
        drawn = {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}
        assert drawn == {line.label: [list(point[:2]) for point in line.points] for line in chart.lines}


def test_a_damaged_profile_is_left_out_with_a_note(tmp_path):
    (tmp_path / "profile").mkdir()
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    curve = tmp_path / "profile" / "memory.csv"
    curve.write_text("seconds,bytes\n0.5,100\n")
    assert read_run(str(tmp_path), None).memory == [(0.5, 100)]
    huge = f"seconds,bytes\n0.5,{'9' * 400}\n"
    for damaged in ("seconds,bytes\n0.5,1x\n", "seconds,bytes\n0.5", "other\n1\n", "seconds,bytes\nnan,1\n", huge):
        curve.write_text(damaged)
        run = read_run(str(tmp_path), None)
        assert run.memory == []
        assert "The memory of the profile is damaged, and left out." in run.notes


def test_a_mean_that_is_no_number_is_left_out(tmp_path):
    values = [0.9, 0.6, 0.8, float("nan"), 0.4]
    lines = [Line(name, "", {0: place}, {0: name}) for place, name in enumerate(VALUES)]
    column = Column("accuracy", ACCURACY, values, [None] * len(values), is_main=True)
    write_results(str(tmp_path), [column], lines, lines[0], {"sweep": "s", "baseline": "Full KD"})
    runs = [make_run(tmp_path / name, name, position_fraction=share) for name, share in SHARES.items()]
    (chart,) = make_charts(runs, [read_sweep(str(tmp_path))])
    assert [line.label for line in chart.lines] == ["SE-KD", "Full KD"]
    assert all(low == mean == high for line in chart.lines for _, mean, low, high in line.points), "one seed"
