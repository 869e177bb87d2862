"""Each sequence of a step has draws of its own."""

import torch
from helpers import make_trainer

import sekd.trainer
from sekd.seeds import make_generators


def test_draws_differ_though_loader_workers_give_the_same_ids(tmp_path, tokenizer, pairs, monkeypatch):
    """Each worker numbers the samples of its own files."""
    ids, draws = [], []

    def record(batch, *args, **kwargs):
        ids.extend(batch.sample_ids.tolist())
        draws.extend(torch.rand(1, generator=g).item() for g in make_generators(batch, *args, **kwargs))
        return make_generators(batch, *args, **kwargs)

    monkeypatch.setattr(sekd.trainer, "make_generators", record)
    files = pairs.to_iterable_dataset(num_shards=2)
    options = dict(dataloader_num_workers=2, gradient_accumulation_steps=2, max_steps=1, record_selection=0)
    make_trainer(tmp_path, tokenizer, files, position_policy="random", **options).train()
    assert sorted(ids) == sorted([0, 1, 2, 3] * 2), "micro-batches are sorted by length"
    assert len({*draws}) == 8
