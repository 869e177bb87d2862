"""A real subset, of exactly the size asked for, chosen by the frozen models, kept in a file that knows its origin."""

import itertools
import json
import math
from fractions import Fraction

import pytest
import torch
from datasets import Dataset
from helpers import config, make_model, make_tokenizer, make_trainer, qlora_student
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import score_oracle

from sekd import SEKDConfig
from sekd.data.batch import collate
from sekd.data.prepare import prepare
from sekd.fingerprints import data_fingerprint
from sekd.samples import choose_samples, order_stream, prepare_samples, score_samples, select_samples, take_pool
from sekd.scores import SCORES


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.decimals("0.001", "1", places=3))
@settings(deadline=None, max_examples=100)
def test_exactly_the_ceiling_is_kept_and_ties_go_to_the_lower_index(scores, fraction):
    kept = select_samples(torch.tensor(scores).float(), float(fraction))
    count = math.ceil(Fraction(str(fraction)) * len(scores))
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]
    assert kept == sorted(best)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5, 20])
def test_fractions_outside(fraction):
    with pytest.raises(ValueError, match=r"sample_fraction .* is outside \(0, 1\]; 0.2 keeps 20 %"):
        select_samples([1.0, 2.0], fraction)


def sample_config(tmp_path, **choices):
    settings = dict(output_dir=str(tmp_path), bf16=False, disable_tqdm=True, per_device_eval_batch_size=3)
    return SEKDConfig(**settings | choices)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("kind", ["pairs", "texts"])
def test_a_sample_scores_the_mean_over_its_rows(tmp_path, tokenizer, request, score, kind):
    args = sample_config(tmp_path, sample_score=score, max_length=40, max_prompt_length=20)
    data = prepare(request.getfixturevalue(kind).select(range(10)), tokenizer, args)
    student, teacher = make_model("untied"), make_model("untied", 1)
    scores = score_samples(data, student, teacher, args)
    for row, found in zip(data, scores.tolist(), strict=True):
        expected, start = [], 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            ids = torch.tensor([row["input_ids"][start : start + length]])
            where = [t for t in range(length - 1) if row["supervised"][start + t + 1]]
            with torch.no_grad():
                q, p = (model(input_ids=ids).logits[0][where] for model in (student, teacher))
            expected += score_oracle(score, q, p, ids[0, 1:][where]).tolist()
            start += length
        assert found == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_samples_of_similar_length_share_a_batch(tmp_path, tokenizer, pairs, monkeypatch):
    args, lengths = sample_config(tmp_path), []

    def record(samples, pad):
        lengths.append([len(sample.input_ids) for sample in samples])
        return collate(samples, pad)

    monkeypatch.setattr("sekd.samples.collate", record)
    data = prepare(pairs.select(range(20)), tokenizer, args)
    score_samples(data, make_model("untied"), None, args)
    of_data = sorted((len(row["input_ids"]) for row in data), reverse=True)
    assert [*itertools.chain(*lengths)] == of_data != [len(row["input_ids"]) for row in data]


def test_a_prompt_without_completion_is_scored_on_its_own_tokens(tmp_path, tokenizer, pairs):
    args = sample_config(tmp_path, lmbda=1.0, rollout_engine="hf")
    data = prepare(pairs.remove_columns("completion").select(range(4)), tokenizer, args)
    student = make_model("untied")
    scores = score_samples(data, student, None, args)
    ids = torch.tensor([data[2]["input_ids"]])
    with torch.no_grad():
        logits = student(input_ids=ids).logits[0, :-1]
    expected = score_oracle("student_entropy", logits, logits, ids[0, 1:]).mean()
    assert scores[2].item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_frozen_student_has_no_dropout(tmp_path, tokenizer, pairs):
    args, found = sample_config(tmp_path), []
    data = prepare(pairs, tokenizer, args)
    for dropout in (0.0, 0.5):
        student = make_model("untied").train()
        for layer in student.model.layers:
            layer.self_attn.attention_dropout = dropout
        found.append(score_samples(data, student, None, args))
        assert student.training
    assert torch.equal(*found)


def test_a_score_that_is_no_number_has_no_rank():
    with pytest.raises(ValueError, match="score is nan, so samples cannot be ranked"):
        select_samples([1.0, float("nan")], 0.5)


def test_scores_do_not_depend_on_the_batch_size(tmp_path, tokenizer, pairs):
    found = []
    for size in (1, 5, 64):
        args = sample_config(tmp_path, per_device_eval_batch_size=size)
        found.append(score_samples(prepare(pairs, tokenizer, args), make_model("untied"), None, args))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=1e-6)


def test_random_needs_no_model_and_follows_the_seed(tmp_path, tokenizer, pairs):
    args = sample_config(tmp_path, sample_score="random", sample_fraction=0.3)
    data = prepare(pairs, tokenizer, args)
    first = score_samples(data, make_model("untied"), None, args)
    assert torch.equal(first, score_samples(data, make_model("tied"), None, args))
    args = sample_config(tmp_path, sample_score="random", seed=5)
    assert not torch.equal(first, score_samples(data, make_model("untied"), None, args))


def test_a_score_that_is_not_finite_names_the_sample(tmp_path, tokenizer, pairs):
    student = make_model("untied")
    args = sample_config(tmp_path)
    data = prepare(Dataset.from_list([{"prompt": "w1", "completion": f"w{i} w2"} for i in (5, 7, 9)]), tokenizer, args)
    with torch.no_grad():
        student.model.embed_tokens.weight[7] = torch.nan
    with pytest.raises(FloatingPointError, match=r"student_entropy of samples \[1\] is not finite"):
        score_samples(data, student, None, args)


# In training


def seen_samples(trainer):
    """The ids that the steps train on."""
    seen: list[list[int]] = []
    collate = trainer._collate
    trainer._collate = lambda samples: seen.append([s.sample_id for s in samples]) or collate(samples)
    trainer.train()
    return seen


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_training_sees_the_kept_samples_only_and_whole_batches(tmp_path, tokenizer, pairs, lmbda):
    options = dict(sample_fraction=0.2, per_device_train_batch_size=4, max_steps=9, lmbda=lmbda)
    trainer = make_trainer(tmp_path, tokenizer, pairs, **options)
    found = json.loads((tmp_path / "samples.json").read_text())
    assert len(found["kept"]) == math.ceil(0.2 * 64) == len(trainer.train_dataset)
    assert len(found["scores"]) == 64
    seen = seen_samples(trainer)
    assert {i for batch in seen for i in batch} == set(found["kept"])
    assert all(len(batch) == 4 for batch in seen[:3])


def test_the_file_is_used_again_for_any_fraction(tmp_path, tokenizer, pairs, monkeypatch):
    make_trainer(tmp_path, tokenizer, pairs, sample_fraction=0.2)
    first = json.loads((tmp_path / "samples.json").read_text())

    def refuse(*args):
        raise AssertionError("scored again")

    monkeypatch.setattr("sekd.samples.score_samples", refuse)
    trainer = make_trainer(tmp_path, tokenizer, pairs, sample_fraction=0.5)
    assert len(trainer.train_dataset) == 32
    assert set(first["kept"]) <= set(trainer.train_dataset["sample_id"])
    assert json.loads((tmp_path / "samples.json").read_text())["seconds"] == first["seconds"] > 0


def test_training_does_not_change_what_was_chosen(tmp_path, tokenizer, pairs):
    """A resumed run loads its initial student first, and so accepts the file again."""
    options = dict(sample_fraction=0.3, save_strategy="steps", save_steps=2, max_steps=4)
    whole = make_trainer(tmp_path / "run", tokenizer, pairs, **options)
    whole.train()
    resumed = make_trainer(tmp_path / "run", tokenizer, pairs, **options)
    assert resumed.train_dataset["sample_id"] == whole.train_dataset["sample_id"]
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data", r"another value of the data \(dataset_name"),
        ("tokenizer", "another value of the tokenizer"),
        ("student", r"another value of the student's weights \(model_name_or_path, model_revision or dtype\)"),
        ("teacher", r"another value of the teacher's weights \(teacher_model_name_or_path, its revision"),
        ("score", "another value of sample_score"),
        ("format", "has no checksum; delete it to score again, or name another samples_file"),
        ("cut", "is damaged: it is not JSON"),
        ("empty", "is damaged: its checksum differs"),
        ("digit", "is damaged: its checksum differs"),
        ("deep", "is damaged: it is not JSON"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, tokenizer, pairs, change, message):
    args = sample_config(tmp_path, sample_fraction=0.5, sample_score="kl")
    models = {"student": make_model("untied"), "teacher": make_model("untied", 1)}
    choose_samples(prepare(pairs, tokenizer, args), models["student"], models["teacher"], tokenizer, args)
    path = tmp_path / "samples.json"
    if change == "data":
        pairs = pairs.select(range(63, -1, -1))
    elif change == "tokenizer":
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["new"])
    elif change in models:
        with torch.no_grad():
            models[change].lm_head.weight[5, 3] += 1e-3
            models[change].model.norm.weight += 1e-4
    elif change == "score":
        args = sample_config(tmp_path, sample_fraction=0.5, sample_score="ce_ratio")
    elif change == "format":
        path.write_text(json.dumps({"format": 0}))
    elif change == "empty":
        path.write_text(json.dumps({"checksum": "0"}))
    elif change == "digit":
        found = json.loads(path.read_text())
        path.write_text(json.dumps(found | {"scores": [found["scores"][0] + 1e-6, *found["scores"][1:]]}))
    elif change == "deep":
        path.write_text("[" * 100_000)
    else:
        path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=message):
        choose_samples(prepare(pairs, tokenizer, args), models["student"], models["teacher"], tokenizer, args)


@pytest.mark.parametrize("entry", ["format", "fingerprint", "kept", "scores", "checksum", "sample_fraction"])
@pytest.mark.parametrize("value", [None, "x", 1e21, [], {}, [[]], [0.5, []]])
def test_odd_values_in_the_file_are_one_line(tmp_path, tokenizer, pairs, entry, value):
    args = sample_config(tmp_path, sample_fraction=0.5, sample_score="random")
    data = prepare(pairs.select(range(2)), tokenizer, args)
    choose_samples(data, make_model("untied"), None, tokenizer, args)
    path = tmp_path / "samples.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {entry: value}))
    with pytest.raises(ValueError, match=r"^samples_file .*; delete it to score again, or name another samples_file$"):
        choose_samples(data, make_model("untied"), None, tokenizer, args)


def test_a_stream_needs_a_pool(tmp_path, tokenizer, pairs):
    stream = pairs.to_iterable_dataset()
    with pytest.raises(ValueError, match=r"sample_fraction 0.5 needs the number of samples, .* set sample_pool"):
        make_trainer(tmp_path, tokenizer, stream, sample_fraction=0.5)
    trainer = make_trainer(tmp_path, tokenizer, stream, sample_fraction=0.25, sample_pool=20)
    assert len(trainer.train_dataset) == 5
    assert max(trainer.train_dataset["sample_id"]) < 20
    trainer.train()


def test_a_pool_keeps_the_order_and_the_columns_of_the_stream(tmp_path, tokenizer, texts):
    args = sample_config(tmp_path, max_length=40, max_prompt_length=20)
    stream = prepare(texts.to_iterable_dataset(), tokenizer, args)
    assert take_pool(stream, 10).to_list() == list(stream.take(10))


def test_a_quantized_student_can_choose_samples(tmp_path, tokenizer, pairs):
    pytest.importorskip("bitsandbytes")
    student, options = qlora_student(tmp_path)
    trainer = make_trainer(tmp_path, tokenizer, pairs, student, None, options, sample_fraction=0.25)
    assert len(trainer.train_dataset) == 16
    trainer.train()


def test_a_pool_of_data_with_a_length(tmp_path, tokenizer, pairs):
    trainer = make_trainer(tmp_path, tokenizer, pairs, sample_fraction=0.25, sample_pool=20)
    assert len(trainer.train_dataset) == 5
    assert len(json.loads((tmp_path / "samples.json").read_text())["scores"]) == 20


def test_a_pool_larger_than_the_stream_is_the_stream(tmp_path, tokenizer, texts):
    args = sample_config(tmp_path, max_length=40, max_prompt_length=20)
    assert len(take_pool(prepare(texts.to_iterable_dataset(), tokenizer, args), 10_000)) < 10_000


def test_a_sample_choice_belongs_to_the_teachers_prompts(tmp_path, tokenizer, pairs):
    student, teacher, found, names = make_model("untied"), make_model("untied", 1), [], []
    for prefix in (None, "w9 ", "w8 "):
        args = config(sample_score="kl", sample_fraction=0.5, samples_file=str(tmp_path / f"{prefix}.json"))
        args.teacher_prompt_prefix = prefix
        data = prepare(pairs.select(range(6)), tokenizer, args)
        names.append(data_fingerprint(data))
        found.append(choose_samples(data, student, teacher, tokenizer, args)["scores"])
    assert len(set(names)) == 3
    assert found[0] != found[1] != found[2]
    args.samples_file = str(tmp_path / "w9 .json")
    with pytest.raises(
        ValueError, match=r"was made with another value of the data \(.*teacher_prompt_prefix; .*date_string"
    ):
        choose_samples(data, student, teacher, tokenizer, args)


def test_a_prompt_alone_is_scored_as_the_student_sees_it(tokenizer, pairs):
    data, found = pairs.remove_columns("completion").select(range(5)), []
    for prefix in (None, "w9 "):
        args = config(lmbda=1.0, sample_score="kl", teacher_prompt_prefix=prefix)
        found.append(score_samples(prepare(data, tokenizer, args), make_model("untied"), make_model("untied", 1), args))
    assert torch.equal(*found)


def order(rows, tokenizer, **options):
    args = config(**{"per_device_train_batch_size": 4, "max_steps": 3, **options})
    return order_stream(prepare_samples(rows, tokenizer, args), args)


def read_ids(stream, count):
    return [sample["sample_id"] for sample in itertools.islice(stream, count)]


def test_a_seed_changes_the_order_of_a_stream_but_not_its_samples(tokenizer, pairs):
    stream = pairs.to_iterable_dataset()
    orders = [read_ids(order(stream, tokenizer, shuffle_buffer=8, seed=seed), 12) for seed in (1, 2)]
    assert orders[0] != orders[1] != [*range(12)]
    assert sorted(orders[0]) == sorted(orders[1]) == [*range(12)], "3 steps of 4 of the 64 samples"
    chosen = [read_ids(order(stream, tokenizer, shuffle_buffer=8, seed=seed, data_seed=5), 12) for seed in (1, 2)]
    assert chosen[0] == chosen[1] != orders[0]
    assert read_ids(order(stream, tokenizer, seed=3), 12) == [*range(12)], "the order of the data"


def test_each_process_shuffles_its_own_files_of_a_stream(tokenizer, pairs):
    """With as many files as processes, Accelerate gives each process some of the files."""
    files = pairs.to_iterable_dataset(num_shards=2)
    read = []
    for seed in (1, 2):
        stream = order(files, tokenizer, shuffle_buffer=8, seed=seed, max_steps=6)
        parts = [[s["input_ids"] for s in itertools.islice(stream.shard(2, index), 12)] for index in (0, 1)]
        read.append(sorted(parts[0]) + sorted(parts[1]))
    assert read[0] == read[1]
    rows = [row["input_ids"] for row in prepare(pairs, tokenizer, config())]
    assert read[0] == sorted(rows[:12]) + sorted(rows[32:44])


def test_several_rollouts_of_a_prompt_need_fewer_samples(tokenizer, pairs):
    options = dict(lmbda=1.0, rollouts_per_prompt=4, shuffle_buffer=8)
    ids = read_ids(order(pairs.to_iterable_dataset(), tokenizer, **options), 12)
    assert sorted(ids) == [0] * 4 + [1] * 4 + [2] * 4
    assert ids[::4] == ids[3::4]


def test_max_tokens_is_for_packed_text(tokenizer, pairs, texts):
    prepare_samples(texts, tokenizer, config(max_tokens=100))
    with pytest.raises(ValueError, match="max_tokens 100 counts sequences of max_length tokens, and only plain text"):
        prepare_samples(pairs, tokenizer, config(max_tokens=100))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(shuffle_buffer=4, sample_pool=8), "shuffle_buffer 4 is for streams that are read sample by sample"),
        (dict(shuffle_buffer=4, dataloader_num_workers=2), "shuffle_buffer 4 with dataloader_num_workers 2: which"),
        (dict(dataset_num_proc=2), "dataset_num_proc 2 is for data in memory"),
    ],
)
def test_keys_that_cannot_work_with_a_stream_are_refused(tmp_path, tokenizer, pairs, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tokenizer, pairs.to_iterable_dataset(), **options)


def test_a_buffer_shuffles_no_data_in_memory(tmp_path, tokenizer, pairs):
    with pytest.raises(ValueError, match="shuffle_buffer 4 is for streams that are read sample by sample"):
        make_trainer(tmp_path, tokenizer, pairs, shuffle_buffer=4)
