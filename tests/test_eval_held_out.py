"""Held-out divergences are exact means over all valid rows."""

import math

import pytest
import torch
from helpers import VOCAB, LargestTensor, config, make_model, make_trainer

from sekd.data.batch import Sample
from sekd.data.prepare import prepare
from sekd.eval.held_out import STUDENT_MEANS, TEACHER_MEANS, Pair, measure_samples
from sekd.teachers import LiveTeacher


def test_evaluate_reports_exact_divergences_a_token(tmp_path, tokenizer, pairs):
    student, teacher = make_model("untied"), make_model("untied", 1)
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        pairs,
        student,
        teacher,
        dict(eval_dataset=pairs.select(range(10))),
        per_device_eval_batch_size=4,
        max_eval_samples=7,
    )
    metrics = trainer.evaluate()
    forward, reverse, teacher_ce, same, rows = 0.0, 0.0, 0.0, 0, 0
    for row in prepare(pairs.select(range(7)), tokenizer, trainer.args):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            q = student(input_ids=ids).logits[0].double().log_softmax(-1)
            p = teacher(input_ids=ids).logits[0].double().log_softmax(-1)
        where = [t for t in range(len(row["input_ids"]) - 1) if row["supervised"][t + 1]]
        forward += (p.exp() * (p - q)).sum(-1)[where].sum().item()
        reverse += (q.exp() * (q - p)).sum(-1)[where].sum().item()
        teacher_ce -= sum(p[t, ids[0, t + 1]].item() for t in where)
        same += sum(int(q[t].argmax()) == int(p[t].argmax()) for t in where)
        rows += len(where)
    assert metrics["eval_positions"] == rows
    assert metrics["eval_forward_kl"] == pytest.approx(forward / rows, rel=1e-4)
    assert metrics["eval_reverse_kl"] == pytest.approx(reverse / rows, rel=1e-4)
    assert metrics["eval_teacher_ce"] == pytest.approx(teacher_ce / rows, rel=1e-4)
    assert 0 < same < rows
    assert metrics["eval_top1_agreement"] == pytest.approx(same / rows)
    assert metrics["eval_loss"] == metrics["eval_forward_kl"]


def test_calibration_error_equals_binning_by_hand(tmp_path, tokenizer, pairs):
    student = make_model("untied")
    options = dict(eval_dataset=pairs.select(range(40)))
    trainer = make_trainer(tmp_path, tokenizer, pairs, student, None, options, head_chunk_rows=7)
    metrics = trainer.evaluate()
    bins, ce = [[] for _ in range(15)], []
    for row in prepare(pairs.select(range(40)), tokenizer, trainer.args):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            q = student(input_ids=ids).logits[0].double().softmax(-1)
        for t in range(len(row["input_ids"]) - 1):
            if row["supervised"][t + 1]:
                confidence, guess = q[t].max(0)
                y = row["input_ids"][t + 1]
                bins[min(int(confidence * 15), 14)].append((confidence.item(), float(guess == y)))
                ce.append(-q[t, y].log().item())
    n = len(ce)
    expected = sum(abs(sum(c for c, _ in b) / len(b) - sum(h for _, h in b) / len(b)) * len(b) / n for b in bins if b)
    assert metrics["eval_ece"] == pytest.approx(expected, rel=1e-4)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(sum(ce) / n), rel=1e-4)


def test_an_on_policy_run_evaluates_fresh_rollouts_and_repeats_them(tmp_path, tokenizer, pairs):
    options = dict(eval_dataset=pairs.select(range(10)))
    trainer = make_trainer(tmp_path, tokenizer, pairs, None, None, options, lmbda=1.0)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first == second, "the same weights and noise give the same rollouts"
    assert first["eval_loss"] == first["eval_reverse_kl"] > 0
    trainer.train()
    assert trainer.evaluate()["eval_positions"] > 0


def test_compute_metrics_gets_the_likeliest_tokens_and_the_targets(tmp_path, tokenizer, pairs):
    """In the order of the data, whatever the batches, and -100 where nothing is supervised."""
    student, seen = make_model("untied"), []

    def accuracy(prediction):
        seen.append(prediction)
        valid = prediction.label_ids != -100
        return {"accuracy": (prediction.predictions == prediction.label_ids)[valid].mean().item()}

    options = dict(eval_dataset=pairs.select(range(10)), compute_metrics=accuracy)
    trainer = make_trainer(tmp_path, tokenizer, pairs, student, None, options, per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    (prediction,) = seen
    hits = []
    samples = prepare(pairs.select(range(10)), tokenizer, trainer.args)
    for row, guesses, targets in zip(samples, prediction.predictions, prediction.label_ids, strict=True):
        ids = row["input_ids"]
        with torch.no_grad():
            likeliest = student(input_ids=torch.tensor([ids])).logits[0].argmax(-1)
        for t, (guess, target) in enumerate(zip(guesses, targets, strict=True)):
            is_valid = t + 1 < len(ids) and row["supervised"][t + 1]
            assert target == (ids[t + 1] if is_valid else -100)
            assert guess == (likeliest[t] if is_valid else -100)
            if is_valid:
                hits.append(guess == target)
    assert metrics["eval_accuracy"] == pytest.approx(sum(hits) / len(hits))


def test_each_sample_has_its_own_sums_in_any_batch(pairs, tokenizer):
    """Against each sequence alone, dense and in float64; one sample has no position."""
    student, teacher = make_model("softcap"), make_model("tied", 1)
    samples = [Sample(**row) for row in prepare(pairs.select(range(9)), tokenizer, config())]
    samples[4] = Sample(samples[4].input_ids, [0] * len(samples[4].input_ids), 4, 2)
    seen = []
    pair = Pair(student, LiveTeacher(teacher, 121), 121, torch.device("cpu"), batch_size=4, chunk_rows=5)
    for sample, measured in zip(samples, measure_samples(pair, samples, seen.append), strict=True):
        sums = measured.sums
        ids = torch.tensor([sample.input_ids])
        with torch.no_grad():
            q = student(input_ids=ids).logits[0, :, :121].double().log_softmax(-1)
            p = teacher(input_ids=ids).logits[0, :, :121].double().log_softmax(-1)
        expected, bins = (
            dict.fromkeys([*STUDENT_MEANS, *TEACHER_MEANS, "positions"], 0.0),
            [[0.0] * 3 for _ in range(15)],
        )
        for t in range(len(sample.input_ids) - 1):
            if not sample.supervised[t + 1]:
                continue
            y = sample.input_ids[t + 1]
            expected["positions"] += 1
            expected["student_ce"] -= q[t, y].item()
            expected["teacher_ce"] -= p[t, y].item()
            expected["student_entropy"] -= sum(x.exp() * x for x in q[t]).item()
            expected["forward_kl"] += sum(a.exp() * (a - b) for a, b in zip(p[t], q[t], strict=True)).item()
            expected["reverse_kl"] += sum(b.exp() * (b - a) for a, b in zip(p[t], q[t], strict=True)).item()
            expected["top1_agreement"] += float(p[t].argmax() == q[t].argmax())
            confidence = q[t].max().exp().item()
            of_bin = bins[min(int(confidence * 15), 14)]
            of_bin[:] = of_bin[0] + 1, of_bin[1] + confidence, of_bin[2] + float(q[t].argmax() == y)
            assert (measured.guesses[t], measured.targets[t]) == (q[t].argmax(), y)
        for name, value in expected.items():
            assert sums[name].item() == pytest.approx(value, rel=1e-4, abs=1e-5), name
        assert sums["calibration"].tolist() == [pytest.approx(row, rel=1e-4) for row in bins]
    assert seen == [4, 4, 1]


def test_no_tensor_of_all_logits_exists():
    """4 sequences of 60 tokens are measured in chunks of 16 positions: the largest tensors are weights and states."""
    student, teacher = make_model("untied"), make_model("untied", 1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (4, 60), generator=generator).tolist()
    samples = [Sample(row, [1] * 60, i, 0) for i, row in enumerate(ids)]
    pair = Pair(student, LiveTeacher(teacher, VOCAB), VOCAB, torch.device("cpu"), batch_size=4, chunk_rows=16)
    with LargestTensor() as seen:
        measure_samples(pair, samples)
    assert seen.elements <= 4 * 60 * 48  # the states of the feed-forward layers
    assert seen.elements < 4 * 60 * VOCAB / 2
