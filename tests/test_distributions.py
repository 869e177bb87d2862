"""The entropy that a few log-probabilities give, and its bound."""

import math

import torch

from sekd.distributions import entropy, entropy_from_top


def test_the_estimate_lies_between_entropy_and_its_bound():
    """Against float64, for flat and peaked rows: H <= estimate <= H + m log((V - K) p_K / m)."""
    generator = torch.Generator().manual_seed(0)
    for scale in (0.01, 1.0, 4.0, 20.0):
        for classes, known in ((50, 1), (50, 20), (5000, 20), (5000, 5)):
            logp = (torch.randn(200, classes, generator=generator, dtype=torch.float64) * scale).log_softmax(-1)
            top = logp.topk(known).values
            exact, found = -(logp.exp() * logp).sum(-1), entropy_from_top(top.float(), classes).double()
            rest = (1 - top.exp().sum(-1)).clamp(min=1e-300)
            bound = rest * ((classes - known) * top[:, -1].exp() / rest).log()
            assert (found >= exact - 1e-4).all()
            assert (found <= exact + bound + 1e-4).all()
            if scale == 4.0 and known == 5:
                assert (found - exact).max() > 0.1, "it is an estimate"


def test_all_classes_known_is_exact():
    logp = torch.randn(9, 30).log_softmax(-1)
    torch.testing.assert_close(entropy_from_top(logp.sort(descending=True).values, 30), entropy(logp))
    certain = torch.tensor([[0.0, -math.inf, -math.inf]]).clamp(min=-9999)
    assert entropy_from_top(certain, 3).item() == 0
