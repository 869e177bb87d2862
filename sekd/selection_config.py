"""The fields of SEKDConfig that say what is distilled: positions, divergence, classes and samples."""

from dataclasses import dataclass, field
from typing import Any

from sekd.classes import CLASS_SELECTIONS
from sekd.losses import DIVERGENCES
from sekd.policies import POLICIES
from sekd.registry import all_options
from sekd.schedules import Schedule, Scheduled, make_schedule
from sekd.scores import NORMALIZATIONS, RANDOM, SCORES, Scoring, make_scoring


def help_(text: str) -> dict:
    return {"help": text.replace("%", "%%")}  # argparse formats it


def _option(name: str) -> Any:
    """The field of a policy's or divergence's option, with the default and help of its record."""
    option = all_options()[name]
    return field(default=option.default, metadata=help_(option.help))


@dataclass
class SelectionConfig:
    """Each field has its help. :class:`sekd.config.SEKDConfig` checks them."""

    # What is distilled, and where
    lmbda: Scheduled = field(
        default=0.0,
        metadata=help_(
            "Probability that an optimizer step is on-policy: 0 learns from the data only, 1 from rollouts only. A "
            "schedule works as for position_fraction."
        ),
    )
    divergence: str | None = field(
        default=None,
        metadata=help_(
            f"One of {', '.join(DIVERGENCES)}. Default: reverse_kl if lmbda > 0 and class_selection is full, else "
            "forward_kl."
        ),
    )
    jsd_beta: float = _option("jsd_beta")
    skew_alpha: float = _option("skew_alpha")
    decoupled_alpha: float = _option("decoupled_alpha")
    decoupled_beta: float = _option("decoupled_beta")
    kd_weight: float = field(
        default=1.0,
        metadata=help_("Weight of the divergence in the loss, in [0, 1]; cross-entropy has 1 - kd_weight."),
    )
    kd_temperature: float = field(default=1.0, metadata=help_("Temperature of both distributions in the divergence."))
    position_score: dict | str | None = field(
        default="student_entropy",
        metadata=help_(
            f"Score of a position's importance: {', '.join(SCORES)}; or a mapping of scores to weights, such as "
            '{"student_entropy": 1.0, "kl": 0.5}.'
        ),
    )
    score_source: str = field(
        default="exact",
        metadata=help_(
            "Source of student_entropy. exact: the student's logits at all positions. rollout: in on-policy steps, the "
            "score_logprobs largest log-probabilities of the sampler."
        ),
    )
    score_logprobs: int = field(
        default=20, metadata=help_("Number of log-probabilities a position for score_source rollout.")
    )
    score_normalization: str = field(
        default="none",
        metadata=help_(
            f"How each score is normalised within its sequence, before weights apply: {', '.join(NORMALIZATIONS)}."
        ),
    )
    position_policy: str = field(
        default="top_k", metadata=help_(f"Which positions are distilled: {', '.join(POLICIES)}.")
    )
    position_fraction: Scheduled = field(
        default=0.2,
        metadata=help_(
            "Share of a sequence's positions to select, in (0, 1]. For gls it is a share of the recent scores. all and "
            "weighted do not use it. A schedule of optimizer steps is {0: 1.0, 500: 0.2}: 1 before step 500, then 0.2; "
            "{linear: {0: 1.0, 500: 0.2}} falls on a line."
        ),
    )
    position_skip: int = field(
        default=0,
        metadata=help_("Do not select the first N positions of a document, unless the sequence has no others."),
    )
    curriculum_steps: int = _option("curriculum_steps")
    gls_queue_size: int = _option("gls_queue_size")
    pos_rs_exponent: float = _option("pos_rs_exponent")
    pos_rs_coverage: float = _option("pos_rs_coverage")
    bandit_alpha: float = _option("bandit_alpha")
    bandit_ridge: float = _option("bandit_ridge")

    # Classes
    class_selection: str = field(
        default="full",
        metadata=help_(
            f"The classes of a position: {', '.join(CLASS_SELECTIONS)}. rs_kd draws class_samples from the teacher "
            "(unbiased); top_k_classes keeps the likeliest class_samples (biased)."
        ),
    )
    class_samples: int = field(
        default=64, metadata=help_("Draws a position of rs_kd, or classes a position of top_k_classes.")
    )
    sampled_softmax: int = field(
        default=0,
        metadata=help_("Normalise the student over the kept classes and N random ones. 0: over all classes."),
    )

    # Samples
    sample_fraction: float = field(
        default=1.0,
        metadata=help_("Share of the samples to train on, chosen by sample_score once before training."),
    )
    sample_score: str = field(
        default="student_entropy",
        metadata=help_(
            f"Samples are ranked by the mean of this score over their positions: {', '.join((*SCORES, RANDOM))}."
        ),
    )
    samples_file: str | None = field(
        default=None,
        metadata=help_("JSON file of scores and choice, used again if it exists. Default: samples.json in output_dir."),
    )
    sample_pool: int | None = field(
        default=None,
        metadata=help_("Use only the first N samples of the data. A stream needs it for sample_fraction."),
    )

    @property
    def fraction_schedule(self) -> Schedule:
        """``position_fraction`` at each step."""
        return make_schedule("position_fraction", self.position_fraction)

    @property
    def lmbda_schedule(self) -> Schedule:
        """``lmbda`` at each step."""
        return make_schedule("lmbda", self.lmbda)

    def get_scheduled(self, step: int) -> dict[str, float]:
        """The values at a step of the fields whose value changes during the run, by name."""
        schedules = {"position_fraction": self.fraction_schedule, "lmbda": self.lmbda_schedule}
        return {name: schedule.value(step) for name, schedule in schedules.items() if not schedule.is_constant}

    @property
    def any_on_policy(self) -> bool:
        """Whether a step can be on-policy: the run needs prompts, and an engine."""
        return self.lmbda_schedule.highest > 0

    @property
    def all_on_policy(self) -> bool:
        """Whether every step is on-policy: the run reads no completion of the data."""
        return self.lmbda_schedule.lowest == 1

    @property
    def scoring(self) -> Scoring | None:
        """The scores that the position policy reads; None if it needs no score."""
        policy = POLICIES[self.position_policy]
        if policy.reads is not None:
            return Scoring(policy.reads) if policy.reads else None
        if policy.uniform_if_all and self.fraction_schedule.lowest == 1:
            return None
        return make_scoring(self.position_score, self.score_normalization)

    @property
    def policy_options(self) -> dict[str, float]:
        """The options of the position policy, from their fields."""
        return {name: getattr(self, o.field) for name, o in POLICIES[self.position_policy].options.items()}

    @property
    def divergence_options(self) -> dict[str, float]:
        """The options of the divergence, from their fields."""
        return {name: getattr(self, o.field) for name, o in DIVERGENCES[str(self.divergence)].options.items()}
