"""Sums over many batches."""

from collections import defaultdict

import pytest
import torch
from helpers import make_trainer

from sekd.metrics import add_sums


def test_sums_of_many_batches_are_exact(tmp_path, tokenizer, pairs):
    """In bf16 a sum stays at 256 times its addend, and in float32 at 16 million times."""
    sums = defaultdict(float)
    add_sums(sums, {"number": 2.0**24, "count": torch.tensor(2**24), "value": torch.tensor(2.0**24)})
    for _ in range(1000):
        add_sums(sums, {"number": 1, "count": torch.tensor(1), "value": torch.tensor(0.1)})
    found = make_trainer(tmp_path, tokenizer, pairs)._sum_all(sums)
    assert found["number"] == found["count"] == 2**24 + 1000
    assert found["value"] == pytest.approx(2**24 + 1000 * torch.tensor(0.1).item(), rel=1e-14)
