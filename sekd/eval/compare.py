"""Tables of results: a column a model, with the difference to the first model and its paired standard error."""

import csv
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sekd.eval.labels import describe_common, find_common, label_result, write_value
from sekd.eval.records import Score, TaskResult
from sekd.eval.statistics import average_scores, compare_scores
from sekd.eval.tasks import SUITES
from sekd.files import write_atomically
from sekd.metric_kinds import get_kind, strip_name
from sekd.tables import escape_controls, print_table

NARROWEST = 20
"""Columns of a terminal that a table needs at least for its labels: 16 letters, and the lines around them."""
LARGEST = 1e5
"""From here on a score is written with a power of ten: the perplexity of a model that knows nothing, for example."""
Results = Mapping[str, Mapping[str, TaskResult]]
"""The results of each model, by the name of the model and of the result."""


@dataclass(frozen=True)
class Row:
    """A score of all models.

    Attributes:
        task: the task with its split and settings, as ``results.json`` names it, or the suite.
        label: the same without the settings that all rows have in common.
        score: the name of the score.
        values: of each model; None where it has none.
        differences: to the first model; None for the first one, and where the two cannot be compared.
        shown: whether the printed table has it; the files have all.
        is_mean: whether it is the mean of a suite.
    """

    task: str
    label: str
    score: str
    values: list[Score | None]
    differences: list[Score | None]
    shown: bool
    is_mean: bool = False

    @property
    def higher_is_better(self) -> bool | None:
        """Whether more of the score is better; None if neither direction is."""
        return next((value.higher_is_better for value in self.values if value is not None), None)


@dataclass
class Comparison:
    """The rows of a table, and what a reader must know of them.

    Attributes:
        models: the names of the models.
        common: the settings that all rows have in common, as text.
        rows: all scores.
        notes: each note, with the labels of the rows that it is about.
    """

    models: list[str]
    common: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)

    def note(self, label: str, text: str) -> None:
        """Add a note about a row."""
        labels = self.notes.setdefault(text, [])
        if label not in labels:
            labels.append(label)


def compare_results(first: TaskResult, second: TaskResult) -> dict[str, Score]:
    """The differences of two results of a task (``compare_scores``), without error for scores that no items give.

    Raises:
        ValueError: the two have other settings or other data, or no item in common.
    """
    settings = {
        name: (first.settings.get(name), second.settings.get(name)) for name in first.settings | second.settings
    }
    if different := [f"{n} {write_value(b)}, not {write_value(a)}" for n, (a, b) in settings.items() if a != b]:
        raise ValueError(f"other settings: {'; '.join(different)}")
    directions = {strip_name(name): score.higher_is_better for name, score in second.scores.items()}
    differences = compare_scores(first.items, second.items, directions)
    for name in first.scores.keys() & second.scores.keys() - differences.keys():
        before, after = first.scores[name], second.scores[name]
        differences[name] = replace(after, value=after.value - before.value, stderr=None)
    return differences


def compare_models(models: Results, *suites: str) -> Comparison:
    """All scores of the models as rows, then the means of the suites that were evaluated.

    Args:
        models: the results of each model; the first model is the one that the others are compared with.
        suites: the suites whose means are wanted.
    """
    names = list(models)
    results_of = {
        task: [models[name].get(task) for name in names]
        for task in dict.fromkeys(task for results in models.values() for task in results)
    }
    examples = {task: next(r for r in results if r is not None) for task, results in results_of.items()}
    common = find_common(result for results in models.values() for result in results.values())
    comparison = Comparison(names, describe_common(common))
    in_means = {
        (task, SUITES[suite].tasks.get(task), score)
        for suite in suites
        for scores in SUITES[suite].means.values()
        for task, score in scores.items()
    }
    differences: dict[str, dict[str, dict[str, Score]]] = {name: {} for name in names}
    for task, results in results_of.items():
        example, first = examples[task], results[0]
        name, label = (label_result(example, left_out) for left_out in ((), common))
        for model, result in zip(names[1:], results[1:], strict=True):
            if first is not None and result is not None:
                differences[model][task] = _compare_noted(comparison, label, model, first, result)
        for result in results:
            _note_skipped(comparison, label, result)
        for score in dict.fromkeys(score for result in results if result is not None for score in result.scores):
            is_extra = get_kind(score).is_shown and "," not in score
            is_extra &= (example.task, example.settings.get("split"), score) not in in_means
            comparison.rows.append(
                Row(
                    name,
                    label,
                    score,
                    [None if result is None else result.scores.get(score) for result in results],
                    [None, *(differences[model].get(task, {}).get(score) for model in names[1:])],
                    shown=score == example.main or is_extra,
                )
            )
    for suite in suites:
        for score, parts in SUITES[suite].means.items():
            _add_mean(comparison, models, differences, suite, score, parts)
    return comparison


def _compare_noted(
    comparison: Comparison, label: str, model: str, first: TaskResult, result: TaskResult
) -> dict[str, Score]:
    """The differences of a model's result to the first model's, with a note if not all items are compared."""
    short = shorten_names(comparison.models)
    first_name = short[comparison.models[0]]
    try:
        differences = compare_results(first, result)
    except ValueError as error:
        comparison.note(label, f"{short[model]} is not compared with {first_name}: {error}")
        return {}
    main = result.main
    if main in differences and differences[main].items < max(r.scores[main].items for r in (first, result)):
        number = differences[main].items
        comparison.note(label, f"{short[model]} and {first_name} are compared on the {number} items of both")
    return differences


def _note_skipped(comparison: Comparison, label: str, result: TaskResult | None) -> None:
    items = [] if result is None else result.items
    for reason, number in Counter(item.skipped for item in items if item.skipped is not None).items():
        comparison.note(label, f"{number} of {len(items)} items are skipped: {reason}")


def _add_mean(
    comparison: Comparison,
    models: Results,
    differences: dict[str, dict[str, dict[str, Score]]],
    suite: str,
    score: str,
    parts: Mapping[str, str],
) -> None:
    """Add the mean of a suite's tasks: of each model that has all of them."""
    values: list[Score | None] = []
    changes: list[Score | None] = []
    has_main = False
    for model, results in models.items():
        scores: list[Score] = []
        paired: list[Score] = []
        missing = []
        for task, part in parts.items():
            split = SUITES[suite].tasks.get(task)
            of_task = [n for n, r in results.items() if r.task == task and r.settings.get("split") in (split, None)]
            if not of_task or part not in results[of_task[0]].scores:
                missing.append(task)
                continue
            scores.append(results[of_task[0]].scores[part])
            has_main |= results[of_task[0]].main == part
            if (change := differences[model].get(of_task[0], {}).get(part)) is not None:
                paired.append(change)
        if missing and len(missing) < len(parts):
            comparison.note(f"{suite} {score}", f"{shorten_names(list(models))[model]} lacks {', '.join(missing)}")
        values.append(average_scores(scores) if len(scores) == len(parts) else None)
        changes.append(average_scores(paired) if len(paired) == len(parts) else None)
    if any(value is not None for value in values):
        shown = len(parts) > 1 or not has_main
        comparison.rows.append(Row(suite, suite, score, values, changes, shown, is_mean=True))


def show_table(models: Results, *suites: str) -> None:
    """Print the table of the models, with the means of these suites, and its notes.

    Models that do not fit beside each other get a table of their own, with the first model again.
    """
    comparison = compare_models(models, *suites)
    width = Console().width
    for places in _split_models(comparison, width):
        print_table(make_table(comparison, places, width))
    for line in describe(comparison):
        print(escape_controls(line))


def _split_models(comparison: Comparison, width: int) -> list[list[int]]:
    """The models of each table: the first one, and as many others as fit beside it."""
    shown = [row for row in comparison.rows if row.shown]
    needed = [
        3 + max((_measure(_make_cell(row, i).plain) for row in shown), default=0) for i in range(len(comparison.models))
    ]
    tables, spare = [[0]], width - NARROWEST - needed[0]
    for i in range(1, len(needed)):
        if len(tables[-1]) > 1 and needed[i] > spare:
            tables, spare = [*tables, [0]], width - NARROWEST - needed[0]
        tables[-1].append(i)
        spare -= needed[i]
    return tables


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
    labels = [[escape_controls(row.label), label_score(row), count_items(row)] for row in shown]
    table = Table()
    if several:
        labels = [[f"{task}\n  {score}, {items}"] for task, score, items in labels]
        spare = width - 1 - 3 * (1 + len(models)) - sum(needed)
        widest = max((_measure(label) for (label,) in labels), default=0)
        table.add_column("task, score, items", overflow="fold", width=min(widest, max(NARROWEST - 4, spare)))
        spare -= min(widest, spare)
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
    tasks = {row.label for row in comparison.rows if not row.is_mean}
    lines = ["A score is followed by its standard error."]
    if comparison.common:
        lines.insert(0, f"All rows: {', '.join(comparison.common)}.")
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


def label_score(row: Row) -> str:
    """The name of a row's score with its unit, and an arrow if lower is better."""
    return row.score + " %" * get_kind(row.score).is_share + " ↓" * (row.higher_is_better is False)


def count_items(row: Row) -> str:
    """The number of items that a score is over: a range if the models have different numbers."""
    numbers = [value.items for value in row.values if value is not None]
    return f"{min(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)}-{max(numbers)}"


def format_score(name: str, score: Score | None, sign: str = "") -> str:
    """A score with its standard error, such as ``43.5 ± 1.1``; nothing if there is none."""
    if score is None:
        return ""
    kind = get_kind(name)
    factor = 100.0 if kind.is_share else 1.0
    form = f".{kind.digits}f" if abs(factor * score.value) < LARGEST else ".3g"
    text = f"{factor * score.value:{sign}{form}}"
    return text if score.stderr is None else f"{text} ± {factor * score.stderr:{form}}"


def _choose_style(change: Score | None) -> str:
    """Green for better and red for worse by more than two standard errors; nothing if neither direction is better."""
    if change is None or change.stderr is None or change.higher_is_better is None:
        return ""
    if abs(change.value) <= 2 * change.stderr:
        return ""
    return "green" if (change.value > 0) == change.higher_is_better else "red"


def write_comparison(output: str, models: Results, *suites: str) -> None:
    """Write ``comparison.csv`` (a line a model and score, of all scores) and ``comparison.md`` (the shown table)."""
    comparison = compare_models(models, *suites)
    write_atomically(os.path.join(output, "comparison.csv"), as_csv(comparison), is_shared=True)
    write_atomically(os.path.join(output, "comparison.md"), as_markdown(comparison), is_shared=True)


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
        cells = [row.label, label_score(row), count_items(row), format_score(row.score, row.values[0])]
        for value, change in zip(row.values[1:], row.differences[1:], strict=True):
            cells += [format_score(row.score, value), format_score(row.score, change, "+")]
        lines.append(cells)
    table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines]
    return "\n".join([*table, "", *(f"- {line}" for line in describe(comparison))]) + "\n"
