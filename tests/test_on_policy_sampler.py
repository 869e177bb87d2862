"""Several rollouts of a prompt: they meet in one step, and they differ."""

import torch
from rollout_helpers import make_run, read_rollouts

from sekd.on_policy.sampler import RepeatSampler
from sekd.seeds import make_generators
from sekd.types import Batch


def test_several_rollouts_of_a_prompt_meet_in_a_step(tmp_path, tokenizer, pairs):
    data = pairs.select(range(8))
    trainer = make_run(tmp_path, tokenizer, data, rollouts_per_prompt=4, per_device_train_batch_size=8, max_steps=8)
    assert len(trainer.get_train_dataloader()) == 4
    trainer.train()
    steps = [[line for line in read_rollouts(tmp_path) if line["step"] == step] for step in range(8)]
    for step in steps:
        ids = [line["sample_id"] for line in step]
        assert sorted(ids) == sorted([ids[0], ids[-1]] * 4)
        for i in (ids[0], ids[-1]):
            assert len({tuple(line["completion_ids"]) for line in step if line["sample_id"] == i}) > 1
    for epoch in (steps[:4], steps[4:]):
        assert {line["sample_id"] for step in epoch for line in step} == set(range(8))
    assert [line["sample_id"] for s in steps[:4] for line in s] != [line["sample_id"] for s in steps[4:] for line in s]


def test_a_repeating_sampler():
    assert list(RepeatSampler(3, 2, seed=0, shuffle=False, get_epoch=lambda: 0)) == [0, 0, 1, 1, 2, 2]
    epoch = 0
    sampler = RepeatSampler(50, 2, seed=0, shuffle=True, get_epoch=lambda: epoch)
    first = list(sampler)
    assert sorted(first) == sorted([*range(50)] * 2)
    assert first[::2] == first[1::2]
    epoch = 1
    assert list(sampler) != first


def test_a_stream_repeats_its_prompts_too(tmp_path, tokenizer, pairs):
    stream = pairs.to_iterable_dataset()
    make_run(tmp_path, tokenizer, stream, rollouts_per_prompt=2, max_steps=2).train()
    assert [line["sample_id"] for line in read_rollouts(tmp_path)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_draws_of_a_prompts_rollouts_differ(tmp_path, tokenizer, pairs):
    trainer = make_run(tmp_path, tokenizer, pairs, rollouts_per_prompt=2)
    trainer.state.max_steps = 8
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    generators = make_generators(Batch.from_inputs(batches[0]), seed=0, step=0, by_targets=True)
    assert len({torch.rand(1, generator=generator).item() for generator in generators}) == 4
