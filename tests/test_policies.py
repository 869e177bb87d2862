"""Budgets are exact, ties deterministic, weights those of the formulas, and draws do not depend on batching."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sekd.policies import POLICIES, make_policy
from sekd.policies.bandit import FEATURES
from sekd.policies.ranks import budgets, eligible

VALID = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 1]]).bool()
SCORES = torch.tensor([[9.0, 1, 3, 3, 2, 9], [1, 1, 1, 1, 1, 1], [0, -5, 9, 9, 9, 0]])
POSITIVE = SCORES.abs() + 0.5


def scores_for(name, shape=(3, 6), seed=0):
    """Random positive scores in the shape that the policy reads."""
    generator = torch.Generator().manual_seed(seed)
    reads = POLICIES[name].reads
    columns = 1 if reads is None else len(reads)
    scores = torch.rand(*shape, max(columns, 1), generator=generator) * 4
    return scores if columns > 1 else scores[..., 0]


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
            expected[torch.tensor(order[:k])] = 1 / k
        torch.testing.assert_close(w, expected)


def test_prefix_takes_the_first_rows():
    weights = make_policy("prefix", 0.5)(SCORES, VALID)
    assert weights.tolist() == [[0, 0.5, 0.5, 0, 0, 0], [0] * 6, [0.5, 0.5, 0, 0, 0, 0]]


@pytest.mark.parametrize(("step", "start"), [(0, 0), (2000, 4), (4000, 8), (9999, 8), (499, 0), (500, 1)])
def test_curriculum_hits_its_window(step, start):
    """10 rows, K = 2: the window starts at floor(8 * phase) of the ascending order."""
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    scores = torch.empty(1, 10).scatter_(1, order[None], torch.arange(10.0)[None])  # order[i] has score i
    weights = make_policy("curriculum", 0.2)(scores, torch.ones(1, 10).bool(), step=step)
    assert weights[0, order[start : start + 2]].tolist() == [0.5, 0.5]
    assert weights.sum() == 1


@given(st.integers(0, 2**31), st.integers(0, 12), st.sampled_from([0.07, 0.2, 0.5, 1.0]))
@settings(deadline=None, max_examples=50)
def test_curriculum_equals_sorting_row_by_row(seed, step, fraction):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, (3, 20), generator=generator).float()
    valid = torch.rand(3, 20, generator=generator) < 0.6
    weights = make_policy("curriculum", fraction, steps=10)(scores, valid, step=step)
    for s, v, w, k in zip(scores.tolist(), valid.tolist(), weights, budgets(valid, fraction).tolist(), strict=True):
        order = sorted((i for i in range(20) if v[i]), key=lambda i: (s[i], i))
        start = math.floor((len(order) - k) * min(Fraction(1), Fraction(step, 10)))
        expected = torch.zeros(20)
        if k:
            expected[torch.tensor(order[start : start + k])] = 1 / k
        torch.testing.assert_close(w, expected)


def test_weighted_is_proportional_to_the_score():
    weights = make_policy("weighted")(POSITIVE, VALID)
    for s, v, w in zip(POSITIVE.double(), VALID, weights, strict=True):
        expected = torch.where(v, s, 0) / max(float(s[v].sum()), 1e-9)
        torch.testing.assert_close(w.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["weighted", "pos_rs", "pos_rs_corrected"])
def test_scores_that_are_all_zero_are_uniform(name):
    policy, generator = make_policy(name, 0.5), torch.Generator().manual_seed(0)
    weights = policy(torch.zeros(3 * 3000, 6), VALID.repeat(3000, 1), generator=generator)
    torch.testing.assert_close(weights.view(3000, 3, 6).mean(0), make_policy("all")(SCORES, VALID), rtol=0, atol=0.03)


# Estimators: the mean of many draws lies within five standard errors of what it estimates


def mean_of_draws(name, draws=20_000, fraction=0.5, **options):
    policy, generator = make_policy(name, fraction, **options), torch.Generator().manual_seed(7)
    many = POSITIVE.repeat(draws, 1), VALID.repeat(draws, 1)
    weights = policy(*many, generator=generator).double().view(draws, 3, 6)
    return weights.mean(0), 5 * weights.std(0) / draws**0.5 + 1e-7


@pytest.mark.parametrize("exponent", [1.0, 0.5, 2.0, 0.0])
def test_pos_rs_is_unbiased_for_weighted_kd(exponent):
    mean, error = mean_of_draws("pos_rs", exponent=exponent)
    expected = make_policy("weighted")(POSITIVE**exponent, VALID).double()
    assert ((mean - expected).abs() <= error).all()
    assert (mean - make_policy("all")(POSITIVE, VALID)).abs().max() > 0.05 or exponent == 0, "not for Full KD"


@pytest.mark.parametrize("coverage", [0.0, 0.5])
@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_pos_rs_corrected_is_unbiased_for_full_kd(exponent, coverage):
    mean, error = mean_of_draws("pos_rs_corrected", exponent=exponent, coverage=coverage)
    expected = make_policy("all")(POSITIVE, VALID).double()
    assert ((mean - expected).abs() <= error).all()


def test_pos_rs_weights_are_counts_over_the_budget():
    weights = make_policy("pos_rs", 0.5)(POSITIVE, VALID, generator=torch.Generator().manual_seed(0))
    counts = weights * 2
    assert torch.equal(counts, counts.round())
    assert counts.sum(1).tolist() == [2, 0, 2]


def test_coverage_spends_part_of_the_budget_on_the_highest():
    """Half of K = 2 rows: the highest always weighs 1/2, the other half is drawn among the rest."""
    policy, generator = make_policy("pos_rs", 0.5, coverage=0.5), torch.Generator().manual_seed(0)
    weights = policy(torch.tensor([[1.0, 9, 3, 2]]).repeat(4000, 1), torch.ones(4000, 4).bool(), generator=generator)
    assert (weights[:, 1] == 0.5).all()
    torch.testing.assert_close(weights.mean(0), torch.tensor([1 / 12, 1 / 2, 3 / 12, 2 / 12]), rtol=0, atol=0.03)


def test_tip_takes_uncertain_rows_and_confident_ones_that_the_teacher_contradicts():
    entropy = torch.tensor([[4.0, 0.1, 0.1, 0.2, 2.0]])
    divergence = torch.tensor([[0.1, 6.0, 0.2, 0.0, 0.1]])
    weights = make_policy("tip", 0.4)(torch.stack([entropy, divergence], -1), torch.ones(1, 5).bool())
    assert weights.tolist() == [[0.5, 0.5, 0, 0, 0]]
    assert make_policy("top_k", 0.4)(entropy, torch.ones(1, 5).bool()).tolist() == [[0.5, 0, 0, 0, 0.5]]


@given(st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_tip_ties_the_most_uncertain_position_and_the_most_contradicted_one(seed):
    """Both score exactly 1, whatever the other criterion says: the lower index is taken, on every machine."""
    scores = torch.rand(4, 20, 2, generator=torch.Generator().manual_seed(seed)) * 5
    weights = make_policy("tip", 0.05)(scores, torch.ones(4, 20).bool())
    assert weights.argmax(1).tolist() == scores.argmax(1).amin(1).tolist()


def test_random_keeps_the_budget_and_draws_uniformly():
    policy, generator = make_policy("random", 0.5), torch.Generator().manual_seed(0)
    draws = 4000
    weights = policy(SCORES.repeat(draws, 1), VALID.repeat(draws, 1), generator=generator)
    counts = (weights > 0).double().view(draws, 3, 6).sum(0)
    assert counts[~VALID].sum() == 0
    assert counts.sum(1).tolist() == [2 * draws, 0, 2 * draws]
    for row, expected in ((0, draws / 2), (2, draws * 2 / 3)):
        # Five standard deviations of a binomial count.
        assert (counts[row][VALID[row]] - expected).abs().max() < 5 * (expected * (1 - expected / draws)) ** 0.5


@pytest.mark.parametrize("name", ["random", "pos_rs", "pos_rs_corrected"])
def test_draws_do_not_depend_on_batching_or_padding(name):
    policy = make_policy(name, 0.4)
    seeds = [11, 12, 13]
    valid = torch.zeros(3, 12).bool()
    for row, n in enumerate((5, 12, 9)):
        valid[row, :n] = True
    scores = scores_for(name, (3, 12))
    together = policy(scores, valid, generator=[torch.Generator().manual_seed(s) for s in seeds])
    for row, seed in enumerate(seeds):
        n = int(valid[row].sum())
        generator = [torch.Generator().manual_seed(seed)]
        alone = policy(scores[row : row + 1, :n], torch.ones(1, n).bool(), generator=generator)
        torch.testing.assert_close(together[row, :n], alone[0])
        assert not together[row, n:].any()


@pytest.mark.parametrize("name", POLICIES)
def test_weights_of_a_sequence_sum_to_one_and_the_same_seed_draws_the_same(name):
    found = [
        make_policy(name, 0.3)(scores_for(name), VALID, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    ]
    assert torch.equal(*found)
    assert found[0].dtype == torch.float32
    if name != "pos_rs_corrected":  # its weights sum to 1 in expectation
        torch.testing.assert_close(found[0].sum(1), torch.tensor([1.0, 0.0, 1.0]))


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_valid_gives_nothing(name):
    weights = make_policy(name, 0.3)(scores_for(name), torch.zeros(3, 6).bool(), generator=torch.Generator())
    assert not weights.any()


@pytest.mark.parametrize("name", [*POLICIES])
def test_one_valid_row_gets_everything(name):
    valid = torch.zeros(3, 6).bool()
    valid[:, 2] = True
    weights = make_policy(name, 0.3)(scores_for(name), valid, generator=torch.Generator())
    torch.testing.assert_close(weights, valid.float())


@pytest.mark.parametrize("name", ["gls", "pos_rs", "pos_rs_corrected", "weighted"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(name, poison):
    scores = scores_for(name)
    scores[0, 2] = poison
    with pytest.raises(FloatingPointError, match="a position score is not finite"):
        make_policy(name)(scores, VALID)
    scores[0, 2], scores[1, 3] = 1.0, poison  # nobody reads an invalid row
    assert make_policy(name)(scores, VALID).isfinite().all()


def test_large_exponents_take_the_highest():
    weights = make_policy("pos_rs", 0.5, exponent=2000.0)(POSITIVE * 1e7, VALID, generator=torch.Generator())
    assert weights[2].tolist() == [0, 1, 0, 0, 0, 0]


def test_gls_with_all_positions_is_full_kd():
    policy = make_policy("gls", 1.0)
    for scores in (SCORES, SCORES - 5):
        assert torch.equal(policy(scores, VALID) > 0, VALID)


def test_skipping_counts_from_the_start_of_each_packed_document():
    valid = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1, 0]]).bool()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    assert eligible(valid, 2, positions).int().tolist() == [[0, 0, 1, 0, 0, 0, 1, 1, 0]]
    assert eligible(valid, 2).int().tolist() == [[0, 0, 1, 0, 1, 1, 1, 1, 0]]


def test_skipping_the_first_rows():
    assert eligible(VALID, 0).tolist() == VALID.tolist()
    assert eligible(VALID, 2).int().tolist() == [[0, 0, 0, 1, 1, 0], [0] * 6, [0, 0, 0, 0, 0, 1]]
    assert eligible(VALID, 3).int().tolist() == [[0, 0, 0, 0, 1, 0], [0] * 6, [1, 1, 0, 0, 0, 1]], "unless none is left"


def test_unknown_names_fractions_and_options_say_what_to_write():
    with pytest.raises(ValueError, match=r"'topk' is unknown; choose one of all, top_k, random"):
        make_policy("topk")
    for fraction in (0, -0.1, 1.5, 20):
        with pytest.raises(ValueError, match=r"position_fraction .* outside \(0, 1\]; write 0.2 for 20 %"):
            make_policy("top_k", fraction)
    with pytest.raises(ValueError, match="position_policy 'top_k' has no option 'exponent'; it has none"):
        make_policy("top_k", exponent=2.0)
    with pytest.raises(ValueError, match="exponent -1 must not be negative"):
        make_policy("pos_rs", exponent=-1)
    with pytest.raises(ValueError, match=r"coverage 1 is outside \[0, 1\)"):
        make_policy("pos_rs", coverage=1)
    with pytest.raises(ValueError, match="steps 0 must be at least 1"):
        make_policy("curriculum", steps=0)
    assert [*POLICIES["pos_rs"].options] == ["exponent", "coverage"]
    assert len(FEATURES) == 5
