"""Which positions, and with what weights? A policy maps scores [B T] to weights [B T]. Weight 0 is not distilled."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sekd.options import Option
from sekd.policies.bandit import FEATURES, Bandit
from sekd.policies.base import FinishedStep, PositionPolicy, Stateless
from sekd.policies.gls import Gls
from sekd.policies.ranks import Weights, top_k
from sekd.policies.stateless import (
    all_positions,
    curriculum,
    pos_rs,
    pos_rs_corrected,
    prefix,
    random,
    tip,
    weighted,
)
from sekd.schedules import Schedule, make_schedule

__all__ = ["POLICIES", "FinishedStep", "Policy", "PositionPolicy", "make_policy"]


@dataclass(frozen=True)
class Policy:
    """The record of a policy, which the rest of the code reads. ``POLICIES[name](fraction, **options)`` makes the
    :class:`PositionPolicy` that a run calls.

    Attributes:
        weigh: a function ``(scores, valid, fraction, step, generator, **options) -> weights``, or a
            :class:`PositionPolicy` class for a policy with state.
        reads: names of the scores that it reads. None is ``position_score``, () is no score.
        needs_positive: scores are proportions and must not be negative.
        equal_weights: all chosen positions of a sequence weigh the same.
        uniform_if_all: with fraction 1, scores do not matter, since all positions weigh the same.
        options: by the name of the parameter.
        words: the chosen positions in a model card; {fraction} and {score} are filled in.
    """

    weigh: Callable[..., Weights] | type[PositionPolicy]
    reads: tuple[str, ...] | None = None
    needs_positive: bool = False
    equal_weights: bool = True
    uniform_if_all: bool = False
    options: Mapping[str, Option] = field(default_factory=dict)
    words: str = ""

    def __call__(self, fraction: float | Schedule = 0.2, whole_steps: bool = False, **options: Any) -> PositionPolicy:
        if isinstance(self.weigh, type):
            return self.weigh(fraction, whole_steps, **options)
        return Stateless(self.weigh, fraction, **options)

    @property
    def has_state(self) -> bool:
        """Whether the policy learns from one optimizer step to the next."""
        return isinstance(self.weigh, type)


POS_RS = {
    "exponent": Option(
        field="pos_rs_exponent",
        default=1.0,
        is_valid=lambda v: v >= 0,
        hint="must not be negative; 1 draws in proportion to the score, 0 uniformly",
        help="pos_rs draws in proportion to score^exponent. Below 1 the draws are more even.",
    ),
    "coverage": Option(
        field="pos_rs_coverage",
        default=0.0,
        is_valid=lambda v: 0 <= v < 1,
        hint="is outside [0, 1); at 1 choose position_policy: top_k",
        help="Share of pos_rs's positions that are always those of the highest scores, in [0, 1).",
    ),
}

POLICIES: dict[str, Policy] = {
    "all": Policy(all_positions, reads=(), words="every position"),
    "top_k": Policy(top_k, uniform_if_all=True, words="the {fraction} of the positions with the highest {score}"),
    "random": Policy(random, reads=(), words="{fraction} of the positions, drawn at random"),
    "prefix": Policy(prefix, reads=(), words="the first {fraction} of the positions"),
    "curriculum": Policy(
        curriculum,
        options={
            "steps": Option(
                field="curriculum_steps",
                default=4000,
                is_valid=lambda v: v >= 1,
                hint="must be at least 1",
                help="Optimizer steps until curriculum reaches the hardest positions.",
            )
        },
        words="{fraction} of the positions, moving over the run from the lowest to the highest {score}",
    ),
    "pos_rs": Policy(
        pos_rs,
        needs_positive=True,
        equal_weights=False,
        options=POS_RS,
        words="{fraction} of the positions, drawn in proportion to the {score}",
    ),
    "pos_rs_corrected": Policy(
        pos_rs_corrected,
        needs_positive=True,
        equal_weights=False,
        options=POS_RS,
        words="{fraction} of the positions, drawn in proportion to the {score} and weighted to be unbiased",
    ),
    "weighted": Policy(
        weighted,
        needs_positive=True,
        equal_weights=False,
        words="every position, weighted by its {score}",
    ),
    "tip": Policy(
        tip,
        reads=("student_entropy", "reverse_kl"),
        words="the {fraction} of the positions with the highest student entropy or reverse KL",
    ),
    "gls": Policy(
        Gls,
        options={
            "queue_size": Option(
                field="gls_queue_size",
                default=30_000,
                is_valid=lambda v: 1 <= v <= 10_000_000,
                hint="must be from 1 to 10,000,000",
                help="Number of recent scores whose quantile is gls's threshold.",
            )
        },
        words="the positions whose {score} is in the highest {fraction} of the recent ones",
    ),
    "bandit": Policy(
        Bandit,
        reads=FEATURES,
        options={
            "alpha": Option(
                field="bandit_alpha",
                default=1.0,
                is_valid=lambda v: v >= 0,
                hint="must not be negative; 0 never explores",
                help="How much bandit explores; 0: not at all.",
            ),
            "ridge": Option(
                field="bandit_ridge",
                default=1.0,
                is_valid=lambda v: v > 0,
                hint="must be above 0",
                help="Ridge penalty of bandit's regression.",
            ),
        },
        words="the {fraction} of the positions that a bandit expects to learn most from",
    ),
}


def make_policy(
    name: str, fraction: float | Schedule = 0.2, *, whole_steps: bool = False, **options: Any
) -> PositionPolicy:
    """The policy ``name`` with its budget: ``policy(scores, valid, step=0, generator=None) -> weights``.

    ``whole_steps``: the caller calls :meth:`PositionPolicy.end_step` after each optimizer step. Otherwise each call of
    the policy is a step of its own.

    Raises:
        ValueError: an unknown name, a fraction outside (0, 1], or an option outside its range.
    """
    if name not in POLICIES:
        raise ValueError(f"position_policy {name!r} is unknown; choose one of {', '.join(POLICIES)}")
    hint = "is outside (0, 1]; write 0.2 for 20 % of the positions"
    make_schedule("position_fraction", fraction).check_values("position_fraction", lambda k: 0 < k <= 1, hint)
    policy = POLICIES[name]
    for option, value in options.items():
        if option not in policy.options:
            raise ValueError(f"position_policy {name!r} has no option {option!r}; it has {[*policy.options] or 'none'}")
        policy.options[option].check(value, option)
    return policy(fraction, whole_steps, **options)
