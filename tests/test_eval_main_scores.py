"""Which scores of an evaluation in training count: those of the progress line, and the one that chooses."""

import shutil
from pathlib import Path

import pytest
from evaluation_helpers import write_tasks
from helpers import config, make_model, make_trainer

from sekd.eval.during import Evaluation
from sekd.eval.records import Score, TaskResult
from sekd.metrics import format_line

pytest.importorskip("lm_eval", reason="lm-eval is not installed here")

from lm_eval.models.huggingface import HFLM

from sekd.eval.harness import run_prepared
from sekd.eval.prepared import TaskOptions, prepare_task
from sekd.eval.tasks import SUITES, Suite


@pytest.fixture
def tasks(tmp_path):
    folder = Path(write_tasks(tmp_path / "tasks"))
    shutil.copy(folder / "arc_easy" / "test.jsonl", folder / "arc_easy" / "validation.jsonl")
    return dict(eval_data_dir=[str(folder)], eval_limit=6)


def make_measured(**scores):
    """A result with the given scores; the first one is the main one."""
    return TaskResult("task", next(iter(scores), "acc"), {n: Score(v, None, 1) for n, v in scores.items()}, [], {}, 0.0)


def test_the_progress_line_shows_main_scores_and_means_of_suites(tmp_path, tokenizer, pairs, tasks, monkeypatch):
    suite = {"arc_easy": "test", "lambada_openai": "test"}
    means = {
        "accuracy": {"arc_easy": "acc", "lambada_openai": "acc"},
        "ece": {"arc_easy": "ece"},
        "perplexity": {"lambada_openai": "perplexity"},
        "arc": {"arc_easy": "acc"},
    }
    monkeypatch.setattr("sekd.eval.tasks.SUITES", {"paper": Suite({}, {}), "mine": Suite(suite, means)})
    results = iter([make_measured(acc=0.5, ece=0.1, acc_loose=0.9), make_measured(acc=0.25, perplexity=19.664)])
    monkeypatch.setattr("sekd.eval.harness.run_prepared", lambda *_: next(results))
    trainer = make_trainer(tmp_path / "run", tokenizer, pairs, **tasks | dict(eval_suite=["mine"]))
    logs, forms = trainer.evaluate(), {f"eval_{name}": form for name, form in trainer.evaluation.forms.items()}
    means = "mine 37.5%  mine ece 10.0%  mine perplexity 19.66"
    assert format_line(logs, forms) == f"arc_easy 50.0%  lambada_openai 25.0%  {means}"
    # A mean over fewer tasks is another number.
    results = iter([make_measured(), make_measured(acc=0.25, perplexity=19.664)])
    logs = trainer.evaluate()
    assert "eval_mine_accuracy" not in logs
    assert logs["eval_mine_perplexity"] == 19.664


@pytest.mark.parametrize(
    ("suite", "metric", "is_reported"),
    [
        (["arc_easy"], "arc_easy_acc", True),
        (["arc_easy@test[:5]"], "eval_arc_easy_acc", True),
        (["arc_easy@validation"], "arc_easy_acc", False),
        (["arc_easy", "arc_easy@validation"], "arc_easy@validation_acc", False),
        (["arc_easy", "arc_easy@validation"], "arc_easy@test_acc", True),
        (["arc_easy", "gsm8k@train"], "gsm8k_math_verify", False),
        (["arc_easy"], None, False),
        (["mine"], "mine_accuracy", True),
    ],
)
def test_choosing_on_the_rows_of_the_paper_is_warned_of(
    tmp_path, tokenizer, pairs, tasks, monkeypatch, suite, metric, is_reported
):
    monkeypatch.setitem(SUITES, "mine", Suite({"arc_easy": "test"}, {"accuracy": {"arc_easy": "acc"}}))
    warnings = []
    monkeypatch.setattr("sekd.eval.during.logger.warning", warnings.append)
    args = config(**tasks | dict(eval_suite=suite, metric_for_best_model=metric))
    Evaluation(args, tokenizer, None)
    reason = f"metric_for_best_model {metric} is chosen on the rows that `--suite paper` reports"
    assert warnings == [f"{reason}; use eval_suite: [validation]"] * is_reported


def test_a_metric_without_a_better_direction_needs_one():
    with pytest.raises(ValueError, match="'distillation_length' is not better in either direction: set greater_is_"):
        config(metric_for_best_model="distillation_length")
    assert config(metric_for_best_model="distillation_length", greater_is_better=False).greater_is_better is False


def test_lm_eval_says_which_way_its_metrics_are_better(tokenizer, tasks, monkeypatch):
    task = prepare_task("arc_easy", "test", TaskOptions(limit=2, data_dirs=tuple(tasks["eval_data_dir"])))
    monkeypatch.setattr(task.task, "higher_is_better", lambda: {"acc": False})
    scores = run_prepared(HFLM(make_model("untied"), tokenizer=tokenizer, batch_size=4), task).scores
    assert scores["acc"].higher_is_better is False
    assert scores["acc_norm"].higher_is_better is True


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("bogus", "'bogus' is measured by no evaluation: name one of ece, .*, or a score of arc_easy"),
        ("eval_arc_easy", "'arc_easy' names no score: set it to arc_easy_acc"),
        ("arc_easyacc", "is measured by no evaluation"),
    ],
)
def test_a_metric_that_no_evaluation_gives_is_refused_before_training(
    tmp_path, tokenizer, pairs, tasks, metric, message
):
    options = tasks | dict(eval_suite=["arc_easy"], metric_for_best_model=metric, greater_is_better=True)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tokenizer, pairs, **options)
