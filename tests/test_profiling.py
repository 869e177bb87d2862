"""`profile: N` records N steps after a warm-up."""

import csv
import json

import pytest
import torch
from helpers import make_trainer
from transformers import TrainerCallback

from sekd.config import SEKDConfig
from sekd.profiling import CURVE, FOLDER, MEMORY, TRACE, sum_allocations


def read_trace(folder):
    return json.loads((folder / FOLDER / TRACE).read_text())["traceEvents"]


def count(events, name):
    return sum(event.get("name") == name and event.get("ph") == "X" for event in events)


def test_a_trace_has_the_steps_after_the_warm_up(tmp_path, tokenizer, pairs, caplog):
    options = dict(profile=2, max_steps=6, gradient_accumulation_steps=2, lmbda=1.0)
    trainer = make_trainer(tmp_path, tokenizer, pairs, **options)
    trainer.train()
    events = read_trace(tmp_path)
    steps = [event["name"] for event in events if str(event.get("name", "")).startswith("ProfilerStep")]
    assert steps == ["ProfilerStep#2", "ProfilerStep#3"]
    parts = {
        part: count(events, part) for part in ("student", "teacher", "scoring", "loss", "backward", "data", "sync")
    }
    micro_batches = dict.fromkeys(("student", "teacher", "loss", "backward"), 4)
    assert parts == {**micro_batches, "scoring": 4 + 2, "data": 2 + 4, "sync": 2}
    assert count(events, "aten::addmm_") >= 4, "the gradient of the head, once a micro-batch at least"
    assert any(event.get("name") == "[memory]" for event in events)
    assert not (tmp_path / FOLDER / MEMORY).exists()
    assert "profiled 2 steps" in caplog.text
    assert "memory.csv has the memory" in caplog.text


@pytest.mark.parametrize(("steps", "recorded"), [(1, 1), (2, 2), (3, 2)])
def test_a_short_run_has_a_shorter_warm_up(tmp_path, tokenizer, pairs, steps, recorded):
    make_trainer(tmp_path, tokenizer, pairs, profile=2, max_steps=steps).train()
    assert count(read_trace(tmp_path), "loss") == recorded


class Fail(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyError


def test_an_error_ends_the_recording_and_keeps_it(tmp_path, tokenizer, pairs):
    failing = make_trainer(tmp_path / "a", tokenizer, pairs, profile=2, max_steps=4)
    failing.add_callback(Fail())
    with pytest.raises(KeyError):
        failing.train()
    assert count(read_trace(tmp_path / "a"), "loss") == 1
    make_trainer(tmp_path / "b", tokenizer, pairs, profile=1).train()
    assert count(read_trace(tmp_path / "b"), "loss") == 1, "the first profiler is closed"


def test_a_profile_changes_nothing_that_a_run_learns(tmp_path, tokenizer, pairs):
    weights = []
    for number in (0, 1):
        trainer = make_trainer(tmp_path / str(number), tokenizer, pairs, profile=number, max_steps=3)
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())


def test_a_negative_number_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="profile -1 must be at least 0"):
        SEKDConfig(str(tmp_path), profile=-1)


def test_the_memory_is_the_sum_of_what_was_allocated_and_freed(tmp_path, tokenizer, pairs):
    assert sum_allocations([(5, 100), (8, 50), (1_000_000_005, -100)]) == [(0.0, 100), (3e-9, 150), (1.0, 50)]
    assert sum_allocations([]) == []
    trainer = make_trainer(tmp_path, tokenizer, pairs, profile=2, max_steps=6)
    trainer.train()
    with open(tmp_path / FOLDER / CURVE) as file:
        curve = [(float(row["seconds"]), int(row["bytes"])) for row in csv.DictReader(file)]
    changes = [event["args"] for event in read_trace(tmp_path) if event.get("name") == "[memory]"]
    total, totals = 0, []
    for change in changes:
        total += change["Bytes"]
        totals.append(total)
    assert [size for _, size in curve] == totals
    assert [*sorted(time for time, _ in curve)] == [time for time, _ in curve]
    gradients = sum(parameter.nbytes for parameter in trainer.model.parameters())
    assert max(totals) > gradients
    assert totals[-1] < gradients / 2, "a step frees what it took"
