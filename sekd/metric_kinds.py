"""What is known of each score of an evaluation by its name: which way is better, and how it is shown."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class MetricKind:
    """What is known of a score.

    Attributes:
        higher_is_better: None if neither direction is better.
        is_share: shown in percent.
        digits: after the point, where it is shown.
        is_shown: the table shows it beside the main score of its task.
        ignores_weight: its mean counts every item once, whatever the item's weight.
    """

    higher_is_better: bool | None = None
    is_share: bool = False
    digits: int = 3
    is_shown: bool = False
    ignores_weight: bool = False


ACCURACY = MetricKind(True, is_share=True, digits=1)
DISTANCE = MetricKind(False, is_shown=True)
PERPLEXITY = MetricKind(False, digits=2)
OTHER = MetricKind()
"""A score that ``METRIC_KINDS`` does not have."""

METRIC_KINDS: dict[str, MetricKind] = {
    # shares of right answers
    "accuracy": ACCURACY,  # the mean of a suite
    "acc": ACCURACY,
    "acc_norm": ACCURACY,
    "acc_bytes": ACCURACY,
    "acc_mutual_info": ACCURACY,
    "acc_all": ACCURACY,
    "exact_match": ACCURACY,  # lm-eval's: equal strings
    "math_verify": MetricKind(True, is_share=True, digits=1, is_shown=True, ignores_weight=True),
    "avg": MetricKind(True, is_share=True, digits=1, ignores_weight=True),  # avg@k
    "pass": MetricKind(True, is_share=True, digits=1, is_shown=True, ignores_weight=True),  # pass@k
    "prompt_level_strict_acc": ACCURACY,
    "prompt_level_loose_acc": ACCURACY,
    "inst_level_strict_acc": ACCURACY,
    "inst_level_loose_acc": ACCURACY,
    # how likely a text is
    "loss": MetricKind(False),
    "nll": MetricKind(False),
    "student_ce": MetricKind(False),
    "teacher_ce": MetricKind(),
    "perplexity": MetricKind(False, digits=2, is_shown=True),
    "word_perplexity": PERPLEXITY,
    "byte_perplexity": PERPLEXITY,
    "bits_per_byte": MetricKind(False),
    "student_entropy": MetricKind(),
    # calibration
    "ece": MetricKind(False, is_share=True, digits=1, is_shown=True),
    "brier_score": MetricKind(False),
    # the distance from a teacher
    "forward_kl": DISTANCE,
    "reverse_kl": DISTANCE,
    "sampled_reverse_kl": DISTANCE,
    "top1_agreement": MetricKind(True, is_share=True, digits=1, is_shown=True),
    # completions
    "length": MetricKind(digits=1, is_shown=True, ignores_weight=True),
    "cut_off": MetricKind(False, is_share=True, digits=1, is_shown=True, ignores_weight=True),
    "positions": MetricKind(),
    # texts beside a reference
    "wer": MetricKind(False),
    "ter": MetricKind(False),
}


def strip_name(score: str) -> str:
    """The name of a score without lm-eval's filter, which follows a comma, and without the k of ``pass@k``."""
    return score.partition(",")[0].partition("@")[0]


def get_kind(score: str) -> MetricKind:
    """What is known of a score; ``OTHER`` if nothing is."""
    return METRIC_KINDS.get(strip_name(score), OTHER)


def choose_direction(score: str, directions: Mapping[str, bool | None]) -> bool | None:
    """Whether more of a score is better: as ``directions`` says by its stripped name, else as its kind does."""
    given = directions.get(strip_name(score))
    return get_kind(score).higher_is_better if given is None else given


def find_kind(metric: str) -> MetricKind | None:
    """The kind of the score in which the name of a logged metric ends, as in ``eval_gsm8k_math_verify``; or None."""
    endings = [name for name in METRIC_KINDS if metric == name or metric.endswith(f"_{name}")]
    return METRIC_KINDS[max(endings, key=len)] if endings else None
