"""Tables of results: a column a model, with the difference to the first model and its paired standard error."""

import csv
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sekd.eval.records import Score, TaskResult
from sekd.eval.statistics import LOWER_IS_BETTER, Difference, compare_scores, mean_of
from sekd.eval.tasks import SUITES
from sekd.files import write_atomically
from sekd.tables import escape_controls, print_table

NOTED = frozenset({"backend", "arguments", "dtype", "device", "batch_size", "limit", "rows", "data", "seed", "lm_eval"})
"""Settings in which two compared results may differ: a note says so. Any other difference forbids the comparison."""
UNTOLD = frozenset({"rows", "data", "lm_eval", "batch_size", "device"})
"""Settings of ``NOTED`` without a note: what they change is told by the items that are compared, or is nothing."""
ROW_SETTINGS = ("data", "seed", "shots_data")
"""Two results with these settings in common are of the same rows in the same order."""
PERCENT = ("acc", "avg@", "pass@", "exact_match", "math_verify", "prompt_level", "inst_level", "ece", "top1", "cut_off")
"""How the names of scores begin that are shown in percent."""
DECIMALS = {"perplexity": 2, "word_perplexity": 2, "byte_perplexity": 2, "length": 1}
"""Digits after the point of scores that are no percentages; the others have ``DIGITS``."""
DIGITS = 3
NARROWEST, COLUMN = 18, 15
"""Columns of a terminal that a table needs at least for its labels, and for each model."""
SHOWN = frozenset(
    {
        "perplexity",
        "ece",
        "forward_kl",
        "reverse_kl",
        "sampled_reverse_kl",
        "top1_agreement",
        "exact_match",
        "length",
        "cut_off",
    }
)
"""Scores that the table shows beside the main one, unless a suite's mean has them; ``pass@k`` too."""

Results = Mapping[str, Mapping[str, TaskResult]]
"""The results of each model, by the name of the model and of the result."""


@dataclass(frozen=True)
class Row:
    """A score of all models.

    Attributes:
        task: the name of the result, or of the suite.
        score: the name of the score.
        values: of each model; None where it has none.
        differences: to the first model; None for the first one, and where the two cannot be compared.
        shown: whether the printed table has it; the files have all.
        is_mean: whether it is the mean of a suite.
    """

    task: str
    score: str
    values: list[Score | None]
    differences: list[Difference | None]
    shown: bool
    is_mean: bool = False


@dataclass
class Comparison:
    """The rows of a table, and what a reader must know of them.

    Attributes:
        models: the names of the models.
        rows: all scores.
        notes: each note, with the names of the results that it is about.
    """

    models: list[str]
    rows: list[Row] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)

    def note(self, task: str, text: str) -> None:
        """Add a note about a result."""
        tasks = self.notes.setdefault(text, [])
        if task not in tasks:
            tasks.append(task)


def compare_results(first: TaskResult, second: TaskResult) -> dict[str, Difference]:
    """The differences of two results of a task (``compare_scores``), without error for scores that no items give.

    Raises:
        ValueError: the two differ in a setting that is not in ``NOTED``, or have no item in common.
    """
    different = find_different_settings(first, second)
    if forbidden := [name for name in different if name not in NOTED]:
        told = (f"{name} {_tell(different[name][1])}, not {_tell(different[name][0])}" for name in forbidden)
        raise ValueError(f"other settings: {'; '.join(told)}")
    same_rows = "data" in first.settings and not any(name in different for name in ROW_SETTINGS)
    differences = compare_scores(first.items, second.items, same_rows)
    for name in first.scores.keys() & second.scores.keys() - differences.keys():
        value = second.scores[name].value - first.scores[name].value
        differences[name] = Difference(value, None, second.scores[name].items, second.scores[name].higher_is_better)
    return differences


def find_different_settings(first: TaskResult, second: TaskResult) -> dict[str, tuple[Any, Any]]:
    """The settings in which two results differ, with the first one's value and the second one's."""
    names = dict.fromkeys((*first.settings, *second.settings))
    pairs = {name: (first.settings.get(name), second.settings.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def compare_models(models: Results, *suites: str) -> Comparison:
    """All scores of the models as rows, then the means of the suites that were evaluated.

    Args:
        models: the results of each model; the first model is the one that the others are compared with.
        suites: the suites whose means are wanted.
    """
    names = list(models)
    comparison = Comparison(names)
    in_means = {
        (task, SUITES[suite].tasks.get(task), score)
        for suite in suites
        for scores in SUITES[suite].means.values()
        for task, score in scores.items()
    }
    differences: dict[str, dict[str, dict[str, Difference]]] = {name: {} for name in names}
    for task in dict.fromkeys(task for results in models.values() for task in results):
        results = [models[name].get(task) for name in names]
        given = [result for result in results if result is not None]
        first = results[0]
        for name, result in zip(names[1:], results[1:], strict=True):
            if first is not None and result is not None:
                differences[name][task] = _compare_noted(comparison, task, names[0], first, name, result)
        _note_skipped(comparison, task, given)
        for score in dict.fromkeys(score for result in given for score in result.scores):
            is_extra = score in SHOWN or score.startswith("pass@")
            is_extra &= (given[0].task, given[0].settings.get("split"), score) not in in_means
            comparison.rows.append(
                Row(
                    task,
                    score,
                    [None if result is None else result.scores.get(score) for result in results],
                    [None, *(differences[name].get(task, {}).get(score) for name in names[1:])],
                    shown=score == given[0].main or is_extra,
                )
            )
    for suite in suites:
        for score, parts in SUITES[suite].means.items():
            _add_mean(comparison, models, differences, suite, score, parts)
    return comparison


def _compare_noted(
    comparison: Comparison, task: str, name_a: str, a: TaskResult, name_b: str, b: TaskResult
) -> dict[str, Difference]:
    """The differences, with a note of all that stands in the way of comparing the two."""
    short = shorten_names(comparison.models)
    try:
        found = compare_results(a, b)
    except ValueError as error:
        comparison.note(task, f"{short[name_b]} is not compared with {short[name_a]}: {error}")
        return {}
    for name, (before, after) in find_different_settings(a, b).items():
        if name not in UNTOLD:
            comparison.note(task, f"{short[name_b]} has {name} {_tell(after)}, {short[name_a]} {_tell(before)}")
    if a.main in found and found[a.main].items < max(a.scores[a.main].items, b.scores[b.main].items):
        comparison.note(
            task, f"{short[name_b]} and {short[name_a]} are compared on the {found[a.main].items} items of both"
        )
    return found


def _tell(value: Any) -> str:
    return "none" if value is None else str(value)


def _note_skipped(comparison: Comparison, task: str, results: list[TaskResult]) -> None:
    for result in results:
        for reason, number in Counter(item.skipped for item in result.items if item.skipped is not None).items():
            comparison.note(task, f"{number} of {len(result.items)} items are skipped: {reason}")


def _add_mean(
    comparison: Comparison,
    models: Results,
    differences: dict[str, dict[str, dict[str, Difference]]],
    suite: str,
    score: str,
    parts: Mapping[str, str],
) -> None:
    """Add the mean of a suite's tasks: of each model that has all of them."""
    values: list[Score | None] = []
    changes: list[Difference | None] = []
    has_main = False
    for model, results in models.items():
        found: list[Score] = []
        paired: list[Difference] = []
        missing = []
        for task, part in parts.items():
            split = SUITES[suite].tasks.get(task)
            own = [n for n, r in results.items() if r.task == task and r.settings.get("split") in (split, None)]
            if not own or part not in results[own[0]].scores:
                missing.append(task)
                continue
            found.append(results[own[0]].scores[part])
            has_main |= results[own[0]].main == part
            if (change := differences[model].get(own[0], {}).get(part)) is not None:
                paired.append(change)
        if missing and len(missing) < len(parts):
            comparison.note(f"{suite} {score}", f"{shorten_names(list(models))[model]} lacks {', '.join(missing)}")
        values.append(mean_of(found) if len(found) == len(parts) else None)
        changes.append(mean_of(paired) if len(paired) == len(parts) else None)
    if any(value is not None for value in values):
        shown = len(parts) > 1 or not has_main
        comparison.rows.append(Row(suite, score, values, changes, shown, is_mean=True))


def show_table(models: Results, *suites: str) -> None:
    """Print the table of the models, with the means of these suites, and its notes.

    Models that do not fit beside each other get a table of their own, with the first model again.
    """
    comparison = compare_models(models, *suites)
    width = Console().width
    others = list(range(1, len(models)))
    fitting = max(1, (width - NARROWEST) // COLUMN - 1)
    for start in range(0, max(1, len(others)), fitting):
        print_table(make_table(comparison, [0, *others[start : start + fitting]], width))
    for line in describe(comparison):
        print(escape_controls(line))


def make_table(comparison: Comparison, models: Sequence[int], width: int) -> Table:
    """The shown rows as a table of these models. With several, a score stands above its difference to the first model.

    Args:
        comparison: of all models.
        models: the places of the models that are shown.
        width: of the terminal, in columns.
    """
    short, several = shorten_names(comparison.models), len(models) > 1
    shown = [row for row in comparison.rows if row.shown]
    columns = [[_make_cell(row, i) for row in shown] for i in models]
    # rich breaks a line at spaces alone
    headers = [escape_controls(short[comparison.models[i]]).replace("/", "/\n") for i in models]
    needed = [max((_measure(cell.plain) for cell in cells), default=0) for cells in columns]
    labels = [[escape_controls(row.task), label_score(row.score), count_items(row)] for row in shown]
    table = Table()
    if several:
        labels = [[f"{task}\n  {score}, {items}"] for task, score, items in labels]
        spare = width - 1 - 3 * (1 + len(models)) - sum(needed)
        own = max((_measure(label) for (label,) in labels), default=0)
        table.add_column("task, score, items", overflow="fold", width=max(1, min(own, spare)))
        spare -= min(own, spare)
    else:
        table.add_column("task", overflow="fold")
        table.add_column("score", overflow="fold")
        table.add_column("items", justify="right")
        spare = width
    for header, least in zip(headers, needed, strict=True):
        given = min(max(0, _measure(header) - least), max(0, spare))
        table.add_column(Text(header), justify="right", overflow="fold", width=least + given)
        spare -= given
    for i, (row, label, *cells) in enumerate(zip(shown, labels, *columns, strict=True)):
        ends = i + 1 < len(shown) and shown[i + 1].is_mean and not row.is_mean
        table.add_row(*label, *cells, end_section=ends)
    return table


def _measure(text: str) -> int:
    return max(map(len, text.split("\n")))


def _make_cell(row: Row, model: int) -> Text:
    cell = Text(format_score(row.score, row.values[model]) or "-")
    if (change := row.differences[model]) is not None:
        cell.append("\n" + format_score(row.score, change, "+"), style=_choose_style(change))
    return cell


def describe(comparison: Comparison) -> list[str]:
    """What the numbers of the table are, and its notes: one line each."""
    tasks = {row.task for row in comparison.rows if not row.is_mean}
    lines = ["A score is followed by its standard error."]
    if len(comparison.models) > 1:
        first = shorten_names(comparison.models)[comparison.models[0]]
        lines.append(f"A difference is to {first}, with its paired standard error, on the items of both.")
    for note, about in comparison.notes.items():
        lines.append(f"{'all tasks' if len(about) > 1 and tasks == set(about) else ', '.join(about)}: {note}")
    return lines


def shorten_names(models: Sequence[str]) -> dict[str, str]:
    """The last part of each name, or as many parts as tell the models apart."""
    parts = {model: model.rstrip("/").split("/") for model in models}
    short = {}
    for model in models:
        for n in range(1, len(parts[model]) + 1):
            short[model] = "/".join(parts[model][-n:])
            if all(other == model or parts[other][-n:] != parts[model][-n:] for other in models):
                break
    return short


def label_score(name: str) -> str:
    """The name of a score with its unit, and an arrow if lower is better."""
    return name + (" %" if name.startswith(PERCENT) else "") + (" ↓" if name in LOWER_IS_BETTER else "")


def count_items(row: Row) -> str:
    """The number of items that a score is over: a range if the models have different numbers."""
    numbers = [value.items for value in row.values if value is not None]
    return f"{min(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)}-{max(numbers)}"


def format_score(name: str, score: Score | None, sign: str = "") -> str:
    """A score with its standard error, such as ``43.5 ± 1.1``; nothing if there is none."""
    if score is None:
        return ""
    factor, digits = (100.0, 1) if name.startswith(PERCENT) else (1.0, DECIMALS.get(name, DIGITS))
    text = f"{factor * score.value:{sign}.{digits}f}"
    return text if score.stderr is None else f"{text} ± {factor * score.stderr:.{digits}f}"


def _choose_style(change: Difference | None) -> str:
    """Green for better and red for worse by more than two standard errors."""
    if change is None or change.stderr is None or abs(change.value) <= 2 * change.stderr:
        return ""
    return "green" if (change.value > 0) == change.higher_is_better else "red"


def write_comparison(output: str, models: Results, *suites: str) -> None:
    """Write ``comparison.csv`` (a line a model and score, of all scores) and ``comparison.md`` (the shown table)."""
    comparison = compare_models(models, *suites)
    write_atomically(os.path.join(output, "comparison.csv"), as_csv(comparison))
    write_atomically(os.path.join(output, "comparison.md"), as_markdown(comparison))


def as_csv(comparison: Comparison) -> str:
    """A line a model and score, of all scores, in their own units: accuracies are shares."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = ("model", "task", "score", "value", "stderr", "items", "higher_is_better")
    writer.writerow([*columns, "difference", "difference_stderr", "difference_items"])
    for row in comparison.rows:
        for model, value, change in zip(comparison.models, row.values, row.differences, strict=True):
            if value is None:
                continue
            numbers = [value.value, value.stderr, value.items, value.higher_is_better]
            changes = [None] * 3 if change is None else [change.value, change.stderr, change.items]
            writer.writerow([model, row.task, row.score, *numbers, *changes])
    return file.getvalue()


def as_markdown(comparison: Comparison) -> str:
    """The shown rows as a Markdown table, with the notes below."""
    short = shorten_names(comparison.models)
    header = ["task", "score", "items", short[comparison.models[0]]]
    for model in comparison.models[1:]:
        header += [short[model], "difference"]
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
    for row in comparison.rows:
        if not row.shown:
            continue
        cells = [row.task, label_score(row.score), count_items(row), format_score(row.score, row.values[0])]
        for value, change in zip(row.values[1:], row.differences[1:], strict=True):
            cells += [format_score(row.score, value), format_score(row.score, change, "+")]
        lines.append(cells)
    table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines]
    return "\n".join([*table, "", *(f"- {line}" for line in describe(comparison))]) + "\n"
