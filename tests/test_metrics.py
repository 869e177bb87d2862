"""Logged numbers are named after what they are, and are what their names say."""

import math
from collections import defaultdict

import pytest
import torch
from accelerate import Accelerator
from helpers import config, make_model, make_trainer

from sekd.metrics import add_sums, format_line, name_divergence, sum_all


@pytest.mark.parametrize(
    ("choices", "name"),
    [
        ({}, "forward_kl_selected"),
        (dict(lmbda=1.0), "reverse_kl_selected"),
        (dict(divergence="jsd"), "jsd_selected"),
        (dict(class_selection="rs_kd"), "rs_kd_forward_kl_selected"),
        (dict(class_selection="top_k_classes"), "top_k_classes_forward_kl_selected"),
        (dict(teacher_cache="caches/x"), "rs_kd_forward_kl_selected"),
    ],
)
def test_a_divergence_is_named_after_what_is_measured(choices, name):
    assert name_divergence(config(**choices)) == name


def test_a_log_in_short():
    logs = {"epoch": 1.0, "selected_fraction": 0.2, "entropy_selected": 2.0, "rs_kd_forward_kl_selected": 0.5}
    assert format_line({"loss": 0.25, **logs}) == "loss 0.2500  rs_kd_forward_kl_sel 0.5000  H_sel 2.00  sel 20%"
    assert format_line({"epoch": 1.0}) == ""


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_logged_numbers_are_what_docs_runs_says(tmp_path, tokenizer, pairs, divergence):
    """Against dense formulas: one step of two micro-batches, temperature 2, a quarter of cross-entropy."""
    data, T, weight = pairs.select(range(8)), 2.0, 0.75
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        data,
        max_steps=1,
        gradient_accumulation_steps=2,
        divergence=divergence,
        kd_temperature=T,
        kd_weight=weight,
        position_fraction=0.5,
    )
    student, teacher = make_model("untied"), make_model("untied", 1)
    losses, divergences, chosen_entropies, entropies = [], [], [], []
    lengths = sorted(len(ids) for ids in trainer.train_dataset["input_ids"])
    batches = 4 * (lengths[3] + lengths[7])  # of the shorter and of the longer half
    for row in trainer.train_dataset:
        ids, start = torch.tensor([row["input_ids"]]), row["prompt_length"]
        with torch.no_grad():
            q, p = (model(ids).logits[0, start - 1 : -1].double() for model in (student, teacher))
        entropy = -(q.softmax(-1) * q.log_softmax(-1)).sum(-1)
        chosen = entropy.argsort(descending=True)[: math.ceil(0.5 * len(entropy))]
        p_T, q_T = ((logits / T).log_softmax(-1)[chosen] for logits in (p, q))
        a, b = (p_T, q_T) if divergence == "forward_kl" else (q_T, p_T)
        kl = (a.exp() * (a - b)).sum(-1)
        ce = torch.nn.functional.cross_entropy(q[chosen], ids[0, start:][chosen], reduction="none")
        losses.append((weight * T**2 * kl + (1 - weight) * ce).mean())
        divergences += kl.tolist()
        chosen_entropies += entropy[chosen].tolist()
        entropies += entropy.tolist()
    trainer.train()
    log = trainer.state.log_history[0]
    expected = {
        "loss": sum(losses).item() / 8,
        f"{divergence}_selected": sum(divergences) / len(divergences),
        "entropy_selected": sum(chosen_entropies) / len(chosen_entropies),
        "entropy": sum(entropies) / len(entropies),
        "selected_fraction": len(divergences) / len(entropies),
        "padding_share": 1 - sum(lengths) / batches,
    }
    assert {name: log[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_sums_of_many_batches_are_exact():
    """In bf16 a sum stays at 256 times its addend, and in float32 at 16 million times."""
    sums = defaultdict(float)
    add_sums(sums, {"number": 2.0**24, "count": torch.tensor(2**24), "value": torch.tensor(2.0**24)})
    for _ in range(1000):
        add_sums(sums, {"number": 1, "count": torch.tensor(1), "value": torch.tensor(0.1)})
    found = sum_all(sums, Accelerator(cpu=True))
    assert found["number"] == found["count"] == 2**24 + 1000
    assert found["value"] == pytest.approx(2**24 + 1000 * torch.tensor(0.1).item(), rel=1e-14)
