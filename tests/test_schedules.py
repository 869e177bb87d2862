"""Numbers that change during a run."""

import json

import pytest
import torch
import yaml
from helpers import config, make_model, make_trainer

from sekd.on_policy.schedule import is_on_policy
from sekd.policies import POLICIES, make_policy
from sekd.schedules import make_schedule
from sekd.selection_words import describe_selection

STEPS = {0: 1.0, 2: 0.5, 5: 0.2}


def test_each_value_holds_until_the_next_step():
    schedule = make_schedule("lmbda", STEPS)
    assert [schedule.value(step) for step in range(7)] == [1.0, 1.0, 0.5, 0.5, 0.5, 0.2, 0.2]
    assert (schedule.lowest, schedule.highest, schedule.is_constant) == (0.2, 1.0, False)


def test_values_on_a_line():
    schedule = make_schedule("lmbda", {"linear": {0: 1.0, 4: 0.2, 6: 0.8}})
    assert [schedule.value(step) for step in range(8)] == [1.0, 0.8, 0.6, 0.4, 0.2, 0.5, 0.8, 0.8]
    third = make_schedule("lmbda", {"linear": {0: 0.0, 3: 1.0}}).value(1)
    assert third == 0.333333333333, "rounded down: 0.334 of 3 positions would be 2"


def test_a_number_is_a_constant_schedule():
    schedule = make_schedule("lmbda", 0.3)
    assert schedule.value(0) == schedule.value(10**6) == 0.3
    assert schedule.is_constant


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "must begin with step 0"),
        ({5: 0.2}, "must begin with step 0"),
        ({-1: 0.2, 0: 0.3}, "must begin with step 0"),
        ({0: 0.2, 9: 0.1, 5: 0.3}, "the steps must ascend"),
        ({0: 0.2, 1.5: 0.1}, "must be a finite number, or a mapping"),
        ({0: "a"}, "must map whole numbers of steps to numbers"),
        ({0: True}, "must map whole numbers of steps to numbers"),
        ({0: float("nan")}, "must map whole numbers of steps to numbers"),
        ({"linaer": {0: 0.2}}, "must map whole numbers of steps to numbers"),
        ({"linear": 0.2}, "must map whole numbers of steps to numbers"),
        ({0: 0.2, 3: 0.0}, r"position_fraction 0.0 at step 3 is outside \(0, 1\]"),
        ({0: 1.5, 3: 0.1}, r"position_fraction 1.5 at step 0 is outside \(0, 1\]"),
        ("a lot", "position_fraction 'a lot' must be"),
    ],
)
def test_an_invalid_schedule_is_one_clear_line(value, message):
    with pytest.raises(ValueError, match=message) as caught:
        config(position_fraction=value)
    assert "\n" not in str(caught.value)


def test_an_invalid_lmbda_names_the_step():
    with pytest.raises(ValueError, match=r"lmbda 1.2 at step 10 is outside \[0, 1\]"):
        config(lmbda={0: 0.5, 10: 1.2})


def test_a_recipe_or_the_command_line_may_hold_a_schedule():
    for text in ("{0: 1.0, 2: 0.5, 5: 0.2}", STEPS):
        assert config(position_fraction=text).fraction_schedule.value(3) == 0.5
    assert config(lmbda="{linear: {0: 0.0, 10: 1.0}}").lmbda_schedule.value(5) == 0.5


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_weighs_at_each_step_as_with_that_fraction_alone(name):
    torch.manual_seed(0)
    read = POLICIES[name].reads
    scores = torch.rand(2, 40, *([len(read)] if read else []))
    valid = torch.rand(2, 40) > 0.2
    for schedule in (STEPS, {"linear": {0: 1.0, 6: 0.1}}):
        for step in range(7):
            fraction = make_schedule("k", schedule).value(step)
            seeded = [[torch.Generator().manual_seed(i) for i in range(2)] for _ in range(2)]
            ours = make_policy(name, make_schedule("k", schedule))(scores, valid, step=step, generator=seeded[0])
            alone = make_policy(name, fraction)(scores, valid, step=step, generator=seeded[1])
            torch.testing.assert_close(ours, alone, rtol=0, atol=0)


def test_gls_takes_the_threshold_of_the_step():
    policy = make_policy("gls", make_schedule("k", {0: 0.5, 1: 0.25, 2: 1.0}))
    scores, valid = torch.arange(100.0).view(1, 100), torch.ones(1, 100, dtype=torch.bool)
    counts = [int((policy(scores, valid, step=step) > 0).sum()) for step in range(3)]
    assert counts == [50, 25, 100]


def test_lmbda_of_a_step_decides():
    args = config(lmbda={0: 0.0, 3: 1.0, 6: 0.0})
    assert [is_on_policy(args, step) for step in range(8)] == [False] * 3 + [True] * 3 + [False] * 2
    args = config(lmbda={"linear": {0: 0.0, 4000: 1.0}}, seed=1)
    share = sum(is_on_policy(args, step) for step in range(1500, 2500)) / 1000
    assert abs(share - 0.5) < 0.05


def test_what_follows_from_lmbda_follows_from_all_steps():
    mixed = config(lmbda={0: 0.0, 5: 1.0})
    assert (mixed.any_on_policy, mixed.all_on_policy, mixed.divergence) == (True, False, "reverse_kl")
    never = config(lmbda={0: 0.0})
    assert (never.any_on_policy, never.all_on_policy, never.divergence) == (False, False, "forward_kl")
    assert config(lmbda={0: 1, 9: 1.0}).all_on_policy


def test_the_model_card_says_how_a_fraction_changes():
    words = describe_selection(config(position_fraction={0: 1.0, 500: 0.2}))
    assert "at the 100 %, 20 % from step 500 on, of the positions" in words
    words = describe_selection(config(lmbda={"linear": {0: 0, 500: 1}}))
    assert "on-policy in 0 %, on a line to 100 % at step 500, of the steps" in words


def run(folder, tokenizer, pairs, **options):
    trainer = make_trainer(folder, tokenizer, pairs, make_model(), make_model(seed=1), logging_steps=1, **options)
    trainer.train(options.get("resume_from_checkpoint"))
    return trainer


@pytest.mark.parametrize("policy", ["top_k", "gls"])
def test_a_step_of_a_scheduled_run_is_that_of_a_constant_one(tmp_path, tokenizer, pairs, policy):
    """With a learning rate of 0 the weights stay, so each step can be compared with runs of its own fraction."""
    common = dict(max_steps=4, learning_rate=0.0, position_policy=policy)
    scheduled = run(tmp_path / "s", tokenizer, pairs, position_fraction={0: 1.0, 2: 0.25}, **common)
    logs = [log for log in scheduled.state.log_history if "loss" in log]
    assert [log["position_fraction"] for log in logs] == [1.0, 1.0, 0.25, 0.25]
    for fraction, steps in ((1.0, logs[:2]), (0.25, logs[2:])):
        alone = run(tmp_path / str(fraction), tokenizer, pairs, position_fraction=fraction, **common)
        expected = [log for log in alone.state.log_history if "loss" in log]
        assert "position_fraction" not in expected[0]
        for log in steps:
            other = expected[log["step"] - 1]
            for name in ("loss", "grad_norm", "selected_fraction", "entropy_selected"):
                assert log[name] == pytest.approx(other[name], rel=1e-6), (name, log["step"])


@pytest.mark.slow
@pytest.mark.parametrize("batches", [1, 3])
def test_a_resumed_run_follows_the_schedules_as_an_undisturbed_one(tmp_path, tokenizer, pairs, batches):
    common = dict(
        lmbda={"linear": {0: 0.0, 6: 1.0}},
        position_fraction={"linear": {0: 1.0, 5: 0.2}},
        rollout_batches=batches,
        max_steps=8,
        save_strategy="steps",
        save_steps=4,
        save_total_limit=5,
    )
    whole = run(tmp_path / "whole", tokenizer, pairs, **common)
    resumed = run(
        tmp_path / "resumed", tokenizer, pairs, **common, resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4")
    )
    mine, expected = ([log for log in t.state.log_history if "loss" in log] for t in (resumed, whole))
    assert any("completion_length" in log for log in expected), "a step was on-policy"
    for a, b in zip(mine, expected, strict=True):
        assert {k: a[k] for k in ("step", "loss", "lmbda", "position_fraction", "selected_fraction")} == {
            k: b[k] for k in ("step", "loss", "lmbda", "position_fraction", "selected_fraction")
        }
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])


def test_the_written_recipe_has_the_schedule(tmp_path, tokenizer, pairs):
    trainer = run(tmp_path / "run", tokenizer, pairs, position_fraction=STEPS, max_steps=1)
    written = config(**{"position_fraction": yaml.safe_load(yaml.safe_dump(trainer.args.position_fraction))})
    assert written.position_fraction == STEPS
    assert json.loads(json.dumps(trainer.args.to_dict()))["position_fraction"] == {"0": 1.0, "2": 0.5, "5": 0.2}
