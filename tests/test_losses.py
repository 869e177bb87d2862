"""Divergences equal their float64 formulas, value and gradient."""

import pytest
import torch
from oracles import KINDS, kl, logits, loss_oracle, teacher_logits

from sekd.distributions import cross_entropy
from sekd.losses import DIVERGENCES, at_kd, at_kd_factors, decoupled_kl, forward_kl, reduce


def case(kind, dtype):
    student = logits(kind).to(dtype)
    return student, teacher_logits(len(student)).to(dtype), torch.arange(len(student)) * 7 % 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_equals_the_formula(name, kind, dtype):
    student, teacher, targets = case(kind, dtype)
    ours, theirs = student.clone().requires_grad_(), student.double().requires_grad_()
    value = DIVERGENCES[name](ours, teacher, targets)
    expected = loss_oracle(name, theirs, teacher, targets)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=1e-5)
    if len(student):
        value.sum().backward()
        expected.sum().backward()
        # A bf16 gradient is the exact one, rounded.
        tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(ours.grad.double(), theirs.grad, **tolerance)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("jsd", {"beta": beta}) for beta in (0.1, 0.9)),
        *(("skew_kl", {"alpha": alpha}) for alpha in (0.01, 0.5, 0.99)),
        ("decoupled_kl", {"alpha": 2.0, "beta": 0.5}),
        ("decoupled_kl", {"alpha": 0.0, "beta": 1.0}),
    ],
)
def test_options(name, options):
    student, teacher, targets = case("random", torch.float32)
    value = DIVERGENCES[name](student, teacher, targets, **options)
    torch.testing.assert_close(
        value.double(), loss_oracle(name, student, teacher, targets, **options), rtol=1e-5, atol=1e-6
    )


def test_log_probabilities_and_logits_give_the_same():
    student, teacher, targets = case("random", torch.float32)
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    for divergence in DIVERGENCES.values():
        on_logp = divergence.on_logp(q, p, targets)
        torch.testing.assert_close(divergence(student, teacher, targets), on_logp)
        torch.testing.assert_close(divergence(q, p, targets), on_logp)


def test_a_model_does_not_differ_from_itself():
    q, targets = logits("random"), torch.arange(6)
    for divergence in DIVERGENCES.values():
        torch.testing.assert_close(divergence(q, q.clone(), targets), torch.zeros(6), rtol=0, atol=1e-6)


def test_decoupled_kl_gives_forward_kl_back():
    """With alpha 1 and beta 1 - p(y), which is a number a row."""
    q, p, targets = case("random", torch.float32)
    q, p = q.log_softmax(-1), p.log_softmax(-1)
    rest = 1 - p.gather(1, targets[:, None])[:, 0].exp()
    torch.testing.assert_close(decoupled_kl(q, p, targets, alpha=1.0, beta=rest), forward_kl(q, p))


def test_decoupled_kl_of_a_certain_teacher_is_finite():
    """1 - p(y) is far below what float32 can subtract from 1."""
    teacher = torch.full((1, 50), -60.0)
    teacher[0, 3] = 60.0
    student = logits("random")[:1].clone().requires_grad_()
    value = DIVERGENCES["decoupled_kl"](student, teacher, torch.tensor([3]))
    value.sum().backward()
    q = torch.softmax(student.detach().double(), -1)[0]
    others = q[torch.arange(50) != 3]
    flat = torch.full((49,), 1 / 49, dtype=torch.float64)
    assert value.item() == pytest.approx((-q[3].log() + 8 * kl(flat, others / others.sum())).item(), rel=1e-4)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("rows", [1, 2, 5, 6])
def test_at_kd_is_the_weighted_mean_of_the_two_halves(rows):
    student, teacher, targets = (part[:rows] for part in case("random", torch.float32))
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    easy, hard = [], []
    order = sorted(range(rows), key=lambda i: (p[i, targets[i]].item(), i))
    for place, i in enumerate(order):
        y = targets[i]
        others = torch.arange(50) != y
        rest = kl(p[i, others] / p[i, others].sum(), q[i, others] / q[i, others].sum())
        pair_p, pair_q = (torch.stack([d[i, y], 1 - d[i, y]]) for d in (p, q))
        if place < (rows + 1) // 2:
            hard.append(rest + kl(pair_p, pair_q))
        else:
            easy.append(rest)
    expected = 0.8 * sum(hard) / len(hard) + (0.2 * sum(easy) / len(easy) if easy else 0)
    assert DIVERGENCES["at_kd"](student, teacher, targets).mean().item() == pytest.approx(float(expected), rel=1e-5)


def test_at_kd_in_chunks_is_that_of_the_whole_batch():
    student, teacher, targets = case("random", torch.float32)
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    factors = at_kd_factors(cross_entropy(p, targets))
    chunks = [at_kd(q[i : i + 2], p[i : i + 2], targets[i : i + 2], factors[i : i + 2]) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(chunks), at_kd(q, p, targets))


def test_at_kd_ties_go_to_the_lower_index():
    factors = at_kd_factors(torch.ones(4))
    assert (factors[:, 0] > 0).tolist() == [True, True, False, False]


def test_bounds():
    student, teacher, targets = case("peaked", torch.float32)
    assert DIVERGENCES["total_variation"](student, teacher * 30, targets).max() <= 1 + 1e-6
    assert DIVERGENCES["skew_kl"](student, teacher * 30, targets, alpha=0.1).max() <= -torch.tensor(0.1).log() + 1e-5


def test_cross_entropy_and_reduction():
    q, targets = logits("random"), torch.tensor([3, 1, 4, 1, 5, 9])
    expected = -q.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(cross_entropy(q.log_softmax(-1), targets).double(), expected, rtol=1e-6, atol=1e-6)
    assert reduce(torch.tensor([1.0, 2, 3]), torch.tensor([0.5, 0.0, 2.0])) == 6.5
