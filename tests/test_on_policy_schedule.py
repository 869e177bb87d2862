"""Rounds of generation: one for several steps, one ahead; resumed, and stopped by a failing engine."""

import copy

import pytest
import torch
from datasets import Dataset
from helpers import make_trainer, trained_weights
from rollout_helpers import ON_POLICY, Counting, make_run, read_rollouts

from rollouts import RolloutError
from sekd import SEKDConfig


def ages(folder):
    """step -> how many steps old its rollouts are."""
    return {line["step"]: line["step"] - line["weights_step"] for line in read_rollouts(folder)}


def test_one_round_serves_several_steps(tmp_path, tokenizer, pairs):
    engine = Counting()
    trainer = make_run(tmp_path, tokenizer, pairs, engine, rollout_batches=3)
    trainer.train()
    assert engine.rounds == [(0, 12), (3, 12), (6, 8)]
    assert ages(tmp_path) == {0: 0, 1: 1, 2: 2, 3: 0, 4: 1, 5: 2, 6: 0, 7: 1}
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["rollout_age"] for log in logs] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [("completion_length" in log) for log in logs] == [True, False, False, True, False, False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"rollout_batches": 3}, {"rollout_staleness": 1}, {"gradient_accumulation_steps": 2}]
)
def test_the_data_keep_their_order(tmp_path, tokenizer, pairs, options):
    """20 prompts in epochs of 5 steps; a round ends with its epoch."""
    orders = []
    for name, more in (("plain", {}), ("rounds", options)):
        sizes = {"per_device_train_batch_size": 4 // more.get("gradient_accumulation_steps", 1)}
        trainer = make_run(tmp_path / name, tokenizer, pairs.select(range(20)), max_steps=12, **sizes | more)
        trainer.train()
        orders.append([(line["step"], line["sample_id"]) for line in read_rollouts(tmp_path / name)])
    assert orders[0] == orders[1]
    assert sorted(i for _, i in orders[0][:20]) == list(range(20))


def test_rounds_one_ahead_are_one_step_old(tmp_path, tokenizer, pairs):
    """The first round of an epoch is fresh, and nothing is generated for steps after the last one."""
    engine = Counting()
    trainer = make_run(tmp_path, tokenizer, pairs.select(range(20)), engine, rollout_staleness=1, max_steps=12)
    trainer.train()
    assert ages(tmp_path) == {step: int(step % 5 > 0) for step in range(12)}
    assert sum(count for _, count in engine.rounds) == 48
    assert len({tuple(line["completion_ids"]) for line in read_rollouts(tmp_path)}) > 20, (
        "rounds of the same weights differ"
    )


def test_rollouts_are_sampled_with_the_weights_that_they_name(tmp_path, tokenizer, pairs):
    """With staleness 1, a fresh engine with the weights after step 2 gives the rollouts of step 3."""
    weights = {}

    class Keep(Counting):
        def sync_weights(self, model, step):
            super().sync_weights(model, step)
            weights[step] = copy.deepcopy(self.model.state_dict())

    make_run(tmp_path, tokenizer, pairs, Keep(), rollout_staleness=1, max_steps=5, learning_rate=0.1).train()
    recorded = [line for line in read_rollouts(tmp_path) if line["step"] == 3]
    fresh = Counting()
    fresh.model.load_state_dict(weights[2])
    fresh.step = 2
    rollouts = fresh.generate([line["prompt_ids"] for line in recorded])
    assert [line["completion_ids"] for line in recorded] == [rollout.completion_ids for rollout in rollouts]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rollout_batches": 4, "score_source": "rollout"},
        {"rollout_batches": 3, "rollout_staleness": 1},
    ],
)
def test_a_resumed_run_learns_from_the_same_rollouts(tmp_path, tokenizer, pairs, options):
    """A checkpoint in the middle of a round has the rollouts that were not trained on yet."""
    options = options | dict(save_strategy="steps", save_steps=5, max_steps=9, learning_rate=0.01)
    whole = trained_weights(make_run(tmp_path / "whole", tokenizer, pairs, **options))
    make_run(tmp_path / "cut", tokenizer, pairs, **options).train()
    with open(tmp_path / "cut" / "rollouts.jsonl", "a") as file:
        file.write('{"step": 4, "sample_')  # a kill in the middle of a line
    resumed = make_run(tmp_path / "cut", tokenizer, pairs, **options)
    engine = resumed.engine
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-5"))
    for name, weight in resumed.model.named_parameters():
        torch.testing.assert_close(weight.detach(), whole[name], rtol=1e-6, atol=1e-7)
    assert read_rollouts(tmp_path / "cut") == read_rollouts(tmp_path / "whole")
    assert sum(count for _, count in engine.rounds) <= 16, "restored rollouts are not generated again"


def test_a_checkpoint_of_other_data_is_refused(tmp_path, tokenizer, pairs):
    options = dict(save_strategy="steps", save_steps=2, max_steps=4, rollout_batches=4)
    make_run(tmp_path, tokenizer, pairs, **options).train()
    other = make_run(tmp_path, tokenizer, pairs.select(range(63, -1, -1)), **options)
    with pytest.raises(ValueError, match="which differs in the data;"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("staleness", [0, 1])
def test_no_rollouts_end_in_a_checkpoint(tmp_path, tokenizer, pairs, staleness):
    options = dict(rollout_staleness=staleness, max_steps=6, learning_rate=0.01)
    whole = trained_weights(make_run(tmp_path / "whole", tokenizer, pairs, **options))
    failing = Counting()
    failing.fails_after = 3
    with pytest.raises(RolloutError, match="no server answers"):
        make_run(tmp_path / "cut", tokenizer, pairs, failing, **options).train()
    (checkpoint,) = (tmp_path / "cut").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-3"
    resumed = make_run(tmp_path / "cut", tokenizer, pairs, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    steps = [line["step"] for line in read_rollouts(tmp_path / "cut")]
    assert steps == sorted(steps)
    orders = [[line["sample_id"] for line in read_rollouts(tmp_path / name)] for name in ("cut", "whole")]
    assert orders[0] == orders[1]
    if not staleness:  # else the resumed step is fresh
        for name, weight in resumed.model.named_parameters():
            torch.testing.assert_close(weight.detach(), whole[name], rtol=1e-6, atol=1e-7)


def test_an_evaluation_without_rollouts_ends_in_a_checkpoint_too(tmp_path, tokenizer, pairs):
    failing = Counting()
    failing.fails_after = 3
    options = dict(max_steps=6, eval_strategy="steps", eval_steps=3)
    trainer_options = dict(rollout_engine=failing, eval_dataset=pairs.select(range(4)))
    settings = ON_POLICY | dict(rollout_engine="vllm_server") | options
    trainer = make_trainer(tmp_path, tokenizer, pairs, trainer_options=trainer_options, **settings)
    with pytest.raises(RolloutError, match="no server answers"):
        trainer.train()
    assert (tmp_path / "checkpoint-3").exists()


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_an_evaluation_changes_no_rollout(tmp_path, tokenizer, pairs, staleness):
    """It waits for the round in progress, and has its own seeds."""
    for name, more in (("plain", {}), ("evaluated", dict(eval_strategy="steps", eval_steps=2))):
        trainer_options = dict(rollout_engine=Counting(), eval_dataset=pairs.select(range(4)))
        settings = ON_POLICY | dict(rollout_engine="vllm_server", rollout_staleness=staleness, max_steps=6) | more
        make_trainer(tmp_path / name, tokenizer, pairs, trainer_options=trainer_options, **settings).train()
    assert read_rollouts(tmp_path / "plain") == read_rollouts(tmp_path / "evaluated")


def test_answers_to_other_prompts_are_refused(tmp_path, tokenizer, pairs):
    class Reversed(Counting):
        def generate(self, prompts):
            return super().generate(prompts)[::-1]

    with pytest.raises(ValueError, match="answers are for other prompts, or in another order"):
        make_run(tmp_path, tokenizer, pairs, Reversed()).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rollout_batches=0), "rollout_batches 0 must be at least 1"),
        (dict(rollouts_per_prompt=0), "rollouts_per_prompt 0 must be at least 1"),
        (
            dict(rollouts_per_prompt=2, temperature=0.0),
            "with temperature 0.0 and top_k 0 generates the same completion again",
        ),
        (dict(rollouts_per_prompt=2, lmbda=0.5), "with lmbda 0.5: steps that learn from the data would repeat each"),
        (dict(rollouts_per_prompt=2, top_k=1), "top_k 1 generates the same completion again; raise"),
        (dict(stop_strings=[5]), r"stop_strings \[5\] must be a list of texts that are not empty"),
        (dict(rollout_server_urls=None), "rollout_server_urls null must be a list of texts"),
        (dict(rollout_server_urls=[]), "rollout_server_urls is empty: name the servers"),
        (dict(rollout_server_urls="localhost:8000"), "'localhost:8000' is not a server's address; write http://"),
        (dict(rollout_server_urls="http://h:99999"), "'http://h:99999' is not a server's address"),
        (dict(rollout_server_urls="http://h:80/v1"), "write http://127.0.0.1:8000, without /v1"),
        (dict(rollout_server_urls=["http://h", "http://h/"]), "names a server twice"),
        (dict(rollout_transfer="nccl", rollout_engine="hf"), "rollout_transfer 'nccl' is for rollout_engine vllm_ser"),
        (dict(rollout_transfer="rdma"), "rollout_transfer 'rdma' is unknown"),
        (dict(vllm_gpu_memory_utilization=5.0), r"vllm_gpu_memory_utilization 5.0 is outside \(0, 1\]"),
        (dict(vllm_kv_cache_gib=0.2), "vllm_kv_cache_gib 0.2 must be at least 1"),
        (dict(log_completions_steps=-3), "log_completions_steps -3 must not be negative"),
        (dict(temperature=2.5), "temperature 2.5 is above 2, vLLM's maximum; lower it, or use rollout_engine: hf"),
        (dict(rollout_staleness=2), "rollout_staleness 2 must be 0 or 1"),
        (dict(rollout_staleness=1, rollout_engine="hf"), "which generates on the trainer's own device"),
        (dict(repetition_penalty=0.0), "repetition_penalty 0.0 must be above 0"),
        (dict(stop_strings=[""]), "must be a list of texts that are not empty"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, tokenizer, pairs, options, message):
    with pytest.raises(ValueError, match=message):
        make_run(tmp_path, tokenizer, pairs, **options)


def test_one_stop_string_is_a_list_of_one(tmp_path):
    args = SEKDConfig(str(tmp_path), stop_strings="Question:", rollout_server_urls="http://127.0.0.1:8001")
    assert args.stop_strings == ["Question:"]
    assert args.rollout_server_urls == ["http://127.0.0.1:8001"]


def test_prompts_without_a_token_are_dropped(tmp_path, tokenizer):
    data = Dataset.from_list([{"prompt": "w1"}, {"prompt": ""}, {"prompt": "w2 w3"}])
    assert len(make_run(tmp_path, tokenizer, data).train_dataset) == 2
