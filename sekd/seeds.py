"""The random generators of a step: one for each sequence, however sequences are batched and distributed."""

import random
import zlib

import torch

from sekd.types import Batch


def make_generators(batch: Batch, seed: int, step: int, by_targets: bool = False) -> list[torch.Generator]:
    """A generator for each sequence of a batch. It depends on the seed, the step and the sequence alone.

    A sequence is named by its sample's id, and with ``by_targets`` also by a hash of its targets, since other sequences
    of the step may have the same id: a prompt has several rollouts, or loader workers number their shares of a stream.
    """
    names = [str(i) for i in batch.sample_ids.tolist()]
    if by_targets:
        hashes = [zlib.crc32(ids[valid].cpu().numpy()) for ids, valid in zip(batch.targets, batch.valid, strict=True)]
        names = [f"{name}/{code}" for name, code in zip(names, hashes, strict=True)]
    draws = [random.Random(f"{seed}/{step}/{name}").getrandbits(63) for name in names]
    return [torch.Generator().manual_seed(draw) for draw in draws]
