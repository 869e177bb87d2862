"""Scores equal their float64 formulas, value and gradient."""

import pytest
import torch

from sekd.scores import SCORES, Rows


def logits(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(6, 50, generator=generator)
    return {
        "random": random,
        "peaked": random * 30,
        "flat": torch.zeros(6, 50),
        "single": random[:1],
        "empty": random[:0],
    }[kind]


def oracle(name, logits, targets):
    """Row by row, class by class."""
    values = []
    for row, target in zip(logits.double(), targets.tolist(), strict=True):
        q = torch.exp(row - row.max())
        q = q / q.sum()
        if name == "student_ce":
            values.append(-torch.log(q[target]))
        else:
            values.append(-sum(p * torch.log(p) for p in q if p > 0))
    return torch.stack(values) if values else logits.new_zeros(0).double()


@pytest.mark.parametrize("kind", ["random", "peaked", "flat", "single", "empty"])
@pytest.mark.parametrize("name", SCORES)
def test_equals_the_formula(name, kind):
    z = logits(kind)
    targets = torch.arange(len(z)) * 7 % 50
    if name == "student_ce" and kind == "peaked":
        targets = z.argmax(-1)  # elsewhere float64's own q underflows
    ours = z.clone().requires_grad_()
    theirs = z.clone().requires_grad_()
    value = SCORES[name](Rows(ours.log_softmax(-1), targets))
    expected = oracle(name, theirs, targets)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    assert value.dtype == torch.float32
    value.sum().backward()
    if len(z):
        expected.sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_entropy_is_in_nats():
    assert SCORES["student_entropy"](
        Rows(torch.zeros(1, 50).log_softmax(-1), torch.tensor([0]))
    ).item() == pytest.approx(3.912023, abs=1e-5)


def test_every_score_says_whether_it_needs_the_teacher():
    assert not any(score.needs_teacher for score in SCORES.values())
