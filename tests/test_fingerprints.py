"""What tells data and weights apart."""

from helpers import config, make_model

from sekd.data.prepare import prepare
from sekd.fingerprints import data_fingerprint, weights_fingerprint


def test_fingerprints(tokenizer, pairs, tmp_path):
    data = prepare(pairs, tokenizer, config())
    assert data_fingerprint(data) == data_fingerprint(prepare(pairs, tokenizer, config()))
    assert data_fingerprint(data) != data_fingerprint(data.select(range(63)))
    assert data_fingerprint(data) != data_fingerprint(prepare(pairs, tokenizer, config(supervise_prompt=True)))
    assert weights_fingerprint(make_model("untied")) == weights_fingerprint(make_model("untied"))
    assert weights_fingerprint(make_model("untied")) != weights_fingerprint(make_model("untied", 1))
