"""What tells data and weights apart."""

from datasets import Dataset
from helpers import config, make_model

from sekd.data.prepare import prepare
from sekd.fingerprints import data_fingerprint, hash_data, weights_fingerprint


def test_fingerprints(tokenizer, pairs, tmp_path):
    data = prepare(pairs, tokenizer, config())
    assert data_fingerprint(data) == data_fingerprint(prepare(pairs, tokenizer, config()))
    assert data_fingerprint(data) != data_fingerprint(data.select(range(63)))
    assert data_fingerprint(data) != data_fingerprint(prepare(pairs, tokenizer, config(supervise_prompt=True)))
    assert weights_fingerprint(make_model("untied")) == weights_fingerprint(make_model("untied"))
    assert weights_fingerprint(make_model("untied")) != weights_fingerprint(make_model("untied", 1))


def test_the_hash_of_the_data_sees_every_token():
    rows = [{"input_ids": [i, i + 1, 2], "supervised": [0, 1, 1], "sample_id": i} for i in range(25_000)]
    data = Dataset.from_list(rows)
    expected = hash_data(data)
    assert hash_data(Dataset.from_list(rows).select(range(25_000))) == expected, "however the rows are stored"
    assert hash_data(data.add_column("other", [1] * 25_000)) == expected
    for row, column, change in ((17_003, "input_ids", [1, 1, 1]), (24_999, "supervised", [1, 1, 1])):
        assert hash_data(Dataset.from_list([*rows[:row], {**rows[row], column: change}, *rows[row + 1 :]])) != expected
    rows[3]["input_ids"], rows[4]["input_ids"] = [3, 4], [2, 4, 5, 2]  # the same tokens, cut elsewhere
    assert hash_data(Dataset.from_list(rows)) != expected
    assert hash_data(data.select([1, 0, *range(2, 25_000)])) != expected
    assert hash_data(data.to_iterable_dataset()) == hash_data(data.take(100).to_iterable_dataset())
