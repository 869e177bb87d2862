"""The table of models: its numbers, what it refuses to compare, and how it looks."""

import csv
import dataclasses
import io
import os
import random
import re

import pytest

from sekd.eval.compare import (
    Row,
    _split_models,
    as_csv,
    as_markdown,
    compare_models,
    compare_results,
    format_score,
    label_score,
    make_table,
    shorten_names,
    show_table,
    write_comparison,
)
from sekd.eval.records import Item, Score, TaskResult
from sekd.eval.statistics import average_scores, compare_scores, fill_bins, summarize
from sekd.eval.tasks import SUITES, TASKS

SETTINGS = {"shots": 0, "version": "1", "data": "abc", "seed": 0, "backend": "hf", "dtype": "float32"}
FIRST, SECOND = "HuggingFaceTB/SmolLM2-135M-Instruct", "runs/gsm8k_on_policy_sekd/checkpoint-1000"
THIRD, FOURTH = "runs/full_kd/checkpoint-1000", "runs/random"


def make_result(task, seed, items=40, skipped=0, split=None, **settings):
    """Right and wrong as a model of this seed may be; the item's difficulty is the same for all models."""
    rows, model = random.Random(task), random.Random(f"{task}{seed}")
    main = TASKS[task].main
    made = []
    for i in range(items):
        right = model.random() < rows.random()
        is_skipped = i < skipped
        made.append(
            Item(
                i,
                f"{task} {i}",
                metrics={}
                if is_skipped
                else {main: float(right), **({"nll": model.random()} if "lam" in task else {})},
                calibration=fill_bins([model.random()], [right]) if main == "acc" and "lam" not in task else None,
                skipped="a rule needs nltk's punkt" if is_skipped else None,
            )
        )
    settings = {**SETTINGS, "split": split or TASKS[task].split, **settings}
    return TaskResult(task, main, summarize(made), made, settings, 1.0)


def make_suite(seed, suite="paper", **settings):
    return {task: make_result(task, seed, split=split, **settings) for task, split in SUITES[suite].tasks.items()}


@pytest.fixture(scope="module")
def models():
    return {name: make_suite(seed) for seed, name in enumerate((FIRST, SECOND, THIRD, FOURTH))}


def find_row(comparison, task, score):
    (row,) = [row for row in comparison.rows if (row.task, row.score) == (task, score)]
    return row


def test_every_score_is_shown_beside_its_paired_difference(models):
    comparison = compare_models(models)
    for task in SUITES["paper"].tasks:
        results = [results[task] for results in models.values()]
        for score in results[0].scores:
            row = find_row(comparison, task, score)
            assert row.values == [result.scores[score] for result in results]
            paired = [compare_scores(results[0].items, result.items)[score] for result in results[1:]]
            assert row.differences == [None, *paired]
            assert paired[0].value == pytest.approx(row.values[1].value - row.values[0].value)
    assert comparison.notes == {}


def test_the_mean_of_a_suite_by_hand(models):
    comparison = compare_models(models, "paper")
    row = find_row(comparison, "paper", "accuracy")
    tasks = ["hellaswag", "piqa", "arc_easy", "gsm8k", "lambada_openai"]
    for results, value in zip(models.values(), row.values, strict=True):
        own = [results[task].scores[results[task].main] for task in tasks]
        assert value.value == pytest.approx(sum(score.value for score in own) / 5)
        assert value.stderr == pytest.approx(sum(score.stderr**2 for score in own) ** 0.5 / 5)
    parts = [find_row(comparison, task, TASKS[task].main).differences[2] for task in tasks]
    assert row.differences[2] == average_scores(parts)
    assert find_row(comparison, "paper", "perplexity").values[0] == models[FIRST]["lambada_openai"].scores["perplexity"]
    assert find_row(comparison, "paper", "ece").values[0].items == 120


def test_two_suites_in_one_call_take_their_own_splits():
    results = make_suite(0)
    for task, split in SUITES["validation"].tasks.items():
        results[f"{task} ({split})"] = make_result(task, 9, split=split)
    comparison = compare_models({FIRST: results}, "paper", "validation")
    for suite, name in (("paper", "{}"), ("validation", "{} ({})")):
        own = [
            results[name.format(task, SUITES[suite].tasks[task])].scores[score].value
            for task, score in SUITES[suite].means["accuracy"].items()
        ]
        assert find_row(comparison, suite, "accuracy").values[0].value == pytest.approx(sum(own) / len(own))


def test_what_a_suite_sums_up_is_not_shown_twice(models):
    shown = [(row.task, row.score) for row in compare_models(models, "paper").rows if row.shown]
    mains = [(task, TASKS[task].main) for task in SUITES["paper"].tasks]
    assert shown == [*mains, ("paper", "accuracy"), ("paper", "ece"), ("paper", "perplexity")]
    alone = [(row.task, row.score) for row in compare_models(models).rows if row.shown]
    assert ("arc_easy", "ece") in alone
    assert ("lambada_openai", "perplexity") in alone


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"shots": 5}, "other settings: shots 5, not 0"),
        ({"version": "2", "split": "train"}, "other settings: version 2, not 1; split train, not test"),
        ({"temperature": 1.0}, "other settings: temperature 1.0, not none"),
        ({"backend": "vllm"}, "other settings: backend vllm, not hf"),
        ({"data": "def"}, "other settings: data def, not abc"),
    ],
)
def test_other_settings_are_not_compared(settings, reason):
    first, second = make_result("gsm8k", 0), make_result("gsm8k", 1, **settings)
    with pytest.raises(ValueError, match=re.escape(reason)):
        compare_results(first, second)
    models = {FIRST: {"gsm8k": first}, SECOND: {"gsm8k": second}}
    comparison = compare_models(models)
    assert find_row(comparison, "gsm8k", "math_verify").differences == [None, None]
    assert comparison.notes == {
        f"checkpoint-1000 is not compared with SmolLM2-135M-Instruct: {reason}": ["gsm8k"],
    }


def test_what_stands_in_the_way_of_all_tasks_is_noted_once(models):
    comparison = compare_models({FIRST: models[FIRST], SECOND: make_suite(1, backend="vllm")})
    text = "checkpoint-1000 is not compared with SmolLM2-135M-Instruct: other settings: backend vllm, not hf"
    assert len(comparison.notes) == 1
    assert f"all tasks: {text}" in as_markdown(comparison)


def test_rows_say_their_split_and_what_they_do_not_have_in_common():
    """All settings stand in the file's names; the table says those of all rows once."""
    results = {
        "gsm8k": make_result("gsm8k", 0, split="train[:4]", limit=3, chat_template=False),
        "piqa": make_result("piqa", 0, limit=3, shots=5, chat_template=False),
        "arc_easy": make_result("arc_easy", 0, limit=3, chat_template=False),
    }
    comparison = compare_models({FIRST: results})
    rows = [row for row in comparison.rows if row.score == TASKS[row.task.split(" ")[0]].main]
    assert [row.label for row in rows] == ["gsm8k (train[:4])", "piqa (5 shots)", "arc_easy"]
    names = ["gsm8k (train[:4], limit 3)", "piqa (5 shots, limit 3)", "arc_easy (limit 3)"]
    assert [row.task for row in rows] == names
    common = "- All rows: limit 3, chat template off, seed 0, backend hf, float32."
    assert common in as_markdown(comparison).splitlines()
    assert "| gsm8k (train[:4]) | math_verify % |" in as_markdown(comparison)
    assert f'{FIRST},"{names[1]}",acc,' in as_csv(comparison)


def test_a_suite_says_its_splits_in_the_table(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    show_table({FIRST: make_suite(0, "validation", limit=200), SECOND: make_suite(1, "validation", limit=200)})
    printed = capsys.readouterr().out
    for text in ("gsm8k (train[7000:])", "hellaswag (train[:2000])", "All rows: limit 200, 0 shots, seed 0"):
        assert text in printed


def test_items_that_only_one_model_counts_are_told():
    first, second = make_result("ifeval", 0, skipped=3), make_result("ifeval", 1)
    comparison = compare_models({FIRST: {"ifeval": first}, SECOND: {"ifeval": second}})
    assert "checkpoint-1000 and SmolLM2-135M-Instruct are compared on the 37 items of both" in comparison.notes


def test_prompts_of_two_chat_templates_are_of_the_same_rows():
    first, second = make_result("gsm8k", 0, chat_template=True), make_result("gsm8k", 1, chat_template=True)
    second = dataclasses.replace(second, items=[dataclasses.replace(i, prompt=f"<s>{i.prompt}") for i in second.items])
    assert compare_results(first, second)["math_verify"].items == 40


def test_a_score_that_no_items_give_has_a_difference_without_error():
    first, second = make_result("gsm8k", 0), make_result("gsm8k", 1)
    first.scores["f1"], second.scores["f1"] = Score(0.25, 0.1, 40), Score(0.5, 0.1, 40)
    difference = compare_results(first, second)["f1"]
    assert (difference.value, difference.stderr) == (0.25, None)


def test_skipped_items_and_missing_results_are_told(capsys):
    first, second = make_suite(0), make_suite(1)
    first["ifeval"] = make_result("ifeval", 0, skipped=3)
    second["ifeval"] = make_result("ifeval", 1, skipped=3)
    del second["piqa"]
    comparison = compare_models({FIRST: first, SECOND: second}, "paper")
    assert find_row(comparison, "paper", "accuracy").values[1] is None
    assert find_row(comparison, "paper", "accuracy").differences == [None, None]
    assert comparison.notes == {
        "3 of 40 items are skipped: a rule needs nltk's punkt": ["ifeval"],
        "checkpoint-1000 lacks piqa": ["paper accuracy", "paper ece"],
    }
    show_table({FIRST: first, SECOND: second}, "paper")
    printed = capsys.readouterr().out
    assert re.search(r"piqa +│ +\d+\.\d ± \d\.\d │ +- │", printed)
    assert "paper accuracy, paper ece: checkpoint-1000 lacks piqa" in printed


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """datasets replaces os.environ when it maps in several processes, and rich keeps the object of its import."""
    monkeypatch.setattr("rich.console.Console._environ", os.environ)


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_the_table_fits_the_terminal_with_every_number_whole(models, monkeypatch, capsys, width, number):
    monkeypatch.setenv("COLUMNS", str(width))
    shown = dict(list(models.items())[:number])
    show_table(shown, "paper")
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line and line[0] in "┏┃┡│├└"]
    assert max(map(len, table)) <= width
    assert all(line[-1] in "┓┃┩│┤┘" for line in table)
    assert "…" not in printed
    for row in compare_models(shown, "paper").rows:
        if row.shown:
            for number in (*row.values, *row.differences[1:]):
                sign = "+" if number in row.differences else ""
                assert format_score(row.score, number, sign) in printed


def test_models_that_do_not_fit_get_tables_of_their_own(models, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    many = {f"model-{i}": models[FIRST if i == 0 else SECOND] for i in range(9)}
    show_table(many)
    printed = capsys.readouterr().out
    assert printed.count("model-0 ┃") == 3
    assert all(printed.count(f"model-{i} ┃") == 1 for i in range(1, 9))


def test_a_name_cannot_steer_the_terminal(models, capsys):
    show_table({"a\x1b[31m": models[FIRST], "[bold]b": models[SECOND]})
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "[bold]b" in printed


def test_the_csv_has_every_score(models):
    comparison = compare_models(models, "paper")
    lines = list(csv.DictReader(io.StringIO(as_csv(comparison))))
    assert len(lines) == len(comparison.rows) * 4
    (line,) = [x for x in lines if (x["model"], x["task"], x["score"]) == (SECOND, "arc_easy", "ece")]
    score = models[SECOND]["arc_easy"].scores["ece"]
    assert (float(line["value"]), float(line["stderr"]), int(line["items"])) == (score.value, score.stderr, score.items)
    assert line["higher_is_better"] == "False"
    difference = find_row(comparison, "arc_easy", "ece").differences[1]
    assert (float(line["difference"]), float(line["difference_stderr"])) == (difference.value, difference.stderr)
    assert [x["difference"] for x in lines if x["model"] == FIRST] == [""] * len(comparison.rows)


def test_the_files_of_a_comparison(models, tmp_path):
    write_comparison(str(tmp_path), models, "paper")
    table = (tmp_path / "comparison.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in table if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert len(rows) == 2 + 9
    assert rows[0].startswith("| task | score | items | SmolLM2-135M-Instruct | gsm8k_on_policy_sekd/checkpoint-1000 |")
    assert table[len(rows) + 2].startswith("- A score is followed by its standard error")
    assert (tmp_path / "comparison.csv").read_text() == as_csv(compare_models(models, "paper"))


def test_names_are_as_short_as_they_differ():
    assert shorten_names([FIRST, SECOND]) == {FIRST: "SmolLM2-135M-Instruct", SECOND: "checkpoint-1000"}
    assert shorten_names([SECOND, THIRD])[THIRD] == "full_kd/checkpoint-1000"
    assert shorten_names(["model", "a/model"]) == {"model": "model", "a/model": "a/model"}
    assert shorten_names(["/a/b/", "/c/b"]) == {"/a/b/": "a/b", "/c/b": "c/b"}


@pytest.mark.parametrize(
    ("name", "score", "label", "text"),
    [
        ("acc", Score(0.4349, 0.0351, 200), "acc %", "43.5 ± 3.5"),
        ("exact_match,strict-match", Score(1.0, 0.0, 200), "exact_match,strict-match %", "100.0 ± 0.0"),
        ("pass@8", Score(0.5, 0.1, 200), "pass@8 %", "50.0 ± 10.0"),
        ("ece", Score(0.1, None, 1, False), "ece % ↓", "10.0"),
        ("perplexity", Score(19.664, 0.911, 500, False), "perplexity ↓", "19.66 ± 0.91"),
        ("forward_kl", Score(0.4434, 0.0123, 9, False), "forward_kl ↓", "0.443 ± 0.012"),
        ("cer", Score(0.4434, 0.0123, 9, False), "cer ↓", "0.443 ± 0.012"),
        ("length", Score(101.26, 2.0, 9, None), "length", "101.3 ± 2.0"),
        ("acc", None, "acc %", ""),
    ],
)
def test_how_a_score_is_written(name, score, label, text):
    assert label_score(Row("task", "task", name, [None, score], [], shown=True)) == label
    assert format_score(name, score) == text


def test_colours_say_better_and_worse_beyond_two_errors():
    from sekd.eval.compare import _choose_style

    assert _choose_style(Score(0.3, 0.1, 9)) == "green"
    assert _choose_style(Score(0.3, 0.1, 9, higher_is_better=False)) == "red"
    assert _choose_style(Score(0.3, 0.1, 9, higher_is_better=None)) == ""
    assert _choose_style(Score(0.15, 0.1, 9)) == _choose_style(Score(0.3, None, 9)) == ""


def test_huge_scores_leave_room_for_the_names_of_rows():
    """The perplexity of a model that knows nothing takes as few columns as others."""
    assert format_score("perplexity", Score(563301282808227.38, 1095495946816087.25, 9)) == "5.63e+14 ± 1.1e+15"
    assert format_score("perplexity", Score(99999.994, 1.0, 9)) == "99999.99 ± 1.00"
    score = {"perplexity": Score(563301282808227.38, 1095495946816087.25, 9, False)}
    result = TaskResult("lambada_openai", "perplexity", score, [], SETTINGS, 1.0)
    comparison = compare_models({name: {"lambada_openai": result} for name in (FIRST, SECOND, THIRD)})
    for places in _split_models(comparison, 80):
        table = make_table(comparison, places, 80)
        assert table.columns[0].width >= len("lambada_openai")
