"""The records of an evaluation: an item, a score, the result of a task, and why there is none."""

from dataclasses import dataclass, field
from typing import Any

BINS = 15
"""Bins of confidence in an expected calibration error."""


class EvaluationRefused(ValueError):
    """A model, a task, a file or an option that the user chose cannot be evaluated. The message says why."""


@dataclass(frozen=True)
class Item:
    """One evaluated item: a question, a text or a prompt.

    Attributes:
        index: its place in the split of its task.
        prompt: what the model read.
        answer: the right answer; empty if the task has none.
        outputs: what the model answered, one text for each repeat. Of a multiple-choice item, the likeliest choice.
        correct: the share of right outputs, by the main metric of the task; None if the task has no right answers.
        loglikelihoods: of each choice, or of the target, in nats; empty if the outputs were generated.
        metrics: each number that is averaged over the items, by name.
        weight: what the item counts in averages: the number of positions for means over positions, else 1.
        calibration: ``BINS`` times three numbers: how often the confidence fell into the bin, the sum of these
            confidences, and how often the prediction was right. None without predictions.
        skipped: why the item counts in no score; None if it counts.
    """

    index: int
    prompt: str
    answer: str = ""
    outputs: tuple[str, ...] = ()
    correct: float | None = None
    loglikelihoods: tuple[float, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    weight: float = 1.0
    calibration: tuple[tuple[float, float, float], ...] | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class Score:
    """A number over items, with its standard error.

    ``stderr`` is None for a single item. ``higher_is_better`` is None if neither direction is better.
    """

    value: float
    stderr: float | None
    items: int
    higher_is_better: bool | None = True


@dataclass(frozen=True)
class TaskResult:
    """What an evaluation of one model on one task gives.

    Attributes:
        task: its name.
        main: the name of the score that averages and comparisons show.
        scores: by name.
        items: in the order of their index.
        settings: all that the numbers depend on beside the model: task version, shots, split, template, limit, seed,
            repeats, temperature, length of outputs, backend, dtype, hash of the data.
        seconds: how long it took.
    """

    task: str
    main: str
    scores: dict[str, Score]
    items: list[Item]
    settings: dict[str, Any]
    seconds: float
