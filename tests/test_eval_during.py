"""Evaluation in training: the numbers of the command, at no change of what a run learns."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from evaluation_helpers import write_tasks
from harness_helpers import run_task
from helpers import add_lora, make_model, make_trainer, save_pair
from rollout_helpers import Counting, make_run
from transformers import TrainerCallback, set_seed

from rollouts import HFEngine
from sekd.checkpoints import list_checkpoints
from sekd.recipe import Run

pytest.importorskip("lm_eval", reason="lm-eval is not installed here")

from lm_eval.models.huggingface import HFLM

from sekd.eval.prepared import TaskOptions
from sekd.eval.tasks import Suite

SUITE = ["arc_easy", "lambada_openai", "gsm8k"]


@pytest.fixture
def tasks(tmp_path):
    folder = Path(write_tasks(tmp_path / "tasks"))
    shutil.copy(folder / "arc_easy" / "test.jsonl", folder / "arc_easy" / "validation.jsonl")
    return dict(eval_suite=SUITE, eval_data_dir=[str(folder)], eval_limit=6)


EVERY_STEP = dict(eval_strategy="steps", eval_steps=1, eval_on_start=True)


def test_scores_are_those_of_the_command(tmp_path, tokenizer, pairs, tasks):
    student = make_model("untied")
    options = dict(eval_dataset=pairs.select(range(5)))
    trainer = make_trainer(tmp_path / "run", tokenizer, pairs, student, None, options, **tasks)
    metrics = trainer.evaluate()
    lm = HFLM(copy.deepcopy(student), tokenizer=copy.deepcopy(tokenizer), batch_size=4)
    for name in SUITE:
        result = run_task(lm, name, "test", TaskOptions(limit=6, data_dirs=(str(tmp_path / "tasks"),)))
        assert result.scores
        for score_name, score in result.scores.items():
            key = f"eval_{name}_{score_name}".replace(",", "_")
            assert metrics[key] == pytest.approx(score.value, rel=1e-5), key
        main = result.scores[result.main]
        assert metrics[f"eval_{name}_{result.main}_stderr"] == pytest.approx(main.stderr, rel=1e-5)
        assert main.items == 6
    assert metrics["eval_loss"] == metrics["eval_forward_kl"] > 0
    assert trainer.evaluate() == metrics
    without = trainer.evaluate(pairs.select(range(5)))
    assert without == {name: metrics[name] for name in without}
    assert not any("arc" in name for name in without), "rows that are passed are measured alone"


def test_means_of_suites(tmp_path, tokenizer, pairs, tasks, monkeypatch):
    both = {"arc_easy": "test", "lambada_openai": "test"}
    suites = {
        "small": Suite(both, {"accuracy": dict.fromkeys(both, "acc")}),
        "other": Suite({"arc_easy": "validation"}, {"accuracy": {"arc_easy": "acc"}}),
    }
    monkeypatch.setattr("sekd.eval.tasks.SUITES", suites)
    options = tasks | dict(eval_suite=["small", "other"])
    metrics = make_trainer(tmp_path / "run", tokenizer, pairs, **options).evaluate()
    first, second = metrics["eval_arc_easy@test_acc"], metrics["eval_lambada_openai_acc"]
    assert metrics["eval_small_accuracy"] == pytest.approx((first + second) / 2)
    errors = metrics["eval_arc_easy@test_acc_stderr"], metrics["eval_lambada_openai_acc_stderr"]
    assert metrics["eval_small_accuracy_stderr"] == pytest.approx((errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2)
    assert metrics["eval_other_accuracy"] == metrics["eval_arc_easy@validation_acc"]


def test_metrics_reach_the_file_and_the_progress_line(tmp_path, tokenizer, pairs, tasks, capsys):
    options = EVERY_STEP | tasks | dict(disable_tqdm=False)
    trainer = make_trainer(tmp_path / "run", tokenizer, pairs, **options)
    trainer.train()
    logs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [log for log in logs if "eval_arc_easy_acc" in log]
    assert [log["step"] for log in evaluations] == [0, 1, 2]
    assert not any("eval_loss" in log for log in logs), "there is no held-out data"
    shares = [evaluations[0][f"eval_{n}"] for n in ("arc_easy_acc", "lambada_openai_acc", "gsm8k_math_verify")]
    assert capsys.readouterr().out.startswith(
        "step     0  arc_easy {:.1%}  lambada_openai {:.1%}  gsm8k {:.1%}\n".format(*shares)
    )


# It changes nothing


def losses_and_weights(trainer):
    """What a run logs of its steps, and the student that it leaves."""
    set_seed(0)  # of dropout; a Trainer sets it when it is made
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    timed = ("second", "_share", "epoch", "weight_")
    logs = [{name: value for name, value in log.items() if not any(t in name for t in timed)} for log in logs]
    return logs, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def check_same(plain, evaluated):
    (logs, weights), (evaluated_logs, evaluated_weights) = map(losses_and_weights, (plain, evaluated))
    assert evaluated_logs == logs
    assert len(logs) >= 4
    assert all(torch.equal(evaluated_weights[name], weight) for name, weight in weights.items())
    assert sum("eval_arc_easy_acc" in log for log in evaluated.state.log_history) == len(logs) + 1


def make_dropping(seed=0):
    """A student with dropout in attention, and in its adapter."""
    model = make_model("untied", seed)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    return add_lora(model, lora_dropout=0.3)


RUNS = {
    "off-policy": {},
    "random positions": dict(position_policy="random"),
    "on-policy": dict(lmbda=1.0, max_prompt_length=16),
    "mixed": dict(lmbda=0.5, max_prompt_length=16, seed=3),
    "rounds of two steps": dict(lmbda=1.0, rollout_batches=2, rollouts_per_prompt=2, max_prompt_length=16),
}


@pytest.mark.parametrize(
    "run", ["mixed", *(pytest.param(run, marks=pytest.mark.slow) for run in RUNS if run != "mixed")]
)
def test_a_run_with_it_is_the_run_without_it(tmp_path, tokenizer, pairs, tasks, run):
    """With dropout, and distillation's rollouts among what is measured."""
    options, suite = RUNS[run] | dict(max_steps=4), [*SUITE, "distillation"]
    held_out = dict(eval_dataset=pairs.select(range(5)))
    plain = make_trainer(tmp_path / "plain", tokenizer, pairs, make_dropping(), **options)
    more = EVERY_STEP | tasks | dict(eval_suite=suite)
    evaluated = make_trainer(tmp_path / "run", tokenizer, pairs, make_dropping(), None, held_out, **options, **more)
    check_same(plain, evaluated)


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_with_an_engine_of_its_own_weights_is_the_run_without_it(tmp_path, tokenizer, pairs, tasks, staleness):
    """The engine draws from a copy of the weights, as a server does, in rounds of two steps."""
    options = dict(rollout_batches=2, rollout_staleness=staleness, max_steps=6)
    # In background an engine must not draw from the trainer's generators: the likeliest tokens need no draw.
    drawing = dict(temperature=0.0) if staleness else {}
    runs = [Counting(**drawing), AlsoOtherwise(tokenizer=tokenizer, **drawing)]
    plain = make_run(tmp_path / "plain", tokenizer, pairs, runs[0], **options)
    evaluated = make_run(tmp_path / "run", tokenizer, pairs, runs[1], **options, **EVERY_STEP, **tasks)
    check_same(plain, evaluated)
    assert runs[0].rounds == runs[1].rounds
    assert runs[1].asked == 7, "GSM8K at each evaluation came from the engine"
    for name, text in ((p / "rollouts.jsonl", (p / "rollouts.jsonl").read_text()) for p in (tmp_path / "plain",)):
        assert text == (tmp_path / "run" / name.name).read_text()


class AlsoOtherwise(Counting):
    asked = 0

    def generate_with(self, prompts, sampling):
        self.asked += 1
        return super().generate_with(prompts, sampling)


def test_generated_tasks_have_the_current_weights(tmp_path, tokenizer, pairs, tasks):
    """An engine with other weights would give other outputs; the weights change between two evaluations."""
    engine = AlsoOtherwise(tokenizer=tokenizer)
    trainer = make_run(tmp_path / "run", tokenizer, pairs, engine, **tasks | dict(eval_suite=["gsm8k"]))
    seen, ask = [], engine.generate_with
    engine.generate_with = lambda prompts, sampling: seen.append((sampling, ask(prompts, sampling))) or seen[-1][1]
    for seed in (0, 7):
        trainer.model.load_state_dict(make_model("untied", seed).state_dict())
        trainer.evaluate()
    (_, before), (sampling, after) = seen
    expected = HFEngine(make_model("untied", 7), tokenizer=tokenizer).generate_with(
        [rollout.prompt_ids for rollout in after], sampling
    )
    assert [r.completion_ids for r in after] == [r.completion_ids for r in expected]
    assert [r.completion_ids for r in after] != [r.completion_ids for r in before]


def test_an_engine_without_other_options_leaves_generation_to_transformers(tmp_path, tokenizer, pairs, tasks):
    class Plain:
        def __init__(self):
            self.inner = HFEngine(make_model("untied"), max_completion_length=6)
            self.generate, self.sync_weights, self.close = self.inner.generate, self.inner.sync_weights, lambda: None

    held_out = dict(rollout_engine=Plain())
    trainer = make_trainer(tmp_path, tokenizer, pairs, None, None, held_out, lmbda=1.0, max_prompt_length=16, **tasks)
    assert not trainer.schedule.takes_sampling
    assert "eval_gsm8k_math_verify" in trainer.evaluate()


# Distillation


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_distillation_measures_fresh_rollouts(tmp_path, tokenizer, pairs, lmbda):
    options = dict(eval_dataset=pairs.select(range(8)))
    settings = dict(lmbda=lmbda, max_prompt_length=16, eval_suite=["distillation"], eval_limit=6, temperature=0.0)
    student, teacher = make_model("untied"), make_model("untied", 1)
    trainer = make_trainer(tmp_path, tokenizer, pairs, student, teacher, options, **settings)
    metrics = trainer.evaluate()
    total, positions, lengths = 0.0, 0, []
    engine = HFEngine(student, 0.0, 6, stop_token_ids=[120])
    for row in pairs.select(range(6)):
        (rollout,) = engine.generate([[int(w[1:]) for w in row["prompt"].split()]])
        ids, start = torch.tensor([rollout.prompt_ids + rollout.completion_ids]), len(rollout.prompt_ids)
        with torch.no_grad():
            q, p = (m(ids).logits[0, start - 1 : -1].double().log_softmax(-1) for m in (student, teacher))
        total += (q.exp() * (q - p)).sum().item()
        positions += len(q)
        lengths.append(len(rollout.completion_ids))
    assert metrics["eval_distillation_reverse_kl"] == pytest.approx(total / positions, rel=1e-4)
    assert not any("math_verify" in name for name in metrics), "words are no mathematical answers"
    assert metrics["eval_distillation_cut_off"] > 0
    assert min(lengths) <= metrics["eval_distillation_length"] <= 6


# The best checkpoint, and stopping early


def scripted(trainer, values):
    """The trainer, whose accuracy in its evaluations is what the test says."""
    measure, rest = trainer.evaluation.measure, iter(values)

    def changed(*args, **kwargs):
        return measure(*args, **kwargs) | {"arc_easy_acc": next(rest)}

    trainer.evaluation.measure = changed
    return trainer


BEST = dict(save_strategy="steps", save_steps=1, metric_for_best_model="arc_easy_acc", logging_steps=1)
STEPS = dict(eval_strategy="steps", eval_steps=1, eval_suite=["arc_easy"])


def test_the_best_checkpoint_survives_and_is_loaded(tmp_path, tokenizer, pairs, tasks):
    options = tasks | BEST | STEPS | dict(load_best_model_at_end=True, save_total_limit=1, max_steps=5)
    trainer = scripted(make_trainer(tmp_path / "run", tokenizer, pairs, **options), [0.1, 0.5, 0.3, 0.5, 0.2])
    kept = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            kept[state.global_step] = {n: p.detach().clone() for n, p in model.named_parameters()}

    trainer.add_callback(Keep())
    trainer.train()
    assert trainer.args.greater_is_better is True
    assert 2 in list_checkpoints(str(tmp_path / "run"))
    assert trainer.state.best_global_step == 2
    weights = dict(trainer.model.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in kept[2].items())
    assert not all(torch.equal(weights[name], weight) for name, weight in kept[5].items())


@pytest.mark.parametrize(
    ("options", "values", "steps"),
    [
        (dict(early_stopping_patience=2), [0.1, 0.3, 0.2, 0.3, 0.9, 0.9], 4),
        (dict(early_stopping_patience=1), [0.1, 0.3, 0.4, 0.5, 0.6, 0.7], 6),
        (dict(early_stopping_patience=1, early_stopping_threshold=0.15), [0.1, 0.3, 0.4, 0.5, 0.6, 0.7], 3),
    ],
)
def test_a_run_without_progress_stops(tmp_path, tokenizer, pairs, tasks, options, values, steps):
    settings = tasks | BEST | STEPS | options | dict(max_steps=6)
    trainer = scripted(make_trainer(tmp_path / "run", tokenizer, pairs, **settings), values)
    trainer.train()
    assert trainer.state.global_step == steps


def test_a_resumed_run_stops_where_the_undisturbed_one_does(tmp_path, tokenizer, pairs, tasks):
    options = tasks | BEST | STEPS | dict(early_stopping_patience=3, max_steps=8)
    values = [0.5, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]
    make_trainer(tmp_path / "run", tokenizer, pairs, **options)
    trainer = scripted(make_trainer(tmp_path / "run", tokenizer, pairs, **options), values)
    trainer.train()
    assert trainer.state.global_step == 4
    again = scripted(make_trainer(tmp_path / "run", tokenizer, pairs, **options), values[3:])
    again.train(str(tmp_path / "run" / "checkpoint-3"))
    assert again.state.global_step == 4


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("arc_easy_acc", True),
        ("loss", False),
        ("reverse_kl", False),
        ("lambada_openai_perplexity", False),
        ("paper_ece", False),
    ],
)
def test_what_is_better_goes_by_the_name_of_the_metric(tmp_path, tokenizer, pairs, metric, greater):
    options = dict(eval_dataset=pairs.select(range(2)))
    trainer = make_trainer(tmp_path, tokenizer, pairs, None, None, options, metric_for_best_model=metric)
    assert trainer.args.greater_is_better is greater


# What is refused, before a model is loaded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(eval_suite=["arc_easi"]), r"unknown suite or task 'arc_easi'; nearest are arc_easy"),
        (dict(eval_suite=["hellaswag"]), r"hellaswag: no file .*hellaswag"),
        (dict(eval_suite=["distillation"]), r"eval_suite distillation generates from held-out prompts: set eval_data"),
        (dict(metric_for_best_model="loss"), r"metric_for_best_model 'loss' is of held-out data, and there is none"),
        (dict(eval_chat_template=True), r"eval_chat_template true, but the student's tokenizer has no chat template"),
    ],
    ids=str,
)
def test_what_cannot_work_is_said_before_models_load(tmp_path, tokenizer, pairs, tasks, options, message):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    save_pair(tmp_path, plain)
    (tmp_path / "student" / "model.safetensors").write_text("no weights")
    student, teacher = str(tmp_path / "student"), str(tmp_path / "teacher")
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "run", plain, pairs, student, teacher, **tasks | options)


def test_distillation_needs_prompts(tmp_path, tokenizer, texts):
    options = dict(eval_dataset=texts.select(range(4)))
    with pytest.raises(ValueError, match="the held-out data is plain text; name data with prompts"):
        make_trainer(tmp_path, tokenizer, texts, None, None, options, eval_suite=["distillation"])


def test_without_anything_to_evaluate(tmp_path, tokenizer, pairs):
    with pytest.raises(ValueError, match="there is nothing to evaluate: set eval_dataset_name or eval_suite"):
        make_trainer(tmp_path, tokenizer, pairs).evaluate()


def test_the_engine_gets_the_context_of_the_longest_prompt(tmp_path, tokenizer, pairs, tasks):
    trainer = make_trainer(tmp_path, tokenizer, pairs, **tasks)
    task = trainer.evaluation.tasks["gsm8k"]
    longest = max(len(tokenizer(text)["input_ids"]) for text in task.texts) + 256
    assert trainer.schedule.evaluation_context == longest
    chats = make_trainer(tmp_path, tokenizer, pairs, **tasks, eval_chat_template=True)
    seen = []
    generate = HFEngine.generate_with
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HFEngine, "generate_with", lambda e, p, s: seen.extend(p) or generate(e, p, s))
        chats.evaluate()
    assert max(map(len, seen)) + 256 <= chats.schedule.evaluation_context <= max(map(len, seen)) + 256 + 6
    short = make_model("untied")
    short.config.max_position_embeddings = 200
    with pytest.raises(ValueError, match=r"reads 200 tokens, and gsm8k generates up to 256; leave gsm8k out"):
        make_trainer(tmp_path, tokenizer, pairs, short, **tasks)
    only_choices = make_trainer(tmp_path, tokenizer, pairs, **tasks | dict(eval_suite=["arc_easy"]))
    assert only_choices.schedule.evaluation_context == 0


def test_a_recipe_evaluates_tasks_without_held_out_rows(tmp_path, recipe, tasks):
    options = ["--eval_strategy", "steps", "--eval_steps", "2", "--eval_suite", "arc_easy"]
    options += ["--eval_data_dir", tasks["eval_data_dir"][0], "--early_stopping_patience", "5"]
    options += ["--metric_for_best_model", "arc_easy_acc"]
    run = Run.parse(recipe, options)
    assert run.held_out_rows() is None
    trainer = run.trainer()
    trainer.train()
    assert sum("eval_arc_easy_acc" in log for log in trainer.state.log_history) == 2
