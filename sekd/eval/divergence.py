"""How far is a student from its teacher on each text, and on its own completions of each prompt?

The models and the samples are loaded already: by :mod:`sekd.eval.distillation`, or by a trainer.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rollouts import Rollout
from sekd.data.batch import Sample, from_rollout
from sekd.eval.answers import grade_math
from sekd.eval.held_out import Pair, measure_samples
from sekd.eval.records import Item, TaskResult
from sekd.eval.statistics import count_passes, summarize
from sekd.metrics import add_sums

TEXT, ROLLOUTS = "text", "rollouts"
MAIN = {TEXT: ("forward_kl", "perplexity"), ROLLOUTS: ("math_verify", "reverse_kl", "length")}
"""The main score of each task: the first one that its items give."""
ANSWER = re.compile(r"####|\\boxed\{|^[-+]?[$€£]?\d[\d,]*(\.\d+)?%?$")
"""What a text with a mathematical answer has."""


def measure_texts(
    pair: Pair,
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    on_samples: Callable[[int], Any] = lambda number: None,
) -> list[Item]:
    """One item a sample: the means over its valid positions, in nats, and their number as its weight.

    ``nll`` is -log q(y). ``teacher_ce``, ``forward_kl``, ``reverse_kl`` and ``top1_agreement`` are absent if the
    teacher lacks its whole distribution. Samples with a negative id are copies, which give no item.
    """
    items = []
    for sample, measured in zip(samples, measure_samples(pair, samples, on_samples), strict=True):
        if sample.sample_id < 0:
            continue
        sums = measured.sums
        prompt, rest = sample.input_ids[: sample.prompt_length], sample.input_ids[sample.prompt_length :]
        means, number = _divide(sums)
        items.append(
            Item(
                index=sample.sample_id,
                prompt=tokenizer.decode(prompt),
                answer=tokenizer.decode(rest),
                loglikelihoods=(-float(sums["student_ce"]),),
                metrics={"nll": means.pop("student_ce")} | means if number else {},
                weight=number,
                calibration=tuple((n, c, h) for n, c, h in sums["calibration"].tolist()),
            )
        )
    return items


def measure_completions(
    pair: Pair,
    samples: Sequence[Sample],
    rollouts: Sequence[Rollout],
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[str | None] | None = None,
    samples_as_is: bool = True,
    on_samples: Callable[[int], Any] = lambda number: None,
) -> list[Item]:
    """One item a prompt: means over the positions of all its completions, and numbers of the completions themselves.

    Over positions, with their number as the item's weight: ``reverse_kl`` and ``forward_kl``, exact at each position,
    ``teacher_ce``, ``top1_agreement`` and ``student_entropy``. With ``samples_as_is`` also ``sampled_reverse_kl``, the
    mean of log q(y) - log p(y) at the drawn tokens: an unbiased estimate of the reverse KL. Over completions:
    ``length`` in tokens, ``cut_off`` (the share that reached the limit), and with answers ``math_verify``; of K > 1
    completions also ``avg@K`` (the same) and ``pass@K``.

    Args:
        samples: one for each prompt. Those with a negative id are copies, which give no item.
        rollouts: equally many for each sample, those of a sample one after another.
        answers: the right answer of each sample; None for a sample without one.
    """
    repeats = len(rollouts) // max(len(samples), 1)
    completed = [from_rollout(samples[i // repeats], rollout) for i, rollout in enumerate(rollouts)]
    measured = measure_samples(pair, completed, on_samples)
    items = []
    for i, sample in enumerate(samples):
        if sample.sample_id < 0:
            continue
        of_prompt, sums = rollouts[i * repeats : (i + 1) * repeats], defaultdict[str, Tensor | float](float)
        for part in measured[i * repeats : (i + 1) * repeats]:
            add_sums(sums, part.sums)
        outputs = [tokenizer.decode(rollout.completion_ids, skip_special_tokens=True) for rollout in of_prompt]
        answer = None if answers is None else answers[i]
        right = None if answer is None else [grade_math(output, answer) for output in outputs]
        means, number = _divide(sums)
        nll = means.pop("student_ce")
        if samples_as_is and "teacher_ce" in means:
            means["sampled_reverse_kl"] = means["teacher_ce"] - nll
        items.append(
            Item(
                index=sample.sample_id,
                prompt=tokenizer.decode(of_prompt[0].prompt_ids),
                answer=answer or "",
                outputs=tuple(outputs),
                correct=None if right is None else sum(right) / repeats,
                metrics=(means if number else {}) | _describe_completions(of_prompt, right),
                weight=number,
            )
        )
    return items


def _divide(sums: Mapping[str, Any]) -> tuple[dict[str, float], float]:
    """The mean of each sum over the positions, and their number."""
    number = float(sums["positions"])
    of_numbers = {name: float(total) for name, total in sums.items() if name not in ("positions", "calibration")}
    return {name: total / max(number, 1) for name, total in of_numbers.items()}, number


def _describe_completions(rollouts: Sequence[Rollout], right: Sequence[bool] | None) -> dict[str, float]:
    k = len(rollouts)
    metrics = {
        "length": sum(len(rollout.completion_ids) for rollout in rollouts) / k,
        "cut_off": sum(rollout.finish_reason == "length" for rollout in rollouts) / k,
    }
    if right is None:
        return metrics
    metrics["math_verify"] = sum(right) / k
    return metrics if k == 1 else metrics | count_passes(sum(right), k)


def get_answers(samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """The text of each sample's own completion, as the right answer to its prompt; None where it states no answer.

    It states one after ``####`` or in ``\\boxed{}``, or is a number itself. Whether an output is as right as a story or
    a translation is nothing that :func:`sekd.eval.answers.grade_math` can say.
    """
    texts = [tokenizer.decode(s.input_ids[s.prompt_length :], skip_special_tokens=True).strip() for s in samples]
    return [text if ANSWER.search(text) else None for text in texts]


def make_result(task: str, items: list[Item], settings: dict[str, Any], seconds: float) -> TaskResult:
    """The result of a task with the scores of its items.

    Its main score is the first of ``MAIN`` that it has: of rollouts the share of right answers if answers are known,
    else the reverse KL; of texts the forward KL, or without a teacher's whole distribution the perplexity.
    """
    scores = summarize(items)
    main = next((name for name in MAIN[task] if name in scores), MAIN[task][-1])
    return TaskResult(task, main, scores, sorted(items, key=lambda item: item.index), settings, seconds)
