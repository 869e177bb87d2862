"""Which positions, divergences, classes, caches and samples work together."""

from typing import TYPE_CHECKING

from transformers.utils import logging

from rollouts import ENGINES
from sekd.classes import CLASS_SELECTIONS
from sekd.losses import DIVERGENCES
from sekd.policies import POLICIES, make_policy
from sekd.registry import all_options, one_of
from sekd.scores import RANDOM, SCORES, make_scoring, needs_teacher
from sekd.validation.values import get_default

if TYPE_CHECKING:
    from sekd.config import SEKDConfig

logger = logging.get_logger(__name__)


def check_names(args: "SEKDConfig") -> None:
    """Check the names of strategies. It runs first, because other checks read their records."""
    if args.divergence is not None:
        one_of("divergence", args.divergence, DIVERGENCES)
    one_of("position_policy", args.position_policy, POLICIES)
    one_of("class_selection", args.class_selection, CLASS_SELECTIONS)
    one_of("sample_score", args.sample_score, (*SCORES, RANDOM))
    one_of("score_source", args.score_source, ("exact", "rollout"))
    if args.teacher_dtype is not None:
        one_of("teacher_dtype", args.teacher_dtype, ("auto", "bfloat16", "float16", "float32"))
    one_of("overlong_prompts", args.overlong_prompts, ("error", "drop"))
    one_of("rollout_engine", args.rollout_engine, ENGINES)
    one_of("rollout_transfer", args.rollout_transfer, ("file", "nccl"))


def check_selection(args: "SEKDConfig") -> None:
    """Check positions, divergence, classes, cache and samples."""
    make_policy(args.position_policy, args.fraction_schedule)
    for name, option in all_options().items():
        if not hasattr(args, name):
            raise ValueError(f"option {name!r} has no field in SEKDConfig; set its value with functools.partial")
        option.check(getattr(args, name))
    if args.position_skip < 0:
        raise ValueError(f"position_skip {args.position_skip} must not be negative; 0 skips no position")
    _check_score(args)
    _check_score_source(args)
    _check_divergence(args)
    _check_classes(args)
    if args.teacher_cache is not None:
        _check_cache(args)
    if not 0 < args.sample_fraction <= 1:
        raise ValueError(f"sample_fraction {args.sample_fraction} is outside (0, 1]; 0.2 keeps 20 % of the samples")
    if args.sample_pool is not None and args.sample_pool < 1:
        raise ValueError(f"sample_pool {args.sample_pool} must be at least 1; it is a number of samples")
    for name in ("samples_file", "teacher_cache", "rollouts"):
        if getattr(args, name) == "":
            raise ValueError(f"{name} is empty; name a path, or leave it out")
    _warn_of_unused(args)


def _check_score(args: "SEKDConfig") -> None:
    scoring = make_scoring(args.position_score, args.score_normalization)
    name, policy = args.position_policy, POLICIES[args.position_policy]
    if policy.reads is not None:
        reads = " and ".join(policy.reads) or "no score"
        for field in ("position_score", "score_normalization"):
            if getattr(args, field) != get_default(args, field):
                raise ValueError(
                    f"{field} {getattr(args, field)!r} has no effect: position_policy {name!r} reads {reads}; leave it "
                    "out, or choose position_policy: top_k"
                )
    if not policy.needs_positive:
        return
    if args.score_normalization == "zscore":
        raise ValueError(
            f"score_normalization 'zscore' gives negative scores, but position_policy {name!r} needs scores of at "
            "least 0; use minmax or none"
        )
    if min(scoring.weights or (0,)) < 0:
        raise ValueError(
            f"position_score has a negative weight, but position_policy {name!r} needs scores of at least 0; use "
            "weights of 0 or more, or position_policy: top_k"
        )


def _check_score_source(args: "SEKDConfig") -> None:
    if args.score_logprobs < 1:
        raise ValueError(f"score_logprobs {args.score_logprobs} must be at least 1; 20 agree well with exact scores")
    if args.score_source == "exact":
        return
    if not args.any_on_policy:
        raise ValueError("score_source 'rollout' with lmbda 0: there are no rollouts; use score_source: exact")
    if args.scoring is None or not args.scoring.in_rollouts:
        names = args.scoring.names if args.scoring is not None else ()
        raise ValueError(
            f"score_source 'rollout' gives student_entropy only, but position_policy {args.position_policy!r} reads "
            f"{', '.join(names) or 'no score'}; use score_source: exact"
        )


def _check_divergence(args: "SEKDConfig") -> None:
    divergence = DIVERGENCES[str(args.divergence)]
    for record in DIVERGENCES.values():
        if record.check is not None:
            record.check(**{name: getattr(args, option.field) for name, option in record.options.items()})
    if divergence.mean_over != "sequence" and not POLICIES[args.position_policy].equal_weights:
        raise ValueError(
            f"divergence {args.divergence!r} weighs positions itself, and so does position_policy "
            f"{args.position_policy!r}; use another divergence, or position_policy: all"
        )


def _check_classes(args: "SEKDConfig") -> None:
    if args.class_samples < 1:
        raise ValueError(f"class_samples {args.class_samples} must be at least 1; the paper draws 64")
    if args.sampled_softmax < 0:
        raise ValueError(f"sampled_softmax {args.sampled_softmax} must not be negative; 0 uses all classes")
    if CLASS_SELECTIONS[args.class_selection].select is None:
        if args.sampled_softmax:
            raise ValueError(
                f"sampled_softmax {args.sampled_softmax} needs a selection of classes, but class_selection is full; "
                "set class_selection: rs_kd, or sampled_softmax: 0"
            )
        return
    if DIVERGENCES[str(args.divergence)].sparse is None:
        raise ValueError(
            f"class_selection {args.class_selection!r} estimates forward KL only; set divergence: forward_kl, or "
            f"class_selection: full for {args.divergence}"
        )
    if args.sampled_softmax and args.kd_weight < 1:
        raise ValueError(
            f"kd_weight {args.kd_weight} adds cross-entropy, which sampled_softmax cannot compute; set "
            "kd_weight: 1 or sampled_softmax: 0"
        )
    if args.sampled_softmax and args.sampled_softmax <= args.class_samples:
        raise ValueError(
            f"sampled_softmax {args.sampled_softmax} must be above class_samples {args.class_samples}: with fewer "
            "random classes than kept ones the normaliser would be mostly noise; a few thousand are usual"
        )


def _check_cache(args: "SEKDConfig") -> None:
    if args.any_on_policy:
        raise ValueError(
            f"lmbda {args.lmbda} with teacher_cache: a cache holds positions of the data, but rollouts are new text; "
            "set lmbda: 0, or leave teacher_cache out"
        )
    if not CLASS_SELECTIONS[args.class_selection].in_cache:
        raise ValueError(f"teacher_cache holds rs_kd targets; class_selection {args.class_selection!r} needs a teacher")
    if args.class_samples > 64:
        raise ValueError(
            f"class_samples {args.class_samples} with teacher_cache: a cache holds at most 64 draws a position; lower "
            "class_samples"
        )
    names = args.scoring.names if args.scoring is not None else ()
    # A cache may hold such a score. Whether this one does is checked when it is opened.
    if missing := [name for name in names if SCORES[name].needs_teacher and not SCORES[name].in_cache]:
        raise ValueError(
            f"position_policy {args.position_policy!r} reads {', '.join(missing)}, which needs the teacher's whole "
            "distribution, but teacher_cache lacks it; use position_score: student_entropy or student_ce, or leave "
            "teacher_cache out"
        )
    if args.sample_fraction < 1 and needs_teacher(args.sample_score):
        raise ValueError(
            f"sample_score {args.sample_score!r} needs a teacher model, but with teacher_cache none is loaded; choose "
            "student_entropy, student_ce or random"
        )


def _warn_of_unused(args: "SEKDConfig") -> None:
    used = (*POLICIES[args.position_policy].options.values(), *DIVERGENCES[str(args.divergence)].options.values())
    unused = all_options().keys() - {option.field for option in used}
    if CLASS_SELECTIONS[args.class_selection].select is None:
        unused |= {"class_samples"}
    for name in sorted(unused):
        if getattr(args, name) != get_default(args, name):
            logger.warning(f"{name} {getattr(args, name)} has no effect with the chosen policy, divergence and classes")
