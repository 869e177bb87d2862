"""What a trainer's ``evaluate`` measures: divergences on held-out samples, and the tasks of ``eval_suite``."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from sekd.config import SEKDConfig
from sekd.data.batch import Sample, from_rollout
from sekd.eval.divergence import ROLLOUTS, get_answers, make_result, measure_completions
from sekd.eval.held_out import (
    STUDENT_MEANS,
    TEACHER_MEANS,
    Pair,
    compute_held_out_means,
    join_predictions,
    measure_samples,
)
from sekd.eval.progress import show_bar
from sekd.eval.records import Score, TaskResult
from sekd.eval.statistics import average_scores
from sekd.eval.tasks import DISTILLATION, TASKS
from sekd.losses import DIVERGENCES
from sekd.metric_kinds import get_kind
from sekd.metrics import add_sums, sum_all
from sekd.models import causal_lm
from sekd.on_policy.engines import Generate, generate_inside, keep_generators, make_sampling
from sekd.on_policy.schedule import RolloutSchedule

if TYPE_CHECKING:
    from sekd.eval.prepared import PreparedTask

logger = logging.get_logger(__name__)


class Evaluation:
    """The tasks of ``eval_suite``, checked before a model is loaded.

    Attributes:
        forms: how the progress line shows the main score of each task and the means of suites that were measured, by
            the names of these metrics.

    Args:
        tokenizer: the student's.
        held_out: the prepared samples of the held-out data, or None.

    Raises:
        ValueError: lm-eval is not installed, a name is unknown, the data of a task is missing or damaged, or there are
            no held-out prompts for ``distillation``.
    """

    def __init__(self, args: SEKDConfig, tokenizer: PreTrainedTokenizerBase, held_out: Any) -> None:
        self.args, self.tokenizer = args, tokenizer
        self.measures_distance = DISTILLATION in args.eval_suite
        self.tasks: dict[str, PreparedTask] = {}
        self.suites: dict[str, dict[str, dict[str, str]]] = {}
        self.forms: dict[str, str] = {}
        if self.measures_distance:
            _check_prompts(held_out)
        if names := [name for name in args.eval_suite if name != DISTILLATION]:
            self._prepare(names)
        if self.has_tasks and held_out is None and args.metric_for_best_model in ("loss", "eval_loss"):
            raise ValueError(
                f"metric_for_best_model {args.metric_for_best_model!r} is of held-out data, and there is none: name a "
                "score of eval_suite, such as validation_accuracy, or set eval_dataset_name"
            )

    @property
    def has_tasks(self) -> bool:
        """Whether ``eval_suite`` names anything."""
        return self.measures_distance or bool(self.tasks)

    def _prepare(self, names: list[str]) -> None:
        from sekd.eval.prepared import TaskOptions, prepare_task
        from sekd.eval.tasks import SUITES, resolve_tasks

        args = self.args
        if args.eval_chat_template and self.tokenizer.chat_template is None:
            raise ValueError("eval_chat_template true, but the student's tokenizer has no chat template; leave it out")
        options = TaskOptions(
            limit=args.eval_limit, data_dirs=tuple(args.eval_data_dir), chat_template=args.eval_chat_template
        )
        chosen = resolve_tasks(names)
        several = {task for task, _ in chosen if [name for name, _ in chosen].count(task) > 1}
        named = {(task, split): f"{task}@{split}" if task in several else task for task, split in chosen}
        for (task, split), name in named.items():
            self.tasks[name] = prepare_task(task, split, options)
        for suite in [name for name in names if name in SUITES]:
            of_suite = {task: named[task, split] for task, split in SUITES[suite].tasks.items()}
            self.suites[suite] = {
                mean: {of_suite[task]: score for task, score in scores.items()}
                for mean, scores in SUITES[suite].means.items()
            }
        self._warn_of_reported_rows(named)

    def _warn_of_reported_rows(self, named: dict[tuple[str, str | None], str]) -> None:
        """Warn if the best checkpoint is chosen on rows that the suite ``paper`` reports."""
        from sekd.eval.tasks import SUITES

        metric = str(self.args.metric_for_best_model).removeprefix("eval_")
        splits = [split for split, name in named.items() if metric.startswith(f"{name}_")]
        for suite in self.suites:
            splits += SUITES[suite].tasks.items() if metric.startswith(f"{suite}_") else []
        if any(split and split.partition("[")[0] == SUITES["paper"].tasks.get(task) for task, split in splits):
            logger.warning(
                f"metric_for_best_model {self.args.metric_for_best_model} is chosen on the rows that `--suite paper` "
                "reports; use eval_suite: [validation]"
            )

    def count_tokens(self, model: torch.nn.Module) -> int:
        """Tokens of the longest prompt with its output that the model can read; 0 if the tasks generate nothing.

        Longer prompts lose their beginning, as in lm-eval.

        Raises:
            ValueError: the outputs of a task do not fit the model's context.
        """
        generated = {name: task for name, task in self.tasks.items() if task.generated}
        if not generated:
            return 0
        from lm_eval.models.utils import resolve_max_length

        from sekd.eval.backends import count_longest

        context, longest = resolve_max_length(causal_lm(model).config, self.tokenizer), 0
        frame = 0  # a turn's tokens beside its text
        if self.args.eval_chat_template:
            turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
            frame = len(self.tokenizer(self.tokenizer.apply_chat_template(turns, tokenize=False))["input_ids"])
        for name, task in generated.items():
            if task.max_new_tokens >= context:
                raise ValueError(
                    f"eval_suite: the student reads {context} tokens, and {name} generates up to "
                    f"{task.max_new_tokens}; leave {name} out"
                )
            tokens = count_longest(task.texts, task.max_new_tokens, self.tokenizer)
            longest = max(longest, tokens + frame * (1 + task.settings["shots"]))
        return min(longest, context)

    def connect(self, accelerator: Accelerator, schedule: RolloutSchedule, compute_metrics: Any) -> None:
        """Take what :meth:`measure` needs and a trainer has: its processes, its rollouts and its own metrics."""
        self.processes, self.schedule, self.compute_metrics = accelerator, schedule, compute_metrics
        if compute_metrics is None:
            self._check_metric()

    def _check_metric(self) -> None:
        """Raise ValueError if no evaluation gives ``metric_for_best_model``."""
        metric = (self.args.metric_for_best_model or "").removeprefix("eval_")
        names = [*self.tasks, *self.suites, *([DISTILLATION] if self.measures_distance else [])]
        if metric in names:
            score = next(iter(self.suites[metric])) if metric in self.suites else "acc"
            spec = TASKS.get(metric.partition("@")[0])
            score = spec.main if spec is not None else "reverse_kl" if metric == DISTILLATION else score
            raise ValueError(
                f"metric_for_best_model {metric!r} names no score: set it to {metric}_{score}, for example"
            )
        known = {*STUDENT_MEANS, *TEACHER_MEANS, "perplexity", "ece", "loss"}
        if metric and names and metric not in known and not any(metric.startswith(f"{name}_") for name in names):
            raise ValueError(
                f"metric_for_best_model {metric!r} is measured by no evaluation: name one of "
                f"{', '.join(sorted(known))}, or a score of {', '.join(names)}, such as arc_easy_acc"
            )

    # What evaluate() measures. Every process calls it, and gets the same numbers.

    def measure(self, pair: Pair, samples: list[Sample] | None, with_suite: bool) -> dict[str, float]:
        """The metrics of samples, and (``with_suite``) of the tasks. The student must be in evaluation mode.

        ``loss`` is the metric of the samples that the divergence names (:class:`sekd.losses.Divergence`).

        Raises:
            ValueError: there is nothing to measure.
        """
        if samples is None and not (with_suite and self.has_tasks):
            raise ValueError("there is nothing to evaluate: set eval_dataset_name or eval_suite, or pass eval_dataset")
        self.schedule.begin_evaluation()
        metrics: dict[str, float] = {}
        if samples is not None:
            metrics = self._measure_held_out(pair, samples)
        if samples is not None and with_suite and self.measures_distance:
            metrics |= self._measure_rollouts(pair, samples[: self.args.eval_limit])
        return metrics | (self._measure_tasks(pair) if with_suite and self.tasks else {})

    def _measure_held_out(self, pair: Pair, samples: list[Sample]) -> dict[str, float]:
        share = take_share(samples, self.processes)
        if self.args.all_on_policy:
            share = [*map(from_rollout, share, self.schedule.generate(share))]
        sums: Any = defaultdict(float)
        predictions = []
        for sample, measured in zip(share, measure_samples(pair, share), strict=True):
            is_counted = sample.sample_id >= 0
            add_sums(sums, {name: total * is_counted for name, total in measured.sums.items()})
            if is_counted and self.compute_metrics is not None:
                predictions.append((measured.guesses, measured.targets))
        metrics = compute_held_out_means(sum_all(sums, self.processes))
        if self.compute_metrics is not None:
            metrics |= self.compute_metrics(join_predictions(gather_object(predictions)))
        # Without the teacher's whole distribution there is no divergence.
        evaluated = DIVERGENCES[str(self.args.divergence)].held_out if pair.teacher.has_logits else "student_ce"
        return {**metrics, "loss": metrics[evaluated]}

    def _measure_rollouts(self, pair: Pair, samples: list[Sample]) -> dict[str, float]:
        """``distillation_...``: divergences and right answers on fresh rollouts, sampled as in training."""
        started, share = time.monotonic(), take_share(samples, self.processes)
        sampling = make_sampling(causal_lm(pair.student), self.tokenizer, self.args, pair.vocab)
        if self.args.any_on_policy:
            rollouts = self.schedule.generate(share)
        else:
            rollouts = self._generate_inside(pair)([s.input_ids[: s.prompt_length] for s in share], sampling)
        with self._show_bar(DISTILLATION, len(samples)) as advance:
            items = measure_completions(
                pair,
                share,
                rollouts,
                self.tokenizer,
                get_answers(share, self.tokenizer),
                samples_as_is=sampling.is_unchanged,
                on_samples=advance,
            )
        items = gather_object(items) if self.processes.num_processes > 1 else items
        return self._name_scores(DISTILLATION, make_result(ROLLOUTS, items, {}, time.monotonic() - started))

    def _measure_tasks(self, pair: Pair) -> dict[str, float]:
        """``TASK_SCORE`` for the scores of all tasks, and ``SUITE_MEAN`` for the means of suites."""
        from sekd.eval.harness import run_prepared
        from sekd.eval.student_lm import StudentLM

        generate = self.schedule.generate_with if self.schedule.takes_sampling else self._generate_inside(pair)
        lm = StudentLM(pair.student, self.tokenizer, self.processes, generate, pair.batch_size, pair.chunk_rows)
        results: dict[str, TaskResult] = {}
        metrics: dict[str, float] = {}
        with keep_generators("evaluation"):
            for name, task in self.tasks.items():
                with self._show_bar(name, task.requests) as advance:
                    results[name] = run_prepared(lm, task, advance)
                metrics |= self._name_scores(name, results[name])
        for suite, means in self.suites.items():
            for mean, of_tasks in means.items():
                scores = [results[task].scores.get(score) for task, score in of_tasks.items()]
                present = [score for score in scores if score is not None]
                if len(present) < len(scores):
                    continue  # a task has skipped all its items: the mean of fewer tasks is another number
                metrics |= _name_score(f"{suite}_{mean}", average_scores(present), with_error=True)
                if len(scores) > 1 or all(results[task].main != score for task, score in of_tasks.items()):
                    self.forms[f"{suite}_{mean}"] = _make_form(suite, mean)
        return metrics

    def _name_scores(self, task: str, result: TaskResult) -> dict[str, float]:
        """The scores of a task by ``TASK_SCORE``; the main one comes first, with its standard error."""
        metrics: dict[str, float] = {}
        for score in sorted(result.scores, key=lambda name: name != result.main):
            metrics |= _name_score(_join_names(task, score), result.scores[score], score == result.main)
        self.forms[_join_names(task, result.main)] = _make_form(task, result.main)
        return metrics

    def _generate_inside(self, pair: Pair) -> Generate:
        return generate_inside(pair.student, self.tokenizer, self.processes, pair.batch_size)

    @contextmanager
    def _show_bar(self, name: str, total: int) -> Iterator[Callable[[int], Any]]:
        """A bar with the remaining time; gives the function that moves it on. The main process stands for all."""
        hidden = self.args.disable_tqdm or not self.processes.is_main_process
        share = -(-total // self.processes.num_processes)
        with show_bar(f"evaluating {name}", share, hidden, leave=False) as advance:
            yield advance


def _check_prompts(held_out: Any) -> None:
    """Raise ValueError if the held-out samples are no prompts."""
    if held_out is None:
        raise ValueError("eval_suite distillation generates from held-out prompts: set eval_dataset_name")
    if not next(iter(held_out)).get("prompt_length"):
        raise ValueError(
            "eval_suite distillation generates from held-out prompts, and the held-out data is plain text; name data "
            "with prompts in eval_dataset_name, or leave distillation out"
        )


def _join_names(task: str, score: str) -> str:
    return f"{task}_{score}".replace(",", "_")


def _make_form(task: str, score: str) -> str:
    """How the progress line shows a score: with its name, unless it is a share of right answers."""
    kind = get_kind(score)
    label = task if kind.is_share and kind.higher_is_better else f"{task} {score}"
    return label.replace("{", "{{").replace("}", "}}") + (" {:.1%}" if kind.is_share else f" {{:.{kind.digits}f}}")


def _name_score(name: str, score: Score, with_error: bool) -> dict[str, float]:
    metrics = {name: float(score.value)}
    return metrics | ({f"{name}_stderr": float(score.stderr)} if with_error and score.stderr is not None else {})


def take_share(samples: Sequence[Sample], accelerator: Accelerator) -> list[Sample]:
    """This process's share of the samples. Copies with id -1, which do not count, make all shares equally large."""
    processes, index = accelerator.num_processes, accelerator.process_index
    padding = [replace(s, sample_id=-1) for s in samples[:1] * (-len(samples) % processes)]
    return [*samples, *padding][index::processes]
