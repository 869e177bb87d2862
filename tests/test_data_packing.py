"""Packing wastes little, drops nothing, and keeps documents apart."""

import numpy as np
import pytest
from datasets import Dataset

from sekd.data.packing import pack_documents


def make_documents(kind, length):
    """Documents whose tokens say which document they are of, and where in it."""
    draws = np.random.default_rng(0)
    lengths = {
        "web pages": draws.lognormal(6.3, 1.0, 1500),  # as FineWeb: median 545, mean 900 tokens
        "one length": draws.normal(0.8 * length, 20, 1500),  # two documents never fit into a sequence
        "short": draws.integers(1, 40, 8000),
    }[kind].astype(int)
    ids = [[n * 100_000 + i for i in range(max(1, size))] for n, size in enumerate(lengths)]
    return Dataset.from_dict({"input_ids": ids, "supervised": [[i % 3 % 2 for i in row] for row in ids]})


@pytest.mark.parametrize("kind", ["web pages", "one length", "short"])
@pytest.mark.parametrize("length", [512, 2048])
def test_packing_wastes_less_than_2_percent_and_drops_nothing(kind, length):
    documents = make_documents(kind, length)
    packed = pack_documents(documents, length, {})
    assert max(map(len, packed["input_ids"])) <= length
    tokens = sum(map(len, documents["input_ids"]))
    assert sorted(i for ids in packed["input_ids"] for i in ids) == [i for ids in documents["input_ids"] for i in ids]
    waste = 1 - tokens / (len(packed) * length)
    assert 0 <= waste < 0.02, f"{waste:.1%} of {len(packed)} sequences is padding"
    for row in packed:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["supervised"])
        assert row["supervised"] == [i % 3 % 2 for i in row["input_ids"]]
        start = 0
        for size in row["seq_lengths"]:
            part = row["input_ids"][start : start + size]
            assert part == [*range(part[0], part[0] + size)], "tokens of one document, in order"
            start += size


def test_a_document_that_fits_stays_whole():
    """Best fit puts 7 with 3 and 6 with 4. The sequences with 5 are too empty, so one 5 is cut."""
    sizes, length = [7, 6, 5, 5, 5, 4, 3], 10
    rows = {name: [[n] * size for n, size in enumerate(sizes)] for name in ("input_ids", "supervised")}
    packed = pack_documents(Dataset.from_dict(rows), length, {})
    assert packed["seq_lengths"][:] == [[7, 3], [6, 4], [5, 5], [5]]
    rows = {name: [[n] * size for n, size in enumerate([6, 6, 6])] for name in ("input_ids", "supervised")}
    packed = pack_documents(Dataset.from_dict(rows), length, {})
    assert packed["seq_lengths"][:] == [[6, 4], [2, 6]]
    assert packed["input_ids"][:] == [[0] * 6 + [1] * 4, [1] * 2 + [2] * 6]
