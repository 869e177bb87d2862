"""Rows become samples of bounded length; what is dropped or cut is counted."""

import copy
import importlib
import itertools

import pytest
from datasets import Dataset, IterableDataset
from helpers import EOS, config, make_tokenizer, make_trainer, rollout_row
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import sekd.data.encode
from sekd.data.batch import Sample, collate
from sekd.data.load import load_rows
from sekd.data.prepare import check_same_tokenizer, prepare
from sekd.types import IGNORE


def test_text_is_packed_and_documents_stay_apart(tokenizer, texts):
    data = prepare(texts, tokenizer, config(max_length=64))
    samples = [Sample(**row) for row in data]
    tokens = sum(len(text.split()) + 1 for text in texts["text"])
    assert sum(len(s.input_ids) for s in samples) == tokens, "packing loses or doubles tokens"
    assert max(len(s.input_ids) for s in samples) <= 64
    assert [s.sample_id for s in samples] == list(range(len(samples)))
    batch = collate(samples[:4], pad_token_id=122)
    for b, sample in enumerate(samples[:4]):
        start = 0
        for length in sample.seq_lengths:
            document = slice(start, start + length)
            assert batch["position_ids"][b, document].tolist() == list(range(length))
            assert batch["targets"][b, document].tolist() == [*sample.input_ids[start + 1 : start + length], IGNORE]
            start += length
        assert (batch["targets"][b, start:] == IGNORE).all()


def test_text_without_packing_is_cut_and_counted(tokenizer, caplog):
    rows = [{"text": "w1 w2 w3 w4 w5"}, {"text": "w1 w2"}]
    data = prepare(Dataset.from_list(rows), tokenizer, config(packing=False, max_length=4))
    assert data["input_ids"][:] == [[1, 2, 3, 4], [1, 2, EOS]]
    assert "cut 1 of 2 sequences to max_length 4" in caplog.text


def test_streams(tokenizer, pairs, texts):
    stream = prepare(pairs.to_iterable_dataset(), tokenizer, config())
    assert isinstance(stream, IterableDataset)
    assert [*stream] == [*prepare(pairs, tokenizer, config())]
    packed = [*prepare(texts.to_iterable_dataset(), tokenizer, config(max_length=64))]
    assert packed == [*prepare(texts, tokenizer, config(max_length=64))]


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_documents_that_are_not_longer_than_a_prompt_are_dropped_and_counted(tokenizer, caplog, lmbda):
    data = Dataset.from_list([{"text": " ".join(["w1"] * n)} for n in (1, 3, 2, 5)])
    args = config(lmbda=lmbda, text_prompt_length=2)
    kept = [*prepare(data, tokenizer, args)]
    assert [(row["sample_id"], len(row["input_ids"])) for row in kept] == [(0, 4), (1, 6)]
    assert "dropped 2 of 4 documents that are not longer than text_prompt_length 2" in caplog.text
    caplog.clear()
    assert [*prepare(data.to_iterable_dataset(), tokenizer, args)] == kept
    assert "dropped 1 documents that are not longer than text_prompt_length 2 so far" in caplog.text
    with pytest.raises(ValueError, match="text_prompt_length 5: no document is longer; the longest has 5 tokens"):
        prepare(data, tokenizer, config(lmbda=lmbda, text_prompt_length=5))


def test_a_run_on_policy_from_text(tmp_path, tokenizer, texts):
    data = texts.to_iterable_dataset()
    trainer = make_trainer(tmp_path, tokenizer, data, lmbda=1.0, text_prompt_length=4, max_completion_length=3)
    collated, seen = trainer._collate, []
    trainer._collate = lambda samples: seen.extend(samples) or collated(samples)
    trainer.train()
    prompts = [tokenizer(text)["input_ids"][:4] for text in texts["text"]]
    assert len(seen) == 8
    for sample in seen:
        assert sample.input_ids[:4] in prompts
        assert 5 <= len(sample.input_ids) <= 7


def test_empty_rollouts_are_dropped_and_counted(tokenizer, caplog):
    rows = [rollout_row([1, 2], []), rollout_row([1, 2], [3])]
    assert len(prepare(Dataset.from_list(rows), tokenizer, config())) == 1
    assert "dropped 1 of 2 samples that have no token to learn from" in caplog.text


def test_packed_sequences_without_a_target_are_dropped_and_counted(tokenizer, caplog):
    """A document of one token has no target, and neither has the last token of a document that is cut into two."""
    rows = Dataset.from_list([{"text": text} for text in ["", "", "w1 w2 w3 w4", "w5 w6 w7"]])
    for data in (rows, rows.to_iterable_dataset()):
        found = [*prepare(data, tokenizer, config(max_length=4, max_prompt_length=2))]
        assert [row["input_ids"] for row in found] == [[1, 2, 3, 4], [5, 6, 7, EOS]]
        assert [row["sample_id"] for row in found] == [0, 1]
        assert "packed sequences that have no token to learn from" in caplog.text
        caplog.clear()
    with pytest.raises(ValueError, match="no sample has a token to learn from"):
        prepare(rows.select([0, 1]), tokenizer, config())


@pytest.mark.parametrize("kind", ["pair", "chat", "messages"])
def test_empty_completions_are_counted_and_refused_if_there_are_no_others(tokenizer, caplog, kind):
    def make(answer):
        prompt, completion = {"role": "user", "content": "w1"}, {"role": "assistant", "content": answer}
        chat = {"prompt": [prompt], "completion": [completion]}
        return {"pair": {"prompt": "w1", "completion": answer}, "chat": chat}.get(
            kind, {"messages": [prompt, completion]}
        )

    mixed = Dataset.from_list([make(answer) for answer in ["", "w2", " "]])
    assert len(prepare(mixed, tokenizer, config())) == 3
    assert "2 of 3 completions are empty" in caplog.text
    empty = mixed.select([0, 2])
    with pytest.raises(ValueError, match=r"all 2 completions are empty, so .*; set completion_column"):
        prepare(empty, tokenizer, config())
    assert len(prepare(empty, tokenizer, config(lmbda=1.0))) == 2, "the student generates completions of its own"


def test_empty_data(tokenizer):
    for empty in (Dataset.from_dict({"text": []}), IterableDataset.from_generator(lambda: iter(()))):
        with pytest.raises(ValueError, match="the data is empty"):
            prepare(empty, tokenizer, config())


def test_overlong_prompts_stop_or_are_counted(tokenizer, caplog):
    rows = [{"prompt": " ".join(["w1"] * n), "completion": "w2"} for n in (3, 9, 12)]
    with pytest.raises(ValueError, match=r"2 of 3 prompts are longer than max_prompt_length 5; raise it to 12"):
        prepare(Dataset.from_list(rows), tokenizer, config(max_prompt_length=5))
    with pytest.raises(ValueError, match="a prompt of the stream is longer than max_prompt_length 5; raise it to 9"):
        [*prepare(Dataset.from_list(rows).to_iterable_dataset(), tokenizer, config(max_prompt_length=5))]
    kept = prepare(Dataset.from_list(rows), tokenizer, config(max_prompt_length=5, overlong_prompts="drop"))
    assert len(kept) == 1
    assert "dropped 2 of 3 prompts over max_prompt_length 5" in caplog.text


def test_samples_without_targets_are_counted_and_do_not_stay(tokenizer, caplog):
    silent = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
    mute = copy.deepcopy(tokenizer)
    mute.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    with pytest.raises(ValueError, match="no sample has a token to learn from"):
        prepare(Dataset.from_list([silent]), mute, config())
    assert "dropped 1 of 1 samples that have no token to learn from" in caplog.text


def test_prompts_are_never_cut(tokenizer, pairs):
    for lmbda in (0.0, 0.5):
        with pytest.raises(ValueError, match="max_length 6 leaves no room for completions after prompts"):
            prepare(pairs, tokenizer, config(lmbda=lmbda, max_length=6, max_prompt_length=8))
    kept = prepare(pairs, tokenizer, config(lmbda=0.5, max_length=9, max_prompt_length=8))
    for row, pair in zip(kept, pairs, strict=True):
        assert row["prompt_length"] == len(pair["prompt"].split()) < len(row["input_ids"]) <= 9


def test_tokenizers_that_differ(tokenizer):
    check_same_tokenizer(tokenizer, copy.deepcopy(tokenizer))
    other = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer))
    other.add_tokens(["new"])
    with pytest.raises(ValueError, match=r"different tokenizers: 1 tokens differ, for example 'new' \(student None"):
        check_same_tokenizer(tokenizer, other)


def test_tokens_are_kept_for_the_next_run_but_not_for_other_code(tokenizer, pairs, tmp_path, monkeypatch):
    pairs.to_json(tmp_path / "pairs.jsonl")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def ids():
        return prepare(load_rows(str(tmp_path / "pairs.jsonl")), tokenizer, config())["input_ids"][0]

    before = ids()
    other = dict(input_ids=[7, 8], supervised=[0, 1], prompt_length=1, teacher_prompt_ids=None)
    monkeypatch.setitem(sekd.data.encode.ENCODERS, "pair", lambda *known: other)
    assert ids() == before, "of this code they are there already"
    monkeypatch.setattr(importlib.import_module("sekd.data.prepare"), "CODE", "other code")
    assert ids() == [7, 8]


def fingerprint(data, tokenizer, **options):
    return prepare(data, tokenizer, config(**options))._fingerprint


def test_tokens_are_cached_by_what_the_encoding_reads_alone(tokenizer, pairs, texts):
    other = dict(learning_rate=0.5, seed=7, logging_steps=3, teacher_cache="folder", position_fraction=0.5)
    for data in (pairs, texts):
        before = fingerprint(data, tokenizer)
        assert fingerprint(data, tokenizer, **other) == before
        assert fingerprint(data, tokenizer, max_length=900) != before
    assert fingerprint(pairs, tokenizer, prompt_template="Q: {prompt}") != fingerprint(pairs, tokenizer)
    assert fingerprint(pairs, tokenizer, max_prompt_length=100) != fingerprint(pairs, tokenizer)


def test_another_learning_rate_reads_the_tokens_of_the_first_run(tokenizer, pairs, tmp_path, monkeypatch):
    pairs.to_json(tmp_path / "pairs.jsonl")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = load_rows(str(tmp_path / "pairs.jsonl"))
    encode, calls = sekd.data.encode.ENCODERS["pair"], []
    monkeypatch.setitem(sekd.data.encode.ENCODERS, "pair", lambda *row: calls.append(1) or encode(*row))
    samples = [*prepare(rows, tokenizer, config())]
    assert len(calls) == len(pairs)
    assert [*prepare(rows, make_tokenizer(), config(learning_rate=0.5, max_length=900))] == samples
    assert len(calls) == len(pairs), "max_length is applied to the tokens"


@pytest.mark.parametrize("kind", ["pairs", "texts"])
def test_a_cache_on_disk_gives_no_tokens_of_other_options(tokenizer, request, kind, tmp_path, monkeypatch):
    data = request.getfixturevalue(kind)
    data.to_json(tmp_path / "data.jsonl")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = load_rows(str(tmp_path / "data.jsonl"))
    other = make_tokenizer()
    other.backend_tokenizer.pre_tokenizer = Whitespace()  # <eos> becomes three tokens
    other.backend_tokenizer.normalizer = Replace("w1", "w2")
    runs = [
        (tokenizer, {}),
        (tokenizer, dict(max_length=12, max_prompt_length=10, overlong_prompts="drop")),
        (tokenizer, dict(prompt_template="w7 {prompt}", packing=False)),
        (other, {}),
        (tokenizer, dict(eos="w3")),
    ]
    results = []
    for own, options in runs:
        own = copy.deepcopy(own)
        results.append([*prepare(rows, own, config(**options))])
        assert results[-1] == [*prepare(data, own, config(**options))], options
    assert all(a != b for a, b in itertools.combinations(results, 2))


def test_tokens_of_several_processes_are_the_same(tokenizer, pairs, tmp_path, monkeypatch):
    pairs.to_json(tmp_path / "pairs.jsonl")
    one = [*prepare(pairs, tokenizer, config())]
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = load_rows(str(tmp_path / "pairs.jsonl"))
    assert [*prepare(rows, tokenizer, config(dataset_num_proc=2))] == one
    parts = [path.name for path in (tmp_path / "cache").rglob("cache-*_of_00002.arrow")]
    assert len(parts) == 2, "each process wrote a part"
