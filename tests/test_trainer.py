"""The trainer: one gradient however a step is split, nothing lost on the way, and what a run leaves behind."""

import copy
import json
import math

import pytest
import torch
from datasets import Dataset
from helpers import (
    EOS,
    ONE_SGD_STEP,
    LargestTensor,
    make_model,
    make_tokenizer,
    make_trainer,
    qlora_student,
    trained_weights,
)
from oracles import naive
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback

from rollouts import Rollout
from sekd import SEKDConfig, SEKDTrainer
from sekd.data.batch import Sample
from sekd.on_policy.engines import make_sampling
from sekd.on_policy.schedule import is_on_policy


@pytest.mark.parametrize("sizes", [(1, 8), (4, 2)])
def test_the_gradient_is_that_of_the_mean_over_sequences(tmp_path, tokenizer, pairs, sizes):
    data = pairs.select(range(8))
    student, teacher = make_model("untied"), make_model("untied", 1)
    reference = copy.deepcopy(student)
    options = dict(per_device_train_batch_size=sizes[0], gradient_accumulation_steps=sizes[1])
    trainer = make_trainer(
        tmp_path, tokenizer, data, student, copy.deepcopy(teacher), divergence="reverse_kl", **ONE_SGD_STEP, **options
    )
    samples = [Sample(**row) for row in trainer.train_dataset]
    weights = trained_weights(trainer)
    loss = naive(reference, teacher, [[(s.input_ids, s.supervised)] for s in samples], 0.2) / 8
    loss.backward()
    for name, p in reference.named_parameters():
        expected = p.detach() - p.grad
        torch.testing.assert_close(
            weights[name].double(), expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_sequences_without_targets_do_not_count(tmp_path, tokenizer):
    """On-policy, a prompt that drew an empty completion teaches nothing and must not dilute the others."""

    class Fixed:
        def generate(self, prompts):
            return [Rollout(p, [] if i % 2 else [5, 6, EOS], 0, "stop") for i, p in enumerate(prompts)]

        def sync_weights(self, model, step):
            self.synced = step

        def close(self):
            pass

    data = Dataset.from_list([{"prompt": "w1 w2"}] * 4)
    student, teacher = make_model("untied"), make_model("untied", 1)
    reference = copy.deepcopy(student)
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        data,
        student,
        copy.deepcopy(teacher),
        dict(rollout_engine=Fixed()),
        lmbda=1.0,
        **ONE_SGD_STEP,
    )
    trainer.train()
    expected = naive(reference, teacher, [[([1, 2, 5, 6, EOS], [0, 0, 1, 1, 1])]], 0.2)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert trainer.state.log_history[0]["empty_completions"] == 2


def test_a_round_of_empty_completions_is_survived(tmp_path, tokenizer):
    class Silent:
        def generate(self, prompts):
            return [Rollout(p, [], 0, "stop") for p in prompts]

        def sync_weights(self, model, step):
            pass

        def close(self):
            pass

    data = Dataset.from_list([{"prompt": "w1 w2"}] * 4)
    trainer = make_trainer(tmp_path, tokenizer, data, None, None, dict(rollout_engine=Silent()), lmbda=1.0)
    trainer.train()
    assert [log["loss"] for log in trainer.state.log_history if "loss" in log] == [0, 0]


def test_the_engine_has_the_current_weights_before_each_round(tmp_path, tokenizer, pairs):
    class Watching:
        def __init__(self):
            self.rounds, self.weights = [], None

        def sync_weights(self, model, step):
            self.weights, self.step = {n: t.clone() for n, t in model}, step

        def generate(self, prompts):
            self.rounds.append((self.step, len(prompts), self.weights["lm_head.weight"]))
            return [Rollout(p, [1, EOS], self.step, "stop") for p in prompts]

        def close(self):
            pass

    engine = Watching()
    options = dict(lmbda=1.0, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    trainer = make_trainer(tmp_path, tokenizer, pairs, None, None, dict(rollout_engine=engine), **options)
    trainer.train()
    assert [(step, count) for step, count, _ in engine.rounds] == [(0, 8), (1, 8), (2, 8)], "one call a step"
    assert torch.equal(engine.rounds[0][2], make_model("untied").lm_head.weight)
    assert not torch.equal(engine.rounds[1][2], engine.rounds[0][2])
    assert not torch.equal(engine.rounds[2][2], trainer.model.lm_head.weight)


@pytest.mark.parametrize(
    ("lmbda", "policy"), [(0.0, "random"), (0.5, "random"), (0.0, "gls"), (0.0, "bandit"), (0.0, "pos_rs")]
)
def test_a_resumed_run_equals_an_undisturbed_one(tmp_path, tokenizer, pairs, lmbda, policy):
    options = dict(lmbda=lmbda, position_policy=policy, max_steps=6, save_strategy="steps", save_steps=3)
    whole = trained_weights(make_trainer(tmp_path / "whole", tokenizer, pairs, **options))

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4  # one step after the checkpoint

    make_trainer(tmp_path / "cut", tokenizer, pairs, None, None, dict(callbacks=[Stop()]), **options).train()
    resumed = make_trainer(tmp_path / "cut", tokenizer, pairs, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    for name, p in resumed.model.named_parameters():
        assert torch.equal(p, whole[name]), name
    files = [[json.loads(line) for line in (tmp_path / run / "metrics.jsonl").open()] for run in ("whole", "cut")]
    assert [e["step"] for e in files[1]] == [e["step"] for e in files[0]], "steps logged twice or lost"
    assert [e.get("loss") for e in files[1]] == [e.get("loss") for e in files[0]]


def test_the_mix_follows_the_seed_and_the_fraction(tmp_path, tokenizer, pairs):
    def draws(lmbda, count):
        trainer = make_trainer(tmp_path, tokenizer, pairs, lmbda=lmbda)
        return [is_on_policy(trainer.args, step) for step in range(count)]

    drawn = draws(0.3, 2000)
    assert abs(sum(drawn) / 2000 - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 2000)
    assert drawn == draws(0.3, 2000)
    assert not any(draws(0.0, 100))
    assert all(draws(1.0, 100))


@pytest.mark.parametrize(("policy", "what"), [("all", "the loss is nan"), ("top_k", "a position score is not finite")])
def test_what_is_not_finite_stops_the_run_and_names_the_samples(tmp_path, tokenizer, pairs, policy, what):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    model.lm_head.weight[3] = torch.nan

    options = dict(max_steps=4, save_strategy="steps", save_steps=1, per_device_train_batch_size=2)
    options |= dict(position_policy=policy)
    trainer = make_trainer(tmp_path, tokenizer, pairs, None, None, dict(callbacks=[Break()]), **options)
    with pytest.raises(FloatingPointError, match=rf"{what} at step 2, on samples \[\d+, \d+\]"):
        trainer.train()
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-3").exists()
    assert last.config.vocab_size == 128


def test_what_a_run_leaves_behind(tmp_path, tokenizer, pairs):
    trainer = make_trainer(tmp_path, tokenizer, pairs, lmbda=1.0, max_steps=3)
    trainer.train()
    trainer.save_model()
    trainer.close()
    student = AutoModelForCausalLM.from_pretrained(tmp_path)
    for (name, ours), theirs in zip(trainer.model.named_parameters(), student.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    logs = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [log["step"] for log in logs] == [1, 2, 3, 3]
    wanted = {
        "loss",
        "reverse_kl_selected",
        "entropy",
        "entropy_selected",
        "selected_fraction",
        "tokens_per_second",
        "completion_length",
        "cut_fraction",
        "empty_completions",
        "rollout_tokens_per_second",
    }
    assert wanted <= logs[0].keys()
    assert logs[0]["entropy_selected"] > logs[0]["entropy"], "the chosen rows are the uncertain ones"
    assert 0 < logs[0]["completion_length"] <= 6
    assert "torch" in json.loads((tmp_path / "versions.json").read_text())


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_an_adapter_trains_and_the_base_does_not(tmp_path, tokenizer, pairs, lmbda, gradient_checkpointing):
    student = make_model("untied")
    before = {name: p.clone() for name, p in student.named_parameters()}
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj", "lm_head"], lora_dropout=0.1)
    options = dict(lmbda=lmbda, max_steps=4, learning_rate=0.01, gradient_checkpointing=gradient_checkpointing)
    trainer = make_trainer(tmp_path, tokenizer, pairs, student, None, dict(peft_config=config), **options)
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if "lora_B" in name and p.any()}
    assert len(moved) == sum("lora_B" in name for name, _ in trainer.model.named_parameters()) > 0
    for name, p in trainer.model.get_base_model().named_parameters():
        if "lora" not in name:
            assert torch.equal(p, before[name.replace(".base_layer", "")]), name


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_a_quantized_student_learns_through_its_adapter(tmp_path, tokenizer, pairs, lmbda):
    """QLoRA trainers elsewhere have had a loss of zero (TRL #2217)."""
    pytest.importorskip("bitsandbytes")
    student, options = qlora_student(tmp_path)
    trainer = make_trainer(
        tmp_path / "run", tokenizer, pairs, student, None, options, lmbda=lmbda, max_steps=4, learning_rate=0.01
    )
    trainer.train()
    assert all(log["loss"] > 0 for log in trainer.state.log_history if "loss" in log)
    assert all(p.any() for name, p in trainer.model.named_parameters() if "lora_B" in name)


def test_a_quantized_student_passes_gradients_after_it_was_evaluated(tmp_path, tokenizer, pairs):
    """bitsandbytes packs 4-bit weights in evaluation mode on some CPUs, and computes no gradient through them."""
    pytest.importorskip("bitsandbytes")
    student, options = qlora_student(tmp_path)
    model = make_trainer(tmp_path / "run", tokenizer, pairs, student, None, options, sample_fraction=0.5).model
    untouched = AutoModelForCausalLM.from_pretrained(student, **options["model_init_kwargs"])
    untouched = get_peft_model(prepare_model_for_kbit_training(untouched, False), options["peft_config"])
    set_peft_model_state_dict(untouched, get_peft_model_state_dict(model))
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        model.eval()(ids)
    for trained in (untouched, model):
        trained.train()(ids, labels=ids).loss.backward()
    expected = {name: p.grad for name, p in untouched.named_parameters() if "lora_B" in name}
    assert all(gradient.any() for gradient in expected.values())
    for name, p in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-6, atol=1e-9, msg=name)


def test_quantized_students_need_an_adapter_and_the_hf_engine(tmp_path, tokenizer, pairs):
    init = dict(model_init_kwargs=dict(quantization_config=BitsAndBytesConfig(load_in_4bit=True)))
    with pytest.raises(ValueError, match="a quantized student cannot be trained in full: set use_peft: true"):
        make_trainer(tmp_path, tokenizer, pairs, "somewhere", None, init)
    init["peft_config"] = LoraConfig(task_type="CAUSAL_LM")
    pytest.importorskip("vllm")
    options = dict(lmbda=1.0, rollout_engine="vllm")
    with pytest.raises(ValueError, match="rollout_engine 'vllm' cannot take a quantized student; use hf"):
        make_trainer(tmp_path, tokenizer, pairs, "somewhere", None, init, **options)


def test_every_parameter_of_a_full_student_moves(tmp_path, tokenizer, pairs):
    student = make_model("tied")
    before = {name: p.clone() for name, p in student.named_parameters()}
    trainer = make_trainer(tmp_path, tokenizer, pairs, student, make_model("tied", 1), max_steps=3)
    trainer.train()
    assert not [name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["top_k", "random", "all"])
@pytest.mark.parametrize("mode", ["text", "off_policy", "mixed", "on_policy", "lora"])
def test_every_mode_trains_and_learns(tmp_path, tokenizer, pairs, texts, mode, policy):
    options = dict(max_steps=60, position_policy=policy, logging_steps=6, max_length=48, max_prompt_length=16)
    options["learning_rate"] = 1e-2 if mode == "lora" else 3e-3
    options["lmbda"] = {"mixed": 0.5, "on_policy": 1.0, "lora": 1.0}.get(mode, 0.0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear") if mode == "lora" else None
    data = texts if mode == "text" else pairs
    trainer = make_trainer(tmp_path, tokenizer, data, None, None, dict(peft_config=lora), **options)
    trainer.train()
    divergences = [log[name] for log in trainer.state.log_history for name in log if name.endswith("_kl_selected")]
    assert len(divergences) == 10
    assert divergences[-1] < divergences[0]


# What a user can get wrong: all of it before a model is loaded


@pytest.fixture
def no_models(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("sekd.student.load_model", refuse)


@pytest.fixture
def folder(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_data_and_tokenizers_are_checked_before_models_load(no_models, tmp_path, tokenizer, folder, pairs):
    def start(data, teacher=folder, trainer_options=None, **kwargs):
        make_trainer(tmp_path, tokenizer, data, folder, teacher, trainer_options, **kwargs)

    with pytest.raises(ValueError, match="lacks completion_column"):
        start(pairs.rename_column("completion", "answer"))
    with pytest.raises(ValueError, match="prompts are longer than max_prompt_length 3"):
        start(pairs, max_prompt_length=3)
    with pytest.raises(ValueError, match="no training data"):
        start(None)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["new"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="different tokenizers"):
        start(pairs, str(tmp_path / "other"))
    with pytest.raises(AssertionError, match="a model was loaded"):
        start(pairs)


def test_a_student_cannot_teach_itself(tmp_path, tokenizer, pairs):
    student, sharing = make_model("untied"), make_model("untied", 1)
    sharing.lm_head.weight = student.lm_head.weight
    for teacher in (student, sharing):
        with pytest.raises(ValueError, match=r"teacher_model shares weights with model, .* or pass copy.deepcopy"):
            make_trainer(tmp_path, tokenizer, pairs, student, teacher)
    make_trainer(tmp_path, tokenizer, pairs, student, copy.deepcopy(student), max_steps=1).train()


def test_an_eos_token_of_the_recipe_ends_the_student_s_completions(tmp_path, pairs):
    """The saved student stops at it, wherever it is loaded."""
    made = make_tokenizer()
    trainer = make_trainer(tmp_path, made, pairs, eos="<user>", max_steps=1, lmbda=1.0)
    trainer.train()
    assert 123 in make_sampling(trainer.model, trainer.processing_class, trainer.args).stop_token_ids
    trainer.save_model()
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<user>"
    assert 123 in AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id


def test_a_teacher_is_needed(tmp_path, tokenizer, pairs):
    with pytest.raises(ValueError, match="set teacher_model_name_or_path"):
        SEKDTrainer(
            make_model(), args=SEKDConfig(output_dir=str(tmp_path)), train_dataset=pairs, processing_class=tokenizer
        )


def test_a_stream_needs_max_steps(no_models, tmp_path, tokenizer, folder, pairs):
    with pytest.raises(ValueError, match="a stream has no length: set max_steps"):
        make_trainer(tmp_path, tokenizer, pairs.to_iterable_dataset(), folder, folder, max_steps=-1)


@pytest.mark.parametrize("policy", ["top_k", "all"])
def test_no_tensor_of_size_batch_tokens_vocabulary_in_a_training_step(tmp_path, tokenizer, texts, policy):
    """Through the Trainer, optimizer included: 4 packed sequences of 64 tokens, 128 classes."""
    options = dict(max_length=64, head_chunk_rows=16, position_policy=policy, max_steps=1)
    trainer = make_trainer(tmp_path, tokenizer, texts, **options)
    with LargestTensor() as largest:
        trainer.train()
    assert trainer.state.global_step == 1
    assert largest.elements < 4 * 64 * 128


def test_a_run_lets_the_teacher_read_the_reference(tmp_path, tokenizer, pairs):
    options = dict(trainer_options={"eval_dataset": pairs.select(range(6))}, max_steps=3, record_selection=0)
    trainer = make_trainer(tmp_path, tokenizer, pairs, lmbda=1.0, teacher_prompt_prefix="w99 {completion} ", **options)
    read, seen = trainer.teacher.read, []
    trainer.teacher.read = lambda batch: seen.append(batch) or read(batch)
    trainer.train()
    assert len(seen) == 3
    for batch in seen:
        for number, ids in zip(batch.sample_ids.tolist(), batch.for_teacher.input_ids.tolist(), strict=True):
            expected = tokenizer(f"w99 {pairs[number]['completion']} {pairs[number]['prompt']}")["input_ids"]
            assert ids[: len(expected)] == expected
        assert torch.equal(batch.for_teacher.targets[batch.for_teacher.valid], batch.targets[batch.valid])
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
    assert trainer.evaluate()["eval_reverse_kl"] > 0
