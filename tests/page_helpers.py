"""The page of a report in Chromium, as a reader uses it, and what its numbers and colours mean."""

import json
import os
import random
import re
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import make_trainer, words

from sekd.data.batch import Sample
from sekd.eval.snapshots import FOLDER, Snapshot, list_snapshots, read_snapshot
from sekd.report.page import write_report
from sekd.report.read import RunRecord

try:
    from selenium import webdriver
except ImportError:
    webdriver = None

CHROMIUM, CHROMEDRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"

NAMES = {
    "Student entropy H(q)": "student_entropy",
    "Teacher entropy H(p)": "teacher_entropy",
    "KL(p‖q)": "forward_kl",
    "KL(q‖p)": "reverse_kl",
    "Cross-entropy −log q(y)": "student_ce",
}
MARKUP = '<img src=x onerror="window.hacked = true">'
SCRIPT = "</script><script>window.hacked = true</script>"
HOSTILE = {
    MARKUP: MARKUP,
    SCRIPT: SCRIPT,
    "\x1b[31mred\x1b[0m": "␛[31mred␛[0m",
    "\u202eevil\u202c": "\\u202Eevil\\u202C",
    "&lt;b&gt;<!--": "&lt;b&gt;<!--",
    "zero\u200bwidth\x00": "zero\\u200Bwidth␀",
    "\t": "⇥",
    "": "∅",
    "\u2028${1}`'\"": "\\u2028${1}`'\"",
}
"""Text -> what the page must show."""

READ_DETAIL = """
const detail = document.getElementById("viewer-detail");
const texts = (parts) => [...parts].map((part) => part.innerText.trim());
const top = (model) => [...detail.querySelectorAll(`.top-${model} li`)].map((item) => texts(item.children));
return {
  token: detail.querySelector(".detail-token").innerText,
  position: Number(detail.querySelector(".detail-position").innerText.match(/\\d+/)[0]),
  numbers: Object.fromEntries([...detail.querySelectorAll("tbody tr")].map((row) => texts(row.cells))
    .map(([name, ...values]) => [name, values])),
  student: top("student"), teacher: top("teacher"),
};
"""
READ_TOKENS = """
return [...document.querySelectorAll(`${arguments[0]} .token`)].map((token) => ({
  position: Number(token.dataset.position), text: token.textContent, chosen: token.classList.contains("chosen"),
  said: token.getAttribute("aria-label"), stop: token.tabIndex,
  fill: getComputedStyle(token).backgroundColor, ink: getComputedStyle(token).color,
  outlined: getComputedStyle(token).boxShadow !== "none",
}));
"""
FIND_WIDE = """
const isBox = (node) => node !== document.body && getComputedStyle(node).overflowX !== "visible";
const isInside = (node) => node !== document.body && (isBox(node) || isInside(node.parentElement));
return [...document.querySelectorAll("body *:not(.skip)")].filter((node) => {
  const { left, right, width } = node.getBoundingClientRect();
  return width && (left < -1 || right > innerWidth + 1) && !isInside(node.parentElement);
}).map((node) => node.outerHTML.slice(0, 200));
"""


@contextmanager
def start_browser():
    """A driver of a headless Chromium; skips where there is none."""
    for path in (CHROMIUM, CHROMEDRIVER):
        if not os.path.exists(path):
            pytest.skip(f"there is no {path}; scripts/setup_browser.sh installs it on Debian")
    if webdriver is None:
        pytest.skip("selenium is not installed; it is in the extra dev")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SE_OFFLINE", "true")  # Selenium would download a driver
        patch.setenv("NO_PROXY", "localhost,127.0.0.1")
        with webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER)) as driver:
            yield driver


class Page:
    """A page in the browser, as a reader uses it."""

    def __init__(self, driver):
        self.driver = driver
        self.run = driver.execute_script

    def open(self, path):
        self.driver.get(Path(path).as_uri())

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def text(self, selector):
        return self.find(selector).text

    def texts(self, selector):
        """The texts of all elements, whether they are in view or not."""
        return self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)

    def point_at(self, selector, place=0):
        script = "const element = document.querySelectorAll(arguments[0])[arguments[1]];"
        element = self.run(script + "element.scrollIntoView({ block: 'center' }); return element", selector, place)
        webdriver.ActionChains(self.driver, duration=0).move_to_element(element).perform()

    def press(self, *keys):
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def focus(self, selector):
        self.run("document.querySelector(arguments[0]).focus()", selector)

    def choose(self, selector, text):
        """Choose an option by its text, with the keyboard."""
        options = self.texts(f"{selector} option")
        self.focus(selector)
        self.press(webdriver.Keys.HOME, *[webdriver.Keys.ARROW_DOWN] * options.index(text))

    def focused(self):
        """The position of the token that has the focus, if it is one."""
        return self.run("return document.activeElement.dataset.position ?? null")

    def tokens(self, selector="#viewer-text"):
        return self.run(READ_TOKENS, selector)

    def detail(self):
        """What the detail panel says."""
        return self.run(READ_DETAIL)

    def look_at(self, position, selector="#viewer-text"):
        """What the detail panel says while the pointer is at a token."""
        look = "document.querySelector(arguments[0]).dispatchEvent(new MouseEvent('mouseover', { bubbles: true }));"
        return self.run(look + READ_DETAIL, f"{selector} [data-position='{position}']")

    def command(self, name, **arguments):
        self.driver.execute_cdp_cmd(f"Emulation.{name}", arguments)


def as_number(text):
    return float(re.sub("[,≥≤ ]", "", text.split(" chosen")[0]).replace("−", "-"))


def near(value, digits=3):
    """Equal to a value that the page shows with ``digits`` after the point. Its data has four digits."""
    return pytest.approx(value, abs=0.51 * 10**-digits, rel=6e-4)


def read_colors(page):
    """The colour that the legend gives a number, as red, green and blue from 0 to 1."""
    script = "const style = getComputedStyle(document.documentElement); return [0, 1, 2, 3, 4].map((stop) => "
    stops = page.run(script + "style.getPropertyValue(`--heat-${stop}`))")
    ramp = [[int(stop.strip()[k : k + 2], 16) / 255 for k in (1, 3, 5)] for stop in stops]
    low, *_, high = map(as_number, page.texts("#viewer-legend .ticks span"))
    power = 0.5 if "square-root" in page.text("#viewer-legend .legend-name") else 1

    def color(value):
        place = 4 * min(1, max(0, (value - low) / (high - low))) ** power
        left = min(3, int(place))
        return [a + (place - left) * (b - a) for a, b in zip(ramp[left], ramp[left + 1], strict=True)]

    return color


def parse_color(text):
    parts = [float(part) for part in re.findall(r"[\d.]+", text)][:3]
    return parts if text.startswith("color(srgb") else [part / 255 for part in parts]


def luminance(color):
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parse_color(color)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(first, second):
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def read_snapshots(run):
    return [read_snapshot(path) for path in list_snapshots(str(run / FOLDER)).values()]


def read_columns(snapshot, sample=0):
    """The columns of a sequence, as lists."""
    mine = snapshot.columns["sample"] == sample
    return {name: column[mine].tolist() for name, column in snapshot.columns.items()}


def read_logs(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_numbers(shown, columns, i, pane=0):
    """The numbers in the detail panel are those of the position's row in a snapshot."""
    numbers = {name: values[pane] for name, values in shown["numbers"].items()}
    for name, column in NAMES.items():
        assert as_number(numbers[name]) == near(columns[column][i]), name
    weight = columns["weight"][i]
    assert as_number(numbers["Weight"]) == pytest.approx(weight, rel=6e-3)
    assert numbers["Weight"].endswith("chosen") == (weight > 0)


def check_detail(shown, snapshot, columns, i):
    sample = snapshot.samples[columns["sample"][i]]
    texts = {token: re.sub("^ ", "·", HOSTILE.get(text, text)) for token, text in snapshot.texts.items()}
    assert shown["token"] == texts[sample["input_ids"][columns["position"][i] + 1]]
    check_numbers(shown, columns, i)
    assert as_number(shown["numbers"]["Score: reverse KL"][0]) == near(columns["scores"][i][0])
    scores = [score for (score,) in columns["scores"]]
    rank, of = map(int, shown["numbers"]["Rank of the score"][0].split(" of "))
    assert of == len(scores)
    assert sum(s > scores[i] * 1.001 for s in scores) < rank <= 1 + sum(s > scores[i] * 0.999 for s in scores)
    for model in ("student", "teacher"):
        assert [text for text, _ in shown[model]] == [texts[token] for token in columns[f"{model}_ids"][i]]
        assert [as_number(p) for _, p in shown[model]] == near(columns[f"{model}_probs"][i], 2)


def make_large_runs():
    """Six runs with 8 curves of 3,000 logs, and snapshots of 4 sequences of 512 tokens at 5 steps."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.rand(*shape, generator=generator)

    names = ("loss", "reverse_kl_selected", "entropy", "entropy_selected")
    names += ("selected_fraction", "grad_norm", "learning_rate", "tokens_per_second")
    tokens = [torch.randint(0, 2000, (512,), generator=generator).tolist() for _ in range(4)]
    samples = [asdict(Sample(ids, [1] * 512, number, 0)) for number, ids in enumerate(tokens)]
    places = torch.arange(4).repeat_interleave(511), torch.arange(511).repeat(4)
    snapshots = []
    for step in (0, 750, 1500, 2250, 3000):
        columns = {name: 3 * draw(4 * 511).half() for name in NAMES.values()}
        columns |= {"weight": (draw(4 * 511) < 0.2) / 409, "scores": draw(4 * 511, 1)}
        for model in ("student", "teacher"):
            columns[f"{model}_ids"] = torch.randint(0, 2000, (4 * 511, 5), generator=generator)
            columns[f"{model}_probs"] = draw(4 * 511, 8).softmax(-1).sort(descending=True).values[:, :5].half()
        columns |= dict(zip(("sample", "position"), places, strict=True))
        texts = {token: f" word{token}" for token in range(2000)}
        snapshots.append(Snapshot(step, "training data", ["entropy"], samples, texts, columns))
    runs = []
    for place in range(6):
        values = draw(3000, 8).tolist()
        logs = [{"step": step, **dict(zip(names, row, strict=True))} for step, row in enumerate(values, 1)]
        runs.append(RunRecord(f"run {place}", f"run {place}", f"run {place}", {}, logs, "finished", [], snapshots))
    return runs


@pytest.fixture(scope="module")
def driver():
    with start_browser() as driver:
        yield driver


@pytest.fixture
def page(driver):
    """The browser. Whatever a test does, the console stays empty, nothing is loaded, and no text is run as a script."""
    yield Page(driver)
    loaded = driver.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    scripts = driver.execute_script("return [typeof window.hacked, document.scripts.length]")
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert driver.get_log("browser") == []
    assert loaded == []
    assert scripts == ["undefined", 2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer):
    """Two runs with the same held-out sequences: one chooses by a score, the other at random."""
    folder, generator = tmp_path_factory.mktemp("runs"), random.Random(0)
    rows = [{"prompt": words(generator, 3, 8), "completion": words(generator, 30, 50)} for _ in range(32)]
    data, held_out = Dataset.from_list(rows[4:]), Dataset.from_list(rows[:4])
    common = dict(record_selection=2, max_steps=8, learning_rate=0.02, eval_strategy="steps", eval_steps=4)
    for name, choices in (("chosen", {"position_score": "reverse_kl"}), ("random", {"position_policy": "random"})):
        options = dict(eval_dataset=held_out)
        make_trainer(folder / name, tokenizer, data, None, None, options, **common, **choices).train()
    return folder


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("report"), runs / "chosen", runs / "random")


def write_page(folder, *runs):
    write_report([str(run) for run in runs], str(folder / "page.html"), "", "no evaluations")
    return folder / "page.html"
