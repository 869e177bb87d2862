"""Runs a task of lm-eval on rows that are handed in: the numbers are those of lm-eval's own command."""

import contextlib
import copy
import inspect
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sekd.eval.prepared import DEFAULTS, PreparedTask, TaskOptions, prepare_task, quiet, without_logs
from sekd.eval.records import Item, Score, TaskResult
from sekd.eval.statistics import count_passes, fill_bins, summarize

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

__all__ = ["PreparedTask", "TaskOptions", "prepare_task", "run_prepared", "run_task"]


@dataclass
class _Scored:
    """An item, and those of its scores that are no numbers or whose average is no mean."""

    item: Item
    others: dict[str, Any] = field(default_factory=dict)


class _Hook:
    """lm-eval's hook for finished requests: counts them, and passes them to the hook that was there."""

    def __init__(self, inner: Any, on_request: Callable[[int], None]) -> None:
        self.inner, self.on_request = inner, on_request

    def add_partial(self, kind: str, request: tuple[Any, ...], response: Any) -> None:
        self.inner.add_partial(kind, request, response)
        self.on_request(1)


def run_task(
    lm: "LM",
    name: str,
    split: str | None = None,
    options: TaskOptions = DEFAULTS,
    on_request: Callable[[int], None] = lambda finished: None,
    gather: Callable[[list[Any]], list[Any]] | None = None,
) -> TaskResult:
    """``prepare_task``, then ``run_prepared``."""
    return run_prepared(lm, prepare_task(name, split, options), on_request, gather)


def run_prepared(
    lm: "LM",
    prepared: PreparedTask,
    on_request: Callable[[int], None] = lambda finished: None,
    gather: Callable[[list[Any]], list[Any]] | None = None,
) -> TaskResult:
    """Let a model answer a task.

    Every process of a model that runs in several answers its share of the rows, with the few-shot examples that one
    process would use.

    Args:
        lm: any of lm-eval's models. If it has ``takes_seed = True``, each sampled request has a ``seed`` of its own
            among its sampling options; else torch's generators are seeded for each round of samples, and set back.
        prepared: see ``prepare_task``; it may be run several times.
        on_request: called with the number of requests that have just finished.
        gather: with several processes: returns the lists of all of them as one list.

    Raises:
        ValueError: the model's context is too short for the outputs, its tokenizer has no chat template, or there are
            several processes and no ``gather``.
    """
    started, task, options = time.perf_counter(), prepared.task, prepared.options
    if lm.world_size > 1 and gather is None:
        raise ValueError(f"{prepared.name}: {lm.world_size} processes need a way to gather their items")
    context = getattr(lm, "max_length", None)
    if isinstance(context, int) and prepared.max_new_tokens >= context:
        raise ValueError(
            f"{prepared.name}: outputs of up to {prepared.max_new_tokens} tokens do not fit the model's context of "
            f"{context}; set max_new_tokens to less"
        )
    by_row = defaultdict(list)
    for instance in _build_instances(lm, prepared):
        by_row[instance.doc_id].append(instance)
    counts = [
        sum(instance.repeats or 1 for row in sorted(by_row)[rank :: lm.world_size] for instance in by_row[row])
        for rank in range(lm.world_size)
    ]
    mine = {row: by_row[row] for row in sorted(by_row)[lm.rank :: lm.world_size]}
    instances = [instance for row in mine.values() for instance in row]
    rounds: list[list[_Scored]] = []
    for repeat in range(options.repeats):
        for instance in instances:
            instance.resps, instance.filtered_resps = [], {}
        _ask(lm, prepared, instances, repeat, max(counts) - counts[lm.rank], on_request)
        task._instances = instances  # of this process; build_all_requests has those of all
        with quiet():
            if instances:
                task.apply_filters()
            rounds.append([_score_row(prepared, row, instances) for row, instances in mine.items()])
    scored = [_merge_rounds(prepared, row) for row in zip(*rounds, strict=True)]
    if gather is not None:
        scored = gather(scored)
    scored.sort(key=lambda one: one.item.index)
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
        except ValueError as error:
            raise ValueError(f"{prepared.name}: chat_template: {error}") from error
        instances = prepared.task.instances
    return [copy.copy(instance) for instance in instances]


def _ask(
    lm: "LM",
    prepared: PreparedTask,
    instances: "list[Instance]",
    repeat: int,
    padding: int,
    on_request: Callable[[int], None],
) -> None:
    """Put the model's responses into the instances.

    ``padding`` requests are asked again: all processes of a model must ask equally many.
    """
    settings, seed, kind = prepared.settings, prepared.options.seed, prepared.instances[0].request_type
    sampled = settings.get("temperature", 0.0) > 0
    asked = [instance for instance in instances for _ in range(instance.repeats or 1)]
    asked += (instances or [copy.copy(prepared.instances[0])])[-1:] * padding
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
    if not requests:
        return
    ask, hook = getattr(lm, kind), lm.cache_hook
    silent = {"disable_tqdm": True} if "disable_tqdm" in inspect.signature(ask).parameters else {}
    lm.set_cache_hook(_Hook(hook, on_request))
    try:
        seeded = _seeded(_derive_seed(seed, repeat, lm.rank)) if sampled else contextlib.nullcontext()
        with without_logs(), seeded:
            responses = ask(requests, **silent)
    finally:
        lm.set_cache_hook(hook)
    for instance, response in zip(asked[: len(asked) - padding], responses, strict=False):
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
    instances = sorted(instances, key=lambda instance: instance.idx)
    first, row = instances[0], instances[0].doc
    skipped: str | None = None
    raw: dict[str, Any] = {}
    if spec is not None and spec.score is not None:
        raw, skipped = spec.score(row, first.resps)
    else:
        for name in first.filtered_resps:
            values = task.process_results(row, [instance.filtered_resps[name] for instance in instances])
            raw |= {metric if name == "none" else f"{metric},{name}": value for metric, value in values.items()}
    item = Item(index=index, prompt=_get_text(first.args[0]), skipped=skipped)
    if task.OUTPUT_TYPE == "multiple_choice":
        item = _add_choices(task, item, row, instances)
    elif task.OUTPUT_TYPE == "generate_until":
        answer = "" if spec is not None and spec.score is not None else str(task.doc_to_target(row))
        item = replace(item, answer=answer, outputs=tuple(map(_get_text, first.resps)))
        if spec is not None and spec.grade is not None:
            raw["math_verify"] = float(spec.grade(item.outputs[0], item.answer))
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
    return _Scored(item, {name: value for name, value in raw.items() if name not in means})


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
    if np.isnan(likelihoods).any():
        raise ValueError(f"row {item.index}: the model gives no log-likelihood (nan); are its weights finite?")
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
    if correct is not None and (main == "nll" or not 0 <= correct <= 1):
        correct = None
    if (k := len(rounds)) > 1 and correct is not None:
        metrics |= count_passes(sum(one.item.metrics[main] >= 1 for one in rounds), k)
    outputs = tuple(output for one in rounds for output in one.item.outputs)
    return _Scored(replace(item, metrics=metrics, outputs=outputs, correct=correct), rounds[0].others)


def _aggregate_others(prepared: PreparedTask, scored: Sequence[_Scored]) -> dict[str, Score]:
    """The scores whose average is no mean over items, as lm-eval reports them."""
    from lm_eval.api.metrics import stderr_for_metric

    values = defaultdict(list)
    for one in scored:
        for name, value in one.others.items():
            values[name].append(value)
    scores: dict[str, Score] = {}
    for name, parts in values.items():
        metric = name.partition(",")[0]
        higher = prepared.task.higher_is_better().get(metric)
        if prepared.spec is not None and prepared.spec.score is not None:  # a list of parts for each row
            parts = [part for part in parts if part]
            rows = [Item(i, "", metrics={name: float(np.mean(p))}, weight=len(p)) for i, p in enumerate(parts)]
            scores |= summarize(rows)
            continue
        aggregate = prepared.task.aggregation()[metric]
        error = stderr_for_metric(aggregate, 1000)
        with quiet():
            stderr = float(error(parts)) if error and len(parts) > 1 else None
            scores[name] = Score(float(aggregate(parts)), stderr, len(parts), higher)
    return scores
