"""Scores and their standard errors: hand cases, naive loops, simulations."""

import itertools
import math
import random
import statistics

import numpy as np
import pytest

from sekd.eval.records import BINS, Item, Score
from sekd.eval.statistics import (
    average_scores,
    compare_scores,
    count_passes,
    fill_bins,
    pair_items,
    pass_at_k,
    summarize,
)


def make_items(values, name="acc", **fields):
    return [Item(index=i, prompt=f"prompt {i}", metrics={name: value}, **fields) for i, value in enumerate(values)]


def make_predictions(predictions):
    """An item for each list of (confidence, hit)."""
    return [Item(i, "p", calibration=fill_bins(*zip(*pairs, strict=True))) for i, pairs in enumerate(predictions)]


def test_a_mean_and_its_error_by_hand():
    # 1, 0, 1, 1: mean 3/4; squared deviations 3/16 + 9/16 = 12/16; variance 12/16 / 3 = 1/4; error sqrt(1/4 / 4) = 1/4.
    assert summarize(make_items([1.0, 0.0, 1.0, 1.0]))["acc"] == Score(0.75, 0.25, 4)


def test_a_mean_and_its_error_are_those_of_lm_eval():
    metrics = pytest.importorskip("lm_eval.api.metrics")
    values = [random.Random(0).gauss(1, 2) for _ in range(57)]
    score = summarize(make_items(values))["acc"]
    assert score.value == pytest.approx(metrics.mean(values), rel=1e-12)
    assert score.stderr == pytest.approx(metrics.mean_stderr(values), rel=1e-12)
    # perplexity: lm-eval's exp(-mean of log-likelihoods)
    perplexity = summarize(make_items([abs(v) for v in values], "nll"))["perplexity"]
    assert perplexity.value == pytest.approx(metrics.perplexity([-abs(v) for v in values]), rel=1e-12)


def test_a_weighted_mean_by_hand():
    # w 1, 3 and x 2, 6: mean (2 + 18) / 4 = 5; w (x - 5) = -3, 3; error sqrt(2/1 * 18) / 4 = 1.5.
    items = [Item(0, "a", metrics={"nll": 2.0}, weight=1.0), Item(1, "b", metrics={"nll": 6.0}, weight=3.0)]
    scores = summarize(items)
    assert scores["nll"] == Score(5.0, 1.5, 2, higher_is_better=False)
    assert scores["perplexity"].value == pytest.approx(math.exp(5))
    assert scores["perplexity"].stderr == pytest.approx(math.exp(5) * 1.5)


def test_metrics_of_whole_items_ignore_the_weights():
    items = [
        Item(0, "a", metrics={"reverse_kl": 1.0, "math_verify": 1.0, "avg@4": 0.5}, weight=9.0),
        Item(1, "b", metrics={"reverse_kl": 2.0, "math_verify": 0.0, "avg@4": 0.0}, weight=1.0),
        Item(2, "c", metrics={"math_verify": 0.5, "avg@4": 1.0, "reverse_kl": 7.0}, weight=0.0),  # an empty completion
    ]
    scores = summarize(items)
    assert scores["reverse_kl"].value == pytest.approx(1.1)
    assert scores["reverse_kl"].items == 2
    assert scores["math_verify"].value == scores["avg@4"].value == 0.5
    assert scores["math_verify"].items == 3


def test_skipped_items_and_items_without_a_metric_do_not_count():
    items = [
        Item(0, "a", metrics={"acc": 1.0}),
        Item(1, "b", metrics={"acc": 0.0}, skipped="nltk's punkt is missing"),
        Item(2, "c", metrics={"other": 3.0}),
    ]
    assert summarize(items) == {"acc": Score(1.0, None, 1), "other": Score(3.0, None, 1, None)}
    assert summarize(items[1:2]) == {}
    assert summarize([]) == {}


def test_the_calibration_error_by_hand():
    # Bin 13 (0.8667 to 0.9333): 0.9 right, 0.9 wrong: |1 - 1.8| = 0.8. Bin 7 (0.4667 to 0.5333): 0.5 right: 0.5.
    # Bin 14: 1.0 right: 0. The sum over 4 predictions: 1.3 / 4.
    score = summarize(make_predictions([[(0.9, True)], [(0.9, False)], [(0.5, True)], [(1.0, True)]]))["ece"]
    assert score.value == pytest.approx(1.3 / 4)
    assert (score.items, score.higher_is_better) == (4, False)


def test_the_calibration_error_is_that_of_a_naive_loop():
    source = random.Random(1)
    texts = [[(source.random(), source.random() < 0.6) for _ in range(source.randint(1, 9))] for _ in range(40)]
    score = summarize(make_predictions(texts))["ece"]
    assert score.value == pytest.approx(naive_ece(texts), rel=1e-12)
    resamples = [naive_ece([source.choice(texts) for _ in texts]) for _ in range(2000)]
    assert score.stderr == pytest.approx(statistics.stdev(resamples), rel=0.1)


def naive_ece(texts):
    predictions = list(itertools.chain.from_iterable(texts))
    error = 0.0
    for b in range(BINS):
        last = b == BINS - 1
        chosen = [(c, hit) for c, hit in predictions if b / BINS <= c < (b + 1) / BINS or (last and c == 1)]
        if chosen:
            confidence, accuracy = (sum(column) / len(chosen) for column in zip(*chosen, strict=True))
            error += len(chosen) / len(predictions) * abs(accuracy - confidence)
    return error


def test_bins_hold_their_lower_edge_and_the_last_one_1():
    table = fill_bins([0.0, 1.0, 0.2, 0.999], [True, True, False, False])
    assert [row[0] for row in table] == [1, 0, 0, 1, *[0] * 10, 2]
    assert table[14] == (2.0, 1.999, 1.0)


def test_one_item_has_no_error():
    assert summarize(make_items([2.0], "nll"))["perplexity"].stderr is None
    assert summarize(make_predictions([[(0.5, True)]]))["ece"].stderr is None


@pytest.mark.slow
@pytest.mark.parametrize("case", ["equal", "weighted", "perplexity", "ece", "difference"])
def test_the_errors_are_the_spread_of_the_scores(case):
    """Evaluations of many samples of items: their spread is the standard error that one sample gives, on average."""
    generator = np.random.default_rng(3)
    values, errors = [], []
    for _ in range(60 if case == "ece" else 150):
        hard, lengths = generator.random(80), generator.integers(1, 30, size=80)
        first = [float(generator.random() < h) for h in hard]
        if case == "equal":
            score = summarize(make_items(first))["acc"]
        elif case in ("weighted", "perplexity"):  # long texts are easier, so that the weights matter
            nll = generator.normal(2 - lengths / 30, 0.5)
            items = [
                Item(i, "p", metrics={"nll": x}, weight=float(n))
                for i, (x, n) in enumerate(zip(nll.tolist(), lengths.tolist(), strict=True))
            ]
            score = summarize(items)["nll" if case == "weighted" else case]
        elif case == "ece":
            confidences = generator.uniform(0.5, 1, 80)
            score = summarize(make_predictions([[(c, generator.random() < c - 0.3)] for c in confidences.tolist()]))[
                "ece"
            ]
        else:
            second = [1.0 - x if generator.random() < 0.2 else x for x in first]
            score = compare_scores(make_items(first), make_items(second))["acc"]
        values.append(score.value)
        errors.append(score.stderr)
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.2)


def test_a_paired_difference_by_hand():
    # Differences 0, -1, 1, 1: mean 1/4; squared deviations 1/16 + 25/16 + 9/16 + 9/16 = 44/16; variance 11/12.
    found = compare_scores(make_items([1.0, 1.0, 0.0, 0.0]), make_items([1.0, 0.0, 1.0, 1.0]))["acc"]
    assert found.value == 0.25
    assert found.stderr == pytest.approx(math.sqrt(11 / 12 / 4))
    assert found.items == 4


def test_a_weighted_difference_is_that_of_a_jackknife():
    """The jackknife needs no formula: leave each item out, and look at how the difference changes."""
    source = random.Random(5)

    def make(shift):
        return [
            Item(i, "p", metrics={"nll": source.gauss(2 + shift, 0.5)}, weight=float(source.randint(5, 9)))
            for i in range(400)
        ]

    def mean(items):
        return sum(item.weight * item.metrics["nll"] for item in items) / sum(item.weight for item in items)

    first, second = make(0), make(0.1)
    differences = compare_scores(first, second)
    for name, finish in (("nll", float), ("perplexity", math.exp)):
        left_out = [[finish(mean(side[:i] + side[i + 1 :])) for i in range(len(side))] for side in (first, second)]
        changes = [b - a for a, b in zip(*left_out, strict=True)]
        jackknife = math.sqrt((len(changes) - 1) * statistics.pvariance(changes))
        assert differences[name].stderr == pytest.approx(jackknife, rel=0.02)
        assert differences[name].value == pytest.approx(finish(mean(second)) - finish(mean(first)))


def test_two_equal_models_differ_by_nothing():
    items = [
        Item(i, "p", metrics={"nll": i / 7}, calibration=fill_bins([i / 9], [i % 2 == 0]), weight=i + 1.0)
        for i in range(9)
    ]
    for difference in compare_scores(items, list(items)).values():
        assert (difference.value, difference.stderr) == (0.0, 0.0)


def test_the_pairing_of_calibration_errors_uses_the_same_resamples():
    source = random.Random(2)
    pairs = [(source.random(), source.random() < 0.5) for _ in range(200)]
    first = make_predictions([[pair] for pair in pairs])
    second = make_predictions([[(confidence, hit if i % 10 else not hit)] for i, (confidence, hit) in enumerate(pairs)])
    paired = compare_scores(first, second)["ece"].stderr
    a, b = summarize(first)["ece"].stderr, summarize(second)["ece"].stderr
    assert paired < 0.7 * math.hypot(a, b)


def test_only_the_same_items_are_compared():
    first = make_items([0.0, 0.0, 0.0, 0.0])
    second = [
        Item(0, "prompt 0", metrics={"acc": 1.0}),
        Item(1, "another prompt", metrics={"acc": 1.0}),
        Item(2, "prompt 2", metrics={"acc": 1.0}),
        Item(3, "prompt 3", metrics={"acc": 1.0}, skipped="why"),
        Item(9, "prompt 9", metrics={"acc": 1.0}),
    ]
    assert [(a.index, b.index) for a, b in pair_items(first, second)] == [(0, 0), (1, 1), (2, 2)]
    assert compare_scores(first, second)["acc"] == Score(1.0, 0.0, 3)
    with pytest.raises(ValueError, match="their 4 and 1 items have no common index"):
        compare_scores(first, second[4:])
    with pytest.raises(ValueError, match="the same index"):
        compare_scores(first, [second[0], second[0]])


def test_the_average_scores_tasks_by_hand():
    scores = [Score(0.2, 0.03, 10), Score(0.6, 0.04, 30)]
    mean = average_scores(scores)
    assert (mean.value, mean.stderr, mean.items) == (pytest.approx(0.4), pytest.approx(0.025), 40)
    assert average_scores([*scores, Score(0.1, None, 1)]).stderr is None
    assert average_scores([Score(1.0, 0.0, 2, False)]) == Score(1.0, 0.0, 2, False)
    with pytest.raises(ValueError, match="no scores"):
        average_scores([])


def test_pass_at_k_is_the_share_of_subsets_with_a_right_output():
    for n, c in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1):
            if c > n:
                continue
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    assert pass_at_k(10_000, 3, 5_000) == pytest.approx(1 - 0.5**3, rel=1e-3)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_what_cannot_be(n, c, k):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, c, k)


def test_right_outputs_become_avg_and_pass_at_k():
    """Of 5 outputs 2 are right: two drawn ones are both wrong in 3 of 10 pairs, four never."""
    assert count_passes(2, 5) == pytest.approx({"avg@5": 0.4, "pass@2": 0.7, "pass@4": 1.0, "pass@5": 1.0})
    assert count_passes(0, 3) == {"avg@3": 0.0, "pass@2": 0.0, "pass@3": 0.0}
    assert count_passes(1, 4) == pytest.approx({"avg@4": 0.25, "pass@2": 0.5, "pass@4": 1.0})
