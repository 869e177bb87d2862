"""The loss and every parameter's gradient equal a naive dense implementation, written out here."""

import copy
import dataclasses
from dataclasses import replace

import pytest
import torch
from devices import needs_kernels
from helpers import (
    ARCHITECTURES,
    DEVICE,
    VOCAB,
    LargestTensor,
    gradients,
    make_batch,
    make_model,
    prompts_and_completions,
    samples_with_contexts,
)
from oracles import dense_rows, losses_by, naive, naive_with_contexts, seeded, sparse_rows, weights_by

from sekd.classes import CLASS_SELECTIONS
from sekd.config import SEKDConfig
from sekd.data.batch import Sample, collate
from sekd.distill import Method, distill
from sekd.losses import DIVERGENCES, Divergence
from sekd.models import freeze, run_inside
from sekd.policies import POLICIES, Policy, make_policy
from sekd.policies.ranks import check_weights
from sekd.scores import SCORES, Rows, Scoring
from sekd.teachers.live import LiveTeacher
from sekd.types import IGNORE, Batch

ENTROPY = Scoring(("student_entropy",), (1.0,))


def check(
    student, teacher, batch, documents, fraction=0.2, chunk_rows=5, policy="top_k", divergence="reverse_kl", **options
):
    """Compare :func:`distill` with :func:`naive`, value and gradient."""
    reference = copy.deepcopy(student)
    scoring = None if policy == "all" else ENTROPY
    method = Method(scoring, make_policy(policy, fraction), DIVERGENCES[divergence], chunk_rows=chunk_rows, **options)
    live = LiveTeacher(freeze(copy.deepcopy(teacher)))
    loss, sums = run_inside(student, lambda b: distill(student, live, b, method), batch)
    loss.backward()
    expected = naive(reference, copy.deepcopy(teacher), documents, fraction, divergence, **options)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=2e-5, atol=1e-6)
    wanted = gradients(reference)
    for name, gradient in gradients(student).items():
        scale = wanted[name].abs().max().clamp(min=1e-3)
        torch.testing.assert_close(
            gradient / scale, wanted[name] / scale, rtol=0, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    return sums


@pytest.mark.parametrize("fraction", [1.0, 0.2])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_equals_the_dense_formula_for_every_head(kind, fraction):
    samples, documents = prompts_and_completions()
    batch = make_batch(samples)
    sums = check(make_model(kind), make_model(kind, seed=1), batch, documents, fraction)
    assert sums["positions"] == 26
    assert sums["selected"] == (26 if fraction == 1.0 else 2 + 1 + 3 + 1)


@pytest.mark.parametrize("fraction", [1.0, 0.2])
def test_left_padding_changes_nothing(fraction):
    samples, documents = prompts_and_completions()
    right = collate(samples, pad_token_id=122)
    width = right["input_ids"].shape[1]
    left = {"sample_ids": right["sample_ids"], "attention_mask": torch.zeros(len(samples), width, dtype=torch.long)}
    for name, empty in (("input_ids", 122), ("targets", IGNORE), ("position_ids", 0)):
        left[name] = torch.full((len(samples), width), empty)
        for b, sample in enumerate(samples):
            n = len(sample.input_ids)
            left[name][b, width - n :] = right[name][b, :n]
            left["attention_mask"][b, width - n :] = 1
    check(make_model(), make_model(seed=1), Batch(**left).to(DEVICE), documents, fraction)


@pytest.mark.parametrize("kind", ["tied", "softcap"])
@pytest.mark.parametrize("fraction", [1.0, 0.2])
def test_packed_documents_do_not_see_each_other(kind, fraction):
    generator = torch.Generator().manual_seed(3)
    samples, documents = [], []
    for number, lengths in enumerate([(4, 7, 3), (9, 2)]):
        sequence = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in lengths]
        ids = [token for document in sequence for token in document]
        samples.append(Sample(ids, [1] * len(ids), number, seq_lengths=list(lengths)))
        documents.append([(document, [0] + [1] * (len(document) - 1)) for document in sequence])
    batch = make_batch(samples)
    sums = check(make_model(kind), make_model(kind, seed=1), batch, documents, fraction)
    assert sums["positions"] == 14 - 3 + 11 - 2


@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
def test_chunk_size_changes_nothing(chunk_rows):
    samples, documents = prompts_and_completions()
    batch = make_batch(samples)
    check(make_model("untied"), make_model("untied", seed=1), batch, documents, 0.4, chunk_rows=chunk_rows)


def test_cross_entropy_mix_and_temperature():
    samples, documents = prompts_and_completions()
    batch = make_batch(samples)
    check(
        make_model(), make_model(seed=1), batch, documents, 0.3, divergence="forward_kl", kd_weight=0.6, temperature=2.0
    )


def test_select_everything_is_full_kd():
    samples, documents = prompts_and_completions()
    batch = make_batch(samples)
    sums = check(make_model(), make_model(seed=1), batch, documents, 1.0, policy="all")
    assert sums["entropy_positions"] == sums["selected"] == sums["positions"]


def test_a_sequence_without_targets_adds_nothing_but_keeps_every_gradient():
    sample = Sample([1, 2, 3], [0, 0, 0], 0, 3)
    student = make_model("untied")
    method = Method(ENTROPY, make_policy("top_k"), DIVERGENCES["reverse_kl"])
    loss, _ = distill(student, LiveTeacher(make_model("untied", 1)), make_batch([sample]), method)
    loss.backward()
    assert loss == 0
    # DDP waits for a gradient of every parameter, zero or not.
    assert all(p.grad is not None and not p.grad.any() for p in student.parameters())


@needs_kernels
def test_vocabularies_padded_differently_use_the_common_rows():
    """Qwen2.5's sizes differ in padding rows only; those must not enter any softmax."""
    samples, _ = prompts_and_completions()
    batch = make_batch(samples)
    student, teacher = make_model("untied"), make_model("untied", 1)
    wide = make_model("untied", 2)
    wide.resize_token_embeddings(VOCAB + 24, mean_resizing=False)
    with torch.no_grad():
        wide.load_state_dict(
            {
                name: torch.cat([p, 9 * torch.ones(24, p.shape[1])]) if p.shape[:1] == (VOCAB,) else p
                for name, p in teacher.state_dict().items()
            }
        )
    losses = []
    for model in (teacher, wide):
        method = Method(ENTROPY, make_policy("top_k"), DIVERGENCES["reverse_kl"], vocab=VOCAB)
        losses.append(distill(student, LiveTeacher(model, VOCAB), batch, method)[0])
    torch.testing.assert_close(*losses)


def check_method(args, losses_of, weights_of, step=3, kind="untied"):
    """Compare :func:`distill`, loss and gradients, with sum_b sum_t w_t l_t over dense rows."""
    samples, _ = prompts_and_completions()
    batch = make_batch(samples)
    student, teacher = make_model(kind), make_model(kind, 1)
    reference, dense_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    method = Method.from_config(args, VOCAB)
    live = LiveTeacher(freeze(teacher))
    loss, _ = run_inside(student, lambda b: distill(student, live, b, method, step, seeded(batch)), batch)
    loss.backward()

    parts = list(dense_rows(reference, dense_teacher, batch))
    q, p, targets = (torch.cat(column) for column in zip(*parts, strict=True))
    lengths = [len(part[0]) for part in parts]
    weights = weights_of(q.detach(), p, targets, lengths, batch, step)
    expected = (weights * losses_of(q, p, targets, weights, batch)).sum()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=5e-5, atol=1e-6)
    wanted = gradients(reference)
    for name, gradient in gradients(student).items():
        scale = wanted[name].abs().max().clamp(min=1e-3)
        torch.testing.assert_close(
            gradient / scale, wanted[name] / scale, rtol=0, atol=3e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def config(tmp_path, **choices):
    settings = dict(output_dir=str(tmp_path), bf16=False, head_chunk_rows=5, position_fraction=0.4)
    return SEKDConfig(**settings | choices)


@pytest.mark.parametrize("score", SCORES)
def test_every_score_chooses_what_the_dense_formula_does(tmp_path, score):
    args = config(tmp_path, position_score=score)
    check_method(args, losses_by("forward_kl"), weights_by(args))


@pytest.mark.parametrize("normalization", ["none", "zscore", "minmax"])
def test_combined_scores(tmp_path, normalization):
    mixture = {"student_entropy": 1.0, "student_ce": 0.5, "kl": 1.0}
    args = config(tmp_path, position_score=mixture, score_normalization=normalization)
    check_method(args, losses_by("forward_kl"), weights_by(args))


@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in ("gls", "bandit")])
def test_every_policy_weighs_as_on_dense_scores(tmp_path, policy):
    args = config(tmp_path, position_policy=policy, curriculum_steps=5)
    check_method(args, losses_by("forward_kl"), weights_by(args))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("policy", ["all", "top_k"])
def test_every_divergence_in_chunks_equals_the_dense_formula(tmp_path, divergence, policy):
    args = config(tmp_path, divergence=divergence, position_policy=policy)
    weights_of = weights_by(args)
    if divergence == "at_kd":  # a mean over the rows of the batch, times its 4 sequences

        def weights_of(*parts):
            chosen = weights_by(args)(*parts) > 0
            return chosen * 4 / chosen.sum()

    check_method(args, losses_by(divergence), weights_of)


@pytest.mark.parametrize("policy", ["all", "top_k", "random"])
@pytest.mark.parametrize("classes", ["rs_kd", "top_k_classes"])
def test_class_selection_with_the_same_draws_equals_the_dense_formula(tmp_path, classes, policy):
    args = config(tmp_path, class_selection=classes, class_samples=9, position_policy=policy)
    check_method(args, sparse_rows(args), weights_by(args))


def test_sampled_softmax_over_the_whole_vocabulary_changes_nothing(tmp_path):
    args = config(tmp_path, class_selection="rs_kd", class_samples=9, sampled_softmax=VOCAB)
    check_method(args, sparse_rows(args), weights_by(args))


def test_skipped_positions_are_never_chosen(tmp_path):
    samples, _ = prompts_and_completions()
    batch = make_batch(samples)
    seen = []

    def policy(scores, valid, fraction, step, generator):
        seen.append(valid)
        return make_policy("top_k", fraction)(scores, valid)

    method = Method(ENTROPY, Policy(policy)(0.4), DIVERGENCES["forward_kl"], skip_first=2)
    distill(make_model(), LiveTeacher(make_model(seed=1)), batch, method)
    assert (batch.valid.sum(1) - seen[0].sum(1)).tolist() == [2, 2, 2, 0], "the last one has a single row"


def test_scores_are_combined_over_the_rows_that_may_be_chosen(tmp_path):
    """A skipped row with an extreme score must not set the scale of the others."""
    samples, _ = prompts_and_completions()
    batch = make_batch(samples)
    args = config(tmp_path, position_score={"student_entropy": 1.0, "kl": 1.0}, score_normalization="minmax")
    args.position_skip = 2
    seen = []
    method = dataclasses.replace(
        Method.from_config(args, VOCAB), policy=Policy(lambda s, v, **_: seen.append((s, v)) or v / v.sum())()
    )
    distill(make_model(), LiveTeacher(make_model(seed=1)), batch, method)
    ((scores, valid),) = seen
    for s, v in zip(scores, valid, strict=True):
        if v.sum() > 1:
            assert s[v].max() > 1, "one of two scores scaled to [0, 1] is 1 somewhere"


@pytest.mark.parametrize("policy", POLICIES)
def test_a_score_that_is_not_finite_stops_every_policy(tmp_path, policy):
    """A comparison with nan chooses nothing, and the mean over nothing is a loss of 0."""
    samples, _ = prompts_and_completions()
    batch = make_batch(samples)
    student = make_model("untied")
    with torch.no_grad():
        student.lm_head.weight[3] = torch.nan
    method = Method.from_config(config(tmp_path, position_policy=policy), VOCAB)
    generators = seeded(batch)
    if method.scoring is None:
        loss, _ = distill(student, LiveTeacher(make_model("untied", 1)), batch, method, 3, generators)
        assert loss.isnan()
    else:
        with pytest.raises(FloatingPointError, match=r"not finite at step 3, on samples \[0, 1, 2, 3\]"):
            distill(student, LiveTeacher(make_model("untied", 1)), batch, method, 3, generators)


def test_negatives_change_from_step_to_step(tmp_path):
    samples, _ = prompts_and_completions()
    batch = make_batch(samples)
    method = Method.from_config(config(tmp_path, class_selection="rs_kd", class_samples=9, sampled_softmax=20), VOCAB)
    student, teacher = make_model("untied"), LiveTeacher(make_model("untied", 1))
    first, again, later = (float(distill(student, teacher, batch, method, s, seeded(batch))[0]) for s in (3, 3, 4))
    assert first == again != later


@needs_kernels
@pytest.mark.parametrize(
    "choices",
    [{"position_policy": name} for name in ("top_k", "all", "random")]
    + [{"position_score": "kl"}, {"class_selection": "rs_kd", "sampled_softmax": 70}],
)
def test_nothing_of_size_batch_tokens_vocabulary_is_ever_allocated(tmp_path, choices):
    samples = [Sample([i % VOCAB for i in range(b, b + 64)], [1] * 64, b) for b in range(4)]
    batch = make_batch(samples)
    student, teacher = make_model("untied"), LiveTeacher(freeze(make_model("untied", 1)))
    args = config(tmp_path, head_chunk_rows=16, position_fraction=0.2, **choices)
    with LargestTensor() as largest:
        loss, _ = distill(student, teacher, batch, Method.from_config(args, VOCAB))
        loss.backward()
    # The head's own weight and one chunk of logits are the yardstick.
    assert largest.elements < 4 * 64 * VOCAB / 2

    with LargestTensor() as dense:
        student(input_ids=batch.input_ids)
    assert dense.elements >= 4 * 64 * VOCAB, "the probe must see a dense step"


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_equals_the_dense_formula_behind_the_teachers_own_prompts(divergence, fraction):
    samples, student, teacher = samples_with_contexts(), make_model("untied"), make_model("untied", 1)
    reference, live = copy.deepcopy(student), LiveTeacher(freeze(copy.deepcopy(teacher)))
    method = Method(Scoring(("kl",), (1.0,)), make_policy("top_k", fraction), DIVERGENCES[divergence], chunk_rows=5)
    batch = make_batch(samples)
    loss, sums = run_inside(student, lambda b: distill(student, live, b, method), batch)
    loss.backward()
    expected = naive_with_contexts(reference, teacher, samples, divergence, fraction)
    expected.backward()
    assert sums["positions"] == 9 + 4 + 12 + 6
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=2e-5, atol=1e-6)
    wanted = gradients(reference)
    for name, gradient in gradients(student).items():
        scale = wanted[name].abs().max().clamp(min=1e-3)
        torch.testing.assert_close(gradient / scale, wanted[name] / scale, rtol=0, atol=2e-4)


def test_equal_prompts_are_the_plain_result_to_the_bit():
    plain = [replace(sample, teacher_prompt_ids=None) for sample in samples_with_contexts()]
    same = [replace(sample, teacher_prompt_ids=sample.input_ids[: sample.prompt_length]) for sample in plain]
    method = Method(Scoring(("kl",), (1.0,)), make_policy("top_k", 0.5), DIVERGENCES["reverse_kl"])
    results = []
    for samples in (plain, same):
        student = make_model("untied")
        batch = make_batch(samples)
        assert (batch.for_teacher is batch) == (samples is plain)
        loss, _ = distill(student, LiveTeacher(make_model("untied", 1)), batch, method)
        loss.backward()
        results.append([loss.detach(), *gradients(student).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def distill_with(**choices):
    """A batch through :func:`distill` with other parts of a method."""
    samples, _ = prompts_and_completions()
    method = dataclasses.replace(Method(ENTROPY, make_policy("top_k"), DIVERGENCES["forward_kl"]), **choices)
    return distill(make_model(), LiveTeacher(make_model(seed=1)), make_batch(samples), method)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([[0.5, float("nan"), 0]], "negative, not a number, or not 0"),
        ([[0.5, -0.5, 0]], "negative, not a number, or not 0"),
        ([[0.5, 0.5, 0.5]], "or not 0 at a position that may not be chosen"),
        ([0.5, 0.5, 0], r"returned weights of shape \[3\], not \[1, 3\]"),
    ],
)
def test_weights_that_cannot_be_a_policys_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        check_weights(torch.tensor(weights), torch.tensor([[True, True, False]]))


def test_scores_of_the_wrong_shape_are_refused(monkeypatch):
    # A bare function: the type checker of the tests would see the wrong shape of a Score first.
    monkeypatch.setitem(SCORES, "wide", lambda rows: rows.student_logp)
    rows = Rows(torch.zeros(3, 5), torch.zeros(3).long())
    with pytest.raises(ValueError, match=r"score 'wide' returned shape \[3, 5\]; it must be \[3\]"):
        Scoring(("wide",), (1.0,)).score(rows)


def test_a_divergence_keeps_its_own_sparse_form_and_options():
    """Under a sampled softmax too."""
    rs_kd = dict(classes=CLASS_SELECTIONS["rs_kd"], class_samples=8)
    plain = DIVERGENCES["forward_kl"]
    twice = Divergence(lambda *_, factor: None, sparse=lambda q, target, factor=2.0: factor * plain.sparse(q, target))
    for sampled in (0, 70):
        losses = []
        for divergence in (plain, twice, twice.with_options(factor=3.0)):
            losses.append(seeded_loss(divergence=divergence, sampled_softmax=sampled, **rs_kd))
        assert losses[1] == pytest.approx(2 * losses[0], rel=1e-6)
        assert losses[2] == pytest.approx(3 * losses[0], rel=1e-6)


def seeded_loss(**choices):
    torch.manual_seed(0)
    return float(distill_with(**choices)[0])


def test_records_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match="mean_over 'tokens' must be 'sequence' or 'batch'"):
        Divergence(lambda q, p, y: q.sum(-1), mean_over="tokens")
    with pytest.raises(ValueError, match="a divergence with them has no sparse form"):
        Divergence(lambda q, p, y: q.sum(-1), sparse=lambda q, t: q.sum(-1), factors=lambda ce: ce)
