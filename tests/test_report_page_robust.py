"""The page of a report in a real browser: hostile texts, unfinished runs, small windows and large pages."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import yaml
from page_helpers import (
    FIND_WIDE,
    HOSTILE,
    MARKUP,
    SCRIPT,
    as_number,
    check_numbers,
    contrast,
    luminance,
    make_large_runs,
    read_columns,
    read_snapshots,
    webdriver,
    write_page,
)

from sekd.eval.snapshots import FOLDER, write_snapshot
from sekd.report.page import Report, make_page, write_report
from sekd.report.tables import ReportTable, TableCell

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser")]

STEPS = [0, 2, 4, 6, 8]


@pytest.fixture(scope="module")
def hostile(runs, tmp_path_factory):
    """A page of a run all whose texts are hostile, and of an honest run."""
    folder = tmp_path_factory.mktemp("hostile")
    run = folder / MARKUP
    shutil.copytree(runs / "chosen", run)
    long = "/very/long/path" * 12
    keys = {"position_policy": MARKUP, "dataset_name": "".join(HOSTILE), SCRIPT: MARKUP, "model_name_or_path": long}
    (run / "recipe.yaml").write_text(yaml.safe_dump(keys))
    (run / "versions.json").write_text(json.dumps({"sekd": SCRIPT}))
    with (run / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": 8, f"eval_{MARKUP}": 1.5, "eval_forward_kl": 1.0}) + "\n")
    for snapshot in read_snapshots(run):
        ids = dict.fromkeys(token for sample in snapshot.samples for token in reversed(sample["input_ids"]))
        texts = snapshot.texts | dict(zip(ids, HOSTILE, strict=False))
        changed = replace(snapshot, source=SCRIPT, scores=[MARKUP], texts=texts)
        write_snapshot(str(run / FOLDER), changed)
    page, title = folder / "page.html", f"</title>{SCRIPT}\x1b"
    report = write_report([str(run), str(runs / "random")], str(page), title, "no evaluations")
    table = ReportTable(
        f"{MARKUP}\u202e", SCRIPT, [SCRIPT, MARKUP], [[TableCell(MARKUP, best=True), TableCell(SCRIPT, second=True)]]
    )
    page.write_text(make_page(replace(report, tables=[*report.tables, table])), encoding="utf-8")
    return page


def test_text_is_never_markup(page, hostile):
    page.open(hostile)
    visible_markup = {text for text in HOSTILE.values() if len(text) > 3}
    shown = {token["text"] for token in page.tokens()} | {token["text"] for token in page.tokens("#viewer-text-b")}
    assert {*HOSTILE.values()} <= shown
    assert page.driver.title == f"</title>{SCRIPT}␛"
    assert page.texts("h1") == [f"</title>{SCRIPT}␛"]
    card = page.texts(".card")[0]
    assert page.texts(".card h3")[0] == MARKUP
    assert MARKUP in page.texts(".card .sentence")[0]
    assert SCRIPT in page.texts(".card .notes")[0]
    recipe = page.texts(".card .recipe pre")[0]
    assert all(text in card and text in recipe for text in visible_markup)
    assert f"{SCRIPT}: {MARKUP}" in recipe
    assert page.texts(".table:first-child tbody th") == [MARKUP, "random"]
    shown = [page.texts(f".table:last-child {part}") for part in ("h3", "p", "thead th", "tbody tr > *")]
    assert shown == [[f"{MARKUP}\\u202E"], [SCRIPT], [SCRIPT, MARKUP], [f"{MARKUP} (best)", f"{SCRIPT} (second)"]]
    assert any(MARKUP in text for text in page.texts("#curves h3"))
    assert MARKUP in page.texts(".curve-legend button")
    assert page.texts("#viewer-run option")[0] == MARKUP
    assert f"Score: {MARKUP}" in page.texts("#viewer-color option")
    assert SCRIPT in page.texts(".pane-title")[0]
    page.choose("#viewer-color", f"Score: {MARKUP}")
    page.run("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    page.choose("#viewer-compare", "random")
    for token in page.tokens():
        assert page.look_at(token["position"])["token"].removeprefix("·") == token["text"].removeprefix("·")
    page.focus("#viewer-step")
    page.press(webdriver.Keys.HOME, webdriver.Keys.END)
    assert page.texts("body :is(img, iframe, object, embed, base, form, link, b b)") == []
    everything = page.run(
        "return document.body.innerText + [...document.querySelectorAll('body *')].flatMap((node) => "
        "[...node.attributes]).map((attribute) => attribute.value).join()"
    )
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2028]", everything)


def test_an_unfinished_run_is_shown_with_a_note(page, runs, tmp_path):
    shutil.copytree(runs / "chosen", tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    text = log.read_text()
    log.write_text(text[: text.index('"step": 6') - 20])
    page.open(write_page(tmp_path, tmp_path / "run"))
    logs = [json.loads(line) for line in log.read_text().splitlines()[:-1]]
    assert page.text(".badge") == "unfinished"
    notes = "1 damaged line of metrics.jsonl was skipped.The run is unfinished: the page shows it up to step"
    assert page.texts(".card .notes") == [f"{notes} {logs[-1]['step']}."]
    page.focus("figure[data-metric=loss] .chart")
    page.press(webdriver.Keys.END)
    last = [log for log in logs if "loss" in log][-1]
    assert page.text("figure[data-metric=loss] .readout p") == f"step {last['step']}"
    assert as_number(page.texts("figure[data-metric=loss] .readout td")[-1]) == pytest.approx(last["loss"], rel=6e-3)
    assert "shares so far" in page.text("#time")


def test_what_a_run_lacks_is_left_out(page, runs, tmp_path):
    shutil.copytree(runs / "chosen", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / FOLDER)
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if "eval_" not in line))
    page.open(write_page(tmp_path, tmp_path / "run"))
    assert page.text("#viewer .empty").startswith("No run recorded a selection")
    assert not page.find("#viewer .content").is_displayed()
    assert not page.find("#tables").is_displayed()
    assert page.texts("nav.sections a") == ["Runs", "Selection", "Curves", "Time"]
    assert "loss" in page.run("return [...document.querySelectorAll('figure')].map((f) => f.dataset.metric)")
    log.write_text("")
    page.open(write_page(tmp_path, tmp_path / "run"))
    assert page.text("#curves .lead") == "No run has logged numbers."
    assert page.text(".card h3") == "run"


@pytest.mark.parametrize("name", ["report", "hostile"])
def test_a_telephone_needs_no_scrolling_sideways(page, name, request):
    page.command("setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
    page.open(request.getfixturevalue(name))
    for compared in ("nothing", "random"):
        page.choose("#viewer-compare", compared)
        page.run("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
        assert page.run("return [innerWidth, document.documentElement.scrollWidth]") == [390, 390]
        assert page.run(FIND_WIDE) == []
        page.run("window.scrollTo(100, 0)")
        assert page.run("return window.scrollX") == 0


def test_the_dark_page_is_dark_and_both_can_be_read(page, report):
    page.open(report)
    papers = {}
    for scheme in ("light", "dark"):
        page.command("setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        script = "const style = getComputedStyle(document.body); return [style.backgroundColor, style.color]"
        papers[scheme], ink = page.run(script)
        assert contrast(papers[scheme], ink) > 7
        for color in ("Student entropy H(q)", "Change of KL(p‖q) since the first snapshot"):
            page.choose("#viewer-color", color)
            assert min(contrast(token["fill"], token["ink"]) for token in page.tokens()) > 4.5
    assert luminance(papers["dark"]) < 0.05 < 0.8 < luminance(papers["light"])


def test_a_large_page_works_and_is_under_5_megabytes(page, tmp_path):
    """Its sequences are cut, and a note says so."""
    runs = make_large_runs()
    path = tmp_path / "page.html"
    path.write_text(make_page(Report("large", runs, [])), encoding="utf-8")
    assert 1e6 < path.stat().st_size < 5e6
    page.open(path)
    assert len(page.texts("#curves .chart")) == 8
    number = len(page.tokens())
    assert 100 < number < 511
    assert page.texts(".card .notes") == [f"The page has the first {number} positions of each recorded sequence."] * 6
    page.choose("#viewer-compare", "run 1")
    page.focus("#viewer-step")
    page.press(webdriver.Keys.HOME)
    for place, snapshot in enumerate(runs[0].snapshots):
        if place:
            page.press(webdriver.Keys.ARROW_RIGHT)
        chosen = [weight > 0 for weight in read_columns(snapshot)["weight"]]
        for selector in ("#viewer-text", "#viewer-text-b"):
            assert [token["chosen"] for token in page.tokens(selector)] == chosen[:number]
    page.point_at(f"#viewer-text [data-position='{number - 1}']")
    check_numbers(page.detail(), read_columns(runs[0].snapshots[-1]), number - 1)
    page.focus("figure[data-metric=loss] .chart")
    page.press(webdriver.Keys.HOME, webdriver.Keys.ARROW_RIGHT)
    assert page.texts("figure[data-metric=loss] .readout th") == [run.label for run in runs]
