"""A global threshold, against its definition."""

import copy
import math

import torch

from sekd.policies import FinishedStep, make_policy

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
    assert resumed.get_threshold(4) == policy.get_threshold(4) is not None
    assert torch.equal(resumed(after, VALID), policy(after, VALID))


def test_gls_over_a_step_in_parts_selects_what_it_would_in_one():
    """Two parts of each of two processes: the queue, and so the next threshold, is that of one process.

    The queue keeps a part of a step, which does not depend on the order of the sequences either.
    """
    parts = [batches(4, seed) for seed in range(3)]
    whole, *ranks = (make_policy("gls", 0.3, whole_steps=True, queue_size=50) for _ in range(3))
    for step, (first, second, third, fourth) in enumerate(parts):
        # One process sees batches of four sequences: the first two belong to rank 0.
        expected = [
            whole(torch.cat([first, second]), VALID.repeat(2, 1)),
            whole(torch.cat([third, fourth]), VALID.repeat(2, 1)),
        ]
        order = {3: (ranks[1], fourth), 0: (ranks[0], first), 1: (ranks[1], second), 2: (ranks[0], third)}
        weights = {place: rank(scores, VALID) for place, (rank, scores) in order.items()}
        assert torch.equal(torch.cat([weights[place] for place in range(4)]), torch.cat(expected))
        if step == 0:
            assert whole.selected is ranks[0].selected is None, "no threshold yet: top_k"
        else:
            assert whole.selected == sum(rank.selected for rank in ranks) > 0
        whole.end_step(FinishedStep())
        pending = [rank._pending for rank in ranks]
        for rank in ranks:
            rank.end_step(FinishedStep(gather=lambda _, pending=pending: pending))
        assert torch.equal(ranks[0].queue, whole.queue)
        assert ranks[1].get_threshold(step) == whole.get_threshold(step)
