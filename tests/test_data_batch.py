"""Samples become batches; targets are shifted once."""

import random

import torch
from datasets import Dataset
from helpers import EOS, config

from rollouts import Rollout
from sekd.data.batch import Sample, collate, from_rollout, group_by_length
from sekd.data.prepare import prepare
from sekd.types import IGNORE, Batch


def test_targets_are_shifted_once():
    samples = [Sample([5, 6, 7, 8], [0, 0, 1, 1], 3, 2), Sample([9, 10], [0, 1], 4, 1)]
    batch = collate(samples, pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 10, 0, 0]]
    assert batch["targets"].tolist() == [[IGNORE, 7, 8, IGNORE], [10, IGNORE, IGNORE, IGNORE]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert batch["sample_ids"].tolist() == [3, 4]


def test_a_rollout_supervises_what_was_generated_only():
    sample = Sample([1, 2, 3], [1, 1, 1], 7, 2)
    new = from_rollout(sample, Rollout([1, 2], [8, 9, EOS], 4, "stop"))
    assert new == Sample([1, 2, 8, 9, EOS], [0, 0, 1, 1, 1], 7, 2)
    empty = from_rollout(sample, Rollout([1, 2], [], 4, "stop"))
    assert (collate([empty], 0)["targets"] == IGNORE).all()


def test_random_samples_round_trip_through_a_batch():
    generator = random.Random(0)
    samples = [
        Sample(
            ids := [generator.randrange(100) for _ in range(generator.randint(1, 20))],
            [generator.randint(0, 1) for _ in ids],
            i,
        )
        for i in range(16)
    ]
    batch = collate(samples, 0)
    for b, sample in enumerate(samples):
        expected = [token for token, s in zip(sample.input_ids[1:], sample.supervised[1:], strict=True) if s]
        assert batch["targets"][b][batch["targets"][b] != IGNORE].tolist() == expected
    assert batch["input_ids"].dtype == torch.int64


def test_micro_batches_of_similar_lengths_have_the_samples_and_sizes_of_before():
    """The longest samples come first. Samples of one length, and samples of a micro-batch, keep their order."""
    lengths = [[3, 7], [4, 9], [7]]
    numbers = iter(range(5))
    parts = [[Sample([5] * length, [1] * length, next(numbers)) for length in part] for part in lengths]
    grouped = [[(len(s.input_ids), s.sample_id) for s in part] for part in group_by_length(parts)]
    assert grouped == [[(7, 1), (9, 3)], [(4, 2), (7, 4)], [(3, 0)]]
    assert group_by_length([]) == []


def test_both_views_have_the_same_targets_in_the_same_order():
    samples = [
        Sample([1, 2, 3, 4, 5], [0, 0, 1, 0, 1], 7, 2, teacher_prompt_ids=[9]),
        Sample([6, 7], [0, 1], 8, 1),
        Sample([3, 4, 5], [1, 1, 1], 9, 0, teacher_prompt_ids=[8, 9]),  # without a prompt there is no row for the 3
    ]
    batch = Batch(**collate(samples, 0))
    theirs = batch.for_teacher
    assert theirs.input_ids.tolist() == [[9, 3, 4, 5, 0], [6, 7, 0, 0, 0], [8, 9, 3, 4, 5]]
    assert theirs.targets.tolist() == [
        [3, IGNORE, 5, IGNORE, IGNORE],
        [7, IGNORE, IGNORE, IGNORE, IGNORE],
        [IGNORE, IGNORE, 4, 5, IGNORE],
    ]
    assert theirs.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert theirs.sample_ids.tolist() == [7, 8, 9]
    assert torch.equal(theirs.targets[theirs.valid], batch.targets[batch.valid])
    assert "teacher_input_ids" not in collate(samples[1:2], 0)


def test_a_rollout_keeps_the_teachers_prompt_and_a_stream_has_it_too(tokenizer):
    sample = Sample([1, 2, 3], [0, 0, 1], 7, 2, teacher_prompt_ids=[9, 1, 2])
    new = from_rollout(sample, Rollout([1, 2], [8, EOS], 4, "stop"))
    assert collate([new], 0)["teacher_input_ids"].tolist() == [[9, 1, 2, 8, EOS]]
    data = Dataset.from_list([{"prompt": "w1", "completion": "w2", "answer": f"w{i}"} for i in range(5)])
    args = config(teacher_prompt_prefix="{answer} ")
    assert [*prepare(data.to_iterable_dataset(), tokenizer, args)] == [*prepare(data, tokenizer, args)]
