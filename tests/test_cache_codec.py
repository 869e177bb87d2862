"""What goes into the cache comes out, and what is damaged is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sekd.cache.codec import decode, encode

EDGES = [0, 131_071, 131_072, 151_935, 262_143]


def canonical(ids, counts, entropy=None):
    """Each position as sorted (id, count) pairs."""
    return [
        sorted((i, c) for i, c in zip(some_ids, some_counts, strict=True) if c)
        for some_ids, some_counts in zip(ids.tolist(), counts.tolist(), strict=True)
    ]


def make_grids(positions, slots):
    """Ids and counts [N K] of positions given as (id, count) pairs."""
    ids, counts = np.zeros((len(positions), slots), np.int64), np.zeros((len(positions), slots), np.int64)
    for n, classes in enumerate(positions):
        for slot, (i, c) in enumerate(classes):
            ids[n, slot], counts[n, slot] = i, c
    return ids, counts


position = st.dictionaries(
    st.sampled_from(EDGES) | st.integers(0, 262_143), st.integers(1, 64), min_size=1, max_size=64
)


@given(st.lists(position, max_size=12))
@settings(deadline=None, max_examples=100)
def test_round_trip(positions):
    ids, counts = make_grids([list(classes.items()) for classes in positions], 64)
    decoded = decode(encode(ids, counts, 262_144), 262_144)
    assert canonical(*decoded) == canonical(ids, counts)
    assert decoded.ids.shape[1] == max(map(len, positions), default=0), "as many slots as the fullest position has"


def test_bytes_that_an_earlier_version_stored():
    """Format 2 stays readable; the bytes are those of version 0.1.0."""
    streams = (
        "02000000060b0000000c0000000c0000000c0000000c0000000b00000028b52ffd2002110000010028b52ffd200319000000020328b5"
        "2ffd200319000003037028b52ffd200319000000001128b52ffd200319000000000128b52ffd200211000005c81004c5ae"
    )
    ids, counts, entropy = decode(bytes.fromhex(streams), 100_000)
    assert canonical(ids, counts) == [[(3, 1), (7, 3)], [(70_000, 4)]]
    assert entropy.tolist() == [5, 200]


@pytest.mark.parametrize("number", EDGES)
def test_edges(number):
    ids, counts = make_grids([[(number, c)] for c in range(1, 65)], 1)
    assert canonical(*decode(encode(ids, counts, 262_144), 262_144)) == canonical(ids, counts)


def test_a_larger_vocabulary_gets_a_wider_word():
    ids, counts = make_grids([[(262_144, 64), (1_000_000, 1)], [(0, 3)]], 2)
    narrow, wide = (encode(np.minimum(ids, v - 1), counts, v) for v in (262_144, 1_000_001))
    assert len(wide) > len(narrow)
    assert canonical(*decode(encode(ids, counts, 1_000_001), 1_000_001)) == canonical(ids, counts)


def test_draws_of_a_zipf_distribution_take_less_than_three_bytes_a_class():
    generator = np.random.default_rng(0)
    draws = np.minimum(generator.zipf(1.2, (500, 64)), 49_151)
    positions = [list(zip(*np.unique(d, return_counts=True), strict=True)) for d in draws]
    ids, counts = make_grids(positions, 64)
    uncompressed = sum(1 + 3 * len(classes) for classes in positions)
    assert len(encode(ids, counts, 49_152)) < 0.7 * uncompressed


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[(262_144, 1)]], "do not fit a vocabulary of 262144"),
        ([[(-1, 1)]], "do not fit a vocabulary"),
        ([[(1, 65)]], "do not fit a vocabulary of 262144 and 64 draws"),
        ([[(1, 1)], []], "positions have 0 to 1 classes"),
        ([[(i, 1) for i in range(65)]], "positions have 65 to 65 classes; 1 to 64 can be stored"),
    ],
)
def test_what_cannot_be_stored(positions, message):
    with pytest.raises(ValueError, match=message):
        encode(*make_grids(positions, 65), 262_144)


def test_cut_bytes_are_refused_at_every_length():
    data = encode(*make_grids([[(5, 1), (70_000, 2)], [(9, 61)]], 2), 262_144)
    for length in range(len(data)):
        with pytest.raises(ValueError, match="the bytes are damaged: their checksum differs"):
            decode(data[:length], 262_144)


def test_a_flipped_bit_is_refused_wherever_it_is():
    data = encode(*make_grids([[(5, 1), (70_000, 2)], [(9, 61)]], 2), 262_144)
    for place in range(len(data)):
        with pytest.raises(ValueError, match="the bytes are damaged"):
            decode(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :], 262_144)


def test_bytes_of_another_vocabulary_are_refused():
    data = encode(*make_grids([[(5, 1)]], 1), 100)
    with pytest.raises(ValueError, match="the bytes hold 5 streams instead of the 6 of a vocabulary of 262145"):
        decode(data, 262_145)
