"""A run that was killed, stopped or out of disk goes on as if nothing had happened."""

import json
import os
import resource
import signal
import threading
import time

import pytest
import torch
from helpers import make_trainer, trained_weights
from transformers import TrainerCallback

from sekd.checkpoints import UNFINISHED, RunRefused, list_checkpoints
from sekd.resumable import Interrupted

OPTIONS = dict(max_steps=7, save_strategy="steps", save_steps=2, logging_steps=3, position_policy="random")


class At(TrainerCallback):
    """Does something when a step has ended."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action(control)


def make(folder, tokenizer, pairs, step=None, action=None, **changes):
    more = {} if action is None else dict(callbacks=[At(step, action)])
    return make_trainer(folder, tokenizer, pairs, trainer_options=more, **OPTIONS | changes)


def stop(control):
    control.should_training_stop = True


def terminate(_):
    os.kill(os.getpid(), signal.SIGTERM)


TIMINGS = ("_runtime", "_per_second", "_seconds", "_share")


def log(folder):
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [{name: value for name, value in entry.items() if not name.endswith(TIMINGS)} for entry in entries]


def assert_same_end(trainer, folder, whole_weights, whole_folder):
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight, whole_weights[name]), name
    assert log(folder) == log(whole_folder), "train_loss, and the sums since the last log, included"
    assert [*list_checkpoints(str(folder))] == [*list_checkpoints(str(whole_folder))]


@pytest.fixture
def whole(tmp_path, tokenizer, pairs):
    return trained_weights(make(tmp_path / "whole", tokenizer, pairs))


def test_what_is_logged_after_a_resume_is_the_runs(tmp_path, tokenizer, pairs, whole):
    make(tmp_path / "cut", tokenizer, pairs, 5, stop).train()
    resumed = make(tmp_path / "cut", tokenizer, pairs)
    output = resumed.train(True)
    assert_same_end(resumed, tmp_path / "cut", whole, tmp_path / "whole")
    assert output.training_loss == log(tmp_path / "whole")[-1]["train_loss"]


def test_sigterm_saves_the_step_and_stops(tmp_path, tokenizer, pairs, whole):
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 3, whose checkpoint is saved"):
        make(tmp_path / "cut", tokenizer, pairs, 3, terminate).train()
    assert [*list_checkpoints(str(tmp_path / "cut"))] == [2, 3]
    resumed = make(tmp_path / "cut", tokenizer, pairs)
    resumed.train(True)
    (tmp_path / "cut" / "checkpoint-3").rename(tmp_path / "extra")
    assert_same_end(resumed, tmp_path / "cut", whole, tmp_path / "whole")


def test_sigterm_keeps_its_handler_without_save_on_signal_and_after_training(tmp_path, tokenizer, pairs):
    seen = []
    previous = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        make(tmp_path, tokenizer, pairs, 3, terminate, save_on_signal=False).train()
        make(tmp_path / "b", tokenizer, pairs).train()
        terminate(None)
        assert seen == [1, 1]
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, tokenizer, pairs, whole):
    make(tmp_path / "cut", tokenizer, pairs, 5, stop).train()
    os.remove(tmp_path / "cut" / "checkpoint-4" / "optimizer.pt")
    resumed = make(tmp_path / "cut", tokenizer, pairs)
    resumed.train(True)
    assert (tmp_path / "cut" / "checkpoint-4.old").exists()
    assert_same_end(resumed, tmp_path / "cut", whole, tmp_path / "whole")


@pytest.mark.parametrize("limit", [20_000, 100_000], ids=["the weights", "the optimizer"])
def test_a_checkpoint_that_does_not_fit(tmp_path, tokenizer, pairs, whole, limit):
    """Files above a size fail to be written, as on a full disk. The checkpoint before stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(_):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    try:
        with pytest.raises(OSError, match=r"the checkpoint of step 4 could not be written to "):
            make(tmp_path / "cut", tokenizer, pairs, 3, fill).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [*list_checkpoints(str(tmp_path / "cut"))] == [2]
    assert not (tmp_path / "cut" / UNFINISHED).exists(), "room for the next try"
    resumed = make(tmp_path / "cut", tokenizer, pairs)
    resumed.train(True)
    assert_same_end(resumed, tmp_path / "cut", whole, tmp_path / "whole")


def test_resuming_a_finished_run_trains_nothing(tmp_path, tokenizer, pairs):
    weights = trained_weights(make(tmp_path, tokenizer, pairs, max_steps=4))
    before = log(tmp_path)
    resumed = make(tmp_path, tokenizer, pairs, max_steps=4)
    resumed.train(True)
    assert resumed.state.global_step == 4
    assert all(torch.equal(weight, weights[name]) for name, weight in resumed.model.named_parameters())
    assert log(tmp_path) == before
    with pytest.raises(RunRefused, match=r"is of step 4, but max_steps .* ends at step 3: raise it to train on"):
        make(tmp_path, tokenizer, pairs, max_steps=3).train(True)


def test_checkpoints_with_weights_alone_cannot_resume(tmp_path, tokenizer, pairs):
    make(tmp_path, tokenizer, pairs, save_only_model=True).train()
    with pytest.raises(RunRefused, match=r"has no optimizer state \(save_only_model\)"):
        make(tmp_path, tokenizer, pairs, save_only_model=True).train(True)


def test_the_best_checkpoint_has_its_final_name_and_stays(tmp_path, tokenizer, pairs):
    options = dict(eval_strategy="steps", eval_steps=2, save_total_limit=1, load_best_model_at_end=True)
    options |= dict(greater_is_better=True, metric_for_best_model="eval_student_ce", learning_rate=1e-2)
    evaluation = dict(eval_dataset=pairs.select(range(8)))
    trainer = make_trainer(tmp_path, tokenizer, pairs, trainer_options=evaluation, **OPTIONS | options)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    assert best in list_checkpoints(str(tmp_path)).values()


def test_an_unfinished_checkpoint_of_a_killed_run_is_removed(tmp_path, tokenizer, pairs):
    os.makedirs(tmp_path / UNFINISHED / "checkpoint-2")
    make(tmp_path, tokenizer, pairs).train()
    assert not (tmp_path / UNFINISHED).exists()


def test_sigterm_ends_a_wait_for_a_server_at_once(tmp_path, tokenizer, pairs):
    options = dict(lmbda=1.0, rollout_engine="vllm_server", rollout_timeout=120, max_steps=2)
    options |= dict(rollout_server_urls=["http://127.0.0.1:9"])  # nothing answers
    trainer = make_trainer(tmp_path, tokenizer, pairs, **options)
    threading.Timer(1.0, terminate, [None]).start()
    started = time.monotonic()
    with pytest.raises(Interrupted, match="stopped by SIGTERM before the first step"):
        trainer.train()
    assert time.monotonic() - started < 60


def test_sigterm_in_generation_saves_the_step_before(tmp_path, tokenizer, pairs):
    """The round that was cut is generated again with the same weights, so the resumed run is the undisturbed one."""
    options = OPTIONS | dict(lmbda=1.0, max_completion_length=6, rollout_batches=3, save_rollouts=True)
    whole = trained_weights(make_trainer(tmp_path / "whole", tokenizer, pairs, **options))
    trainer = make_trainer(tmp_path / "cut", tokenizer, pairs, **options)
    rounds = []

    class Cut(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:  # the next round is about to begin
                engine = trainer.engine
                generate = engine.generate
                engine.generate = lambda prompts: (rounds.append(1), terminate(None), generate(prompts))[2]

    trainer.add_callback(Cut())
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 3, whose checkpoint is saved"):
        trainer.train()
    assert rounds == [1]
    assert [*list_checkpoints(str(tmp_path / "cut"))] == [2, 3]
    resumed = make_trainer(tmp_path / "cut", tokenizer, pairs, **options)
    resumed.train(True)
    assert all(torch.equal(weight, whole[name]) for name, weight in resumed.model.named_parameters())
    assert (tmp_path / "cut" / "rollouts.jsonl").read_text() == (tmp_path / "whole" / "rollouts.jsonl").read_text()


def test_a_resumed_run_logs_and_saves_as_its_own_recipe_says(tmp_path, tokenizer, pairs):
    make(tmp_path, tokenizer, pairs, max_steps=2).train()
    make(tmp_path, tokenizer, pairs, max_steps=5, logging_steps=1, save_steps=1).train(True)
    assert [*list_checkpoints(str(tmp_path))] == [2, 3, 4, 5]
    assert [entry["step"] for entry in log(tmp_path)] == [3, 4, 5, 5]


def test_a_run_that_trains_nothing_is_an_error(tmp_path, tokenizer, pairs):
    options = dict(per_device_train_batch_size=100, dataloader_drop_last=True)
    with pytest.raises(RunRefused, match="nothing was trained: the data has no batch"):
        make_trainer(tmp_path, tokenizer, pairs, **options).train()


def test_the_best_checkpoint_is_known_after_the_folder_moved(tmp_path, tokenizer, pairs):
    options = dict(eval_strategy="steps", eval_steps=2, save_total_limit=1, load_best_model_at_end=True)
    options |= dict(greater_is_better=True, metric_for_best_model="eval_student_ce", learning_rate=1e-3)
    evaluation = dict(eval_dataset=pairs.select(range(8)))
    first = make_trainer(tmp_path / "a", tokenizer, pairs, trainer_options=evaluation, **OPTIONS | options)
    first.train()
    best = first.state.best_global_step
    (tmp_path / "a").rename(tmp_path / "b")
    options |= dict(max_steps=9)
    resumed = make_trainer(tmp_path / "b", tokenizer, pairs, trainer_options=evaluation, **OPTIONS | options)
    resumed.train(True)
    assert resumed.state.best_model_checkpoint == str(tmp_path / "b" / f"checkpoint-{resumed.state.best_global_step}")
    assert resumed.state.best_global_step == best
    assert best in list_checkpoints(str(tmp_path / "b"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lr_scheduler_type="cosine_with_min_lr"), "lr_scheduler_type, lr_scheduler_kwargs or warmup_steps: "),
        (dict(lr_scheduler_type="cosine", lr_scheduler_kwargs={"nope": 1}), r"lr_scheduler_kwargs .*TypeError.*nope"),
        (dict(optim="galore_adamw"), "optim, optim_args or optim_target_modules: "),
        (dict(optim="sgd", optim_args="momentum=abc"), "optim, optim_args or optim_target_modules: "),
        (dict(dataloader_persistent_workers=True), "one of the dataloader_ fields: "),
        (dict(load_best_model_at_end=True, metric_for_best_model="nope"), "metric_for_best_model: KeyError"),
    ],
    ids=str,
)
def test_fields_that_transformers_reads_late_are_named(tmp_path, tokenizer, pairs, options, message):
    options = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1) | options
    evaluation = dict(eval_dataset=pairs.select(range(4)))
    with pytest.raises(RunRefused, match=message):
        make_trainer(tmp_path, tokenizer, pairs, trainer_options=evaluation, **options).train()


def stop_and_resume(folder, tokenizer, data, step, **options):
    """The trainer that resumed a run after it was stopped in a step. It ends as an undisturbed run does."""
    weights = trained_weights(make(folder / "whole", tokenizer, data, **options))
    make(folder / "cut", tokenizer, data, step, stop, **options).train()
    resumed = make(folder / "cut", tokenizer, data, **options)
    resumed.train(True)
    assert_same_end(resumed, folder / "cut", weights, folder / "whole")
    return resumed


@pytest.mark.parametrize("batch", [4, 5])
def test_a_stream_in_a_later_epoch_resumes_where_it_was(tmp_path, tokenizer, pairs, batch):
    """The Trainer counts the epochs of data without a length as one, and would begin the stream again."""
    few = pairs.select(range(10)).to_iterable_dataset()
    options = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=2)
    assert OPTIONS["max_steps"] * batch * 2 > 50, "more than five epochs"
    stop_and_resume(tmp_path, tokenizer, few, 5, **options)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_packed_stream_in_a_later_epoch_resumes_where_it_was(tmp_path, tokenizer, texts, workers):
    few = texts.select(range(10)).to_iterable_dataset(num_shards=2)
    options = dict(max_length=64, gradient_accumulation_steps=2, dataloader_num_workers=workers)
    resumed = stop_and_resume(tmp_path, tokenizer, few, 5, **options)
    read = [sample["sample_id"] for _, sample in zip(range(5 * 4 * 2), resumed.train_dataset, strict=False)]
    assert read.count(0) > 2, "step 5 is in the third epoch or later"


def test_a_stream_begins_again_at_its_end(tmp_path, tokenizer, pairs):
    few = pairs.select(range(5)).to_iterable_dataset()
    trainer = make(tmp_path, tokenizer, few, per_device_train_batch_size=4)
    trainer.train()
    assert trainer.state.global_step == OPTIONS["max_steps"]
    ids = [sample["sample_id"] for _, sample in zip(range(12), trainer.train_dataset, strict=False)]
    assert ids == [0, 1, 2, 3, 4] * 2 + [0, 1]


@pytest.mark.parametrize("kind", ["pairs", "texts"])
def test_a_shuffled_stream_in_a_later_epoch_resumes_where_it_was(tmp_path, tokenizer, request, kind):
    few = request.getfixturevalue(kind).select(range(10)).to_iterable_dataset()
    options = dict(max_length=64, max_prompt_length=32, gradient_accumulation_steps=2, shuffle_buffer=6)
    resumed = stop_and_resume(tmp_path, tokenizer, few, 3, **options)
    read = [sample["sample_id"] for _, sample in zip(range(3 * 4 * 2), resumed.train_dataset, strict=False)]
    assert read.count(0) > 1, "step 3 is in the second epoch or later"
    assert read[:6] != sorted(read[:6])
    with pytest.raises(RunRefused, match=r"shuffle_buffer 7 \(it has 6\)"):
        make(tmp_path / "cut", tokenizer, few, **options | dict(shuffle_buffer=7)).train(True)


def test_other_loader_workers_would_read_a_stream_in_another_order(tmp_path, tokenizer, pairs):
    files = pairs.to_iterable_dataset(num_shards=2)
    make(tmp_path, tokenizer, files, 3, stop).train()
    with pytest.raises(RunRefused, match=r"number of loader workers 2 \(it has 1\)"):
        make(tmp_path, tokenizer, files, dataloader_num_workers=2).train(True)
    one_file = pairs.to_iterable_dataset()
    make(tmp_path / "one", tokenizer, one_file, 3, stop).train()
    make(tmp_path / "one", tokenizer, one_file, dataloader_num_workers=1).train(True)
