"""Engines are started by their names, a user's own too; a run asks each for what it can do."""

import json
import random
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from helpers import EOS, add_lora, keep_engine, make_model, make_tokenizer, make_trainer, trained_weights
from peft import LoraConfig
from rollout_helpers import model_logps, read_rollouts

from rollouts import (
    ENGINES,
    BaseEngine,
    HFEngine,
    Rollout,
    RolloutConfigError,
    RolloutEngine,
    VLLMEngine,
    get_logprobs,
    get_trait,
)
from sekd import SEKDConfig
from sekd.on_policy.engines import make_engine, send_weights


class Mine(BaseEngine):
    """A user's engine: it keeps the weights, and says the same everywhere."""

    def __init__(self, setup):
        self.setup, self.steps, self.weights, self.is_closed = setup, [], {}, False

    @classmethod
    def start(cls, setup):
        return cls(setup)

    def generate(self, prompts):
        return [Rollout(prompt, [1, 2, EOS], self.steps[-1], "stop") for prompt in prompts]

    def sync_weights(self, model, step):
        self.weights = {name: tensor.clone() for name, tensor in model}
        self.steps.append(step)

    def close(self):
        self.is_closed = True


class Checked(Mine):
    """Mine, with log-probabilities of another model, or of its weights."""

    served = "its own"

    def logprobs(self, token_ids):
        model = make_model("untied", 3)
        if self.served == "its own":
            model.load_state_dict(self.weights)
        return {"a replica": model_logps(model, token_ids).tolist()}


@pytest.fixture
def make_run(tmp_path, tokenizer, pairs, monkeypatch):
    """A function that makes a trainer whose recipe names an engine of the user."""

    def make(engine):
        monkeypatch.setitem(ENGINES, "mine", engine)
        return make_trainer(tmp_path, tokenizer, pairs, lmbda=1.0, rollout_engine="mine", temperature=0.7, seed=5)

    return make


def test_a_users_engine_trains_by_its_name(make_run, tmp_path):
    trainer = make_run(Mine)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    keep_engine(trainer).train()
    engine = trainer.engine
    assert engine.steps == [0, 1]
    assert any(not torch.equal(engine.weights[name], tensor) for name, tensor in before.items()), "those after a step"
    assert [log["completion_length"] for log in trainer.state.log_history if "loss" in log] == [3, 3]
    setup = engine.setup
    assert setup.model is trainer.model
    assert setup.output_dir == str(tmp_path)
    assert (setup.sampling.temperature, setup.sampling.seed, setup.sampling.stop_token_ids) == (0.7, 5, [EOS])
    assert setup.options["rollout_timeout"] == trainer.args.rollout_timeout
    assert setup.dtype == torch.float32
    assert setup.get_adapter() is None
    trainer.close()
    assert engine.is_closed
    assert trainer.engine is None


def test_an_engine_ends_with_the_run_that_started_it(make_run, tmp_path, tokenizer, pairs):
    started = []

    class Kept(Mine):
        def __init__(self, setup):
            super().__init__(setup)
            started.append(self)

    make_run(Kept).train()
    assert [engine.is_closed for engine in started] == [True]


def test_an_engine_of_the_user_goes_on_after_the_run_but_not_after_an_error(tmp_path, tokenizer, pairs):
    class Failing(Mine):
        rounds = 0

        def generate(self, prompts):
            self.rounds += 1
            return super().generate(prompts if self.rounds < 3 else prompts[::-1])

    engine = Failing(None)
    options = dict(lmbda=1.0, rollout_engine="vllm_server", max_steps=2)
    make_trainer(tmp_path, tokenizer, pairs, trainer_options=dict(rollout_engine=engine), **options).train()
    assert not engine.is_closed
    with pytest.raises(RolloutConfigError, match="in another order"):
        make_trainer(tmp_path, tokenizer, pairs, trainer_options=dict(rollout_engine=engine), **options).train()
    assert engine.is_closed


def test_an_engine_that_samples_from_another_model_is_refused(make_run):
    make_run(Checked).train()
    with pytest.raises(ValueError, match="a replica computes other probabilities than the student"):
        make_run(type("Other", (Checked,), {"served": "another"})).train()


class Noisy(Mine):
    """Seeds and draws from every generator of the process in every call, as vLLM does."""

    draws: ClassVar[list] = []

    def __init__(self, setup):
        super().__init__(setup)
        self.disturb()

    def disturb(self):
        self.draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)

    def logprobs(self, token_ids):
        self.disturb()
        return {}

    def generate(self, prompts):
        self.disturb()
        return super().generate(prompts)

    def sync_weights(self, model, step):
        self.disturb()
        super().sync_weights(model, step)

    def close(self):
        self.disturb()
        super().close()


def test_the_trainers_draws_do_not_depend_on_what_an_engine_does(tmp_path, tokenizer, pairs, monkeypatch):
    """Dropout and the generators' states at the end are the same with a noisy engine and with a quiet one."""
    runs, draws = [], []
    for number, engine in enumerate((Mine, Noisy, Noisy)):
        monkeypatch.setitem(ENGINES, "mine", engine)
        Noisy.draws.clear()
        lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.5)
        options = dict(lmbda=1.0, rollout_engine="mine", max_steps=4, learning_rate=0.01)
        # Folders of their own: beartype draws from `random` to check a list, and a used folder has lists to check.
        folder = tmp_path / str(number)
        trainer = make_trainer(folder, tokenizer, pairs, None, None, dict(peft_config=lora), **options)
        weights = trained_weights(trainer)
        trainer.close()
        runs.append((weights, random.random(), np.random.rand(), torch.rand(1).item()))
        draws.append([*Noisy.draws])
    for name, weight in runs[0][0].items():
        assert torch.equal(weight, runs[1][0][name]), name
    assert runs[0][1:] == runs[1][1:]
    assert len(draws[1]) >= 1 + 4 * 2 + 1, "every call of the engine was noisy"
    assert draws[1] == draws[2], "what an engine draws can be repeated"


def test_an_engine_that_draws_from_the_global_generators_draws_anew_in_each_round(make_run):
    """Though the trainer's generators are put back after each round."""
    draws = []

    class Drawing(Mine):
        def generate(self, prompts):
            draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
            return super().generate(prompts)

    make_run(Drawing).train()
    make_run(Drawing).train()
    assert all(first != second for first, second in zip(*draws[:2], strict=True))
    assert draws[:2] == draws[2:], "and the same in the same run"


@pytest.mark.parametrize("shares", [True, False])
def test_only_an_engine_that_samples_from_the_student_computes_in_its_precision(tmp_path, tokenizer, pairs, shares):
    seen = set()

    class Watching(HFEngine):
        def generate(self, prompts):
            seen.add(torch.is_autocast_enabled("cpu"))
            return super().generate(prompts)

    student = make_model("untied")
    engine = Watching(student if shares else make_model("untied"), max_completion_length=6)
    options = dict(lmbda=1.0, bf16=True, use_cpu=True)
    make_trainer(tmp_path, tokenizer, pairs, student, None, dict(rollout_engine=engine), **options).train()
    assert seen == {shares}


def test_a_student_with_more_classes_than_the_teacher_draws_the_common_ones(tmp_path, tokenizer, pairs):
    student = make_model("untied")
    student.resize_token_embeddings(140)
    with torch.no_grad():
        student.lm_head.weight[128:] *= 100  # these win nearly everywhere
    trainer = make_trainer(tmp_path, tokenizer, pairs, student, lmbda=1.0, save_rollouts=True)
    trainer.train()
    assert max(token for line in read_rollouts(tmp_path) for token in line["completion_ids"]) < 128
    engine = HFEngine(student, max_completion_length=6)  # one of the user's own, which does not know of it
    trainer = make_trainer(tmp_path, tokenizer, pairs, student, None, dict(rollout_engine=engine), lmbda=1.0)
    with pytest.raises(RolloutConfigError, match=r"generated token 1[23]\d, and the teacher has 128 classes"):
        trainer.train()


def test_an_unknown_engine_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rollout_engine 'mine' is unknown; choose one of vllm, vllm_server, hf"):
        SEKDConfig(str(tmp_path), rollout_engine="mine")


def test_each_engine_says_how_it_can_be_used():
    """Callers read these before an engine is started."""
    facts = ("single_process", "per_process", "uses_servers", "generates_in_background", "shares_model")
    true = {name: {fact for fact in facts if getattr(engine, fact)} for name, engine in ENGINES.items()}
    assert true == {
        "vllm": {"single_process"},
        "vllm_server": {"uses_servers", "generates_in_background"},
        "hf": {"per_process", "shares_model"},
    }
    assert [engine.requires for engine in ENGINES.values()] == ["vllm", None, None]


def test_three_methods_are_an_engine():
    class Plain:
        lora_rank = 8

        def generate(self, prompts):
            return [Rollout(prompt, [EOS], 0, "stop") for prompt in prompts]

        def sync_weights(self, model, step):
            self.synced = model, step

        def close(self):
            pass

    plain = Plain()
    assert isinstance(plain, RolloutEngine)
    assert get_trait(plain, "lora_rank") == 8, "its own attribute"
    assert get_trait(plain, "model") is None
    assert get_logprobs(plain, [1, 2]) == {}
    student = make_model("untied")
    plain.model = student
    send_weights(plain, student, 4)
    assert plain.synced == (student, 4), "an engine that samples from the student itself gets it as it is"


def test_an_engine_without_start_says_so(make_run):
    with pytest.raises(RolloutConfigError, match=r"BaseEngine has no start\(setup\)"):
        make_run(BaseEngine).train()


@pytest.mark.parametrize("supports_lora", [True, False])
def test_vllm_starts_from_a_copy_of_the_students_configuration(tmp_path, monkeypatch, supports_lora):
    """With the base weights for an adapter, which are removed again; without, if vLLM has no LoRA for this student."""
    starts = []

    def start(self, model, *, lora_rank, load_format, **options):
        starts.append((lora_rank, load_format, sorted(path.name for path in Path(model).iterdir())))
        if lora_rank and not supports_lora:
            raise ValueError("LlamaForCausalLM does not support LoRA yet")

    monkeypatch.setattr(VLLMEngine, "__init__", start)
    student = add_lora(make_model("untied"))
    before = student.get_base_model().config.to_dict()
    run = tmp_path / "run [1]"
    make_engine(student, make_tokenizer(), SEKDConfig(str(run), rollout_engine="vllm", stop_strings=["w1"]))
    assert student.get_base_model().config.to_dict() == before
    folder = run / "rollout_config"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    files = {path.name for path in folder.iterdir()}
    assert "tokenizer.json" in files, "for the stop strings"
    assert not any("safetensors" in name for name in files)
    assert starts[0] == (4, "auto", sorted(files | {"model.safetensors"}))
    assert starts[1:] == ([] if supports_lora else [(0, "dummy", sorted(files))])
