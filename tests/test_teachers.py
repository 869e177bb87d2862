"""A live teacher gives its own distributions at the valid rows, without a graph."""

import torch
from helpers import make_model, prompts_and_completions

from sekd.data.batch import collate
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
