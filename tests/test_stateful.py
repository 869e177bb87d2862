"""A global threshold and a bandit, against their definitions."""

import copy
import math

import pytest
import torch

from sekd.policies import make_policy
from sekd.policies.bandit import FEATURES
from sekd.types import Batch

VALID = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 5, generator=generator) for _ in range(count)]


def quantile(values, fraction):
    """Linear between the two nearest ranks."""
    values = sorted(values)
    place = fraction * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def test_gls_takes_its_threshold_before_it_pushes():
    policy, seen = make_policy("gls", 0.3, queue_size=20), []
    for number, scores in enumerate(batches(6)):
        weights = policy(scores, VALID)
        if number == 0:
            assert torch.equal(weights, make_policy("top_k", 0.3)(scores, VALID)), "nothing to compare with yet"
        else:
            chosen = VALID & (scores.double() >= quantile(seen[-20:], 0.7))
            assert torch.equal(weights > 0, chosen)
            if chosen.any():
                # The batch loss, a mean over its 2 sequences, is the mean over the selected rows.
                losses = torch.arange(10.0).view(2, 5)
                torch.testing.assert_close((weights * losses).sum() / 2, losses[chosen].mean())
        seen += scores[VALID].double().tolist()
        torch.testing.assert_close(policy.queue.double(), torch.tensor(seen[-20:], dtype=torch.float64))


def test_gls_keeps_30_000_scores():
    policy = make_policy("gls")
    for _ in range(4):
        policy(torch.randn(10, 1000), torch.ones(10, 1000).bool())
    assert len(policy.queue) == 30_000


def test_gls_resumes_with_the_same_threshold():
    policy = make_policy("gls", 0.3)
    *before, after = batches(5)
    for scores in before:
        policy(scores, VALID)
    resumed = make_policy("gls", 0.3)
    resumed.load_state_dict(copy.deepcopy(policy.state_dict()))
    assert resumed.threshold == policy.threshold is not None
    assert torch.equal(resumed(after, VALID), policy(after, VALID))


def test_gls_over_a_step_in_parts_selects_what_it_would_in_one():
    """Two parts of each of two processes: the queue, and so the next threshold, is that of one process."""
    parts = [batches(4, seed) for seed in range(3)]
    whole, *ranks = (make_policy("gls", 0.3) for _ in range(3))
    for policy in (whole, *ranks):
        policy.whole_steps = True
    for first, second, third, fourth in parts:
        # One process sees batches of four sequences: the first two belong to rank 0.
        expected = [
            whole(torch.cat([first, second]), VALID.repeat(2, 1)),
            whole(torch.cat([third, fourth]), VALID.repeat(2, 1)),
        ]
        found = [ranks[0](first, VALID), ranks[1](second, VALID), ranks[0](third, VALID), ranks[1](fourth, VALID)]
        assert torch.equal(torch.cat(found), torch.cat(expected))
        assert whole.selected == sum(rank.selected for rank in ranks)
        whole.end_step()
        waiting = [rank._waiting for rank in ranks]
        for rank in ranks:
            rank.end_step(lambda _, waiting=waiting: waiting)
        assert torch.equal(ranks[0].queue, whole.queue)
        assert ranks[1].threshold == whole.threshold


def features(scores, valid):
    """The bandit's six features, row by row."""
    return [
        [torch.tensor([*row.tolist(), place / n], dtype=torch.float64) for place, row in enumerate(rows[mask])]
        for rows, mask, n in zip(scores, valid, valid.sum(1).tolist(), strict=True)
    ]


def test_bandit_is_linucb_in_closed_form():
    """Three steps against the textbook's loop: one row at a time, matrices inverted anew."""
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
        policy.end_step([after])
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
        policy.end_step([scores[chosen][:, 4] - gain])
    assert scores[chosen][:, 1].mean() > 0.8 > scores[..., 1].mean() + 0.2


def test_bandit_over_parts_of_a_step_learns_what_it_would_in_one():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 5, len(FEATURES), generator=generator)
    whole, parted = make_policy("bandit", 0.5), make_policy("bandit", 0.5)
    chosen = whole(scores, VALID) > 0
    after = torch.rand(int(chosen.sum()), generator=generator)
    whole.end_step([after])
    for row in (0, 1):
        assert torch.equal(parted(scores[row : row + 1], VALID[row : row + 1]) > 0, chosen[row : row + 1])
    parted.end_step(list(after.split(chosen.sum(1).tolist())))
    torch.testing.assert_close(parted.A, whole.A)
    torch.testing.assert_close(parted.b, whole.b)
    resumed = make_policy("bandit", 0.5)
    resumed.load_state_dict(whole.state_dict())
    assert torch.equal(resumed(scores, VALID), whole(scores, VALID))


def test_bandit_remembers_what_the_reward_needs_until_the_step_ends():
    policy = make_policy("bandit")
    ids = torch.zeros(1, 2, dtype=torch.long)
    batch = Batch(ids, ids, ids, torch.tensor([0]))
    policy.remember(batch, torch.tensor([True, False]), (torch.zeros(1, 3),))
    assert policy.chosen[0][0] is batch
    policy.end_step([])
    assert not policy.chosen
