"""What goes into the cache comes out, and what is damaged is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sekd.cache.codec import FORMS, decode, encode

EDGES = [0, 131_071, 131_072, 151_935, 262_143]


def canonical(ids, counts, entropy=None):
    """Rows as sorted (id, count) pairs."""
    return [
        sorted((i, c) for i, c in zip(r, n, strict=True) if c)
        for r, n in zip(ids.tolist(), counts.tolist(), strict=True)
    ]


def make_rows(rows, slots):
    ids, counts = np.zeros((len(rows), slots), np.int64), np.zeros((len(rows), slots), np.int64)
    for row, pairs in enumerate(rows):
        for slot, (i, c) in enumerate(pairs):
            ids[row, slot], counts[row, slot] = i, c
    return ids, counts


row = st.dictionaries(st.sampled_from(EDGES) | st.integers(0, 262_143), st.integers(1, 64), min_size=1, max_size=64)


@pytest.mark.parametrize("form", FORMS)
@given(st.lists(row, max_size=12))
@settings(deadline=None, max_examples=100)
def test_round_trip(form, rows):
    ids, counts = make_rows([list(r.items()) for r in rows], 64)
    found = decode(encode(ids, counts, 262_144, form), 262_144, form)
    assert canonical(*found) == canonical(ids, counts)
    assert found[0].shape[1] == max((len(r) for r in rows), default=0), "no slot more than the fullest row has"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", EDGES)
def test_edges(form, number):
    ids, counts = make_rows([[(number, c)] for c in range(1, 65)], 1)
    assert canonical(*decode(encode(ids, counts, 262_144, form), 262_144, form)) == canonical(ids, counts)


@pytest.mark.parametrize("form", FORMS)
def test_a_larger_vocabulary_gets_a_wider_word(form):
    ids, counts = make_rows([[(262_144, 64), (1_000_000, 1)], [(0, 3)]], 2)
    narrow, wide = (encode(np.minimum(ids, v - 1), counts, v, form) for v in (262_144, 1_000_001))
    assert len(wide) > len(narrow)
    assert canonical(*decode(encode(ids, counts, 1_000_001, form), 1_000_001, form)) == canonical(ids, counts)


def test_packed_takes_three_bytes_a_class_and_one_a_row():
    ids, counts = make_rows([[(5, 1), (7, 2)], [(9, 61)]], 2)
    header = 4 + 1 + 2 * 4 + 4  # rows, streams, their lengths, the checksum
    assert len(encode(ids, counts, 262_144, "packed")) == header + 2 + 3 * 3
    assert len(encode(ids, counts, 262_145, "packed")) == header + 2 + 4 * 3


def test_compressed_is_smaller_on_draws_of_a_zipf_distribution():
    generator = np.random.default_rng(0)
    draws = np.minimum(generator.zipf(1.2, (500, 64)), 49_151)
    rows = [list(zip(*np.unique(r, return_counts=True), strict=True)) for r in draws]
    ids, counts = make_rows(rows, 64)
    packed, compressed = (len(encode(ids, counts, 49_152, form)) for form in ("packed", "compressed"))
    assert compressed < 0.7 * packed


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[(262_144, 1)]], "do not fit a vocabulary of 262144"),
        ([[(-1, 1)]], "do not fit a vocabulary"),
        ([[(1, 65)]], "do not fit a vocabulary of 262144 and 64 draws"),
        ([[(1, 1)], []], "rows have 0 to 1 classes"),
        ([[(i, 1) for i in range(65)]], "rows have 65 to 65 classes; 1 to 64 can be stored"),
    ],
)
def test_what_cannot_be_stored(form, rows, message):
    with pytest.raises(ValueError, match=message):
        encode(*make_rows(rows, 65), 262_144, form)


@pytest.mark.parametrize("form", FORMS)
def test_cut_bytes_are_refused_at_every_length(form):
    data = encode(*make_rows([[(5, 1), (70_000, 2)], [(9, 61)]], 2), 262_144, form)
    for length in range(len(data)):
        with pytest.raises(ValueError, match="the bytes are damaged: their checksum differs"):
            decode(data[:length], 262_144, form)


@pytest.mark.parametrize("form", FORMS)
def test_a_flipped_bit_is_refused_wherever_it_is(form):
    data = encode(*make_rows([[(5, 1), (70_000, 2)], [(9, 61)]], 2), 262_144, form)
    for place in range(len(data)):
        with pytest.raises(ValueError, match="the bytes are damaged"):
            decode(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :], 262_144, form)


def test_bytes_of_the_other_form_are_refused():
    rows = make_rows([[(5, 1)]], 1)
    for form, other in (FORMS, FORMS[::-1]):
        with pytest.raises(ValueError, match=f"the bytes are not those of {other} rows"):
            decode(encode(*rows, 100, form), 100, other)
