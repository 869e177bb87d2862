"""Scores of items: means, perplexity, calibration, their standard errors, and paired differences."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Float

from sekd.eval.records import BINS, Item, Score
from sekd.metric_kinds import choose_direction, get_kind

DRAWS = 1_000
"""Resamples of the items that give the standard error of a calibration error."""


@dataclass(frozen=True)
class Estimate:
    """A score before it becomes one number with an error.

    ``deviations`` are numbers with mean 0, in the same order for every model: what each item adds to the score beyond
    the mean, or how each resample differs from the others. The standard error is the root of n / (n - 1) times their
    sum of squares, for n deviations. The deviations of a difference are the difference of the deviations.
    """

    value: float
    deviations: Float[np.ndarray, " n"]

    def find_error(self) -> float | None:
        """The standard error; None if one item gives none."""
        n = len(self.deviations)
        return math.sqrt(n / (n - 1) * float(np.square(self.deviations).sum())) if n > 1 else None

    def scale(self) -> Float[np.ndarray, " n"] | None:
        """The deviations times the root of n / (n - 1): their sum of squares is the squared standard error."""
        n = len(self.deviations)
        return self.deviations * math.sqrt(n / (n - 1)) if n > 1 else None


@dataclass(frozen=True)
class Aggregate:
    """A score that is no mean of a metric: which items have what it reads, and how it is estimated from them."""

    has: Callable[[Item], bool]
    estimate: Callable[[Sequence[Item]], Estimate]


def estimate_mean(items: Sequence[Item], name: str) -> Estimate:
    """The mean of a metric: sum_i w_i x_i / sum_i w_i, a ratio estimator with independent items.

    The deviation of item i is w_i (x_i - mean) / sum w. With equal weights the standard error is the sample's standard
    deviation over sqrt(n), which is lm-eval's.
    """
    x = np.array([item.metrics[name] for item in items], dtype=np.float64)
    w = np.array([1.0 if ignores_weight(name) else item.weight for item in items], dtype=np.float64)
    mean = float((w * x).sum() / w.sum())
    return Estimate(mean, w * (x - mean) / w.sum())


def estimate_perplexity(items: Sequence[Item]) -> Estimate:
    """exp of the mean of ``nll``; the error by the delta method: perplexity times the error of the mean."""
    mean = estimate_mean(items, "nll")
    value = math.exp(min(mean.value, 700.0))
    return Estimate(value, value * mean.deviations)


def estimate_ece(items: Sequence[Item]) -> Estimate:
    """The expected calibration error (Guo et al., 2017, equation 3) of all predictions of the items.

    A prediction has a confidence, its probability, and is right or wrong. The ``BINS`` = 15 bins are equally wide:
    confidence c falls into bin floor(15 c), and 1 into the last one. Then

        ECE = sum over bins of (predictions in the bin / all predictions) * |share of right ones - mean confidence|

    which is sum over bins of |right - sum of confidences| / predictions. The error is that of a bootstrap over items
    with ``DRAWS`` resamples; its seed is fixed, so that two models are resampled alike. A model that is calibrated
    still has an ECE above 0 on few items, since each bin's gap counts with its absolute value.
    """
    bins = np.array([item.calibration for item in items], dtype=np.float64)
    counts, gaps = bins[:, :, 0].sum(1), bins[:, :, 2] - bins[:, :, 1]
    n, generator, parts = len(items), np.random.default_rng(0), []
    rows = min(DRAWS, max(1, 1_000_000 // n))  # resamples at once, in some megabytes
    for start in range(0, DRAWS, rows):
        chosen = generator.integers(n, size=(min(rows, DRAWS - start), n))
        places = chosen + n * np.arange(len(chosen))[:, None]
        times = np.bincount(places.ravel(), minlength=chosen.size).reshape(chosen.shape).astype(np.float64)
        parts.append(np.abs(times @ gaps).sum(1) / (times @ counts))
    draws = np.concatenate(parts)
    value = float(np.abs(gaps.sum(0)).sum() / counts.sum())
    return Estimate(value, (draws - draws.mean()) / math.sqrt(DRAWS) if n > 1 else np.zeros(1))


AGGREGATES: dict[str, Aggregate] = {
    "perplexity": Aggregate(lambda item: _has(item, "nll"), estimate_perplexity),
    "ece": Aggregate(lambda item: any(count > 0 for count, _, _ in item.calibration or ()), estimate_ece),
}


def summarize(items: Sequence[Item], directions: Mapping[str, bool | None] | None = None) -> dict[str, Score]:
    """Each score of the items: the mean of every metric, then ``AGGREGATES``.

    A score is over the items that are not skipped and have what it reads. A mean over positions leaves out items of
    weight 0. A score without items is absent.

    Args:
        items: of one model and task.
        directions: of scores, by their stripped name, whether more is better; the kinds of scores say it of others.
    """
    scores = {}
    for name, has, estimate in _list_scores(items):
        if chosen := [item for item in items if is_counted(item) and has(item)]:
            scores[name] = _make_score(name, estimate(chosen), len(chosen), directions)
    return scores


def compare_scores(
    first: Sequence[Item], second: Sequence[Item], directions: Mapping[str, bool | None] | None = None
) -> dict[str, Score]:
    """The score of the second model minus the first one's, for each score that both have, on the items of both.

    The standard error is paired: it is that of the differences of the items, and smaller than that of two independent
    scores where the models are right and wrong on the same items.

    Args:
        first: items of the first model.
        second: items of the second model, of the same rows.
        directions: as for :func:`summarize`.

    Raises:
        ValueError: the two have no item in common, or an index twice.
    """
    pairs = pair_items(first, second)
    differences = {}
    for name, has, estimate in _list_scores([item for item, _ in pairs]):
        if chosen := [(a, b) for a, b in pairs if has(a) and has(b)]:
            before, after = (estimate(side) for side in zip(*chosen, strict=True))
            difference = Estimate(after.value - before.value, after.deviations - before.deviations)
            differences[name] = _make_score(name, difference, len(chosen), directions)
    return differences


def estimate_together(models: Sequence[Sequence[Item]]) -> dict[str, list[Estimate]]:
    """Each score that all models have, as an estimate for each model, on the items of all of them.

    The deviations of all models are in the same order, so that they can be subtracted.

    Raises:
        ValueError: a model has an index twice.
    """
    by_index = [{item.index: item for item in items if is_counted(item)} for items in models]
    for items in models:
        if len({item.index for item in items}) < len(items):
            raise ValueError("the items cannot be compared: several of one model have the same index")
    common = [i for i in by_index[0] if all(i in one for one in by_index[1:])]
    estimates = {}
    for name, has, estimate in _list_scores([item for items in models for item in items]):
        if chosen := [i for i in common if all(has(one[i]) for one in by_index)]:
            estimates[name] = [estimate([one[i] for i in chosen]) for one in by_index]
    return estimates


@dataclass(frozen=True)
class SeedErrors:
    """The standard errors of a mean over seeds; None where nothing gives one.

    ``total`` says how much the mean would change with other seeds and other items, ``seeds`` and ``items`` with one of
    them.
    """

    seeds: float | None
    items: float | None
    total: float | None


def find_seed_errors(values: Float[np.ndarray, " S"], deviations: Float[np.ndarray, "S n"] | None) -> SeedErrors:
    """The standard errors of the mean, over S seeds, of a score or a difference. All models answer the same n items.

    Seeds and items are crossed random effects. Let v_s be the values and e_si the scaled deviations, with means e_i
    over the seeds. Then the squared errors are

        seeds: sum (v_s - v)^2 / (S (S - 1))        items: sum e_i^2

    Both count what only a seed and an item together decide, sum (e_si - e_i)^2 / (S (S - 1)). The total counts it once:
    the sum of both, minus it, and at least the larger one of both.

    Args:
        values: of each seed.
        deviations: :meth:`Estimate.scale` of each seed, of the same items in the same order; None without items.
    """
    n = len(values)
    seeds = float(np.var(values, ddof=1)) / n if n > 1 else None
    if deviations is None:
        return SeedErrors(_root(seeds), None, _root(seeds))
    mean = deviations.mean(0)
    items = float(np.square(mean).sum())
    if seeds is None:
        return SeedErrors(None, _root(items), _root(items))
    both = float(np.square(deviations - mean).sum()) / (n * (n - 1))
    return SeedErrors(_root(seeds), _root(items), _root(max(seeds + items - both, seeds, items)))


def _root(square: float | None) -> float | None:
    return None if square is None else math.sqrt(square)


def pair_items(first: Sequence[Item], second: Sequence[Item]) -> list[tuple[Item, Item]]:
    """The items that both have and count, by their index, as pairs in the order of the first.

    The prompts are not compared: two models' chat templates make two prompts of one row.

    Raises:
        ValueError: the two have no item in common, or an index twice.
    """
    by_index = {item.index: item for item in second}
    for items in (first, second):
        if len({item.index for item in items}) < len(items):
            raise ValueError("the items cannot be compared: several of one model have the same index")
    pairs = [(item, by_index[item.index]) for item in first if item.index in by_index]
    if not pairs:
        raise ValueError(
            f"the results cannot be compared: their {len(first)} and {len(second)} items have no common index"
        )
    return [(a, b) for a, b in pairs if is_counted(a) and is_counted(b)]


def average_scores(scores: Sequence[Score]) -> Score:
    """The mean of the scores, or differences, of independent tasks: each task counts the same.

    Its standard error is sqrt(sum of squared errors) / number of tasks; None if a task has none.

    Raises:
        ValueError: there are no scores.
    """
    if not scores:
        raise ValueError("the mean of no scores is not defined")
    errors = [score.stderr for score in scores if score.stderr is not None]
    return replace(
        scores[0],
        value=math.fsum(score.value for score in scores) / len(scores),
        stderr=math.hypot(*errors) / len(scores) if len(errors) == len(scores) else None,
        items=sum(score.items for score in scores),
    )


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that at least one of k outputs is right, unbiased from n outputs of which c are right.

    1 - C(n - c, k) / C(n, k) (Chen et al., 2021, equation 1).

    Raises:
        ValueError: k is not in 1 ... n, or c is not in 0 ... n.
    """
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ValueError(f"pass@{k} needs at least {k} outputs and no more right ones than outputs; got {n} with {c}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def count_passes(right: int, k: int) -> dict[str, float]:
    """``avg@k``, the share of right outputs among k, and ``pass@j`` for j = 2, 4, 8, ... below k, and for k."""
    below = [1 << i for i in range(1, k.bit_length()) if 1 << i < k]
    return {f"avg@{k}": right / k, **{f"pass@{j}": pass_at_k(k, right, j) for j in (*below, k)}}


def fill_bins(confidences: Sequence[float], hits: Sequence[bool]) -> tuple[tuple[float, float, float], ...]:
    """The ``Item.calibration`` of predictions: for each bin, how many, the sum of confidences, how many are right."""
    table = np.zeros((BINS, 3))
    for confidence, hit in zip(confidences, hits, strict=True):
        table[min(int(confidence * BINS), BINS - 1)] += (1.0, confidence, float(hit))
    return tuple((float(n), float(total), float(right)) for n, total, right in table)


def ignores_weight(name: str) -> bool:
    """Does the mean of this metric count every item once, whatever the weights?"""
    return get_kind(name).ignores_weight


def is_counted(item: Item) -> bool:
    """Does the item count in scores?"""
    return item.skipped is None


def _has(item: Item, name: str) -> bool:
    return name in item.metrics and (ignores_weight(name) or item.weight > 0)


def _make_score(name: str, estimate: Estimate, items: int, directions: Mapping[str, bool | None] | None) -> Score:
    return Score(estimate.value, estimate.find_error(), items, choose_direction(name, directions or {}))


def _list_scores(
    items: Sequence[Item],
) -> list[tuple[str, Callable[[Item], bool], Callable[[Sequence[Item]], Estimate]]]:
    """The name of each score that the items may have, which items have it, and its estimate."""
    names = dict.fromkeys(name for item in items for name in item.metrics)
    means = [(name, partial(_has, name=name), partial(estimate_mean, name=name)) for name in names]
    return [*means, *((name, aggregate.has, aggregate.estimate) for name, aggregate in AGGREGATES.items())]
