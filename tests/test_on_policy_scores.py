"""Selection by the sampler's own log-probabilities chooses the right positions."""

import math

import pytest
import torch
from helpers import make_model, make_trainer, trained_weights
from peft import LoraConfig

ROLLOUT = dict(lmbda=1.0, score_source="rollout", temperature=1.0, max_prompt_length=16)


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("curriculum", "pos_rs", "weighted", "gls")]


@pytest.mark.parametrize("policy", ["top_k", *OTHERS])
def test_with_all_classes_the_steps_are_those_of_exact_scores(tmp_path, tokenizer, pairs, policy):
    """K = V: the same positions are chosen, so each entropy is at its position."""
    weights, logs = [], []
    for source in ("exact", "rollout"):
        options = ROLLOUT | dict(score_source=source, score_logprobs=128, position_policy=policy, max_steps=3)
        trainer = make_trainer(tmp_path, tokenizer, pairs, max_completion_length=12, **options, learning_rate=0.01)
        weights.append(trained_weights(trainer))
        logs.append([log for log in trainer.state.log_history if "loss" in log])
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-6)
    assert logs[1][0]["selection_agreement"] == 1
    assert "selection_agreement" not in logs[1][1], "now and then"
    assert "selection_agreement" not in logs[0][0]
    for name in ("entropy", "entropy_selected", "selected_fraction"):
        assert logs[0][0][name] == pytest.approx(logs[1][0][name], rel=1e-4)


def test_no_pass_of_the_head_over_all_positions(tmp_path, tokenizer, pairs, monkeypatch):
    """Except for the checks of agreement, only chosen positions pass the student's head in training."""
    import sekd.distill

    def never(*args):
        raise AssertionError("rows are scored")

    monkeypatch.setattr(sekd.distill, "score_positions", never)
    make_trainer(tmp_path, tokenizer, pairs, record_selection=0, **ROLLOUT).train()
    with pytest.raises(AssertionError, match="rows are scored"):
        make_trainer(tmp_path, tokenizer, pairs, **ROLLOUT | {"score_source": "exact"}).train()


def test_a_lora_student_is_not_scored_either(tmp_path, tokenizer, pairs):
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    options = ROLLOUT | dict(score_logprobs=500, max_steps=1)  # more than there are
    trainer = make_trainer(tmp_path, tokenizer, pairs, trainer_options=dict(peft_config=lora), **options)
    trainer.train()
    (log,) = (log for log in trainer.state.log_history if "loss" in log)
    assert log["selection_agreement"] == 1


def test_steps_on_the_data_are_scored_exactly(tmp_path, tokenizer, pairs):
    trainer = make_trainer(tmp_path, tokenizer, pairs, **ROLLOUT | dict(lmbda=0.5, max_steps=8, seed=3))
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert 0 < sum("completion_length" in log for log in logs) < 8
    assert all(math.isfinite(log["loss"]) for log in logs)


def test_a_smaller_common_vocabulary(tmp_path, tokenizer, pairs):
    options = ROLLOUT | dict(score_logprobs=5)
    student = make_model("untied")
    student.resize_token_embeddings(140)
    trainer = make_trainer(tmp_path, tokenizer, pairs, student, **options)
    trainer.train()
    assert trainer.method.vocab == 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lmbda=0.0), "score_source 'rollout' with lmbda 0: there are no rollouts"),
        (dict(position_score="kl"), "gives student_entropy only, but position_policy 'top_k' reads kl"),
        (dict(position_score={"kl": 1, "student_entropy": 1}), "reads kl, student_entropy; use score_source: exact"),
        (dict(position_policy="tip", position_score="student_entropy"), "'tip' reads student_entropy, reverse_kl"),
        (dict(position_policy="random"), "'random' reads no score; use score_source: exact"),
        (dict(score_source="sampler"), "score_source 'sampler' is unknown; choose one of exact, rollout"),
        (dict(score_logprobs=0), "score_logprobs 0 must be at least 1"),
    ],
)
def test_scores_that_a_sampler_cannot_give_are_refused(tmp_path, tokenizer, pairs, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tokenizer, pairs, **ROLLOUT | options)
