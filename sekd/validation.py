"""Which choices make sense together: the one place that refuses those that do not.

The functions take the configuration (:class:`sekd.config.SEKDConfig`) and raise ValueError with the field, the value
and the remedy.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any
from urllib.parse import urlsplit

import yaml
from transformers.utils import logging

from sekd.classes import CLASS_SELECTIONS
from sekd.losses import DIVERGENCES
from sekd.policies import NEEDS_POSITIVE, READS, check_option, make_policy, options_of
from sekd.scores import SCORES, make_scoring

logger = logging.get_logger(__name__)

SAMPLE_SCORES = (*SCORES, "random")
POLICY_OPTIONS = {
    "steps": "curriculum_steps",
    "queue_size": "gls_queue_size",
    "exponent": "pos_rs_exponent",
    "coverage": "pos_rs_coverage",
    "alpha": "bandit_alpha",
    "ridge": "bandit_ridge",
}
"""Options of the policies, and the fields that set them."""
DIVERGENCE_OPTIONS = {
    "jsd": {"beta": "jsd_beta"},
    "skew_kl": {"alpha": "skew_alpha"},
    "decoupled_kl": {"alpha": "decoupled_alpha", "beta": "decoupled_beta"},
}
"""Options of the divergences, and the fields that set them."""


def read_score(value: Any) -> Any:
    """``position_score`` as a name or a mapping; the command line gives a mapping as text."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(
            f"position_score {value!r} is no mapping; write for example '{{student_entropy: 1.0, kl: 0.5}}'"
        ) from error


def check_numbers(args: Any, names: Sequence[str]) -> None:
    """Fields that count or measure must hold finite numbers."""
    for name in names:
        value = getattr(args, name)
        if value is None and _default(args, name) is None:  # argparse makes `int | None` an int, in place
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} {value!r} is no number that can be used; write a finite one")
        whole = type(args).__dataclass_fields__[name].type in (int, "int")
        if whole and value != int(value):
            raise ValueError(f"{name} {value!r} must be a whole number")


def check_selection(args: Any) -> None:
    """Positions, divergence, classes, cache and samples."""
    one_of("divergence", args.divergence, DIVERGENCES)
    make_policy(args.position_policy, args.position_fraction)
    for option, name in POLICY_OPTIONS.items():
        check_option(option, getattr(args, name), name)
    if args.position_skip < 0:
        raise ValueError(f"position_skip {args.position_skip} must not be negative; 0 skips no position")
    _check_score(args)
    _check_score_source(args)
    _check_divergence(args)
    _check_classes(args)
    if args.teacher_cache is not None:
        _check_cache(args)
    one_of("sample_score", args.sample_score, SAMPLE_SCORES)
    if not 0 < args.sample_fraction <= 1:
        raise ValueError(f"sample_fraction {args.sample_fraction} is outside (0, 1]; 0.2 keeps 20 % of the samples")
    if args.sample_pool is not None and (isinstance(args.sample_pool, bool) or args.sample_pool < 1):
        raise ValueError(f"sample_pool {args.sample_pool} must be at least 1; it counts samples")
    for name in ("samples_file", "teacher_cache", "rollouts"):
        if getattr(args, name) == "":
            raise ValueError(f"{name} is empty; name a path, or leave it out")
    _warn_of_unused(args)


def check_prompts(args: Any) -> None:
    """Prompts of text, and prompts that the teacher alone sees."""
    length, most = args.text_prompt_length, args.max_prompt_length
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= most):
        raise ValueError(
            f"text_prompt_length {length} must be a whole number from 1 to max_prompt_length {most}; change either"
        )
    named = " and ".join(args.teacher_context)
    if named and args.teacher_cache is not None:
        raise ValueError(
            f"{named} with teacher_cache {args.teacher_cache!r}: a cache holds the teacher's rows behind the student's "
            "prompts; leave teacher_cache out, or the teacher's context"
        )
    if named and args.supervise_prompt:
        raise ValueError(
            f"supervise_prompt true with {named}: the teacher reads another prompt, so only completions can be "
            "compared; set supervise_prompt: false, or leave the teacher's context out"
        )


def _check_score(args: Any) -> None:
    scoring = make_scoring(args.position_score, args.score_normalization)
    policy = args.position_policy
    if policy in READS:
        reads = " and ".join(READS[policy]) or "no score"
        for name in ("position_score", "score_normalization"):
            if getattr(args, name) != _default(args, name):
                raise ValueError(
                    f"{name} {getattr(args, name)!r} has no effect: position_policy {policy!r} reads {reads}; leave it "
                    "out, or choose position_policy: top_k"
                )
    if policy not in NEEDS_POSITIVE:
        return
    if args.score_normalization == "zscore":
        raise ValueError(
            f"score_normalization 'zscore' makes negative scores, which position_policy {policy!r} cannot take for "
            "proportions; use minmax or none"
        )
    if min(scoring.weights or (0,)) < 0:
        raise ValueError(
            f"position_score has a negative weight, and position_policy {policy!r} takes scores for proportions; use "
            "weights of 0 or more, or position_policy: top_k"
        )


def check_rollouts(args: Any) -> None:
    """Engines, sampling beyond one number, rounds and reuse."""
    if args.repetition_penalty <= 0:
        raise ValueError(f"repetition_penalty {args.repetition_penalty} must be above 0; 1 leaves chances alone")
    args.stop_strings = _texts("stop_strings", args.stop_strings)
    args.rollout_server_urls = _texts("rollout_server_urls", args.rollout_server_urls)
    for name in ("rollouts_per_prompt", "rollout_batches"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} {getattr(args, name)} must be at least 1")
    if args.rollouts_per_prompt > 1 and args.lmbda < 1:
        raise ValueError(
            f"rollouts_per_prompt {args.rollouts_per_prompt} with lmbda {args.lmbda}: steps that learn from the "
            "data would see each sample so often; set lmbda: 1, or rollouts_per_prompt: 1"
        )
    if args.rollouts_per_prompt > 1 and (args.temperature == 0 or args.top_k == 1):
        raise ValueError(
            f"rollouts_per_prompt {args.rollouts_per_prompt} with temperature {args.temperature} and top_k "
            f"{args.top_k} writes the same completion again; raise the temperature, or set top_k: 0"
        )
    if args.rollout_staleness not in (0, 1):
        raise ValueError(f"rollout_staleness {args.rollout_staleness} is neither 0 nor 1, a round ahead at most")
    if args.rollout_staleness and args.rollout_engine != "vllm_server":
        raise ValueError(
            f"rollout_staleness 1 with rollout_engine {args.rollout_engine!r}, which generates on the trainer's "
            "own device: there is nothing to gain; use rollout_engine: vllm_server, or rollout_staleness: 0"
        )
    one_of("rollout_transfer", args.rollout_transfer, ("file", "nccl"))
    if args.rollout_transfer == "nccl" and args.rollout_engine != "vllm_server":
        raise ValueError(
            f"rollout_transfer 'nccl' is for rollout_engine vllm_server; leave it out for {args.rollout_engine!r}"
        )
    if args.rollout_timeout <= 0:
        raise ValueError(f"rollout_timeout {args.rollout_timeout} must be above 0 seconds")
    if not 0 < args.vllm_gpu_memory_utilization <= 1:
        raise ValueError(
            f"vllm_gpu_memory_utilization {args.vllm_gpu_memory_utilization} is outside (0, 1]; 0.3 leaves room for "
            "the trainer"
        )
    if args.vllm_kv_cache_gib < 1:
        raise ValueError(f"vllm_kv_cache_gib {args.vllm_kv_cache_gib} must be at least 1, the least that vLLM takes")
    if args.log_completions_steps < 0:
        raise ValueError(f"log_completions_steps {args.log_completions_steps} must not be negative; 0 is never")
    _check_urls(args)


def _check_urls(args: Any) -> None:
    urls = args.rollout_server_urls
    if not urls and args.rollout_engine == "vllm_server":
        raise ValueError("rollout_server_urls is empty: name the servers of rollout_engine vllm_server")
    for url in urls:
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
        except ValueError:  # a port that is none
            good = False
        if not good or parts.path.rstrip("/").endswith("/v1"):
            raise ValueError(
                f"rollout_server_urls: {url!r} is no address of a server; write http://127.0.0.1:8000, without /v1"
            )
    if len({url.rstrip("/") for url in urls}) < len(urls):
        raise ValueError(f"rollout_server_urls {urls} names a server twice; leave one out")


def _texts(name: str, value: Any) -> list[str]:
    """A list of texts; one text alone is a list of one."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not all(isinstance(text, str) and text for text in found):
        raise ValueError(f"{name} {value!r} must be a list of texts that are not empty, such as [one, two]")
    return list(found)


def _check_score_source(args: Any) -> None:
    one_of("score_source", args.score_source, ("exact", "rollout"))
    if args.score_logprobs < 1:
        raise ValueError(f"score_logprobs {args.score_logprobs} must be at least 1; 20 agree with exact scores well")
    if args.score_source == "exact":
        return
    if args.lmbda == 0:
        raise ValueError("score_source 'rollout' with lmbda 0: nothing is rolled out; use score_source: exact")
    names = args.scoring.names if args.scoring is not None else ()
    if names != ("student_entropy",):
        raise ValueError(
            f"score_source 'rollout' gives student_entropy alone, and position_policy {args.position_policy!r} reads "
            f"{', '.join(names) or 'no score'}; use score_source: exact"
        )


def _check_divergence(args: Any) -> None:
    limits = {"jsd_beta": "divergence: forward_kl and reverse_kl", "skew_alpha": "forward_kl and no loss at all"}
    for name, meaning in limits.items():
        if not 0 < getattr(args, name) < 1:
            raise ValueError(f"{name} {getattr(args, name)} is outside (0, 1); its limits are {meaning}")
    for name in ("decoupled_alpha", "decoupled_beta"):
        if getattr(args, name) < 0:
            raise ValueError(f"{name} {getattr(args, name)} must not be negative; 0 leaves that part out")
    if args.decoupled_alpha == args.decoupled_beta == 0:
        raise ValueError("decoupled_alpha and decoupled_beta are both 0, which leaves no loss; set one of them above 0")
    if args.divergence == "at_kd" and args.position_policy in NEEDS_POSITIVE:
        raise ValueError(
            f"divergence 'at_kd' weighs positions itself, and so does position_policy {args.position_policy!r}; use "
            "another divergence, or position_policy: all"
        )


def _check_classes(args: Any) -> None:
    one_of("class_selection", args.class_selection, CLASS_SELECTIONS)
    if args.class_samples < 1:
        raise ValueError(f"class_samples {args.class_samples} must be at least 1; the paper draws 64")
    if args.sampled_softmax < 0:
        raise ValueError(f"sampled_softmax {args.sampled_softmax} must not be negative; 0 uses all classes")
    if args.class_selection == "full":
        if args.sampled_softmax:
            raise ValueError(
                f"sampled_softmax {args.sampled_softmax} compares the student on kept classes only; set "
                "class_selection: rs_kd, or sampled_softmax: 0"
            )
        return
    if args.divergence != "forward_kl":
        raise ValueError(
            f"class_selection {args.class_selection!r} estimates forward KL only; set divergence: forward_kl, or "
            f"class_selection: full for {args.divergence}"
        )
    if args.sampled_softmax and args.kd_weight < 1:
        raise ValueError(
            f"kd_weight {args.kd_weight} mixes in a cross-entropy, which needs the student's whole softmax; set "
            "kd_weight: 1 or sampled_softmax: 0"
        )
    if args.sampled_softmax and args.sampled_softmax <= args.class_samples:
        raise ValueError(
            f"sampled_softmax {args.sampled_softmax} must be above class_samples {args.class_samples}: with fewer "
            "random classes than kept ones the normaliser would be mostly noise; a few thousand are usual"
        )


def _check_cache(args: Any) -> None:
    if args.lmbda > 0:
        raise ValueError(
            f"lmbda {args.lmbda} with teacher_cache: a cache knows the data's rows, and rollouts are new text; set "
            "lmbda: 0, or leave teacher_cache out"
        )
    if args.class_selection != "rs_kd":
        raise ValueError(f"teacher_cache holds rs_kd targets; class_selection {args.class_selection!r} needs a teacher")
    if args.class_samples > 64:
        raise ValueError(f"class_samples {args.class_samples} with teacher_cache: counts have 6 bits; use at most 64")
    names = args.scoring.names if args.scoring is not None else ()
    # A cache may hold the teacher's entropy; whether this one does is known when it is opened.
    if needy := [name for name in names if SCORES[name].needs_teacher and name != "teacher_entropy"]:
        raise ValueError(
            f"teacher_cache lacks what {', '.join(needy)} of position_policy {args.position_policy!r} needs: the "
            "teacher's whole distribution; use position_score: student_entropy or student_ce, or leave it out"
        )
    if args.sample_fraction < 1 and args.sample_score not in ("student_entropy", "student_ce", "random"):
        raise ValueError(
            f"sample_score {args.sample_score!r} needs a teacher, and teacher_cache stands in for it; choose "
            "student_entropy, student_ce or random"
        )


def _warn_of_unused(args: Any) -> None:
    """Options of a policy, divergence or class selection that was not chosen."""
    unused = {name for option, name in POLICY_OPTIONS.items() if option not in options_of(args.position_policy)}
    for divergence, names in DIVERGENCE_OPTIONS.items():
        unused |= set(names.values()) if divergence != args.divergence else set()
    if args.class_selection == "full":
        unused.add("class_samples")
    for name in sorted(unused):
        if getattr(args, name) != _default(args, name):
            logger.warning(f"{name} {getattr(args, name)} has no effect on what was chosen")


def _default(args: Any, name: str) -> Any:
    return type(args).__dataclass_fields__[name].default


def one_of(name: str, value: object, known: Collection[str]) -> None:
    """Raise ValueError for an unknown name."""
    if value not in known:
        raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")


def within(name: str, value: float, low: float, high: float, hint: str) -> None:
    """Raise ValueError for a number outside [low, high]."""
    if not low <= value <= high:
        raise ValueError(f"{name} {value} is outside [{low}, {high}]; {hint}")
