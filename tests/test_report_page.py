"""The page of a report in a real browser: it shows what the runs recorded."""

import re
from statistics import mean

import pytest
from page_helpers import (
    NAMES,
    as_number,
    check_detail,
    check_numbers,
    near,
    parse_color,
    read_colors,
    read_columns,
    read_logs,
    read_snapshots,
    webdriver,
)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser")]

STEPS = [0, 2, 4, 6, 8]


def test_pointing_at_a_token_shows_the_numbers_of_its_position(page, report, runs):
    page.open(report)
    snapshots = read_snapshots(runs / "chosen")
    last = read_columns(snapshots[-1])
    for i in range(0, len(last["position"]), 8):
        page.point_at(f"#viewer-text [data-position='{last['position'][i]}']")
        check_detail(page.detail(), snapshots[-1], last, i)
    page.choose("#viewer-sample", page.texts("#viewer-sample option")[1])
    for place, snapshot in enumerate(snapshots):
        page.focus("#viewer-step")
        page.press(webdriver.Keys.HOME, *[webdriver.Keys.ARROW_RIGHT] * place)
        columns = read_columns(snapshot, 1)
        for i, position in enumerate(columns["position"]):
            shown = page.look_at(position)
            assert shown["position"] == position
            check_detail(shown, snapshot, columns, i)


@pytest.mark.parametrize("run", ["chosen", "random"])
def test_colours_marks_and_summary_follow_the_slider(page, report, runs, run):
    page.open(report)
    page.choose("#viewer-run", run)
    assert page.texts("#viewer .step-ticks")[0] == "".join(map(str, STEPS))
    snapshots = read_snapshots(runs / run)
    assert len({str(snapshot.columns["weight"]) for snapshot in snapshots}) > 1
    first = read_columns(snapshots[0])["weight"]
    page.focus("#viewer-step")
    page.press(webdriver.Keys.HOME)
    for place, snapshot in enumerate(snapshots):
        if place:
            page.press(webdriver.Keys.ARROW_RIGHT)
        columns, tokens, color = read_columns(snapshot), page.tokens(), read_colors(page)
        chosen = [weight > 0 for weight in columns["weight"]]
        assert [token["position"] for token in tokens] == columns["position"]
        assert [token["chosen"] for token in tokens] == [token["outlined"] for token in tokens] == chosen
        assert [token["said"].endswith(", chosen") for token in tokens] == chosen
        for token, value in zip(tokens, columns["student_entropy"], strict=True):
            assert parse_color(token["fill"]) == pytest.approx(color(value), abs=0.012)
        assert page.text(".pane output") == f"after {STEPS[place]} steps"
        of = {
            name: mean(value for value, is_chosen in zip(columns[column], chosen, strict=True) if is_chosen in among)
            for name, column, among in (
                ("entropy", "student_entropy", (True, False)),
                ("chosen", "forward_kl", (True,)),
                ("others", "forward_kl", (False,)),
            )
        }
        line = page.text(".pane-line")
        assert line.startswith(f"After {STEPS[place]} steps: {sum(chosen)} of {len(chosen)} positions chosen; ")
        shown = re.search(r"mean entropy (\S+); mean KL\(p‖q\) (\S+) at chosen, (\S+) at others", line)
        assert [*map(as_number, shown.groups())] == near([*of.values()])
        same = sum(now and weight > 0 for now, weight in zip(chosen, first, strict=True))
        assert (f"; {same} of {sum(chosen)} were also chosen in the first snapshot." in line) == (place > 0)


def test_two_runs_stand_side_by_side_with_the_same_sample(page, report, runs):
    page.open(report)
    page.choose("#viewer-compare", "random")
    for sample in (0, 1):
        page.choose("#viewer-sample", page.texts("#viewer-sample option")[sample])
        a, b = page.tokens(), page.tokens("#viewer-text-b")
        assert [(t["position"], t["text"]) for t in a] == [(t["position"], t["text"]) for t in b]
        columns = [read_columns(read_snapshots(runs / run)[-1], sample) for run in ("chosen", "random")]
        for tokens, of_run in zip((a, b), columns, strict=True):
            assert [token["chosen"] for token in tokens] == [weight > 0 for weight in of_run["weight"]]
        for i, position in enumerate(columns[0]["position"]):
            shown = page.look_at(position, "#viewer-text-b")
            for pane in (0, 1):
                check_numbers(shown, columns[pane], i, pane)
    left, right = (page.find(f".pane[data-pane={name}]").rect for name in "AB")
    assert left["y"] == right["y"]
    assert 0 < left["x"] + left["width"] < right["x"]
    assert right["x"] + right["width"] < 1280
    assert [page.text(f".pane[data-pane={name}] bdi") for name in "AB"] == ["chosen", "random"]
    page.focus("#viewer-step")
    page.press(webdriver.Keys.HOME)
    assert page.texts(".pane output") == ["after 0 steps"] * 2, "the other run follows"


def test_two_snapshots_of_a_run_stand_side_by_side(page, report, runs):
    page.open(report)
    page.choose("#viewer-compare", "another snapshot of this run")
    assert page.texts(".pane output") == ["after 0 steps", "after 8 steps"]
    snapshots = read_snapshots(runs / "chosen")
    for selector, snapshot in (("#viewer-text", snapshots[0]), ("#viewer-text-b", snapshots[-1])):
        chosen = [weight > 0 for weight in read_columns(snapshot)["weight"]]
        assert [token["chosen"] for token in page.tokens(selector)] == chosen
    page.choose("#viewer-run", "random")
    assert page.texts(".pane output") == ["after 0 steps", "after 8 steps"]
    page.choose("#viewer-compare", "nothing")
    assert page.text(".pane output") == "after 8 steps"


def test_the_keyboard_moves_between_tokens_and_snapshots(page, report, runs):
    page.open(report)
    keys, positions = webdriver.Keys, [str(p) for p in read_columns(read_snapshots(runs / "chosen")[0])["position"]]
    page.focus("#viewer-step")
    page.press(keys.TAB)
    assert page.focused() in positions
    for key, place in (
        *((keys.HOME, 0), (keys.ARROW_LEFT, 0), (keys.ARROW_RIGHT, 1), (keys.ARROW_RIGHT, 2), (keys.ARROW_LEFT, 1)),
        *((keys.END, -1), (keys.ARROW_RIGHT, -1), (keys.ARROW_LEFT, -2)),
    ):
        page.press(key)
        assert page.focused() == positions[place]
        assert page.detail()["position"] == int(positions[place])
        assert [str(token["position"]) for token in page.tokens() if token["stop"] == 0] == [positions[place]]
    for key, step in ((keys.ARROW_DOWN, 6), (keys.ARROW_UP, 8), (keys.ARROW_UP, 8), (keys.ARROW_DOWN, 6)):
        page.press(key)
        assert page.focused() == positions[-2]
        assert page.text(".pane output") == f"after {step} steps"
    page.press(keys.TAB)
    assert page.focused() is None
    page.point_at("#viewer-text .token")
    assert page.detail()["position"] == int(positions[0])
    page.point_at("h1")
    assert page.detail()["position"] == int(positions[-2]), "back to where the focus was"


@pytest.mark.parametrize("color", ["Student entropy H(q)", "Score: reverse KL", "KL(p‖q)"])
def test_the_list_of_positions_is_sorted(page, report, runs, color):
    page.open(report)
    page.choose("#viewer-color", color)
    assert page.texts("#viewer-sorted tbody tr") == []
    page.run("document.querySelector('#viewer-sorted summary').click()")
    columns = read_columns(read_snapshots(runs / "chosen")[-1])
    values = columns[NAMES[color]] if color in NAMES else [score for (score,) in columns["scores"]]
    script = (
        "return [...document.querySelectorAll('.sorted tbody tr')].map((r) => [...r.cells].map((c) => c.innerText))"
    )
    rows = page.run(script)
    assert len(rows) == len(values)
    shown = [as_number(row[3]) for row in rows]
    assert shown == sorted(shown, reverse=True)
    for place, row in enumerate(rows):
        i = columns["position"].index(int(row[1]))
        assert row[0] == str(place + 1)
        assert as_number(row[3]) == near(values[i])
        assert (row[5] == "chosen") == (columns["weight"][i] > 0)
    page.run("document.querySelector('.sorted tbody button').click()")
    assert page.focused() == rows[0][1]


def test_curves_read_the_logged_values_at_a_step(page, report, runs):
    page.open(report)
    keys = webdriver.Keys
    logs = {run: read_logs(runs / run) for run in ("chosen", "random")}
    for name, factor in (("loss", 1), ("selected_fraction", 100), ("grad_norm", 1), ("eval_forward_kl", 1)):
        logged = {run: {log["step"]: factor * log[name] for log in logs[run] if name in log} for run in logs}
        steps = sorted(logged["chosen"])
        chart = f"figure[data-metric={name}]"

        def check(step, chart=chart, logged=logged):
            assert page.text(f"{chart} .readout p") == f"step {step}"
            assert page.texts(f"{chart} .readout th") == ["chosen", "random"]
            shown = [as_number(text) for text in page.texts(f"{chart} .readout td:last-child")]
            assert shown == pytest.approx([of_run[step] for of_run in logged.values()], rel=6e-3)
            assert len(page.texts(".readout:not([hidden])")) == 1

        for place in (0, len(steps) // 2, len(steps) - 1):
            page.point_at(f"{chart} svg > circle", place)
            check(steps[place])
        page.point_at("#curves-title")
        assert page.texts(".readout:not([hidden])") == []
        page.focus(f"{chart} .chart")
        for key, place in ((keys.HOME, 0), (keys.ARROW_RIGHT, 1), (keys.END, -1), (keys.ARROW_LEFT, -2)):
            page.press(key)
            check(steps[place])


def test_a_line_can_be_hidden(page, report):
    page.open(report)
    assert page.texts(".curve-legend button") == ["chosen", "random"]
    page.run("document.querySelector('.curve-legend button').click()")
    page.focus("figure[data-metric=loss] .chart")
    assert page.texts("figure[data-metric=loss] .readout th") == ["random"]
    assert len(page.texts("figure[data-metric=loss] path.line")) == 1


def test_the_best_scores_are_bold(page, report, runs):
    page.open(report)
    logs = {run: [log for log in read_logs(runs / run) if "eval_loss" in log][-1] for run in ("chosen", "random")}
    header, *rows = page.run(
        "return [...document.querySelectorAll('.table tr')].map((row) => [...row.cells].map((cell) => "
        "[cell.textContent.replace(/ \\(\\w+\\)$/, ''), "
        "cell.querySelector('b') ? 'best' : cell.querySelector('u') ? 'second' : '']))"
    )
    assert [row[0] for row in rows] == [["chosen", ""], ["random", ""]]
    compared = 0
    for place, (column, _) in list(enumerate(header))[1:]:
        name, is_share = column.split()[0], "%" in column
        values = [logs[run][name] for run in logs]
        shown, marks = zip(*(row[place] for row in rows), strict=True)
        assert [as_number(text) for text in shown] == pytest.approx(
            [value * (100 if is_share else 1) for value in values], rel=0.01, abs=0.051
        )
        if column[-1] in "↑↓" and values[0] != values[1]:
            is_first_best = (values[0] > values[1]) == (column[-1] == "↑")
            assert marks == (("best", "second") if is_first_best else ("second", "best")), column
            compared += 1
        else:
            assert marks == ("", ""), column
    assert compared >= 2
    assert page.run("return getComputedStyle(document.querySelector('.table b')).fontWeight") == "700"
