"""A contextual bandit, against its definition."""

import math

import pytest
import torch

from sekd.policies import FinishedStep, make_policy
from sekd.policies.bandit import FEATURES
from sekd.types import Batch

VALID = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()


def end_step(policy, *kl_after):
    """End a step whose parts have these KLs after it."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    for part in kl_after:
        policy.observe(Batch(ids, ids, ids, ids[0]), torch.ones(len(part)).bool(), {"kl": part})
    policy.end_step(FinishedStep(kl_after=lambda batch, chosen, state: state["kl"]))


def features(scores, valid):
    """The bandit's six features, row by row."""
    return [
        [torch.tensor([*row.tolist(), place / n], dtype=torch.float64) for place, row in enumerate(rows[mask])]
        for rows, mask, n in zip(scores, valid, valid.sum(1).tolist(), strict=True)
    ]


def test_bandit_is_linucb_in_closed_form():
    """Three steps against the textbook's loop: one position at a time, matrices inverted each time."""
    generator = torch.Generator().manual_seed(0)
    policy = make_policy("bandit", 0.5, alpha=0.7, ridge=2.0)
    A, b = 2.0 * torch.eye(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for step in range(3):
        scores = torch.rand(2, 5, len(FEATURES), generator=generator) * 3
        weights = policy(scores, VALID, step=step)
        chosen_features = []
        for rows, mask, w in zip(features(scores, VALID), VALID, weights, strict=True):
            theta, inverse = torch.linalg.solve(A, b), torch.linalg.inv(A)
            ucb = [float(theta @ x + 0.7 * (x @ inverse @ x).sqrt()) for x in rows]
            k = math.ceil(len(rows) / 2)
            best = sorted(range(len(rows)), key=lambda i: (-ucb[i], i))[:k]
            assert w[mask].nonzero()[:, 0].tolist() == sorted(best)
            assert w[mask][best].tolist() == pytest.approx([1 / k] * k)
            chosen_features += [rows[i] for i in sorted(best)]
        after = torch.rand(len(chosen_features), generator=generator) * 20
        end_step(policy, after)
        for x, kl_after in zip(chosen_features, after.double(), strict=True):
            reward = max(-5.0, min(5.0, float(x[4] - kl_after)))
            A, b = A + torch.outer(x, x), b + reward * x
        torch.testing.assert_close(policy.A, A)
        torch.testing.assert_close(policy.b, b)


def test_bandit_learns_which_rows_pay():
    """Rows of high teacher entropy lose KL, the others none: soon only those are chosen."""
    generator = torch.Generator().manual_seed(0)
    policy, valid = make_policy("bandit", 0.25), torch.ones(4, 40).bool()
    for _ in range(20):
        scores = torch.rand(4, 40, len(FEATURES), generator=generator)
        chosen = policy(scores, valid) > 0
        gain = 4 * scores[chosen][:, 1]
        end_step(policy, scores[chosen][:, 4] - gain)
    assert scores[chosen][:, 1].mean() > 0.8 > scores[..., 1].mean() + 0.2


def test_bandit_over_parts_of_a_step_learns_what_it_would_in_one():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 5, len(FEATURES), generator=generator)
    whole, parted = make_policy("bandit", 0.5), make_policy("bandit", 0.5)
    chosen = whole(scores, VALID) > 0
    after = torch.rand(int(chosen.sum()), generator=generator)
    end_step(whole, after)
    for row in (0, 1):
        assert torch.equal(parted(scores[row : row + 1], VALID[row : row + 1]) > 0, chosen[row : row + 1])
    end_step(parted, *after.split(chosen.sum(1).tolist()))
    torch.testing.assert_close(parted.A, whole.A)
    torch.testing.assert_close(parted.b, whole.b)
    resumed = make_policy("bandit", 0.5)
    resumed.load_state_dict(whole.state_dict())
    assert torch.equal(resumed(scores, VALID), whole(scores, VALID))


def test_bandit_remembers_what_the_reward_needs_until_the_step_ends():
    policy = make_policy("bandit")
    ids = torch.zeros(1, 2, dtype=torch.long)
    batch = Batch(ids, ids, ids, torch.tensor([0]))
    policy(torch.rand(1, 2, len(FEATURES)), torch.tensor([[True, False]]))
    policy.observe(batch, torch.tensor([True, False]), {"hidden": torch.zeros(1, 3)})
    assert policy.observed[0][0] is batch
    policy.end_step(FinishedStep(kl_after=lambda *part: torch.zeros(1)))
    assert not policy.observed
