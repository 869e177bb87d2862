"""Selection through the trainer: steps split differently, learned policies, and their checkpoints."""

import copy

import pytest
import torch
from datasets import Dataset
from helpers import ONE_SGD_STEP, make_model, make_trainer, trained_weights
from peft import LoraConfig
from transformers import TrainerCallback

from sekd.checkpoints import RunRefused
from sekd.policies import POLICIES

THREE_STEPS = ONE_SGD_STEP | dict(max_steps=3, learning_rate=0.1)


# Draws, thresholds and learned selectors included; at_kd ranks within a batch by definition.
SPLITS = [{"position_policy": name} for name in POLICIES] + [
    {"lmbda": 1.0},
    {"class_selection": "rs_kd", "class_samples": 8},
    {"class_selection": "rs_kd", "class_samples": 8, "sampled_softmax": 40},
    {
        "divergence": "decoupled_kl",
        "position_score": {"kl": 1.0, "student_entropy": 2.0},
        "score_normalization": "zscore",
    },
]


@pytest.mark.slow
@pytest.mark.parametrize("choices", SPLITS, ids=str)
def test_steps_split_differently_have_the_same_gradient(tmp_path, tokenizer, pairs, choices, float64):
    """1 x 8, 2 x 4 and 8 x 1 sequences, whose lengths and numbers of targets differ; three steps of them.

    The micro-batches of 2 are sorted by length, and the micro-batch of 8 is in the order of the data.
    """
    data, found, losses = pairs.select(range(24)), [], []
    for size in (1, 2, 8):
        options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=8 // size) | choices
        trainer = make_trainer(
            tmp_path, tokenizer, data, **ONE_SGD_STEP | dict(max_steps=3, learning_rate=0.1), **options
        )
        found.append(trained_weights(trainer))
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        assert len(losses[-1]) == 3
    assert losses[0] == pytest.approx(losses[2], rel=1e-10)
    assert losses[1] == pytest.approx(losses[2], rel=1e-10)
    for name in found[0]:
        for other in found[1:]:
            torch.testing.assert_close(other[name], found[0][name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("divergence", "micro_batches"), [("forward_kl", [(1, 2), (0, 3)]), ("at_kd", [(0, 1), (2, 3)])]
)
def test_samples_of_similar_length_share_a_micro_batch(tmp_path, tokenizer, divergence, micro_batches):
    """Except where the loss depends on which samples share one."""
    rows = [{"prompt": "w1", "completion": " ".join(["w2"] * length)} for length in (2, 9, 8, 3)]
    options = dict(divergence=divergence, train_sampling_strategy="sequential", max_steps=1)
    options |= dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer = make_trainer(tmp_path, tokenizer, Dataset.from_list(rows), **options)
    numbers, collate = [], trainer._collate
    trainer._collate = lambda samples: numbers.append(tuple(s.sample_id for s in samples)) or collate(samples)
    trainer.train()
    assert numbers == micro_batches


def test_gls_steps_by_the_mean_over_the_selected_rows(tmp_path, tokenizer, pairs):
    """The second step against the definition: rows above the first step's quantile, each with the same weight."""
    data = pairs.select(range(16))
    student, teacher = make_model("untied"), make_model("untied", 1)
    options = ONE_SGD_STEP | dict(max_steps=2, learning_rate=0.1, position_policy="gls", position_fraction=0.3)
    options |= dict(per_device_train_batch_size=2, gradient_accumulation_steps=4, seed=3)
    weights = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights.append(copy.deepcopy(model))

    batches = []
    trainer = make_trainer(
        tmp_path, tokenizer, data, student, copy.deepcopy(teacher), dict(callbacks=[Keep()]), **options
    )
    collate = trainer._collate
    trainer._collate = lambda samples: batches.append(samples) or collate(samples)
    initial = copy.deepcopy(student)
    trainer.train()

    def rows(model, samples):
        for s in samples:
            ids = torch.tensor([s.input_ids])
            where = [t for t in range(len(s.input_ids) - 1) if s.supervised[t + 1]]
            q = model(input_ids=ids).logits[0][where].log_softmax(-1)
            p = teacher.double()(input_ids=ids).logits[0][where].log_softmax(-1)
            yield -(q.exp() * q).sum(-1), (p.exp() * (p - q)).sum(-1)

    first, second = ([s for samples in part for s in samples] for part in (batches[:4], batches[4:]))
    with torch.no_grad():
        threshold = torch.cat([h for h, _ in rows(initial.double(), first)]).quantile(0.7)
    reference = weights[0].double()
    entropies, losses = (torch.cat(column) for column in zip(*rows(reference, second), strict=True))
    loss = losses[entropies >= threshold].mean()
    reference.zero_grad()
    loss.backward()
    for (name, p), after in zip(reference.named_parameters(), weights[1].parameters(), strict=True):
        torch.testing.assert_close(
            after.double(), p.detach() - 0.1 * p.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert trainer.state.log_history[1]["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_bandit_is_rewarded_by_the_drop_of_kl(tmp_path, tokenizer, pairs):
    data = pairs.select(range(4))
    student, teacher = make_model("untied"), make_model("untied", 1)
    before = copy.deepcopy(student)
    options = ONE_SGD_STEP | dict(learning_rate=0.5, position_policy="bandit", position_fraction=1.0)
    trainer = make_trainer(tmp_path, tokenizer, data, student, copy.deepcopy(teacher), **options)
    rows = {row["sample_id"]: row for row in trainer.train_dataset}
    trainer.train()
    b = torch.zeros(6, dtype=torch.float64)
    for row in rows.values():
        ids = torch.tensor([row["input_ids"]])
        where = [t for t in range(len(row["input_ids"]) - 1) if row["supervised"][t + 1]]
        with torch.no_grad():
            q0, q1, p = (
                m.double()(input_ids=ids).logits[0][where].log_softmax(-1) for m in (before, trainer.model, teacher)
            )
        targets, kl = ids[0, 1:][where], lambda q, p=p: (p.exp() * (p - q)).sum(-1)
        x = [-(q0.exp() * q0).sum(-1), -(p.exp() * p).sum(-1), -q0[range(len(where)), targets]]
        x += [-p[range(len(where)), targets], kl(q0), torch.arange(len(where)) / len(where)]
        b += torch.stack(x) @ (kl(q0) - kl(q1)).clamp(-5, 5)
    torch.testing.assert_close(trainer.method.policy.b, b, rtol=1e-4, atol=1e-4)
    assert b.abs().max() > 0.1


@pytest.mark.parametrize("policy", ["gls", "bandit"])
def test_a_checkpoint_of_another_policy_is_refused(tmp_path, tokenizer, pairs, policy):
    options = dict(save_strategy="steps", save_steps=1)
    make_trainer(tmp_path, tokenizer, pairs, **options).train()
    other = make_trainer(tmp_path, tokenizer, pairs, position_policy=policy, **options)
    with pytest.raises(RunRefused, match=f"differs in position_policy '{policy}' \\(it has 'top_k'\\)"):
        other.train(resume_from_checkpoint=True)


def test_a_sampled_softmax_needs_a_plain_head(tmp_path, tokenizer, pairs):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"])
    options = dict(class_selection="rs_kd", class_samples=8, sampled_softmax=64)
    with pytest.raises(ValueError, match=r"sampled_softmax reads single classes of .* head, which is a Linear"):
        make_trainer(tmp_path, tokenizer, pairs, None, None, dict(peft_config=config), **options)
