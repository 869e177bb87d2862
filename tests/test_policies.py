"""Budgets are exact, ties deterministic, and draws do not depend on how sequences are batched."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sekd.policies import POLICIES, budgets, make_policy

VALID = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 1]]).bool()
SCORES = torch.tensor([[9.0, 1, 3, 3, 2, 9], [1, 1, 1, 1, 1, 1], [0, -5, 9, 9, 9, 0]])


@pytest.mark.parametrize(
    ("percent", "n", "k"),
    [
        ("0.07", 100, 7),
        ("0.2", 10, 2),
        ("0.2", 11, 3),
        ("0.0025", 400, 1),
        ("0.0025", 401, 2),
        ("1.0", 7, 7),
        ("0.29", 100, 29),
        ("0.001", 3, 1),
    ],
)
def test_budget_is_the_ceiling_of_the_written_decimal(percent, n, k):
    assert budgets(torch.ones(1, n).bool(), float(percent)).item() == k


@given(st.decimals("0.0025", "1", places=4), st.lists(st.integers(0, 2048), min_size=1, max_size=8))
@settings(deadline=None, max_examples=200)
def test_budgets_are_exact_rationals(fraction, lengths):
    valid = torch.arange(max(*lengths, 1))[None] < torch.tensor(lengths)[:, None]
    exact = [max(1, -((-Fraction(str(fraction)) * n) // 1)) if n else 0 for n in lengths]
    assert budgets(valid, float(fraction)).tolist() == exact


def test_all_is_the_mean_over_valid_rows():
    weights = make_policy("all")(SCORES, VALID)
    torch.testing.assert_close(
        weights, torch.tensor([[0, 0.25, 0.25, 0.25, 0.25, 0], [0.0] * 6, [1 / 3, 1 / 3, 0, 0, 0, 1 / 3]])
    )


def test_top_k_takes_the_highest_and_the_lower_index_of_a_tie():
    weights = make_policy("top_k", 0.25)(SCORES, VALID)
    assert weights.tolist() == [[0, 0, 1, 0, 0, 0], [0] * 6, [1, 0, 0, 0, 0, 0]]
    weights = make_policy("top_k", 0.5)(SCORES, VALID)
    assert weights.tolist() == [[0, 0, 0.5, 0.5, 0, 0], [0] * 6, [0.5, 0, 0, 0, 0, 0.5]]


def test_top_k_never_takes_an_invalid_row_even_if_scores_are_minus_infinity():
    scores = torch.full((1, 4), -torch.inf)
    valid = torch.tensor([[False, True, False, True]])
    assert make_policy("top_k", 1.0)(scores, valid).tolist() == [[0, 0.5, 0, 0.5]]


@given(st.integers(0, 2**31), st.sampled_from([0.07, 0.2, 0.5, 1.0]))
@settings(deadline=None, max_examples=50)
def test_top_k_equals_sorting_row_by_row(seed, fraction):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, (3, 20), generator=generator).float()  # many ties
    valid = torch.rand(3, 20, generator=generator) < 0.6
    weights = make_policy("top_k", fraction)(scores, valid)
    for s, v, w, k in zip(scores.tolist(), valid.tolist(), weights, budgets(valid, fraction).tolist(), strict=True):
        order = sorted((i for i in range(20) if v[i]), key=lambda i: (-s[i], i))
        expected = torch.zeros(20)
        if k:
            expected[order[:k]] = 1 / k
        torch.testing.assert_close(w, expected)


def test_random_keeps_the_budget_and_draws_uniformly():
    policy, generator = make_policy("random", 0.5), torch.Generator().manual_seed(0)
    draws = 4000
    counts = sum((policy(SCORES, VALID, generator=generator) > 0).double() for _ in range(draws))
    assert counts[~VALID].sum() == 0
    assert counts.sum(1).tolist() == [2 * draws, 0, 2 * draws]
    for row, expected in ((0, draws / 2), (2, draws * 2 / 3)):
        # Five standard deviations of a binomial count.
        assert (counts[row][VALID[row]] - expected).abs().max() < 5 * (expected * (1 - expected / draws)) ** 0.5


def test_random_does_not_depend_on_batching_or_padding():
    policy = make_policy("random", 0.4)
    seeds = [11, 12, 13]
    valid = torch.zeros(3, 12).bool()
    for row, n in enumerate((5, 12, 9)):
        valid[row, :n] = True
    together = policy(torch.zeros(3, 12), valid, generator=[torch.Generator().manual_seed(s) for s in seeds])
    for row, seed in enumerate(seeds):
        n = int(valid[row].sum())
        alone = policy(torch.zeros(1, n), torch.ones(1, n).bool(), generator=[torch.Generator().manual_seed(seed)])
        assert together[row, :n].tolist() == alone[0].tolist()


@pytest.mark.parametrize("name", POLICIES)
def test_weights_of_a_sequence_sum_to_one(name):
    weights = make_policy(name, 0.3)(SCORES, VALID)
    torch.testing.assert_close(weights.sum(1), torch.tensor([1.0, 0.0, 1.0]))


def test_unknown_names_and_fractions_say_what_to_write():
    with pytest.raises(ValueError, match=r"'topk' is unknown; choose one of all, top_k, random"):
        make_policy("topk")
    for fraction in (0, -0.1, 1.5, 20):
        with pytest.raises(ValueError, match=r"position_fraction .* outside \(0, 1\]; write 0.2 for 20 %"):
            make_policy("top_k", fraction)
