"""A teacher that reads another prompt is compared with the student on the completion, row by row, and nowhere else."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import EOS, VOCAB, make_model, make_tokenizer
from datasets import Dataset
from test_data import config, first, messages
from test_distill import gradients
from test_trainer import make_trainer
from tokenizers.processors import TemplateProcessing

from rollouts import Rollout
from sekd.data.batch import Sample, collate, from_rollout
from sekd.data.prepare import prepare
from sekd.distill import Method, distill
from sekd.fingerprints import data_fingerprint
from sekd.losses import ON_LOG_PROBABILITIES
from sekd.models import freeze, run_inside
from sekd.policies import make_policy
from sekd.samples import choose_samples, score_samples
from sekd.scores import Scoring
from sekd.teachers.live import LiveTeacher
from sekd.types import IGNORE, Batch


def samples_with_contexts():
    """Prompts that are longer, shorter and as long for the teacher, and one that is the same."""
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        return torch.randint(0, VOCAB, (count,), generator=generator).tolist()

    samples = []
    for number, (prompt, theirs, completion) in enumerate([(3, 11, 9), (5, 2, 4), (2, 2, 12), (4, None, 6)]):
        ids = draw(prompt + completion)
        supervised = [0] * prompt + [1] * completion
        context = None if theirs is None else draw(theirs)
        samples.append(Sample(ids, supervised, number, prompt, teacher_prompt_ids=context))
    return samples


def naive(student, teacher, samples, divergence, fraction):
    """The sum over samples of the mean divergence of their rows of largest KL(p||q), one at a time, in float64."""
    student, teacher, total = student.double(), teacher.double(), torch.zeros((), dtype=torch.float64)
    for sample in samples:
        n = sample.prompt_length
        prompt, completion = sample.input_ids[:n], sample.input_ids[n:]
        theirs = prompt if sample.teacher_prompt_ids is None else sample.teacher_prompt_ids
        q = student(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].softmax(-1)
        p = teacher(torch.tensor([[*theirs, *completion]])).logits[0, len(theirs) - 1 : -1].softmax(-1).detach()
        assert len(q) == len(p) == len(completion)
        forward, reverse = (p * (p.log() - q.log())).sum(-1), (q * (q.log() - p.log())).sum(-1)
        kept = forward.detach().topk(math.ceil(fraction * len(completion))).indices
        total = total + (forward if divergence == "forward_kl" else reverse)[kept].mean()
    return total


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_equals_the_dense_formula_behind_the_teachers_own_prompts(divergence, fraction):
    samples, student, teacher = samples_with_contexts(), make_model("untied"), make_model("untied", 1)
    reference, live = copy.deepcopy(student), LiveTeacher(freeze(copy.deepcopy(teacher)))
    method = Method(
        Scoring(("kl",), (1.0,)), make_policy("top_k", fraction), ON_LOG_PROBABILITIES[divergence], chunk_rows=5
    )
    batch = Batch(**collate(samples, 122))
    loss, sums = run_inside(student, lambda b: distill(student, live, b, method), batch)
    loss.backward()
    expected = naive(reference, teacher, samples, divergence, fraction)
    expected.backward()
    assert sums["rows"] == 9 + 4 + 12 + 6
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=2e-5, atol=1e-6)
    wanted = gradients(reference)
    for name, gradient in gradients(student).items():
        scale = wanted[name].abs().max().clamp(min=1e-3)
        torch.testing.assert_close(gradient / scale, wanted[name] / scale, rtol=0, atol=2e-4)


def test_equal_prompts_are_the_plain_result_to_the_bit():
    plain = [replace(sample, teacher_prompt_ids=None) for sample in samples_with_contexts()]
    same = [replace(sample, teacher_prompt_ids=sample.input_ids[: sample.prompt_length]) for sample in plain]
    method = Method(Scoring(("kl",), (1.0,)), make_policy("top_k", 0.5), ON_LOG_PROBABILITIES["reverse_kl"])
    results = []
    for samples in (plain, same):
        student = make_model("untied")
        batch = Batch(**collate(samples, 122))
        assert (batch.for_teacher is batch) == (samples is plain)
        loss, _ = distill(student, LiveTeacher(make_model("untied", 1)), batch, method)
        loss.backward()
        results.append([loss.detach(), *gradients(student).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_both_views_have_the_same_targets_in_the_same_order():
    samples = [
        Sample([1, 2, 3, 4, 5], [0, 0, 1, 0, 1], 7, 2, teacher_prompt_ids=[9]),
        Sample([6, 7], [0, 1], 8, 1),
        Sample([3, 4, 5], [1, 1, 1], 9, 0, teacher_prompt_ids=[8, 9]),  # without a prompt there is no row for the 3
    ]
    batch = Batch(**collate(samples, 0))
    theirs = batch.for_teacher
    assert theirs.input_ids.tolist() == [[9, 3, 4, 5, 0], [6, 7, 0, 0, 0], [8, 9, 3, 4, 5]]
    assert theirs.targets.tolist() == [
        [3, IGNORE, 5, IGNORE, IGNORE],
        [7, IGNORE, IGNORE, IGNORE, IGNORE],
        [IGNORE, IGNORE, 4, 5, IGNORE],
    ]
    assert theirs.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert theirs.sample_ids.tolist() == [7, 8, 9]
    assert torch.equal(theirs.targets[theirs.valid], batch.targets[batch.valid])
    assert "teacher_input_ids" not in collate(samples[1:2], 0)


# From rows


def test_text_prompts_show_the_teacher_columns_of_the_row(tokenizer):
    row = {"prompt": "w1", "completion": "w2", "answer": "{note}", "note": "w5", "n": 7}
    sample = first(
        [row], tokenizer, teacher_prompt_prefix="w9 {note} {answer} {nothing} ", prompt_template="w8 {prompt}"
    )
    # A value is not read again, and what is no column stays.
    assert sample == Sample([8, 1, 2, EOS], [0, 0, 1, 1], 0, 2, teacher_prompt_ids=[9, 5, 121, 121, 8, 1])
    assert first([row], tokenizer, teacher_prompt_prefix="w{n} ").teacher_prompt_ids == [7, 1]
    assert first([row], tokenizer, teacher_prompt_prefix="").teacher_prompt_ids == [1]
    assert first([row], tokenizer).teacher_prompt_ids is None
    assert "teacher_prompt_ids" not in prepare(Dataset.from_list([row]), tokenizer, config()).column_names


def test_chats_have_a_system_turn_and_a_prefix_of_the_teachers_own(tokenizer):
    row = {"prompt": "w1", "completion": "w2", "answer": "w5"}
    options = dict(use_chat_template=True, teacher_prompt_prefix="{answer} ", teacher_system_prompt="w6")
    sample = first([row], tokenizer, system_prompt="w7", **options)
    assert sample.input_ids == [125, 7, 123, 1, 124, 2, EOS]
    assert sample.teacher_prompt_ids == [125, 6, 123, 5, 1, 124]
    del options["teacher_system_prompt"]
    assert first([row], tokenizer, system_prompt="w7", **options).teacher_prompt_ids == [125, 7, 123, 5, 1, 124]


def test_the_prefix_of_a_conversation_is_in_its_last_user_turn_and_earlier_answers_are_no_targets(tokenizer):
    row = messages(("system", "w7"), ("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4"))
    sample = first([row], tokenizer, teacher_prompt_prefix="w9 ", teacher_system_prompt="w6")
    assert sample.input_ids == [125, 7, 123, 1, 124, 2, EOS, 123, 3, 124, 4, EOS]
    assert sample.supervised == [0] * 10 + [1, 1]
    assert sample.teacher_prompt_ids == [125, 6, 123, 1, 124, 2, EOS, 123, 9, 3, 124]


def test_the_prefix_of_a_text_prompt_begins_the_text():
    """A tokenizer that writes a first token of its own writes it once, before the prefix."""
    row, options = {"text": "w1 w2 w3 w4"}, dict(text_prompt_length=3, teacher_prompt_prefix="w9 w8 ")
    assert first([row], make_tokenizer(), **options).teacher_prompt_ids == [9, 8, 1, 2, 3]
    with_bos = make_tokenizer()
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 121)])
    sample = first([row], with_bos, **options)
    assert sample == Sample([121, 1, 2, 3, 4, EOS], [0, 0, 0, 1, 1, 1], 0, 3, teacher_prompt_ids=[121, 9, 8, 1, 2])


def test_only_the_students_sequence_is_cut(tokenizer):
    row = {"prompt": "w1 w2", "completion": "w3 w4 w5 w6"}
    limits = dict(max_length=4, max_prompt_length=3)
    sample = first([row], tokenizer, teacher_prompt_prefix="w9 w9 w9 w9 ", **limits)
    assert sample.input_ids == [1, 2, 3, 4]
    assert collate([sample], 0)["teacher_input_ids"].tolist() == [[9, 9, 9, 9, 1, 2, 3, 4]]


def test_a_rollout_keeps_the_teachers_prompt_and_a_stream_has_it_too(tokenizer):
    sample = Sample([1, 2, 3], [0, 0, 1], 7, 2, teacher_prompt_ids=[9, 1, 2])
    new = from_rollout(sample, Rollout([1, 2], [8, EOS], 4, "stop"))
    assert collate([new], 0)["teacher_input_ids"].tolist() == [[9, 1, 2, 8, EOS]]
    data = Dataset.from_list([{"prompt": "w1", "completion": "w2", "answer": f"w{i}"} for i in range(5)])
    args = config(teacher_prompt_prefix="{answer} ")
    assert [*prepare(data.to_iterable_dataset(), tokenizer, args)] == [*prepare(data, tokenizer, args)]


# In training


def test_a_run_lets_the_teacher_read_the_reference(tmp_path, tokenizer, pairs):
    options = dict(trainer_options={"eval_dataset": pairs.select(range(6))}, max_steps=3)
    trainer = make_trainer(tmp_path, tokenizer, pairs, lmbda=1.0, teacher_prompt_prefix="w99 {completion} ", **options)
    read, seen = trainer.teacher.rows, []
    trainer.teacher.rows = lambda batch: seen.append(batch) or read(batch)
    trainer.train()
    assert len(seen) == 3
    for batch in seen:
        for number, ids in zip(batch.sample_ids.tolist(), batch.for_teacher.input_ids.tolist(), strict=True):
            expected = tokenizer(f"w99 {pairs[number]['completion']} {pairs[number]['prompt']}")["input_ids"]
            assert ids[: len(expected)] == expected
        assert torch.equal(batch.for_teacher.targets[batch.for_teacher.valid], batch.targets[batch.valid])
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
    assert trainer.evaluate()["eval_reverse_kl"] > 0


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
    with pytest.raises(ValueError, match=r"was made with another value of the data \(.*teacher_prompt_prefix\)"):
        choose_samples(data, student, teacher, tokenizer, args)


def test_a_prompt_alone_is_scored_as_the_student_sees_it(tokenizer, pairs):
    data, found = pairs.remove_columns("completion").select(range(5)), []
    for prefix in (None, "w9 "):
        args = config(lmbda=1.0, sample_score="kl", teacher_prompt_prefix=prefix)
        found.append(score_samples(prepare(data, tokenizer, args), make_model("untied"), make_model("untied", 1), args))
    assert torch.equal(*found)


# What a user can get wrong


@pytest.mark.parametrize("field", ["teacher_system_prompt", "teacher_prompt_prefix"])
def test_fields_that_exclude_each_other(field):
    with pytest.raises(ValueError, match=f"{field} with teacher_cache 'c': a cache holds .* leave teacher_cache out"):
        config(**{field: "w9", "teacher_cache": "c"})
    with pytest.raises(ValueError, match=f"supervise_prompt true with {field}: .* set supervise_prompt: false"):
        config(**{field: "w9", "supervise_prompt": True})


def test_a_system_turn_needs_a_chat(tokenizer):
    row = {"prompt": "w1", "completion": "w2"}
    with pytest.raises(ValueError, match=r"'w6' is a turn of a chat, .*_prefix, or set use_chat_template: true"):
        first([row], tokenizer, teacher_system_prompt="w6")
    with pytest.raises(ValueError, match=r"is a turn of a chat, and the prompts are text: use teacher_prompt_prefix$"):
        first([{"text": "w1 w2 w3"}], tokenizer, teacher_system_prompt="w6", text_prompt_length=1)


@pytest.mark.parametrize("packing", [True, False])
def test_plain_text_has_no_prompt_to_change(tokenizer, packing):
    with pytest.raises(ValueError, match=r"teacher_prompt_prefix change the teacher's prompt, and plain text has none"):
        first([{"text": "w1 w2"}], tokenizer, teacher_prompt_prefix="w9 ", packing=packing)


def test_a_prefix_needs_a_user_turn_and_values_that_are_text(tokenizer):
    row = {"messages": [{"role": "system", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
    with pytest.raises(ValueError, match="teacher_prompt_prefix goes before a user's text, and a prompt has none"):
        first([row], tokenizer, teacher_prompt_prefix="w9 ")
    row = {"prompt": "w1", "completion": "w2", "answer": None}
    with pytest.raises(ValueError, match="column 'answer' holds None, which teacher_prompt_prefix cannot show"):
        first([row], tokenizer, teacher_prompt_prefix="{answer} ")
