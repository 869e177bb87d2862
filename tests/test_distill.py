"""The loss and every parameter's gradient equal a naive dense implementation, written out here."""

import copy
import math
from fractions import Fraction

import pytest
import torch
from conftest import ARCHITECTURES, VOCAB, make_model
from torch.utils._python_dispatch import TorchDispatchMode

from sekd.data import Sample, collate
from sekd.distill import Method, distill
from sekd.losses import ON_LOG_PROBABILITIES
from sekd.models import freeze, run_inside
from sekd.policies import make_policy
from sekd.scores import Scoring
from sekd.teachers import LiveTeacher
from sekd.types import IGNORE, Batch

ENTROPY = Scoring(("student_entropy",), (1.0,))


def naive(student, teacher, documents, fraction, divergence="reverse_kl", kd_weight=1.0, temperature=1.0):
    """The sum over sequences of the mean loss over chosen rows, in float64, one document after the other.

    ``documents`` holds, for each sequence, its packed documents as (ids, supervised) pairs.
    """
    student, teacher = student.double(), teacher.double()
    total = torch.zeros((), dtype=torch.float64)
    for sequence in documents:
        losses, entropies = [], []
        for ids, supervised in sequence:
            q_logits = student(input_ids=torch.tensor([ids])).logits[0]
            p_logits = teacher(input_ids=torch.tensor([ids])).logits[0].detach()
            for t in range(len(ids) - 1):
                if not supervised[t + 1]:
                    continue
                q = torch.softmax(q_logits[t], 0)
                entropies.append(float(-(q * q.log()).sum().detach()))
                q_T, p_T = torch.softmax(q_logits[t] / temperature, 0), torch.softmax(p_logits[t] / temperature, 0)
                if divergence == "reverse_kl":
                    value = (q_T * (q_T.log() - p_T.log())).sum()
                else:
                    value = (p_T * (p_T.log() - q_T.log())).sum()
                losses.append(kd_weight * temperature**2 * value - (1 - kd_weight) * q[ids[t + 1]].log())
        if not losses:
            continue
        k = max(1, math.ceil(Fraction(str(fraction)) * len(losses)))
        chosen = sorted(range(len(losses)), key=lambda i: (-entropies[i], i))[:k]
        total = total + sum(losses[i] for i in chosen) / k
    return total


def gradients(model):
    return {name: p.grad.double() for name, p in model.named_parameters()}


def check(
    student, teacher, batch, documents, fraction=0.2, chunk_rows=5, policy="top_k", divergence="reverse_kl", **options
):
    """Compare :func:`distill` with :func:`naive`, value and gradient."""
    reference = copy.deepcopy(student)
    scoring = None if policy == "all" else ENTROPY
    method = Method(
        scoring, make_policy(policy, fraction), ON_LOG_PROBABILITIES[divergence], chunk_rows=chunk_rows, **options
    )
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


def prompts_and_completions(seed=0):
    generator = torch.Generator().manual_seed(seed)
    samples, documents = [], []
    for number, (prompt, completion) in enumerate([(3, 9), (5, 4), (2, 12), (4, 1)]):
        ids = torch.randint(0, VOCAB, (prompt + completion,), generator=generator).tolist()
        supervised = [0] * prompt + [1] * completion
        samples.append(Sample(ids, supervised, number, prompt))
        documents.append([(ids, supervised)])
    return samples, documents


@pytest.mark.parametrize("fraction", [1.0, 0.2])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_equals_the_dense_formula_for_every_head(kind, fraction):
    samples, documents = prompts_and_completions()
    batch = Batch(**collate(samples, pad_token_id=122))
    sums = check(make_model(kind), make_model(kind, seed=1), batch, documents, fraction)
    assert sums["rows"] == 26
    assert sums["selected_rows"] == (26 if fraction == 1.0 else 2 + 1 + 3 + 1)


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
    check(make_model(), make_model(seed=1), Batch(**left), documents, fraction)


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
    batch = Batch(**collate(samples, pad_token_id=122))
    sums = check(make_model(kind), make_model(kind, seed=1), batch, documents, fraction)
    assert sums["rows"] == 14 - 3 + 11 - 2


@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
def test_chunk_size_changes_nothing(chunk_rows):
    samples, documents = prompts_and_completions()
    batch = Batch(**collate(samples, pad_token_id=122))
    check(make_model("untied"), make_model("untied", seed=1), batch, documents, 0.4, chunk_rows=chunk_rows)


def test_cross_entropy_mix_and_temperature():
    samples, documents = prompts_and_completions()
    batch = Batch(**collate(samples, pad_token_id=122))
    check(
        make_model(), make_model(seed=1), batch, documents, 0.3, divergence="forward_kl", kd_weight=0.6, temperature=2.0
    )


def test_select_everything_is_full_kd():
    samples, documents = prompts_and_completions()
    batch = Batch(**collate(samples, pad_token_id=122))
    sums = check(make_model(), make_model(seed=1), batch, documents, 1.0, policy="all")
    assert sums["entropy_rows"] == sums["selected_rows"] == sums["rows"]


def test_a_sequence_without_targets_adds_nothing_but_keeps_every_gradient():
    sample = Sample([1, 2, 3], [0, 0, 0], 0, 3)
    student = make_model("untied")
    method = Method(ENTROPY, make_policy("top_k"), ON_LOG_PROBABILITIES["reverse_kl"])
    loss, _ = distill(student, LiveTeacher(make_model("untied", 1)), Batch(**collate([sample], 122)), method)
    loss.backward()
    assert loss == 0
    # DDP waits for a gradient of every parameter, zero or not.
    assert all(p.grad is not None and not p.grad.any() for p in student.parameters())


def test_vocabularies_padded_differently_use_the_common_rows():
    """Qwen2.5's sizes differ in padding rows only; those must not enter any softmax."""
    samples, _ = prompts_and_completions()
    batch = Batch(**collate(samples, pad_token_id=122))
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
        method = Method(ENTROPY, make_policy("top_k"), ON_LOG_PROBABILITIES["reverse_kl"], vocab=VOCAB)
        losses.append(distill(student, LiveTeacher(model, VOCAB), batch, method)[0])
    torch.testing.assert_close(*losses)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("policy", ["top_k", "all", "random"])
def test_nothing_of_size_batch_tokens_vocabulary_is_ever_allocated(policy):
    batch_size, length = 4, 64
    samples = [Sample([i % VOCAB for i in range(b, b + length)], [1] * length, b) for b in range(batch_size)]
    batch = Batch(**collate(samples, pad_token_id=122))
    student, teacher = make_model("untied"), LiveTeacher(freeze(make_model("untied", 1)))
    scoring = ENTROPY if policy == "top_k" else None
    method = Method(scoring, make_policy(policy, 0.2), ON_LOG_PROBABILITIES["reverse_kl"], chunk_rows=16)
    with LargestTensor() as largest:
        loss, _ = distill(student, teacher, batch, method)
        loss.backward()
    # The head's own weight and one chunk of logits are the yardstick.
    assert largest.elements < batch_size * length * VOCAB / 2

    with LargestTensor() as dense:
        student(input_ids=batch.input_ids)
    assert dense.elements >= batch_size * length * VOCAB, "the probe must see a dense step"
