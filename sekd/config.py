"""SEKDConfig: every choice of a run beyond the models and the data, checked before anything is loaded."""

import importlib.util
import json
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from sekd.classes import CLASS_SELECTIONS
from sekd.losses import DIVERGENCES
from sekd.policies import NEEDS_POSITIVE, POLICIES, READS, check_option, make_policy, options_of
from sekd.scores import NORMALIZATIONS, SCORES, Scoring, make_scoring

ENGINES = ("vllm", "hf")
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


def _help(text: str) -> dict:
    return {"help": text.replace("%", "%%")}  # argparse formats it


@dataclass
class SEKDConfig(TrainingArguments):
    """``transformers.TrainingArguments`` and the fields of selective distillation; each field's help says what it does.

    Raises:
        ValueError: a value that cannot work, with the field, the value and the remedy.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "chat_template_kwargs", "position_score"]  # noqa: RUF012

    # The teacher
    teacher_model_name_or_path: str | None = field(default=None, metadata=_help("Folder or hub id of the teacher."))
    teacher_model_revision: str = field(default="main", metadata=_help("Branch, tag or commit of the teacher."))
    teacher_dtype: str = field(
        default="bfloat16",
        metadata=_help("The teacher's weights: auto, bfloat16, float16, float32."),
    )

    teacher_cache: str | None = field(
        default=None,
        metadata=_help(
            "Folder of `sekd cache build`: its rs_kd targets stand in for the teacher, which is not loaded."
        ),
    )

    # What is distilled, and where
    lmbda: float = field(
        default=0.0,
        metadata=_help("Share of optimizer steps that are on-policy: 0 learns from the data, 1 from rollouts."),
    )
    divergence: str | None = field(
        default=None,
        metadata=_help(
            f"One of {', '.join(DIVERGENCES)}. If not given: reverse_kl if lmbda > 0 and class_selection is full, else "
            "forward_kl."
        ),
    )
    jsd_beta: float = field(default=0.5, metadata=_help("beta of divergence jsd, inside (0, 1)."))
    skew_alpha: float = field(default=0.1, metadata=_help("alpha of divergence skew_kl, inside (0, 1)."))
    decoupled_alpha: float = field(default=1.0, metadata=_help("Weight of decoupled_kl's target part."))
    decoupled_beta: float = field(default=8.0, metadata=_help("Weight of decoupled_kl's non-target part."))
    kd_weight: float = field(default=1.0, metadata=_help("Weight of the divergence; the rest is cross-entropy."))
    kd_temperature: float = field(default=1.0, metadata=_help("Temperature of both distributions in the divergence."))
    position_score: dict | str | None = field(
        default="student_entropy",
        metadata=_help(
            f"How important a position is: {', '.join(SCORES)}; or weights of several, such as "
            '{"student_entropy": 1.0, "kl": 0.5}.'
        ),
    )
    score_normalization: str = field(
        default="none",
        metadata=_help(f"Each score within its sequence, before weights apply: {', '.join(NORMALIZATIONS)}."),
    )
    position_policy: str = field(default="top_k", metadata=_help(f"Which are distilled: {', '.join(POLICIES)}."))
    position_fraction: float = field(
        default=0.2, metadata=_help("Share k of a sequence's positions, in (0, 1]; all and weighted ignore it.")
    )
    position_skip: int = field(default=0, metadata=_help("Never distil the first so many positions of a sequence."))
    curriculum_steps: int = field(default=4000, metadata=_help("Steps in which curriculum reaches the hardest."))
    gls_queue_size: int = field(default=30_000, metadata=_help("Scores that gls takes its threshold from."))
    pos_rs_exponent: float = field(default=1.0, metadata=_help("pos_rs draws from score^this; below 1 is flatter."))
    pos_rs_coverage: float = field(default=0.0, metadata=_help("Part of pos_rs's budget that top_k gets, in [0, 1)."))
    bandit_alpha: float = field(default=1.0, metadata=_help("How much bandit explores."))
    bandit_ridge: float = field(default=1.0, metadata=_help("Ridge penalty of bandit's regression."))

    # Classes
    class_selection: str = field(
        default="full",
        metadata=_help(
            f"The classes of a position: {', '.join(CLASS_SELECTIONS)}. rs_kd draws class_samples from the teacher "
            "(unbiased); top_k_classes keeps the likeliest class_samples (biased)."
        ),
    )
    class_samples: int = field(default=64, metadata=_help("U: draws of rs_kd, or classes of top_k_classes."))
    sampled_softmax: int = field(
        default=0,
        metadata=_help("Normalise the student over the kept classes and so many random others; 0 is all classes."),
    )

    # Samples
    sample_fraction: float = field(
        default=1.0, metadata=_help("Share l of the samples to train on, chosen once with the initial models.")
    )
    sample_score: str = field(
        default="student_entropy",
        metadata=_help(f"Mean over a sample's positions that ranks it: {', '.join(SAMPLE_SCORES)}."),
    )
    samples_file: str | None = field(
        default=None, metadata=_help("Where scores and choice are kept; samples.json in output_dir if not given.")
    )
    sample_pool: int | None = field(
        default=None, metadata=_help("Choose samples from the first so many of a stream, which has no length.")
    )

    # Data
    prompt_column: str = field(default="prompt", metadata=_help("Column of prompts: text or chat messages."))
    completion_column: str = field(default="completion", metadata=_help("Column of completions."))
    messages_column: str = field(default="messages", metadata=_help("Column of whole conversations."))
    text_column: str = field(default="text", metadata=_help("Column of plain text."))
    prompt_template: str = field(
        default="{prompt}", metadata=_help("A text prompt is put in the place of {prompt} before it is tokenized.")
    )
    use_chat_template: bool = field(
        default=False, metadata=_help("Make text prompts a user turn and completions the assistant's.")
    )
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata=_help("Variables of the chat template, for example {enable_thinking: false}.")
    )
    system_prompt: str | None = field(default=None, metadata=_help("System turn before each chat prompt."))
    supervise_prompt: bool = field(default=False, metadata=_help("Distil prompt tokens too (off-policy)."))
    packing: bool = field(default=True, metadata=_help("Pack text into max_length; documents never see each other."))
    max_length: int = field(default=1024, metadata=_help("Longest training sequence, in tokens."))
    max_prompt_length: int = field(default=512, metadata=_help("Longest prompt, in tokens."))
    overlong_prompts: str = field(
        default="error",
        metadata=_help("Prompts over max_prompt_length: error stops, drop drops and counts them."),
    )

    eval_dataset_name: str | None = field(
        default=None,
        metadata=_help("Held-out data, like dataset_name; dataset_test_split of dataset_name if not given."),
    )
    max_eval_samples: int | None = field(default=None, metadata=_help("Evaluate on the first so many sequences."))

    # Rollouts
    rollout_engine: str = field(default="vllm", metadata=_help(f"Who generates: {', '.join(ENGINES)}."))
    temperature: float = field(default=1.0, metadata=_help("Sampling temperature; 0 is greedy."))
    top_p: float = field(default=1.0, metadata=_help("Nucleus sampling: smallest set of this mass."))
    top_k: int = field(default=0, metadata=_help("Sample from the k likeliest tokens; 0 is all."))
    min_p: float = field(default=0.0, metadata=_help("Drop tokens under this share of the likeliest."))
    max_completion_length: int = field(default=256, metadata=_help("Longest completion, in tokens."))
    vllm_gpu_memory_utilization: float = field(default=0.3, metadata=_help("Share of the GPU that vLLM may take."))
    vllm_kv_cache_gib: float = field(default=1.0, metadata=_help("vLLM's key-value cache on a CPU, in GiB."))
    log_completions_steps: int = field(default=50, metadata=_help("Print a few rollouts every so often; 0 is never."))

    # Memory
    head_chunk_rows: int = field(default=256, metadata=_help("Rows that pass an LM head at once."))

    # Defaults of TrainingArguments that distillation wants otherwise
    learning_rate: float = field(default=1e-5, metadata=_help("Initial learning rate."))
    bf16: bool | None = field(
        default=None, metadata=_help("bf16 autocast over fp32 weights; where the hardware has it, if not given.")
    )
    logging_steps: float = field(default=10, metadata=_help("Log every so many steps."))
    remove_unused_columns: bool = field(default=False, metadata=_help("Unused: sekd reads its own columns."))
    logging_nan_inf_filter: bool = field(default=False, metadata=_help("Unused: a non-finite loss stops the run."))

    def __post_init__(self) -> None:
        if self.teacher_cache is not None and self.class_selection == "full":
            self.class_selection = "rs_kd"  # what a cache holds
        if self.divergence is None:
            self.divergence = "reverse_kl" if self.lmbda > 0 and self.class_selection == "full" else "forward_kl"
        if isinstance(self.position_score, str) and self.position_score.lstrip().startswith("{"):
            self.position_score = _mapping("position_score", self.position_score)
        self._check()
        if not _has_accelerator():
            self.use_cpu = True
        if self.bf16 is None:
            self.bf16 = not self.fp16 and _bf16_is_native(self.use_cpu)
        super().__post_init__()
        # The loader hands out samples, not tensors, so each process reads its own share of a stream.
        self.accelerator_config.dispatch_batches = False

    def _check(self) -> None:
        _one_of("divergence", self.divergence, DIVERGENCES)
        self._check_selection()
        _one_of("teacher_dtype", self.teacher_dtype, ("auto", "bfloat16", "float16", "float32"))
        _one_of("overlong_prompts", self.overlong_prompts, ("error", "drop"))
        _one_of("rollout_engine", self.rollout_engine, ENGINES)
        _within("lmbda", self.lmbda, 0, 1, "0 is off-policy, 1 on-policy")
        _within("kd_weight", self.kd_weight, 0, 1, "1 is the divergence alone, 0 cross-entropy alone")
        if self.kd_temperature <= 0:
            raise ValueError(f"kd_temperature {self.kd_temperature} must be above 0; 1 leaves the distributions alone")
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature} must not be negative; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is outside (0, 1]; 1 samples from all tokens")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} must not be negative; 0 samples from all tokens")
        _within("min_p", self.min_p, 0, 1, "0 samples from all tokens")
        for name in ("max_length", "max_prompt_length", "max_completion_length", "head_chunk_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if "{prompt}" not in self.prompt_template:
            raise ValueError(f"prompt_template {self.prompt_template!r} lacks {{prompt}}, the place of the prompt")
        if self.torch_compile:
            raise ValueError("torch_compile: true is not supported: the student's forward is called in parts")
        if any(name in str(self.optim) for name in ("bnb", "8bit", "4bit")) and not _installed("bitsandbytes"):
            raise ValueError(f"optim {self.optim} needs bitsandbytes: run `pip install bitsandbytes`")
        if self.lmbda > 0 and self.rollout_engine == "vllm" and not _installed("vllm"):
            raise ValueError(
                "rollout_engine 'vllm' needs vLLM, which is not installed: run `bash scripts/setup.sh` "
                '(or `pip install "sekd[vllm]"` on a CUDA machine), or choose rollout_engine: hf'
            )

    def _check_selection(self) -> None:
        make_policy(self.position_policy, self.position_fraction)
        for option, name in POLICY_OPTIONS.items():
            check_option(option, getattr(self, name), name)
        scoring = make_scoring(self.position_score or "", self.score_normalization)
        if self.position_policy in NEEDS_POSITIVE:
            if self.score_normalization == "zscore":
                raise ValueError(
                    f"score_normalization 'zscore' makes negative scores, which position_policy "
                    f"{self.position_policy!r} cannot take for proportions; use minmax or none"
                )
            if min(scoring.weights or (0,)) < 0:
                raise ValueError(
                    f"position_score has a negative weight, and position_policy {self.position_policy!r} takes scores "
                    "for proportions; use weights of 0 or more, or position_policy: top_k"
                )
        if self.position_skip < 0:
            raise ValueError(f"position_skip {self.position_skip} must not be negative; 0 skips no position")
        limits = {"jsd_beta": "divergence: forward_kl and reverse_kl", "skew_alpha": "forward_kl and no loss at all"}
        for name, meaning in limits.items():
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is outside (0, 1); its limits are {meaning}")
        for name in ("decoupled_alpha", "decoupled_beta"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must not be negative; 0 leaves that part out")
        self._check_classes()
        if self.teacher_cache is not None:
            self._check_cache()
        _one_of("sample_score", self.sample_score, SAMPLE_SCORES)
        if not 0 < self.sample_fraction <= 1:
            raise ValueError(f"sample_fraction {self.sample_fraction} is outside (0, 1]; 0.2 keeps 20 % of the samples")
        if self.sample_pool is not None and self.sample_pool < 1:
            raise ValueError(f"sample_pool {self.sample_pool} must be at least 1; it counts samples")

    def _check_classes(self) -> None:
        _one_of("class_selection", self.class_selection, CLASS_SELECTIONS)
        if self.class_samples < 1:
            raise ValueError(f"class_samples {self.class_samples} must be at least 1; the paper draws 64")
        if self.sampled_softmax < 0:
            raise ValueError(f"sampled_softmax {self.sampled_softmax} must not be negative; 0 uses all classes")
        if self.class_selection == "full":
            if self.sampled_softmax:
                raise ValueError(
                    f"sampled_softmax {self.sampled_softmax} compares the student on kept classes only; set "
                    "class_selection: rs_kd, or sampled_softmax: 0"
                )
            return
        if self.divergence != "forward_kl":
            raise ValueError(
                f"class_selection {self.class_selection!r} estimates forward KL only; set divergence: forward_kl, or "
                f"class_selection: full for {self.divergence}"
            )
        if self.sampled_softmax and self.kd_weight < 1:
            raise ValueError(
                f"kd_weight {self.kd_weight} mixes in a cross-entropy, which needs the student's whole softmax; set "
                "kd_weight: 1 or sampled_softmax: 0"
            )
        if self.sampled_softmax and self.sampled_softmax <= self.class_samples:
            raise ValueError(
                f"sampled_softmax {self.sampled_softmax} must be above class_samples {self.class_samples}: with fewer "
                "random classes than kept ones the normaliser would be mostly noise; a few thousand are usual"
            )

    def _check_cache(self) -> None:
        if self.lmbda > 0:
            raise ValueError(
                f"lmbda {self.lmbda} with teacher_cache: a cache knows the data's rows, and rollouts are new text; set "
                "lmbda: 0, or leave teacher_cache out"
            )
        if self.class_selection != "rs_kd":
            raise ValueError(
                f"teacher_cache holds rs_kd targets; class_selection {self.class_selection!r} needs a teacher"
            )
        if self.class_samples > 64:
            raise ValueError(
                f"class_samples {self.class_samples} with teacher_cache: counts have 6 bits; use at most 64"
            )
        if (scoring := self.scoring) is not None and scoring.needs_teacher:
            needy = [name for name in scoring.names if SCORES[name].needs_teacher]  # type: ignore[attr-defined]
            raise ValueError(
                f"teacher_cache lacks what {', '.join(needy)} of position_policy {self.position_policy!r} needs: the "
                "teacher's whole distribution; use position_score: student_entropy or student_ce, or leave it out"
            )
        if self.sample_fraction < 1 and self.sample_score not in ("student_entropy", "student_ce", "random"):
            raise ValueError(
                f"sample_score {self.sample_score!r} needs a teacher, and teacher_cache stands in for it; choose "
                "student_entropy, student_ce or random"
            )

    def check_stream(self) -> None:
        """Raise ValueError where the data is a stream and samples are to be chosen from all of it."""
        if self.sample_fraction < 1 and self.sample_pool is None:
            raise ValueError(
                f"sample_fraction {self.sample_fraction} of a stream is unknown, since it has no length; set "
                "sample_pool to the number of its first samples to choose from, or dataset_streaming: false"
            )

    @property
    def scoring(self) -> Scoring | None:
        """The scores that the position policy reads; None where it reads none, or takes all positions anyway."""
        names = READS.get(self.position_policy)
        if names is not None:
            return Scoring(names) if names else None
        if self.position_policy == "top_k" and self.position_fraction == 1:
            return None
        return make_scoring(self.position_score or "", self.score_normalization)

    @property
    def policy_options(self) -> dict[str, float]:
        """The options of the position policy, from their fields."""
        has = options_of(self.position_policy)
        return {option: getattr(self, name) for option, name in POLICY_OPTIONS.items() if option in has}

    @property
    def divergence_options(self) -> dict[str, float]:
        """The options of the divergence, from their fields."""
        fields = DIVERGENCE_OPTIONS.get(str(self.divergence), {})
        return {option: getattr(self, name) for option, name in fields.items()}


def _mapping(name: str, text: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f'{name} {text!r} is no JSON ({error}); write {{"student_entropy": 1.0}}') from error
    return value


def _one_of(name: str, value: object, known: Collection[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")


def _within(name: str, value: float, low: float, high: float, hint: str) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} {value} is outside [{low}, {high}]; {hint}")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _has_accelerator() -> bool:
    return torch.accelerator.is_available()


def _bf16_is_native(on_cpu: bool) -> bool:
    """Whether bf16 is faster than float32 here, not merely emulated."""
    if on_cpu:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 8
