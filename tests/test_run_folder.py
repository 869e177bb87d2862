"""A run's folder: one owner, one run, nothing of another run."""

import json

import pytest
from datasets import Dataset
from helpers import make_model, make_trainer
from peft import LoraConfig

from sekd.checkpoints import RunRefused, list_checkpoints
from sekd.run_folder import begin_run, check_free, compare_facts, describe_run, lock_run

SAVED = dict(save_strategy="steps", save_steps=1, max_steps=2)


def lines(path):
    return [json.loads(line) for line in path.open()]


def test_a_folder_with_results_is_refused_and_may_be_cleared(tmp_path, tokenizer, pairs):
    first = make_trainer(tmp_path, tokenizer, pairs, **SAVED)
    first.train()
    first.save_model()
    (tmp_path / "samples.json").write_text("of the user")
    with pytest.raises(ValueError, match=r"has the results of an earlier run \(checkpoint-1, checkpoint-2 a"):
        make_trainer(tmp_path, tokenizer, pairs, **SAVED).train()
    assert len(lines(tmp_path / "metrics.jsonl")) == 3, "untouched"
    make_trainer(tmp_path, tokenizer, pairs, **SAVED | dict(max_steps=1, overwrite_output_dir=True)).train()
    assert [*list_checkpoints(str(tmp_path))] == [1]
    assert not (tmp_path / "model.safetensors").exists()
    assert len(lines(tmp_path / "metrics.jsonl")) == 2
    assert (tmp_path / "samples.json").read_text() == "of the user"


def test_a_run_that_left_no_results_may_begin_again(tmp_path, tokenizer, pairs):
    for _ in range(2):
        make_trainer(tmp_path, tokenizer, pairs, max_steps=1).train()


def test_a_second_call_of_train_replaces_the_first(tmp_path, tokenizer, pairs):
    trainer = make_trainer(tmp_path, tokenizer, pairs, **SAVED)
    trainer.train()
    before = trainer.model.lm_head.weight.clone()
    trainer.train()
    assert [*list_checkpoints(str(tmp_path))] == [1, 2]
    assert not before.equal(trainer.model.lm_head.weight)


def test_one_run_at_a_time(tmp_path, tokenizer, pairs):
    trainer = make_trainer(tmp_path, tokenizer, pairs, max_steps=1)
    with lock_run(str(tmp_path)):
        with pytest.raises(ValueError, match="another run is writing into output_dir"):
            trainer.train()
        with pytest.raises(ValueError, match="another run is writing into output_dir"):
            check_free(str(tmp_path), None, False)
    trainer.train()


def test_the_models_of_a_run_are_not_deleted(tmp_path):
    begin_run(str(tmp_path))
    for inside in ("checkpoint-2", "other"):
        (tmp_path / inside).mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    (tmp_path / "checkpoint-3").symlink_to(tmp_path / "other")
    for model in (tmp_path, tmp_path / "checkpoint-2", tmp_path / "adapter", tmp_path / "checkpoint-3"):
        with pytest.raises(RunRefused, match=r"overwrite_output_dir would delete .*, which this run reads"):
            check_free(str(tmp_path), None, True, [str(model)])
    check_free(str(tmp_path), None, True, [str(tmp_path / "other"), "a-hub/id", None])


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl", "model.safetensors", "checkpoint-7"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_what_no_run_wrote_is_neither_deleted_nor_replaced(tmp_path, tokenizer, pairs, name, overwrite):
    (tmp_path / "checkpoint-7").mkdir() if "7" in name else (tmp_path / name).write_text("mine")
    with pytest.raises(RunRefused, match=rf"has files that no run of this version of sekd wrote \({name}\)"):
        make_trainer(tmp_path, tokenizer, pairs, overwrite_output_dir=overwrite).train()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_resuming_from_an_earlier_step_sets_the_later_ones_aside(tmp_path, tokenizer, pairs):
    make_trainer(tmp_path, tokenizer, pairs, **SAVED | dict(max_steps=3)).train()
    options = SAVED | dict(max_steps=2, lr_scheduler_type="constant")
    with pytest.raises(RunRefused, match=r"differs in lr_scheduler_type"):
        make_trainer(tmp_path, tokenizer, pairs, **options).train(str(tmp_path / "checkpoint-1"))
    make_trainer(tmp_path, tokenizer, pairs, **SAVED).train(str(tmp_path / "checkpoint-1"))
    assert [*list_checkpoints(str(tmp_path))] == [1, 2]
    assert (tmp_path / "checkpoint-3.old").exists()


def test_a_checkpoint_of_another_folder_begins_a_run_here(tmp_path, tokenizer, pairs):
    make_trainer(tmp_path / "a", tokenizer, pairs, **SAVED).train()
    trainer = make_trainer(tmp_path / "b", tokenizer, pairs, **SAVED)
    trainer.train(str(tmp_path / "a" / "checkpoint-1"))
    assert [*list_checkpoints(str(tmp_path / "b"))] == [2]
    assert [entry["step"] for entry in lines(tmp_path / "b" / "metrics.jsonl")] == [1, 2, 2]
    with pytest.raises(ValueError, match="has the results of an earlier run"):
        make_trainer(tmp_path / "b", tokenizer, pairs, **SAVED).train(str(tmp_path / "a" / "checkpoint-1"))


def test_a_checkpoint_of_another_run_is_refused(tmp_path, tokenizer, pairs):
    """Only a copy by hand can bring one here."""
    for name in ("a", "b"):
        make_trainer(tmp_path / name, tokenizer, pairs, **SAVED).train()
    (tmp_path / "a" / "checkpoint-2").rename(tmp_path / "b" / "checkpoint-9")
    with pytest.raises(RunRefused, match="belongs to another run than output_dir"):
        make_trainer(tmp_path / "b", tokenizer, pairs, **SAVED).train(True)


REFUSED = [
    dict(seed=1),
    dict(learning_rate=1e-4),
    dict(position_fraction=0.5),
    dict(position_policy="random"),
    dict(divergence="reverse_kl"),
    dict(per_device_train_batch_size=2),
    dict(class_selection="rs_kd"),
    dict(kd_weight=0.5),
    dict(lmbda=0.5),
]


@pytest.mark.parametrize("change", REFUSED, ids=str)
def test_another_recipe_cannot_resume(tmp_path, tokenizer, pairs, change):
    before = make_trainer(tmp_path, tokenizer, pairs).facts
    name = "sequences a step" if "per_device_train_batch_size" in change else next(iter(change))
    with pytest.raises(RunRefused, match=f"differs in .*{name}"):
        compare_facts("checkpoint-1", before, make_trainer(tmp_path, tokenizer, pairs, **change).facts)


def test_other_data_models_and_adapters_cannot_resume(tmp_path, tokenizer, pairs):
    before = make_trainer(tmp_path, tokenizer, pairs).facts
    adapter = dict(peft_config=LoraConfig(task_type="CAUSAL_LM", r=2))
    for what, other in (
        ("the data", make_trainer(tmp_path, tokenizer, pairs.select(range(63, -1, -1)))),
        ("the data", make_trainer(tmp_path, tokenizer, pairs.select(range(63)))),
        ("the teacher", make_trainer(tmp_path, tokenizer, pairs, teacher=make_model("untied", 2))),
        ("the student's architecture", make_trainer(tmp_path, tokenizer, pairs, make_model("tied"))),
        ("the student's architecture", make_trainer(tmp_path, tokenizer, pairs, trainer_options=adapter)),
    ):
        with pytest.raises(RunRefused, match=f"differs in .*{what}"):
            compare_facts("checkpoint-1", before, other.facts)


def test_what_may_differ_is_named(tmp_path, tokenizer, pairs, monkeypatch):
    options = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    before = make_trainer(tmp_path, tokenizer, pairs, **options).facts
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=9, logging_steps=3, seed=42)
    changed = make_trainer(tmp_path / "moved", tokenizer, pairs, **options).facts
    warnings = []
    monkeypatch.setattr("sekd.run_folder.logger.warning", warnings.append)
    compare_facts("checkpoint-1", before, changed)
    (text,) = warnings
    assert "max_steps 9 (it has 2)" in text
    assert "per_device_train_batch_size 2 (it has 4)" in text
    assert "logging_steps" not in text
    assert "output_dir" not in text


def test_tokens_of_accounts_are_not_kept(tmp_path, tokenizer, pairs):
    trainer = make_trainer(tmp_path, tokenizer, pairs, hub_token="secret")
    assert "secret" not in json.dumps(trainer.facts)


def test_a_stream_is_known_by_its_first_samples(tmp_path, tokenizer, pairs):
    trainers = [
        make_trainer(tmp_path, tokenizer, data.to_iterable_dataset()) for data in (pairs, pairs.select(range(1, 64)))
    ]
    assert trainers[0].facts["the data"] != trainers[1].facts["the data"]
    keys = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    again = describe_run(keys, 1, trainers[0].model, "teacher", trainers[0].train_dataset)
    assert again["the data"] == trainers[0].facts["the data"]


def test_on_policy_the_number_of_processes_must_stay():
    """Each process keeps the rollouts of its own prompts in a checkpoint."""
    keys = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    model, data = make_model("untied"), Dataset.from_list([{"input_ids": [1, 2], "supervised": [0, 1]}])
    for lmbda in (0.0, 1.0):
        one = describe_run({**keys, "lmbda": lmbda}, 1, model, "teacher", data)
        two = describe_run({**keys, "lmbda": lmbda, "per_device_train_batch_size": 2}, 2, model, "teacher", data)
        if lmbda:
            with pytest.raises(RunRefused, match=r"differs in number of processes 2 \(it has 1\)"):
                compare_facts("checkpoint-1", one, two)
        else:
            compare_facts("checkpoint-1", one, two)
