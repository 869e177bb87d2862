"""Scores equal their float64 formulas, value and gradient."""

import math

import pytest
import torch
from oracles import KINDS, logits, score_oracle, teacher_logits

from sekd.losses import split_kl
from sekd.scores import NORMALIZATIONS, SCORES, Rows, Scoring, make_scoring


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCORES)
def test_equals_the_formula(name, kind, dtype):
    student, teacher = logits(kind).to(dtype), teacher_logits(len(logits(kind))).to(dtype)
    targets = torch.arange(len(student)) * 7 % 50
    ours, theirs = student.clone().requires_grad_(), student.double().requires_grad_()
    value = SCORES[name](Rows(ours.float().log_softmax(-1), targets, teacher.float().log_softmax(-1)))
    expected = score_oracle(name, theirs, teacher, targets)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=1e-5)
    if len(student) and expected.requires_grad:
        value.sum().backward()
        expected.sum().backward()
        # A bf16 gradient is the exact one, rounded.
        tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(ours.grad.double(), theirs.grad, **tolerance)


def test_entropies_are_in_nats():
    flat = torch.zeros(1, 50).log_softmax(-1)
    for name in ("student_entropy", "teacher_entropy"):
        assert SCORES[name](Rows(flat, torch.tensor([0]), flat)).item() == pytest.approx(math.log(50), abs=1e-5)


@pytest.mark.parametrize("kind", ["random", "peaked", "flat", "single"])
def test_kl_is_the_target_part_and_the_rest(kind):
    """KL = TCKD + (1 - p(y)) NCKD (Zhao et al., 2022; cited in the paper's section 2)."""
    q, p = logits(kind).log_softmax(-1), teacher_logits(len(logits(kind))).log_softmax(-1)
    targets = torch.arange(len(q)) * 7 % 50
    target, others = split_kl(q, p, targets)
    rest = 1 - p.gather(1, targets[:, None])[:, 0].exp()
    torch.testing.assert_close(SCORES["kl"](Rows(q, targets, p)), target + rest * others, rtol=1e-5, atol=1e-5)


def test_every_score_says_whether_it_needs_the_teacher():
    rows = Rows(logits("random").log_softmax(-1), torch.arange(6))
    for name, score in SCORES.items():
        assert score.needs_teacher == (name not in ("student_entropy", "student_ce"))
        if score.needs_teacher:
            with pytest.raises(ValueError, match="needs the teacher"):
                score(rows)
        else:
            score(rows)


SEQUENCES = torch.tensor([[9.0, 1, 3, 4, 2, 9], [1, 1, 1, 1, 1, 1], [5, -5, 9, 9, 9, 7], [2, 2, 2, 2, 2, 2]])
VALID = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 1], [1, 0, 1, 0, 0, 0]]).bool()


@pytest.mark.parametrize("name", ["zscore", "minmax"])
def test_normalisation_is_over_the_valid_rows_of_a_sequence(name):
    found = NORMALIZATIONS[name](SEQUENCES, VALID)
    for scores, valid, mine in zip(SEQUENCES.double(), VALID, found, strict=True):
        s = scores[valid]
        if len(s) and s.min() < s.max():
            expected = {"zscore": (s - s.mean()) / s.std(correction=0), "minmax": (s - s.min()) / (s.max() - s.min())}
            torch.testing.assert_close(mine[valid].double(), expected[name], rtol=1e-6, atol=1e-6)
        else:
            assert not mine[valid].any(), "equal scores are 0, not nan"
    assert found.isfinite().all()


def test_a_combination_is_the_weighted_sum_of_normalised_scores():
    scoring = make_scoring({"student_entropy": 1.0, "student_ce": 0.5, "kl": -2}, "minmax")
    assert scoring.needs_teacher
    grid = torch.stack([SEQUENCES, SEQUENCES * 3 + 1, SEQUENCES.flip(1)], dim=-1)
    minmax = NORMALIZATIONS["minmax"]
    expected = minmax(SEQUENCES, VALID) * 1.5 - 2 * minmax(SEQUENCES.flip(1), VALID)
    torch.testing.assert_close(scoring.combine(grid, VALID), expected)


def test_one_score_is_itself():
    assert torch.equal(make_scoring("student_ce").combine(SEQUENCES[..., None], VALID), SEQUENCES)
    assert not make_scoring("student_ce").needs_teacher


def test_rows_give_one_column_a_score():
    q, p = logits("random").log_softmax(-1), teacher_logits(6).log_softmax(-1)
    rows = Rows(q, torch.arange(6), p)
    columns = Scoring(("kl", "student_ce")).score(rows)
    assert torch.equal(columns[:, 0], SCORES["kl"](rows))
    assert torch.equal(columns[:, 1], SCORES["student_ce"](rows))


@pytest.mark.parametrize(
    ("score", "normalization", "message"),
    [
        ("entropy", "none", "position_score 'entropy' is unknown; choose from student_entropy, teacher_entropy"),
        ({"student_entropy": 1, "klx": 1}, "none", "position_score 'klx' is unknown"),
        ({"student_entropy": "much"}, "none", "the weight of student_entropy is 'much'; it must be a finite number"),
        ({"student_entropy": float("nan")}, "none", "the weight of student_entropy is nan; it must be a finite number"),
        ({"student_entropy": 0}, "none", "all weights are 0"),
        ({}, "none", "all weights are 0"),
        ("kl", "softmax", "score_normalization 'softmax' is unknown; choose one of none, zscore, minmax"),
    ],
)
def test_what_cannot_be_combined(score, normalization, message):
    with pytest.raises(ValueError, match=message):
        make_scoring(score, normalization)
