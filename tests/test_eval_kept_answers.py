"""Answers that were given are not asked for again, whatever ended the process."""

import json

import pytest
import torch
from evaluation_helpers import save_model
from lm_eval.api.instance import Instance

from sekd.eval.backends import BackendOptions, is_out_of_memory, load_lm, shrink_batches
from sekd.eval.kept_answers import AnswerFile, KeepingLM, is_begun

HEADER = {"model": "m", "settings": {"shots": 0}}
PAIRS = [(f"w{i} w{i + 1}", " w5 w6" if i % 2 else " w7") for i in range(10)]
GREEDY = {"until": ["zzz"], "max_gen_toks": 3, "do_sample": False, "temperature": 0.0}


def ask(kind, arguments):
    return [Instance(kind, {}, one, 0) for one in arguments]


@pytest.fixture
def lm(tmp_path):
    return load_lm(save_model(tmp_path / "model"), "hf", BackendOptions(dtype="float32", batch_size=4))


def keep(lm, path, header=HEADER, on_answer=lambda new: None):
    def shrink(lm, error):
        shrink_batches(lm, "hf", "m", False, error)

    return KeepingLM(lm, AnswerFile(str(path), header), on_answer, shrink, is_out_of_memory)


def count_sequences(lm, monkeypatch):
    """How many sequences the model reads from now on."""
    counts = []
    original = lm._model_call
    monkeypatch.setattr(lm, "_model_call", lambda ids, **more: (counts.append(len(ids)), original(ids, **more))[1])
    return counts


def test_answers_are_those_of_the_model_and_are_read_again_without_it(lm, tmp_path):
    requests = ask("loglikelihood", PAIRS), ask("generate_until", [(c, GREEDY) for c, _ in PAIRS])
    own = lm.loglikelihood(requests[0], disable_tqdm=True), lm.generate_until(requests[1], disable_tqdm=True)
    rolling = ask("loglikelihood_rolling", [(c,) for c, _ in PAIRS])
    own_rolling = lm.loglikelihood_rolling(rolling, disable_tqdm=True)
    counted = []
    keeping = keep(lm, tmp_path / "answers.jsonl", on_answer=counted.append)
    assert keeping.loglikelihood(requests[0]) == own[0]
    assert keeping.generate_until(requests[1]) == own[1]
    assert keeping.loglikelihood_rolling(rolling) == pytest.approx(own_rolling)
    assert sum(counted) == 30
    keeping.file.close()
    lm._model = None
    again = keep(lm, tmp_path / "answers.jsonl")
    assert again.loglikelihood(requests[0]) == own[0], "exact, through JSON"
    assert again.generate_until(requests[1]) == own[1]
    assert again.max_gen_toks == lm.max_gen_toks, "everything else is the model's"


def test_only_what_is_missing_is_asked(lm, tmp_path, monkeypatch):
    path = tmp_path / "answers.jsonl"
    first = keep(lm, path).loglikelihood(ask("loglikelihood", PAIRS[:6]))
    asked = count_sequences(lm, monkeypatch)
    everything = keep(lm, path).loglikelihood(ask("loglikelihood", PAIRS))
    assert everything[:6] == first
    assert sum(asked) == 4


def test_a_stop_in_the_middle_keeps_the_batches_before_it(lm, tmp_path, monkeypatch):
    whole = lm.loglikelihood(ask("loglikelihood", PAIRS), disable_tqdm=True)
    path, original, calls = tmp_path / "answers.jsonl", lm._model_call, []

    def stop_at_the_third(ids, **more):
        calls.append(len(ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(ids, **more)

    monkeypatch.setattr(lm, "_model_call", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        keep(lm, path).loglikelihood(ask("loglikelihood", PAIRS))
    assert len(path.read_text().splitlines()) == 1 + 8
    path.write_text(path.read_text() + '["cut off by kill')
    calls.clear()
    assert keep(lm, path).loglikelihood(ask("loglikelihood", PAIRS)) == pytest.approx(whole)
    assert calls == [2]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_repeats_and_equal_requests_have_answers_of_their_own(lm, tmp_path):
    how = GREEDY | {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_gen_toks": 12}
    keeping = keep(lm, tmp_path / "answers.jsonl")
    torch.manual_seed(0)
    rounds = []
    for number in range(2):
        requests = ask("generate_until", [("w1 w2", how), ("w1 w2", how)])
        for request in requests:
            request.idx = number
        rounds.append(keeping.generate_until(requests))
    assert len({*rounds[0], *rounds[1]}) == 4
    assert keeping.generate_until(requests) == rounds[1]


@pytest.mark.parametrize("content", [None, "", "no json\n", '{"model": "other"}\n', "\x80\n", json.dumps(HEADER)])
def test_answers_of_something_else_are_not_used(tmp_path, content):
    path = tmp_path / "answers.jsonl"
    if content is None:
        file = AnswerFile(str(path), {**HEADER, "settings": {"shots": 5}})
        file.put("key", [1.0, True])
        file.close()
    else:
        path.write_bytes(content.encode("latin-1"))
    file = AnswerFile(str(path), HEADER)
    assert file.answers == {}
    file.put("key", "text")
    file.close()
    assert AnswerFile(str(path), HEADER).answers == {"key": "text"}
    assert is_begun(str(path), HEADER)
    assert not is_begun(str(path), {})
    assert not is_begun(str(path / "none"), HEADER)


def test_a_batch_that_does_not_fit_is_asked_again_in_halves(lm, tmp_path, monkeypatch):
    whole = lm.loglikelihood(ask("loglikelihood", PAIRS), disable_tqdm=True)
    original, sizes = lm._model_call, []

    def run_small(ids, **more):
        sizes.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(ids, **more)

    monkeypatch.setattr(lm, "_model_call", run_small)
    counted = []
    keeping = keep(lm, tmp_path / "answers.jsonl", on_answer=counted.append)
    assert keeping.loglikelihood(ask("loglikelihood", PAIRS)) == pytest.approx(whole)
    assert sizes == [4, 2, 2, 2, 2, 2]
    assert sum(counted) == 10


def test_an_error_of_the_model_is_not_taken_for_memory(lm, tmp_path, monkeypatch):
    def fail(ids, **more):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(lm, "_model_call", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        keep(lm, tmp_path / "answers.jsonl").loglikelihood(ask("loglikelihood", PAIRS))
