"""recipes/newer_scores.py, against the papers' formulas written out in float64, a position at a time."""

import importlib
import math
from pathlib import Path

import pytest
import torch

from sekd.policies import make_policy
from sekd.scores import Rows

N, V = 30, 40


@pytest.fixture
def newer(monkeypatch, own_strategies):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "recipes")
    return importlib.import_module("newer_scores")


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    q, p = ((2 * torch.randn(N, V, generator=generator)).log_softmax(-1) for _ in range(2))
    return Rows(q, torch.randint(V, (N,), generator=generator), p)


def as_lists(rows):
    return rows.student_logp.double().exp().tolist(), rows.teacher.double().exp().tolist(), rows.targets.tolist()


def test_dial_is_the_gap_of_logits_times_the_logarithmic_mean(newer, rows):
    expected = []
    for q, p, y in zip(*as_lists(rows), strict=True):
        gap = abs(math.log(p[y]) - math.log(q[y]))
        expected.append(gap * (p[y] - q[y]) / (math.log(p[y]) - math.log(q[y])))
    torch.testing.assert_close(newer.dial(rows), torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_ta_reads_the_students_likeliest_classes(newer, rows):
    divergences, coverages = [], []
    for q, p, _ in zip(*as_lists(rows), strict=True):
        kept = sorted(range(V), key=lambda v: -q[v])[:16]
        mass_q, mass_p = sum(q[v] for v in kept), sum(p[v] for v in kept)
        coverages.append(mass_p)
        divergences.append(sum(p[v] / mass_p * math.log(p[v] / mass_p / (q[v] / mass_q)) for v in kept))
    torch.testing.assert_close(newer.ta_divergence(rows), torch.tensor(divergences), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(newer.ta_coverage(rows), torch.tensor(coverages), rtol=1e-4, atol=1e-6)


def test_ier_is_signal_over_the_least_noise(newer, rows):
    expected = []
    for q, p, _ in zip(*as_lists(rows), strict=True):
        r = [math.log(a / b) for a, b in zip(q, p, strict=True)]
        mean = sum(a * x for a, x in zip(q, r, strict=True))
        signal = sum(a * (x - mean) ** 2 for a, x in zip(q, r, strict=True))

        def noise(b, q=q, r=r, signal=signal):
            return sum(a * (x - b) ** 2 * (1 / a - 1) for a, x in zip(q, r, strict=True)) - signal

        low, high = -20.0, 20.0
        for _ in range(200):  # a parabola in b: ternary search finds its least value
            one, two = low + (high - low) / 3, high - (high - low) / 3
            low, high = (low, two) if noise(one) < noise(two) else (one, high)
        expected.append(signal / noise(low))
    torch.testing.assert_close(newer.ier(rows), torch.tensor(expected), rtol=1e-3, atol=1e-6)


def test_policies_scale_over_the_batch(newer):
    scores = torch.rand(2, 50, 2, generator=torch.Generator().manual_seed(1))
    valid = torch.ones(2, 50, dtype=torch.bool)
    valid[1, 30:] = False

    def scale(column, low, high):
        values = sorted(scores[..., column][valid].double().tolist())

        def quantile(share):
            place = share * (len(values) - 1)
            below = math.floor(place)
            above = min(below + 1, len(values) - 1)
            return values[below] + (place - below) * (values[above] - values[below])

        first, last = quantile(low), quantile(high)
        return ((scores[..., column].double() - first) / (last - first)).clamp(0, 1)

    h, d = scale(0, 0, 0.98), scale(1, 0, 1)
    combined = {"tip_of_batch": h + d - h * d, "ta": scale(0, 0.05, 0.95) * scale(1, 0.05, 0.95)}
    for name, expected in combined.items():
        weights = make_policy(name, 0.2)(scores, valid)
        for b, n in ((0, 50), (1, 30)):
            best = expected[b, :n].topk(n // 5).indices
            assert {*weights[b].nonzero()[:, 0].tolist()} == {*best.tolist()}
