"""Where a run's time goes, and how near it is to the arithmetic. No test depends on how long anything takes."""

from collections import Counter

import pytest
import torch
from helpers import make_model, make_trainer
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

import sekd.timing
from sekd.floor import count_state_bytes, read_shape, shape_batch
from sekd.flops import batch_cost, generation_cost, total
from sekd.hardware import Rates, measure_rates
from sekd.timing import PARTS, Stopwatch, timed, untimed

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets; it replaces the stopwatch's."""

    class Clock:
        now = 0.0

        @classmethod
        def perf_counter(cls):
            return cls.now

    monkeypatch.setattr(sekd.timing, "time", Clock)
    return Clock


def spent(watch):
    return {part: seconds for part, seconds in watch.take().items() if seconds}


# The stopwatch


def test_time_within_an_inner_part_is_the_inner_parts(clock):
    watch = Stopwatch(CPU)
    with watch.running():
        clock.now = 5.0  # nothing is open
        with timed("backward"):
            clock.now += 1
            with timed("teacher"):
                clock.now += 10
            clock.now += 2
            with timed("loss"):
                clock.now += 20
        clock.now += 100
        with timed("teacher"):
            clock.now += 30
    assert spent(watch) == {"backward": 3, "teacher": 40, "loss": 20}
    assert spent(watch) == {}, "since the last call"


def test_a_part_ends_with_an_error(clock):
    @timed("teacher")
    def fail():
        clock.now = 1
        raise KeyError

    watch = Stopwatch(CPU)
    with watch.running():
        with pytest.raises(KeyError):
            timed("backward")(fail)()
        clock.now = 2
    assert spent(watch) == {"teacher": 1}


def test_nothing_is_measured_in_untimed_and_after_the_run(clock):
    watch = Stopwatch(CPU)
    with watch.running(), untimed(), timed("teacher"):
        clock.now = 1
    with timed("teacher"):
        clock.now = 2
    assert spent(watch) == {}


def test_a_function_can_be_timed(clock):
    @timed("scoring")
    def work():
        clock.now += 1
        return 7

    watch = Stopwatch(CPU)
    assert work() == 7
    with watch.running():
        assert work() + work() == 14
    assert spent(watch) == {"scoring": 2}


def test_a_part_that_no_block_ends(clock):
    """The optimizer's, which begins and ends in callbacks of the Trainer."""
    watch = Stopwatch(CPU)
    with watch.running():
        watch.open("optimizer")
        clock.now = 1
        watch.close_all()
        clock.now = 2
        watch.close_all()
    assert spent(watch) == {"optimizer": 1}


# A run


class Opened(Stopwatch):
    """Counts how often each part is opened."""

    def __init__(self):
        super().__init__(CPU)
        self.opened = Counter()

    def open(self, part):
        self.opened[part] += 1
        super().open(part)


def run(folder, tokenizer, pairs, **options):
    trainer = make_trainer(folder, tokenizer, pairs, **options)
    trainer.stopwatch = Opened()
    trainer.train()
    return trainer


@pytest.mark.parametrize("score_source", ["exact", "rollout"])
def test_each_part_is_measured_once_where_it_runs(tmp_path, tokenizer, pairs, score_source):
    """Two steps of two micro-batches, with an evaluation after each: that one does not count."""
    options = dict(max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=2, lmbda=1.0)
    data, evaluation = pairs.select(range(16)), dict(eval_dataset=pairs.select(range(4)))
    evaluating = dict(eval_strategy="steps", eval_steps=1, eval_on_start=True)
    opened = []
    for name, more in {"plain": {}, "evaluated": dict(trainer_options=evaluation, **evaluating)}.items():
        trainer = run(tmp_path / name, tokenizer, data, score_source=score_source, **options, **more)
        opened.append(trainer.stopwatch.opened)
    micro_batches = dict.fromkeys(("teacher", "student", "loss", "backward"), 4)
    steps = {"optimizer": 2, "sync": 2, "generation": 2 * 2}  # a round is requested, and awaited
    assert opened[0] == {**micro_batches, **steps, "scoring": 4 + 2, "data": 2 + 4}
    assert opened[1] == opened[0]


def test_shares_and_seconds_are_in_the_logs(tmp_path, tokenizer, pairs):
    trainer = make_trainer(tmp_path, tokenizer, pairs, max_steps=3, logging_steps=2, lmbda=1.0)
    trainer.train()
    first, last = trainer.state.log_history
    shares = [first[f"{part}_share"] for part in PARTS]
    assert all(share > 0 for share in shares)
    assert sum(shares) <= 1
    assert first["rollout_share"] == pytest.approx(first["generation_share"] + first["sync_share"])
    assert all(last[f"{part}_seconds"] > 0 for part in (*PARTS, "other"))


def test_a_run_off_policy_has_no_generation(tmp_path, tokenizer, pairs):
    trainer = make_trainer(tmp_path, tokenizer, pairs)
    trainer.train()
    for log in trainer.state.log_history:
        assert not [name for name in log if name.startswith(("generation", "sync", "rollout"))]


def count_flops(trainer):
    """All FLOPs of a run, from its last log."""
    log = trainer.state.log_history[-1]
    return log["flops_per_second"] * log["train_seconds"]


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 5


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_a_resumed_run_has_the_flops_of_the_whole_run(tmp_path, tokenizer, pairs, lmbda):
    options = dict(max_steps=7, save_strategy="steps", save_steps=2, logging_steps=3, lmbda=lmbda)
    whole = make_trainer(tmp_path / "whole", tokenizer, pairs, **options)
    whole.train()
    make_trainer(tmp_path / "cut", tokenizer, pairs, trainer_options=dict(callbacks=[Stop()]), **options).train()
    resumed = make_trainer(tmp_path / "cut", tokenizer, pairs, **options)
    resumed.train(True)
    assert count_flops(resumed) == pytest.approx(count_flops(whole), rel=1e-6)
    (seconds,) = (log["other_seconds"] for log in resumed.state.log_history if "other_seconds" in log)
    assert seconds >= 0


# The floor


def equal_lengths(pairs):
    """Prompts of 4 tokens and completions of 7, EOS included."""
    words = " ".join(f"w{i}" for i in range(6))
    return pairs.map(lambda row: {"prompt": "w1 w2 w3 w4", "completion": words})


def test_the_flops_of_a_step(tmp_path, tokenizer, pairs):
    trainer = make_trainer(tmp_path, tokenizer, equal_lengths(pairs), max_steps=3, gradient_accumulation_steps=2)
    trainer.train()
    student, teacher = read_shape(trainer.model), read_shape(trainer.teacher.model)
    shape = shape_batch(trainer.method, trainer.args, 4, 11, step=0)
    assert shape.scores_student
    step = total(batch_cost(student, teacher, shape.with_positions(28, 8))).flops
    assert count_flops(trainer) == pytest.approx(6 * step, rel=1e-6)


def test_the_flops_of_rollouts(tmp_path, tokenizer, pairs):
    data = equal_lengths(pairs)
    trainer = make_trainer(tmp_path, tokenizer, data, max_steps=3, lmbda=1.0, max_completion_length=1)
    trainer.train()
    student, teacher = read_shape(trainer.model), read_shape(trainer.teacher.model)
    shape = shape_batch(trainer.method, trainer.args, 4, 5, step=0).with_positions(4, 4)
    step = total(batch_cost(student, teacher, shape)).flops + generation_cost(student, 4, 4, 1).flops
    assert count_flops(trainer) == pytest.approx(3 * step, rel=1e-6)


def test_an_adapter_is_part_of_the_shape(tmp_path, tokenizer, pairs):
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    trainer = make_trainer(tmp_path, tokenizer, pairs, trainer_options=dict(peft_config=lora))
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert read_shape(trainer.model).trained_parameters == trained


def test_a_model_whose_arithmetic_is_not_known_is_trained_without_a_floor(tmp_path, tokenizer, pairs):
    torch.manual_seed(0)
    student = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2, pad_token_id=122))
    trainer = make_trainer(tmp_path, tokenizer, pairs, student)
    trainer.train()
    assert "teacher_share" in trainer.state.log_history[0]
    assert "floor_share" not in trainer.state.log_history[0]


def test_choices_change_the_shape(tmp_path, tokenizer, pairs):
    def shape(**options):
        trainer = make_trainer(tmp_path, tokenizer, pairs, make_model("tied"), make_model("tied", 1), **options)
        return shape_batch(trainer.method, trainer.args, 2, 8, step=0)

    assert not shape(position_policy="random").scores_student
    assert not shape(position_fraction=1.0).scores_student
    assert shape(position_score="kl").scores_teacher
    assert shape(position_policy="bandit").looks_back
    assert shape(divergence="at_kd").target_passes == 2
    assert shape(gradient_checkpointing=True).checkpointing
    sampled = shape(class_selection="rs_kd", class_samples=8, sampled_softmax=40)
    assert (sampled.loss_classes, sampled.logit_passes) == (40, 2)


@pytest.mark.parametrize(
    ("optim", "number"), [("adamw_torch", 8), ("adamw_8bit", 2), ("lion_8bit", 1), ("sgd", 0), ("adafactor", 0)]
)
def test_state_of_an_optimizer(tmp_path, tokenizer, pairs, optim, number):
    assert count_state_bytes(make_trainer(tmp_path, tokenizer, pairs, optim=optim).args) == number


def test_rates_are_measured_once():
    rates = measure_rates(CPU, torch.float32)
    assert rates.flops > 0
    assert rates.bytes > 0
    assert measure_rates(CPU, torch.float32) is rates
    assert isinstance(rates, Rates)


def test_measuring_the_machine_draws_no_numbers_that_training_would_draw():
    before = torch.get_rng_state()
    measure_rates.cache_clear()
    measure_rates(CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
