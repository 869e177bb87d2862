"""Runs a task of lm-eval on rows that are handed in: it gives the numbers of lm-eval's own command."""

import contextlib
import copy
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from sekd.eval.prepared import PreparedTask, quiet, without_logs
from sekd.eval.records import EvaluationRefused, Item, Score, TaskResult
from sekd.eval.statistics import count_passes, fill_bins, summarize
from sekd.metric_kinds import get_kind

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM


@dataclass
class _Scored:
    """An item, and its scores that are not averaged as a mean: of each, the values of all rounds."""

    item: Item
    others: dict[str, list[Any]]


class _Hook:
    """lm-eval's hook for finished requests: counts them, and passes them to the hook that was there."""

    def __init__(self, inner: Any, on_request: Callable[[int], None]) -> None:
        self.inner, self.on_request = inner, on_request

    def add_partial(self, kind: str, request: tuple[Any, ...], response: Any) -> None:
        self.inner.add_partial(kind, request, response)
        self.on_request(1)


def run_prepared(
    lm: "LM", prepared: PreparedTask, on_request: Callable[[int], None] = lambda finished: None
) -> TaskResult:
    """Let a model answer a task.

    Args:
        lm: any of lm-eval's models, in one process. If it has ``takes_seed = True``, each sampled request has its own
            ``seed`` among its sampling options; else torch's generators are seeded for each round, and set back.
        prepared: see ``prepare_task``; it may be run several times.
        on_request: called with the number of requests that have just finished.

    Raises:
        EvaluationRefused: the model's context is too short for the outputs, it gives no log-likelihood, or its
            tokenizer has no chat template that can be applied.
    """
    started, task, options = time.perf_counter(), prepared.task, prepared.options
    context = getattr(lm, "max_length", None)
    if isinstance(context, int) and prepared.max_new_tokens >= context:  # vLLM's max_model_len may be less than usual
        raise EvaluationRefused(
            f"{prepared.name}: outputs of up to {prepared.max_new_tokens} tokens do not fit the model's context of "
            f"{context}; set max_new_tokens to less"
        )
    instances = _build_instances(lm, prepared)
    by_row = defaultdict(list)
    for instance in instances:
        by_row[instance.doc_id].append(instance)
    rounds: list[list[_Scored]] = []
    for repeat in range(options.repeats):
        for instance in instances:
            instance.resps, instance.filtered_resps = [], {}
        _ask(lm, prepared, instances, repeat, on_request)
        task._instances = instances  # what apply_filters reads
        with quiet():
            task.apply_filters()
            rounds.append([_score_row(prepared, row, by_row[row]) for row in sorted(by_row)])
    scored = [_merge_rounds(prepared, row) for row in zip(*rounds, strict=True)]
    items = [one.item for one in scored]
    scores = summarize(items, prepared.task.higher_is_better()) | _aggregate_others(prepared, scored)
    return TaskResult(
        task=prepared.name,
        main=_find_main(prepared, scores),
        scores=scores,
        items=items,
        settings=dict(prepared.settings),
        seconds=time.perf_counter() - started,
    )


def _build_instances(lm: "LM", prepared: PreparedTask) -> "list[Instance]":
    """The requests of all rows, fresh for this run."""
    instances, options = prepared.instances, prepared.options
    if options.chat_template:
        prepared.task.set_fewshot_seed(options.seed)
        try:
            with quiet():
                prepared.task.build_all_requests(
                    limit=options.limit,
                    apply_chat_template=True,
                    fewshot_as_multiturn=True,
                    chat_template=lm.apply_chat_template,
                )
        except (ValueError, TemplateError) as error:
            reason = " ".join(str(error).split())
            raise EvaluationRefused(f"{prepared.name}: chat_template: {reason}") from error
        instances = prepared.task.instances
    return [copy.copy(instance) for instance in instances]


def _ask(
    lm: "LM", prepared: PreparedTask, instances: "list[Instance]", repeat: int, on_request: Callable[[int], None]
) -> None:
    """Put the model's responses into the instances."""
    settings, seed = prepared.settings, prepared.options.seed
    sampled = settings.get("temperature", 0.0) > 0
    asked = [instance for instance in instances for _ in range(instance.repeats or 1)]
    requests = []
    for i, instance in enumerate(asked):
        request = copy.copy(instance)
        if sampled and getattr(lm, "takes_seed", False):
            context, sampling, *rest = instance.arguments
            own = _derive_seed(seed, repeat, instance.doc_id, i if (instance.repeats or 1) > 1 else 0)
            request.arguments = (context, {**sampling, "seed": own}, *rest)
        if prepared.generated:
            request.idx = repeat
        requests.append(request)
    hook = lm.cache_hook
    lm.set_cache_hook(_Hook(hook, on_request))
    try:
        seeded = _seeded(_derive_seed(seed, repeat)) if sampled else contextlib.nullcontext()
        with without_logs(), seeded:
            responses = getattr(lm, instances[0].request_type)(requests, disable_tqdm=True)
    finally:
        lm.set_cache_hook(hook)
    for instance, response in zip(asked, responses, strict=True):
        if not prepared.generated and math.isnan(response[0] if isinstance(response, tuple | list) else response):
            raise EvaluationRefused(
                f"{prepared.name}: the model gives no log-likelihood (nan) for row {instance.doc_id}; are its weights "
                "finite?"
            )
        instance.resps.append(response)


def _derive_seed(*numbers: int) -> int:
    """A seed of 32 bits from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Python's and torch's generators are seeded, and afterwards as they were."""
    import torch

    state = random.getstate()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(state)


def _score_row(prepared: PreparedTask, index: int, instances: "list[Instance]") -> _Scored:
    """One row's item, with the scores of one round."""
    task, spec = prepared.task, prepared.spec
    score, grade = (None, None) if spec is None else (spec.score, spec.grade)
    instances = sorted(instances, key=lambda instance: instance.idx)
    first, row = instances[0], instances[0].doc
    skipped: str | None = None
    raw: dict[str, Any] = {}
    if score is not None:
        raw, skipped = score(row, first.resps)
    else:
        for name in first.filtered_resps:
            values = task.process_results(row, [instance.filtered_resps[name] for instance in instances])
            raw |= {metric if name == "none" else f"{metric},{name}": value for metric, value in values.items()}
    item = Item(index=index, prompt=_get_text(first.args[0]), skipped=skipped)
    if task.OUTPUT_TYPE == "multiple_choice":
        item = _add_choices(task, item, row, instances)
    elif task.OUTPUT_TYPE == "generate_until":
        answer = "" if score is not None else str(task.doc_to_target(row))
        item = replace(item, answer=answer, outputs=tuple(map(_get_text, first.resps)))
        if grade is not None:
            raw["math_verify"] = float(grade(item.outputs[0], item.answer))
    else:
        rolling = task.OUTPUT_TYPE == "loglikelihood_rolling"
        likelihood = first.resps[0] if rolling else first.resps[0][0]
        item = replace(item, answer="" if rolling else str(first.args[1]), loglikelihoods=(float(likelihood),))
        if "perplexity" in raw:
            raw["nll"] = -float(raw.pop("perplexity"))
        if "word_perplexity" in raw:  # of a text: its words are what the perplexity is a mean over
            _, words = raw["word_perplexity"]
            raw["nll"] = -float(likelihood) / words
            item = replace(item, weight=float(words))
    means = {name: float(value) for name, value in raw.items() if _is_mean(prepared, name, value)}
    item = replace(item, metrics=means)
    return _Scored(item, {name: [value] for name, value in raw.items() if name not in means})


def _get_text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def _is_mean(prepared: PreparedTask, name: str, value: Any) -> bool:
    """Whether a score of a row is a number whose mean lm-eval reports."""
    from lm_eval.api.metrics import mean

    aggregate = prepared.task.aggregation().get(name.partition(",")[0], mean)
    return isinstance(value, int | float | np.number | np.bool_) and aggregate is mean


def _add_choices(task: Any, item: Item, row: dict[str, Any], instances: "list[Instance]") -> Item:
    """An item with what the model thinks of each choice.

    The confidence is the largest probability in the softmax of the choices' log-likelihoods.
    """
    choices = [str(choice) for choice in task.doc_to_choice(row)]
    likelihoods = np.array([instance.resps[0][0] for instance in instances[: len(choices)]], dtype=np.float64)
    target = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
    right = [
        choices.index(t) if isinstance(t, str) and t in choices else t
        for t in (target if isinstance(target, list) else [target])
    ]
    best = int(np.argmax(likelihoods))
    confidence = float(1.0 / np.exp(likelihoods - likelihoods[best]).sum())
    return replace(
        item,
        answer=choices[right[0]] if isinstance(right[0], int) and 0 <= right[0] < len(choices) else str(target),
        outputs=(choices[best],),
        loglikelihoods=tuple(likelihoods.tolist()),
        calibration=fill_bins([confidence], [best in right]),
    )


def _find_main(prepared: PreparedTask, scores: dict[str, Score] | dict[str, float]) -> str:
    return prepared.spec.main if prepared.spec is not None else next(iter(scores), "")


def _merge_rounds(prepared: PreparedTask, rounds: Sequence[_Scored]) -> _Scored:
    """One row's item with the outputs of all rounds; its metrics are their means over the rounds."""
    item = rounds[0].item
    metrics = {name: float(np.mean([one.item.metrics[name] for one in rounds])) for name in item.metrics}
    main = _find_main(prepared, item.metrics)
    correct = metrics.get(main)
    if correct is not None and (get_kind(main).higher_is_better is False or not 0 <= correct <= 1):
        correct = None  # the main score is no share of right outputs
    if (k := len(rounds)) > 1 and correct is not None:
        metrics |= count_passes(sum(one.item.metrics[main] >= 1 for one in rounds), k)
    outputs = tuple(output for one in rounds for output in one.item.outputs)
    others = defaultdict[str, list[Any]](list)
    for one in rounds:
        for name, values in one.others.items():
            others[name] += values
    return _Scored(replace(item, metrics=metrics, outputs=outputs, correct=correct), others)


def _aggregate_others(prepared: PreparedTask, scored: Sequence[_Scored]) -> dict[str, Score]:
    """The scores whose average is no mean over items, as lm-eval reports them: over the values of all rounds."""
    from lm_eval.api.metrics import stderr_for_metric

    scores: dict[str, Score] = {}
    for name in dict.fromkeys(name for one in scored for name in one.others):
        rows = [one.others[name] for one in scored if name in one.others]
        values, metric = [value for row in rows for value in row], name.partition(",")[0]
        aggregate = prepared.task.aggregation()[metric]
        error = stderr_for_metric(aggregate, 1000)
        with quiet():
            # Several values of one row are not independent.
            stderr = float(error(values)) if error and 1 < len(values) == len(rows) else None
            higher = prepared.task.higher_is_better().get(metric)
            scores[name] = Score(float(aggregate(values)), stderr, len(rows), higher)
    return scores
