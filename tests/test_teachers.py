"""A live teacher gives its own distributions at the valid rows, without a graph."""

import pytest
import torch
from devices import ELSEWHERE, TwoDevices
from helpers import config, make_model, make_trainer, make_vllm_model, prompts_and_completions, trained_weights

from sekd.cache.readers import load_reader
from sekd.data.batch import collate
from sekd.models import freeze, load_teacher
from sekd.teachers import Teacher
from sekd.teachers.live import LiveTeacher
from sekd.types import Batch


def test_rows_and_logits_are_the_models_own():
    samples, _ = prompts_and_completions()
    batch, model = Batch(**collate(samples, 122)), make_model("softcap")
    teacher = LiveTeacher(model)
    assert isinstance(teacher, Teacher)
    state = teacher.read(batch)
    logits = teacher.logits(state)
    expected = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits[batch.valid]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert len(state["hidden"]) == int(batch.valid.sum())
    assert not logits.requires_grad


def test_the_common_classes_are_the_first():
    model = make_model()
    teacher = LiveTeacher(model, vocab=100)
    assert teacher.logits({"hidden": torch.randn(3, 32)}).shape == (3, 100)


PLACED = {
    "no score": {"position_policy": "random"},
    "a score of the teacher": {"position_score": "kl"},
    "sampled classes": {"class_selection": "rs_kd", "class_samples": 8},
    "a policy that learns": {"position_policy": "bandit"},
    "on-policy": {"lmbda": 1.0, "teacher_prompt_prefix": "w1 w2 "},
    "samples by a score of the teacher": {"sample_fraction": 0.5, "sample_score": "kl"},
}


@pytest.mark.slow
@pytest.mark.parametrize("choice", PLACED)
def test_a_teacher_on_another_device_gives_the_same_steps(tmp_path, tokenizer, pairs, choice):
    """TwoDevices raises where tensors of both devices meet."""
    data, metrics, weights = pairs.select(range(8)), [], []
    for name in (None, str(ELSEWHERE)):
        with TwoDevices():
            options = PLACED[choice] | {"optim": "sgd", "learning_rate": 0.1, "teacher_device": name}
            trainer = make_trainer(tmp_path, tokenizer, data, trainer_options={"eval_dataset": data}, **options)
            weights.append(trained_weights(trainer))
            assert trainer.teacher.device == torch.device(name or "cpu")
            metrics.append(trainer.evaluate())
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-5)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("bits", "largest"), [(4, 1e-2), (8, 1e-4)])
def test_a_quantized_teacher_is_close_to_the_whole_one(tmp_path, bits, largest):
    """KL(whole || quantized), in nats a position, on random tokens."""
    pytest.importorskip("bitsandbytes")
    make_vllm_model(intermediate=128).save_pretrained(tmp_path)
    samples, _ = prompts_and_completions()
    batch, logp = Batch(**collate(samples, 122)), []
    for options in ({}, {f"teacher_load_in_{bits}bit": True}):
        model = freeze(load_teacher(str(tmp_path), config(teacher_dtype="float32", **options)))
        teacher = LiveTeacher(model)
        logp.append(teacher.score_inputs(teacher.read(batch))["teacher_logp"])
    assert type(model.lm_head) is torch.nn.Linear, "the head is not quantized"
    assert type(model.model.layers[0].mlp.up_proj).__name__ in ("Linear4bit", "Linear8bitLt")
    kl = (logp[0].exp() * (logp[0] - logp[1])).sum(-1)
    assert 0 < kl.mean() < largest


@pytest.mark.parametrize("bits", [4, 8])
def test_training_and_caches_take_a_quantized_teacher(tmp_path, tokenizer, pairs, monkeypatch, bits):
    pytest.importorskip("bitsandbytes")
    lines = []
    monkeypatch.setattr("sekd.models.logger.warning", lines.append)
    make_vllm_model(1, intermediate=128).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    options = {f"teacher_load_in_{bits}bit": True}
    trainer = make_trainer(
        tmp_path, tokenizer, pairs, make_vllm_model(), str(tmp_path / "teacher"), position_score="kl", **options
    )
    trainer.train()
    assert lines == [f"precision: student float32 weights, computing in float32; teacher {bits}-bit"]
    args = config(teacher_model_name_or_path=str(tmp_path / "teacher"), class_samples=8, **options)
    assert len(load_reader(args, None, 128, packed=False).encode([trainer.train_dataset[0]])) == 1


def test_a_loaded_teacher_is_not_quantized(tmp_path, tokenizer, pairs):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="teacher_load_in_4bit true has no effect on a teacher_model that is loaded"):
        make_trainer(tmp_path, tokenizer, pairs, teacher_load_in_4bit=True)
