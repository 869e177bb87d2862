"""Check values and combinations of options before any model loads.

The functions raise ValueError. The message names the field, the value and how to fix it.
"""

import importlib.util
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml
from transformers.utils import logging

from rollouts import ENGINES
from sekd.classes import CLASS_SELECTIONS
from sekd.losses import DIVERGENCES
from sekd.policies import POLICIES, make_policy
from sekd.registry import all_options, one_of
from sekd.scores import RANDOM, SCORES, make_scoring, needs_teacher

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from peft import PeftConfig

    from rollouts import RolloutEngine
    from sekd.config import SEKDConfig

logger = logging.get_logger(__name__)


def parse_score(value: Any) -> Any:
    """``position_score`` as a name or a mapping. The command line gives a mapping as text."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(
            f"position_score {value!r} is not a mapping; write for example '{{student_entropy: 1.0, kl: 0.5}}'"
        ) from error


def check_numbers(args: "SEKDConfig", names: Sequence[str]) -> None:
    """Check that the numeric fields are finite numbers."""
    for name in names:
        value = getattr(args, name)
        # argparse changes the type of an `int | None` field to int.
        if value is None and _default(args, name) is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} {value!r} must be a finite number")
        whole = type(args).__dataclass_fields__[name].type in (int, "int")
        if whole and value != int(value):
            raise ValueError(f"{name} {value!r} must be a whole number")


def check_names(args: "SEKDConfig") -> None:
    """Check the names of strategies. It runs first, because other checks read their records."""
    if args.divergence is not None:
        one_of("divergence", args.divergence, DIVERGENCES)
    one_of("position_policy", args.position_policy, POLICIES)
    one_of("class_selection", args.class_selection, CLASS_SELECTIONS)
    one_of("sample_score", args.sample_score, (*SCORES, RANDOM))
    one_of("score_source", args.score_source, ("exact", "rollout"))
    one_of("teacher_dtype", args.teacher_dtype, ("auto", "bfloat16", "float16", "float32"))
    one_of("overlong_prompts", args.overlong_prompts, ("error", "drop"))
    one_of("rollout_engine", args.rollout_engine, ENGINES)
    one_of("rollout_transfer", args.rollout_transfer, ("file", "nccl"))


def check_selection(args: "SEKDConfig") -> None:
    """Check positions, divergence, classes, cache and samples."""
    make_policy(args.position_policy, args.position_fraction)
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
    if args.sample_pool is not None and (isinstance(args.sample_pool, bool) or args.sample_pool < 1):
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
            if getattr(args, field) != _default(args, field):
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
    if args.lmbda == 0:
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
    if args.lmbda > 0:
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
        if getattr(args, name) != _default(args, name):
            logger.warning(f"{name} {getattr(args, name)} has no effect with the chosen policy, divergence and classes")


def check_prompts(args: "SEKDConfig") -> None:
    """Check prompts from text, and prompts that only the teacher sees."""
    length, limit = args.text_prompt_length, args.max_prompt_length
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= limit):
        raise ValueError(
            f"text_prompt_length {length} must be a whole number from 1 to max_prompt_length {limit}; change either"
        )
    if "{prompt}" not in args.prompt_template:
        raise ValueError(f"prompt_template {args.prompt_template!r} lacks {{prompt}}, the place of the prompt")
    fields = " and ".join(args.teacher_context)
    if fields and args.teacher_cache is not None:
        raise ValueError(
            f"{fields} with teacher_cache {args.teacher_cache!r}: a cache holds the teacher's distributions after "
            "the student's prompts; remove teacher_cache, or the teacher's context"
        )
    if fields and args.supervise_prompt:
        raise ValueError(
            f"supervise_prompt true with {fields}: the teacher reads another prompt, so only completions can be "
            "compared; set supervise_prompt: false, or leave the teacher's context out"
        )


def check_sampling(args: "SEKDConfig") -> None:
    """Check how completions are sampled."""
    if args.temperature < 0:
        raise ValueError(f"temperature {args.temperature} must not be negative; 0 is greedy")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"top_p {args.top_p} is outside (0, 1]; 1 samples from all tokens")
    if args.top_k < 0:
        raise ValueError(f"top_k {args.top_k} must not be negative; 0 samples from all tokens")
    within("min_p", args.min_p, 0, 1, "0 samples from all tokens")
    if args.repetition_penalty <= 0:
        raise ValueError(f"repetition_penalty {args.repetition_penalty} must be above 0; 1 disables it")
    args.stop_strings = list_of_texts("stop_strings", args.stop_strings)


def check_rollouts(args: "SEKDConfig") -> None:
    """Check engines, rounds and reuse."""
    engine = ENGINES[args.rollout_engine]
    args.rollout_server_urls = list_of_texts("rollout_server_urls", args.rollout_server_urls)
    for name in ("rollouts_per_prompt", "rollout_batches"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} {getattr(args, name)} must be at least 1")
    if args.rollouts_per_prompt > 1 and args.lmbda < 1:
        raise ValueError(
            f"rollouts_per_prompt {args.rollouts_per_prompt} with lmbda {args.lmbda}: steps that learn from the "
            "data would repeat each sample; set lmbda: 1, or rollouts_per_prompt: 1"
        )
    if args.rollouts_per_prompt > 1 and (args.temperature == 0 or args.top_k == 1):
        raise ValueError(
            f"rollouts_per_prompt {args.rollouts_per_prompt} with temperature {args.temperature} and top_k "
            f"{args.top_k} generates the same completion again; raise the temperature, or set top_k: 0"
        )
    if args.rollout_staleness not in (0, 1):
        raise ValueError(f"rollout_staleness {args.rollout_staleness} must be 0 or 1: at most one round is ahead")
    if args.rollout_staleness and not engine.generates_in_background:
        raise ValueError(
            f"rollout_staleness 1 with rollout_engine {args.rollout_engine!r}, which generates on the trainer's own "
            "device, saves no time; use rollout_engine: vllm_server, or rollout_staleness: 0"
        )
    if args.rollout_transfer != "file" and not engine.uses_servers:
        raise ValueError(
            f"rollout_transfer {args.rollout_transfer!r} is for rollout_engine vllm_server; leave it out for "
            f"{args.rollout_engine!r}"
        )
    if args.rollout_timeout <= 0:
        raise ValueError(f"rollout_timeout {args.rollout_timeout} must be above 0 seconds")
    if not 0 < args.vllm_gpu_memory_utilization <= 1:
        raise ValueError(
            f"vllm_gpu_memory_utilization {args.vllm_gpu_memory_utilization} is outside (0, 1]; 0.3 leaves memory for "
            "the trainer"
        )
    if args.vllm_kv_cache_gib < 1:
        raise ValueError(f"vllm_kv_cache_gib {args.vllm_kv_cache_gib} must be at least 1, vLLM's minimum")
    if args.log_completions_steps < 0:
        raise ValueError(f"log_completions_steps {args.log_completions_steps} must not be negative; 0 is never")
    _check_urls(args.rollout_server_urls, engine.uses_servers)


def _check_urls(urls: Sequence[str], needed: bool) -> None:
    if not urls and needed:
        raise ValueError("rollout_server_urls is empty: name the servers of rollout_engine vllm_server")
    for url in urls:
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
        except ValueError:  # the port is not a number
            good = False
        if not good or parts.path.rstrip("/").endswith("/v1"):
            raise ValueError(
                f"rollout_server_urls: {url!r} is not a server's address; write http://127.0.0.1:8000, without /v1"
            )
    if len({url.rstrip("/") for url in urls}) < len(urls):
        raise ValueError(f"rollout_server_urls {urls} names a server twice; leave one out")


def list_of_texts(name: str, value: Any) -> list[str]:
    """A list of texts. A single text becomes a list of one."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{name} {value!r} must be a list of texts that are not empty, such as [one, two]")
    return list(texts)


def check_inputs(
    args: "SEKDConfig",
    train_dataset: "Dataset | IterableDataset",
    init: dict[str, Any],
    peft_config: "PeftConfig | None",
    is_quantized: bool,
    rollout_engine: "RolloutEngine | None",
) -> None:
    """Check that a trainer's data, student and engine work together."""
    from datasets import IterableDataset
    from transformers.integrations import is_deepspeed_zero3_enabled

    if peft_config is not None and peft_config.is_prompt_learning:
        raise ValueError(f"peft_type {peft_config.peft_type} adds virtual tokens, which shift the positions; use LoRA")
    quantized = init.get("quantization_config") is not None or is_quantized
    if quantized and peft_config is None:
        raise ValueError("a quantized student cannot be trained in full: set use_peft: true")
    requires = ENGINES[args.rollout_engine].requires
    if args.lmbda > 0 and rollout_engine is None and requires is not None and not is_installed(requires):
        raise ValueError(
            f"rollout_engine {args.rollout_engine!r} needs {requires}, which is not installed: run "
            '`bash scripts/setup.sh` (or `pip install "sekd[vllm]"` on a CUDA machine), or choose rollout_engine: hf'
        )
    if quantized and args.lmbda > 0 and not engine_trait(args, rollout_engine, "shares_model"):
        raise ValueError(f"rollout_engine {args.rollout_engine!r} cannot take a quantized student; use hf")

    if isinstance(train_dataset, IterableDataset):
        if args.max_steps <= 0:
            raise ValueError("a stream has no length: set max_steps to the number of optimizer steps")
        args.check_stream()
        if args.teacher_cache is not None and args.sample_pool is None:
            raise ValueError("teacher_cache needs data of known length; set sample_pool, or dataset_streaming: false")
    if args.world_size > 1 and args.lmbda > 0 and rollout_engine is None and engine_trait(args, None, "single_process"):
        raise ValueError(
            f"rollout_engine {args.rollout_engine!r} works with a single process; use vllm_server (or hf) with several"
        )
    if is_deepspeed_zero3_enabled():
        raise ValueError("DeepSpeed ZeRO-3 would shard the teacher too; use FSDP2, or ZeRO stage 2")


def engine_trait(args: "SEKDConfig", engine: "RolloutEngine | None", name: str) -> Any:
    """A property of a run's engine: of the ``engine`` that was passed if it has the attribute, else by its name."""
    return getattr(engine, name, getattr(ENGINES[args.rollout_engine], name))


def is_installed(package: str) -> bool:
    """Whether a package can be imported. It is not imported here."""
    return importlib.util.find_spec(package) is not None


def _default(args: "SEKDConfig", name: str) -> Any:
    return type(args).__dataclass_fields__[name].default


def within(name: str, value: float, low: float, high: float, hint: str) -> None:
    """Raise ValueError for a number outside [low, high]."""
    if not low <= value <= high:
        raise ValueError(f"{name} {value} is outside [{low}, {high}]; {hint}")
