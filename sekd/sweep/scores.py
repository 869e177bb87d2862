"""The scores of a sweep's runs: of their evaluations and logs, in the form that tables and paired differences need."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sekd.eval.records import TaskResult
from sekd.eval.statistics import Estimate, estimate_together
from sekd.eval.tasks import SUITES
from sekd.metric_kinds import MetricKind, find_kind, get_kind

Results = Mapping[str, TaskResult]
"""The results of a model, by the name of the result."""


@dataclass(frozen=True)
class Paired:
    """A value whose difference to another model's has an error: ``deviations`` are :meth:`Estimate.scale`."""

    value: float
    deviations: Float[np.ndarray, " n"]


@dataclass(frozen=True)
class Column:
    """A score of all models.

    Attributes:
        label: the task and the score, or the suite and the score.
        kind: how it is shown, and which way is better.
        values: of each model; None where it has none.
        paired: of each model, on the items of all models; None where there are none.
        shown: whether the printed table has it; the files have all.
        is_main: whether it is the main score of a task, or the first mean of a suite.
        is_compared: whether it has differences to the baseline.
    """

    label: str
    kind: MetricKind
    values: list[float | None]
    paired: list[Paired | None]
    shown: bool = True
    is_main: bool = False
    is_compared: bool = True


def make_columns(models: Sequence[Results], suites: Sequence[str]) -> list[Column]:
    """The scores of all models: the means of the suites, then each score of each task.

    Of a suite the means alone are shown; of another task the main score, and those whose kind is shown.
    """
    suites = [suite for suite in suites if suite in SUITES]
    in_suites = {task for suite in suites for task in SUITES[suite].tasks}
    columns: dict[tuple[str, str], Column] = {}
    names = dict.fromkeys(name for results in models for name in results)
    for name in names:
        results = [model.get(name) for model in models]
        having = [result for result in results if result is not None]
        _check_settings(name, having)
        estimates = estimate_together([result.items for result in having])
        for score in dict.fromkeys(score for result in having for score in result.scores):
            values = [
                None if result is None or score not in result.scores else result.scores[score] for result in results
            ]
            better = next(value.higher_is_better for value in values if value is not None)
            kind = get_kind(score)
            is_shown = score == having[0].main or (kind.is_shown and "," not in score)
            given = iter(estimates.get(score, [None] * len(having)))
            columns[name, score] = Column(
                f"{name} {score}",
                MetricKind(better, kind.is_share, kind.digits),
                [None if value is None else value.value for value in values],
                [None if result is None else _pair(next(given)) for result in results],
                is_shown and having[0].task not in in_suites,
                is_main=score == having[0].main,
            )
    means = [
        _average(f"{suite} {score}", find_parts(models, suite, parts), columns, is_main=place == 0)
        for suite in suites
        for place, (score, parts) in enumerate(SUITES[suite].means.items())
    ]
    return [*(mean for mean in means if mean is not None), *columns.values()]


def find_parts(models: Sequence[Results], suite: str, parts: Mapping[str, str]) -> list[tuple[str, str]] | None:
    """The names of the results, and their scores, that a mean of a suite is over; None if no model has all."""
    chosen = []
    for task, score in parts.items():
        split = SUITES[suite].tasks.get(task)
        names = [
            name
            for results in models
            for name, result in results.items()
            if result.task == task and result.settings.get("split") in (split, None)
        ]
        if not names:
            return None
        chosen.append((names[0], score))
    return chosen


def _average(
    label: str, parts: list[tuple[str, str]] | None, columns: Mapping[tuple[str, str], Column], is_main: bool
) -> Column | None:
    """The mean of columns: each task counts the same."""
    if parts is None or any(part not in columns for part in parts):
        return None
    values, paired = list[float | None](), list[Paired | None]()
    for model in range(len(columns[parts[0]].values)):
        own = [columns[part].values[model] for part in parts]
        values.append(None if None in own else math.fsum(value for value in own if value is not None) / len(parts))
        pairs = [pair for part in parts if (pair := columns[part].paired[model]) is not None]
        whole = len(pairs) == len(parts)
        deviations = np.concatenate([pair.deviations for pair in pairs]) / len(parts) if whole else np.zeros(0)
        paired.append(Paired(math.fsum(p.value for p in pairs) / len(parts), deviations) if whole else None)
    first = columns[parts[0]].kind
    return Column(
        label, MetricKind(first.higher_is_better, first.is_share, first.digits), values, paired, is_main=is_main
    )


def _check_settings(name: str, results: Sequence[TaskResult]) -> None:
    """Raise ValueError if results of a task cannot be compared."""
    for result in results[1:]:
        for key, value in result.settings.items():
            first = results[0].settings.get(key)
            if value != first:
                raise ValueError(
                    f"the models were evaluated on {name} with other settings ({key}: {first} and {value}); "
                    "delete the folders `evaluations` of the runs, and evaluate again"
                )


def _pair(estimate: Estimate | None) -> Paired | None:
    if estimate is None or (deviations := estimate.scale()) is None:
        return None
    return Paired(estimate.value, deviations)


def make_log_columns(models: Sequence[Mapping[str, float]], metric: str | None) -> list[Column]:
    """The ``eval_`` metrics of all models, without errors over items: the logs have none. ``metric`` is shown too."""
    columns = []
    for name in dict.fromkeys(name for metrics in models for name in metrics):
        kind, values = find_kind(name) or MetricKind(), [metrics.get(name) for metrics in models]
        is_shown = kind.is_shown or name == metric or name.endswith("_accuracy")
        columns.append(Column(name, kind, values, [None] * len(models), is_shown))
    return columns
