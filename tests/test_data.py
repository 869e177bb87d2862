"""Rows become samples, samples become batches; what is supervised is exactly what should be."""

import copy
import importlib
import json
import random

import pytest
import torch
from conftest import EOS
from datasets import Dataset, IterableDataset
from test_trainer import make_trainer
from transformers import PreTrainedTokenizerFast

import sekd.data.encode
from rollouts import Rollout
from sekd.config import SEKDConfig
from sekd.data.batch import Sample, collate, from_rollout
from sekd.data.load import load_rows
from sekd.data.prepare import check_same_tokenizer, prepare
from sekd.types import IGNORE


def config(**kwargs):
    return SEKDConfig(output_dir="unused", **{"rollout_engine": "hf", **kwargs})


def first(rows, tokenizer, **kwargs):
    return Sample(**prepare(Dataset.from_list(rows), tokenizer, config(**kwargs))[0])


def test_prompt_and_completion(tokenizer):
    sample = first([{"prompt": "w1 w2", "completion": "w3 w4 w5", "other": 1}], tokenizer)
    assert sample == Sample([1, 2, 3, 4, 5, EOS], [0, 0, 1, 1, 1, 1], 0, 2)
    assert first([{"prompt": "w1", "completion": "w3"}], tokenizer, supervise_prompt=True).supervised == [1, 1, 1]


def test_other_columns_and_a_template(tokenizer):
    rows = [{"question": "w1", "answer": "w2"}]
    sample = first(
        rows, tokenizer, prompt_column="question", completion_column="answer", prompt_template="w9 {prompt} w8"
    )
    assert sample == Sample([9, 1, 8, 2, EOS], [0, 0, 0, 1, 1], 0, 3)


def test_text_prompts_as_a_chat(tokenizer):
    rows = [{"prompt": "w1", "completion": "w2"}]
    sample = first(rows, tokenizer, use_chat_template=True, system_prompt="w7")
    # <system> w7 <user> w1 <assistant> | w2 <eos>
    assert sample == Sample([125, 7, 123, 1, 124, 2, EOS], [0, 0, 0, 0, 0, 1, 1], 0, 5)


def test_conversational_prompt_and_completion(tokenizer):
    row = {"prompt": [{"role": "user", "content": "w1"}], "completion": [{"role": "assistant", "content": "w2"}]}
    assert first([row], tokenizer) == Sample([123, 1, 124, 2, EOS], [0, 0, 0, 1, 1], 0, 3)


def messages(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_all_assistant_turns_of_a_conversation_are_targets(tokenizer):
    row = messages(("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4 w5"))
    sample = first([row], tokenizer)
    assert sample.input_ids == [123, 1, 124, 2, EOS, 123, 3, 124, 4, 5, EOS]
    assert sample.supervised == [0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]
    assert sample.prompt_length == 8


def test_answers_that_the_template_rewrites_later_are_no_targets(tokenizer):
    """As Qwen3 does: the last answer carries a thinking part, which earlier ones lose."""
    qwen = copy.deepcopy(tokenizer)
    thinking = "{% if m.role == 'assistant' and loop.last %}w77 {% endif %}{{ m.content }}"
    qwen.chat_template = tokenizer.chat_template.replace("{{ m.content }} <eos>", thinking + " <eos>")
    row = messages(("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4"))
    sample = first([row], qwen)
    assert sample.input_ids == [123, 1, 124, 2, EOS, 123, 3, 124, 77, 4, EOS]
    assert sample.supervised == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert sample.input_ids[: sample.prompt_length] == [123, 1, 124, 2, EOS, 123, 3, 124]


def test_what_the_template_writes_after_the_end_is_not_supervised(tokenizer):
    trailing = copy.deepcopy(tokenizer)
    trailing.chat_template = trailing.chat_template.replace("<eos>{% endgeneration %}", "<eos>{% endgeneration %} w99")
    assert first([messages(("user", "w1"), ("assistant", "w2"))], trailing).input_ids == [123, 1, 124, 2, EOS]


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


def test_targets_are_shifted_once():
    samples = [Sample([5, 6, 7, 8], [0, 0, 1, 1], 3, 2), Sample([9, 10], [0, 1], 4, 1)]
    batch = collate(samples, pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 10, 0, 0]]
    assert batch["targets"].tolist() == [[IGNORE, 7, 8, IGNORE], [10, IGNORE, IGNORE, IGNORE]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert batch["sample_ids"].tolist() == [3, 4]


def test_a_rollout_supervises_what_was_generated_only():
    sample = Sample([1, 2, 3], [1, 1, 1], 7, 2)
    new = from_rollout(sample, Rollout([1, 2], [8, 9, EOS], 4, "stop"))
    assert new == Sample([1, 2, 8, 9, EOS], [0, 0, 1, 1, 1], 7, 2)
    empty = from_rollout(sample, Rollout([1, 2], [], 4, "stop"))
    assert (collate([empty], 0)["targets"] == IGNORE).all()


def test_streams(tokenizer, pairs, texts):
    stream = prepare(pairs.to_iterable_dataset(), tokenizer, config())
    assert isinstance(stream, IterableDataset)
    assert [*stream] == [*prepare(pairs, tokenizer, config())]
    packed = [*prepare(texts.to_iterable_dataset(), tokenizer, config(max_length=64))]
    assert packed == [*prepare(texts, tokenizer, config(max_length=64))]


# Text whose first tokens are prompts


@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
def test_the_first_tokens_of_a_document_are_its_prompt(tokenizer, lmbda):
    row, options = {"text": "w1 w2 w3 w4 w5"}, dict(lmbda=lmbda, text_prompt_length=2)
    assert first([row], tokenizer, **options) == Sample([1, 2, 3, 4, 5, EOS], [0, 0, 1, 1, 1, 1], 0, 2)
    limits = dict(max_length=4, max_prompt_length=8)  # which is no limit here: all prompts have 2 tokens
    assert first([row], tokenizer, **options, **limits) == Sample([1, 2, 3, 4], [0, 0, 1, 1], 0, 2)
    assert first([row], tokenizer, **options, supervise_prompt=True).supervised == [1] * 6
    pair = {"prompt": "w1 w2 w3", "completion": "w4"}
    assert first([pair], tokenizer, **options) == first([pair], tokenizer, lmbda=lmbda)


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


def test_text_on_policy_needs_a_length_for_its_prompts(tokenizer):
    with pytest.raises(ValueError, match=r"lmbda 0.5 needs prompts, .* \(text_column 'text'\): set text_prompt_length"):
        first([{"text": "w1"}], tokenizer, lmbda=0.5)
    with pytest.raises(ValueError, match="max_length 2 leaves no room behind a text_prompt_length of 2; raise"):
        first([{"text": "w1"}], tokenizer, lmbda=1.0, max_length=2, text_prompt_length=2)


# Rollouts that were written before


def rollout_row(prompt, completion, **more):
    words = " ".join(f"w{i}" if i != EOS else "<eos>" for i in completion)
    return {"prompt_ids": prompt, "completion_ids": completion, "prompt": "w0", "completion": words, **more}


def test_rollouts_are_taken_as_they_are(tmp_path, tokenizer):
    rows = [
        rollout_row([1, 2], [3, 4, EOS], sample_id=17, step=3, weights_step=3, finish_reason="stop"),
        rollout_row([5], [6, 7], sample_id=4, step=4, weights_step=3, finish_reason="length"),
    ]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for supervise_prompt in (False, True):
        args = config(supervise_prompt=supervise_prompt)
        samples = [Sample(**row) for row in prepare(load_rows(str(tmp_path / "rollouts.jsonl")), tokenizer, args)]
        assert samples == [Sample([1, 2, 3, 4, EOS], [0, 0, 1, 1, 1], 0, 2), Sample([5, 6, 7], [0, 1, 1], 1, 1)]
    bare = {"prompt_ids": [1], "completion_ids": [2, 200]}  # models pad their vocabularies
    assert first([bare], tokenizer).input_ids == [1, 2, 200]


def test_empty_rollouts_are_dropped_and_counted(tokenizer, caplog):
    rows = [rollout_row([1, 2], []), rollout_row([1, 2], [3])]
    assert len(prepare(Dataset.from_list(rows), tokenizer, config())) == 1
    assert "dropped 1 of 2 samples that have no token to learn from" in caplog.text


def test_rollouts_carry_the_teachers_prompts(tokenizer):
    rows = [rollout_row([1], [2], teacher_prompt_ids=[9, 1]), rollout_row([1], [3], teacher_prompt_ids=None)]
    found = [row["teacher_prompt_ids"] for row in prepare(Dataset.from_list(rows), tokenizer, config())]
    assert found == [[9, 1], None]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    assert [row["teacher_prompt_ids"] for row in prepare(stream, tokenizer, config())] == found
    args = config(teacher_prompt_prefix="w9 ")
    assert prepare(Dataset.from_list(rows[:1]), tokenizer, args)[0]["teacher_prompt_ids"] == [9, 1]
    with pytest.raises(ValueError, match="teacher_prompt_prefix cannot be put before tokens, and the rollouts lack"):
        prepare(Dataset.from_list(rows), tokenizer, args)
    with pytest.raises(ValueError, match=r"teacher_cache 'c' holds the teacher's rows behind .* or drop that column"):
        first(rows, tokenizer, teacher_cache="c")
    with pytest.raises(ValueError, match="'teacher_prompt_ids' holds no token"):
        first([rollout_row([1], [2], teacher_prompt_ids=[])], tokenizer)


def test_rollouts_of_another_tokenizer_or_without_token_ids(tokenizer):
    with pytest.raises(ValueError, match="written with another tokenizer: the completion_ids of a row mean 'w3' here"):
        first([{**rollout_row([1], [3]), "completion": "w4"}], tokenizer)
    for bad in ([-1], [1.5], ["w1"], [True], None):
        for column in ("prompt_ids", "completion_ids"):
            with pytest.raises(ValueError, match=rf"column '{column}' holds .*, which is no token id"):
                first([{**rollout_row([1], [2]), column: bad}], tokenizer)


# What a user can get wrong


def test_missing_columns_are_named_beside_those_there_are(tokenizer):
    with pytest.raises(ValueError, match=r"lacks completion_column: 'completion'; its columns are 'prompt', 'answer'"):
        first([{"prompt": "w1", "answer": "w2"}], tokenizer)
    with pytest.raises(ValueError, match=r"prompt_column: 'prompt' or .* or text_column: 'text'; its columns are 'x'"):
        first([{"x": "w1"}], tokenizer)
    with pytest.raises(ValueError, match=r"text_column: 'text'; its columns are 'x'"):
        first([{"x": "w1"}], tokenizer, lmbda=1.0)


def test_on_policy_needs_no_completions(tokenizer):
    assert first([{"prompt": "w1 w2"}], tokenizer, lmbda=1.0).input_ids == [1, 2]


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
        with pytest.raises(ValueError, match="max_length 6 leaves no room for completions behind prompts"):
            prepare(pairs, tokenizer, config(lmbda=lmbda, max_length=6, max_prompt_length=8))
    kept = prepare(pairs, tokenizer, config(lmbda=0.5, max_length=9, max_prompt_length=8))
    for row, pair in zip(kept, pairs, strict=True):
        assert row["prompt_length"] == len(pair["prompt"].split()) < len(row["input_ids"]) <= 9


def test_cells_that_are_not_text(tokenizer):
    for row in ({"prompt": 3, "completion": "w1"}, {"prompt": "w1", "completion": None}):
        with pytest.raises(ValueError, match=r"column '(prompt|completion)' holds (3|None), which is not text"):
            first([row], tokenizer)


def test_a_tokenizer_without_eos(tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no EOS token"):
        first([{"text": "w1"}], endless)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty.jsonl is empty"):
        load_rows(str(tmp_path / "empty.jsonl"))
    (tmp_path / "broken.jsonl").write_text('{"text": "w1"\n{{{')
    with pytest.raises(ValueError, match=r"broken.jsonl' cannot be read as json"):
        load_rows(str(tmp_path / "broken.jsonl"))


def test_a_conversation_needs_a_chat_template_and_an_answer(tokenizer):
    with pytest.raises(ValueError, match="has no assistant turn"):
        first([messages(("user", "w1"))], tokenizer)
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        first([messages(("user", "w1"), ("assistant", "w2"))], bare)


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer):
    rewriting = copy.deepcopy(tokenizer)
    rewriting.chat_template = "{% if add_generation_prompt %}w1 {% else %}w2 {% endif %}" + tokenizer.chat_template
    with pytest.raises(ValueError, match="writes the prompt differently once the answer follows"):
        first([messages(("user", "w1"), ("assistant", "w2"))], rewriting)


def test_files(tmp_path):
    rows = [{"text": f"w{i}", "n": i} for i in range(10)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "b.csv").write_text("text,m\nw50,1\nw51,2\n")
    Dataset.from_list(rows[:3]).to_parquet(tmp_path / "c.parquet")
    assert load_rows(str(tmp_path / "a.jsonl"))["n"][:] == list(range(10))
    assert load_rows(str(tmp_path / "a.jsonl"), split="train[:3]")["n"][:] == [0, 1, 2]
    assert load_rows(str(tmp_path / "a.jsonl"), split="train[80%:]")["n"][:] == [8, 9]
    with pytest.raises(ValueError, match="mixes kinds of files"):
        load_rows(str(tmp_path))
    (tmp_path / "d.jsonl").write_text('{"text": "w1", "other": 2}\n')
    together = load_rows(str(tmp_path / "*.jsonl"))
    assert together.column_names == ["text"]
    assert len(together) == 11
    assert len(load_rows(str(tmp_path / "c.parquet"))) == 3
    assert len(load_rows(str(tmp_path / "*.csv"))) == 2
    stream = load_rows(str(tmp_path / "a.jsonl"), streaming=True)
    assert [row["n"] for row in stream] == list(range(10))
    with pytest.raises(ValueError, match="slices a stream"):
        load_rows(str(tmp_path / "a.jsonl"), split="train[:3]", streaming=True)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "/nowhere/at/all"])
def test_a_missing_file_is_named(name):
    with pytest.raises(ValueError, match=f"dataset_name '{name}': no such file"):
        load_rows(name)


def test_tokenizers_that_differ(tokenizer):
    check_same_tokenizer(tokenizer, copy.deepcopy(tokenizer))
    other = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer))
    other.add_tokens(["new"])
    with pytest.raises(ValueError, match=r"different tokenizers: 1 tokens differ, for example 'new' \(student None"):
        check_same_tokenizer(tokenizer, other)


def test_random_samples_round_trip_through_a_batch():
    generator = random.Random(0)
    samples = [
        Sample(
            ids := [generator.randrange(100) for _ in range(generator.randint(1, 20))],
            [generator.randint(0, 1) for _ in ids],
            i,
        )
        for i in range(16)
    ]
    batch = collate(samples, 0)
    for b, sample in enumerate(samples):
        expected = [token for token, s in zip(sample.input_ids[1:], sample.supervised[1:], strict=True) if s]
        assert batch["targets"][b][batch["targets"][b] != IGNORE].tolist() == expected
    assert batch["input_ids"].dtype == torch.int64


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
