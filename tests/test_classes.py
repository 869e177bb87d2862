"""Class sampling: what is drawn, that its gradient is unbiased, and that the shortcut for log Z is consistent."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import KINDS, logits, teacher_logits

from sekd.classes import (
    SampledHead,
    classes_at,
    negative_classes,
    sample_classes,
    sparse_forward_kl,
    top_k_classes,
    trim,
)
from sekd.heads import Head
from sekd.losses import forward_kl
from sekd.types import SparseTargets


def dense(target, vocab):
    return torch.zeros(len(target.ids), vocab).scatter_add_(1, target.ids, target.probs)


def naive_counts(probs, draws):
    """For each number, the first class at which the running sum exceeds it."""
    rows = []
    for p, row in zip(probs.double().tolist(), draws.tolist(), strict=True):
        counts, total = [0] * len(p), sum(p)
        for u in row:
            running = 0.0
            reached = 0
            while (running := running + p[reached]) <= u * total:
                reached += 1
            counts[reached] += 1
        rows.append(counts)
    return torch.tensor(rows)


@given(st.integers(0, 2**31), st.integers(1, 40), st.sampled_from(["random", "peaked", "flat", "single", "empty"]))
@settings(deadline=None, max_examples=40)
def test_counts_are_those_of_the_inverse_transform(seed, draws, kind):
    p = logits(kind).softmax(-1)
    numbers = torch.rand(len(p), draws, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    target = classes_at(p, numbers)
    if len(p):
        torch.testing.assert_close(dense(target, 50) * draws, naive_counts(p, numbers).float())


@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_distributions_over_unique_classes(kind):
    p = logits(kind).softmax(-1)
    target = sample_classes(p, 64, torch.Generator().manual_seed(0))
    assert target.ids.shape == target.probs.shape
    assert target.ids.shape[1] <= 64
    torch.testing.assert_close(target.probs.sum(1), torch.ones(len(p)))
    for ids, probs in zip(target.ids, target.probs, strict=True):
        used = ids[probs > 0].tolist()
        assert len(set(used)) == len(used)
        assert not probs[len(used) :].any(), "used slots come first"


def test_a_class_without_probability_is_never_drawn():
    p = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    target = classes_at(p, torch.linspace(0, 1 - 1e-12, 1001, dtype=torch.float64)[None])
    assert trim(target).ids.tolist() == [[1, 3]]
    # Of 1001 numbers the middle one, just under 0.5, belongs to the first class.
    torch.testing.assert_close(trim(target).probs, torch.tensor([[501 / 1001, 500 / 1001]]))


def test_a_row_that_is_no_distribution_ends_in_a_loss_that_is_nan():
    """And the rows beside it do not notice."""
    p = torch.full((5, 100), 0.01)
    p[0, 3], p[1, 50], p[2] = torch.nan, torch.inf, 0.0
    draws = torch.rand(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for rows in (slice(0, 5), slice(0, 3)):
        target = trim(classes_at(p[rows], draws[rows]))
        loss = sparse_forward_kl(torch.zeros(len(target.ids), 100).log_softmax(-1).gather(1, target.ids), target)
        assert loss[:3].isnan().all()
        assert loss[3:].isfinite().all()


def test_the_tail_of_a_large_vocabulary_is_reached():
    """In float32, adding 1e-9 to a running sum near 1 changes nothing, and a third of this mass would vanish."""
    vocab = 200_000
    p = torch.full((1, vocab), 1e-9)
    p[0, 0] = 1 - 1e-9 * (vocab - 1)
    numbers = 1 - torch.linspace(1e-9, 1.9e-4, 500, dtype=torch.float64)[None]
    drawn = dense(classes_at(p, numbers), vocab)[0].nonzero()[:, 0]
    assert len(drawn) > 490
    assert drawn.max() > 0.99 * vocab


def gradient(loss_of, z):
    z = z.clone().requires_grad_()
    loss_of(z.log_softmax(-1)).sum().backward()
    return z.grad.double()


def test_rs_kd_has_the_gradient_of_forward_kl_in_expectation_and_top_k_has_not():
    z, p = logits("random")[:2], teacher_logits(2).softmax(-1)
    exact = gradient(lambda q: forward_kl(q, p.log()), z)
    draws, many = 4000, p.repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)
    target = sample_classes(many, 8, generator)

    def sampled(q):
        return sparse_forward_kl(q.repeat(draws, 1).gather(1, target.ids), target) / draws

    # The gradient of one draw is q - p~; the mean must lie within five standard errors of q - p.
    error = 5 * (p * (1 - p) / (8 * draws)).sqrt().double() + 1e-6
    assert ((gradient(sampled, z) - exact).abs() <= error).all()

    kept = top_k_classes(p, 4)
    biased = gradient(lambda q: sparse_forward_kl(q.gather(1, kept.ids), kept), z)
    assert ((biased - exact).abs() > 3 * error).any()


def test_the_target_itself_is_unbiased():
    p = teacher_logits(2).softmax(-1)
    mean = dense(sample_classes(p.repeat(4000, 1), 8, torch.Generator().manual_seed(1)), 50).view(4000, 2, 50).mean(0)
    error = 5 * (p * (1 - p) / (8 * 4000)).sqrt() + 1e-6
    assert ((mean - p).abs() <= error).all()


@pytest.mark.parametrize("kind", ["random", "peaked", "flat", "single", "empty"])
def test_sparse_loss_equals_the_formula_value_and_gradient(kind):
    z = logits(kind)
    target = sample_classes(teacher_logits(len(z)).softmax(-1), 12, torch.Generator().manual_seed(0))
    ours, theirs = z.clone().requires_grad_(), z.double().requires_grad_()
    value = sparse_forward_kl(ours.log_softmax(-1).gather(1, target.ids), target)
    q = theirs.log_softmax(-1)
    rows = [
        sum(p * (p.log() - q[i, v]) for v, p in zip(ids.tolist(), probs.double(), strict=True) if p > 0)
        for i, (ids, probs) in enumerate(zip(target.ids, target.probs, strict=True))
    ]
    expected = torch.stack(rows) if rows else value.double()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    if len(z):
        value.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


def test_top_k_classes_keeps_the_likeliest():
    target = top_k_classes(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), 2)
    assert target.ids.tolist() == [[1, 3]]
    torch.testing.assert_close(target.probs, torch.tensor([[4 / 7, 3 / 7]]))
    assert top_k_classes(torch.tensor([[0.1, 0.9]]), 5).ids.shape == (1, 2)


# The sampled softmax


def make_head(bias=True, softcap=None, scale=1.0, vocab=None):
    torch.manual_seed(0)
    return Head(torch.nn.Linear(8, 60, bias=bias), scale=scale, softcap=softcap, vocab=vocab)


def make_target(rows, vocab=60):
    """Rows with different numbers of unused slots."""
    p = (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1)) * 2).softmax(-1)
    return sample_classes(p, 6, torch.Generator().manual_seed(2))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"softcap": 2.0}, {"scale": 0.3}, {"vocab": 50}])
def test_sampled_softmax_over_the_whole_vocabulary_is_exact(options, temperature):
    head, rows = make_head(**options), torch.randn(7, 8, generator=torch.Generator().manual_seed(3))
    target = make_target(7, head.classes)
    used = target.probs > 0
    found = {}
    for name in ("sampled", "exact"):
        head.projection.zero_grad()
        h = rows.clone().requires_grad_()
        if name == "sampled":
            sampled = SampledHead(head, target, negative_classes(head.classes, head.classes, seed=0))
            logp = sampled.log_probs(h, target.ids, used, temperature)
        else:
            logp = (head(h) / temperature).log_softmax(-1).gather(1, target.ids)
        sparse_forward_kl(logp, target).sum().backward()
        found[name] = logp[used].detach(), h.grad, head.projection.weight.grad.clone()
    for ours, theirs in zip(found["sampled"], found["exact"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_sampled_softmax_is_unbiased_for_the_normaliser():
    """The mean of Z over draws of negatives lies within five standard errors of the exact Z."""
    head, rows, target = make_head(), torch.randn(3, 8, generator=torch.Generator().manual_seed(3)), make_target(3)
    used, logits_ = target.probs > 0, head(rows).detach().double()
    estimates = []
    for seed in range(3000):
        sampled = SampledHead(head, target, negative_classes(60, 10, seed))
        logp = sampled.log_probs(rows, target.ids, used).detach().double()
        estimates.append((logits_.gather(1, target.ids)[:, 0] - logp[:, 0]).exp())
    z = torch.stack(estimates)
    assert ((z.mean(0) - logits_.exp().sum(1)).abs() <= 5 * z.std(0) / 3000**0.5).all()


def test_sampled_softmax_is_consistent():
    head, rows, target = make_head(), torch.randn(3, 8, generator=torch.Generator().manual_seed(3)), make_target(3)
    exact = head(rows).log_softmax(-1).gather(1, target.ids)[target.probs > 0]
    errors = []
    for count in (8, 20, 40, 59):
        found = [
            SampledHead(head, target, negative_classes(60, count, seed)).log_probs(rows, target.ids, target.probs > 0)
            for seed in range(200)
        ]
        errors.append(torch.stack([f[target.probs > 0] - exact for f in found]).square().mean().sqrt().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


def test_unused_slots_count_for_nothing():
    """Padding points at class 0, which must neither enter Z nor leave the negatives."""
    head, rows = make_head(), torch.randn(1, 8)
    short = SparseTargets(torch.tensor([[5]]), torch.tensor([[1.0]]))
    padded = SparseTargets(torch.tensor([[5, 0, 0]]), torch.tensor([[1.0, 0, 0]]))
    negatives = torch.tensor([0, 3, 9])
    found = [SampledHead(head, t, negatives).log_probs(rows, t.ids, t.probs > 0)[0, 0] for t in (short, padded)]
    torch.testing.assert_close(*found)


def test_all_negatives_among_the_kept_classes_leave_finite_gradients():
    head, rows = make_head(), torch.randn(1, 8, requires_grad=True)
    target = SparseTargets(torch.tensor([[5, 7]]), torch.tensor([[0.5, 0.5]]))
    SampledHead(head, target, torch.tensor([5, 7])).log_probs(rows, target.ids, target.probs > 0).sum().backward()
    assert rows.grad.isfinite().all()


def test_negatives_are_uniform_without_replacement_and_seeded():
    assert torch.equal(negative_classes(50, 10, 3), negative_classes(50, 10, 3))
    assert len(set(negative_classes(50, 50, 3).tolist())) == 50
    assert len(negative_classes(50, 99, 3)) == 50
    hits = torch.zeros(50, device="cpu")
    for seed in range(2000):
        hits[negative_classes(50, 10, seed)] += 1
    assert (hits - 400).abs().max() < 5 * (2000 * 0.2 * 0.8) ** 0.5
