"""Divergences equal their float64 formulas, value and gradient."""

import pytest
import torch
from test_scores import logits

from sekd.losses import DIVERGENCES, ON_LOG_PROBABILITIES, cross_entropy, reduce


def oracle(name, q, p, beta=0.5):
    """Class by class, in float64 probabilities."""
    q, p = torch.softmax(q.double(), -1), torch.softmax(p.double(), -1)

    def kl(a, b):
        return torch.where(a > 0, a * (a.clamp(min=1e-300).log() - b.clamp(min=1e-300).log()), 0.0).sum(-1)

    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["random", "peaked", "flat", "single", "empty"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_equals_the_formula(name, kind, dtype):
    z = logits(kind).to(dtype)
    p = logits("random")[: len(z)].flip(-1).to(dtype) * 2
    ours, theirs = z.clone().requires_grad_(), z.double().requires_grad_()
    value = DIVERGENCES[name](ours, p, torch.zeros(len(z), dtype=torch.long))
    expected = oracle(name, theirs, p)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=1e-5)
    if len(z):
        value.sum().backward()
        expected.sum().backward()
        # A bf16 gradient is the exact one, rounded.
        tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(ours.grad.double(), theirs.grad, **tolerance)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_with_any_beta(beta):
    q, p = logits("random"), logits("random").flip(0)
    torch.testing.assert_close(
        DIVERGENCES["jsd"](q, p, beta=beta).double(), oracle("jsd", q, p, beta), rtol=1e-5, atol=1e-6
    )


def test_log_probabilities_and_logits_give_the_same():
    q, p = logits("random"), logits("random").flip(0)
    for name, divergence in DIVERGENCES.items():
        on_logp = ON_LOG_PROBABILITIES[name](q.log_softmax(-1), p.log_softmax(-1))
        torch.testing.assert_close(divergence(q, p), on_logp)
        torch.testing.assert_close(divergence(q.log_softmax(-1), p.log_softmax(-1)), on_logp)


def test_a_model_does_not_differ_from_itself():
    q = logits("random")
    for divergence in DIVERGENCES.values():
        torch.testing.assert_close(divergence(q, q.clone()), torch.zeros(6), rtol=0, atol=1e-6)


def test_cross_entropy_and_reduction():
    q, targets = logits("random"), torch.tensor([3, 1, 4, 1, 5, 9])
    expected = -q.double().log_softmax(-1)[range(6), targets]
    torch.testing.assert_close(cross_entropy(q.log_softmax(-1), targets).double(), expected, rtol=1e-6, atol=1e-6)
    assert reduce(torch.tensor([1.0, 2, 3]), torch.tensor([0.5, 0.0, 2.0])) == 6.5
