"""SEKDConfig: every choice of a run beyond the models and the data, checked before anything is loaded."""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from rollouts import ENGINES
from sekd.classes import CLASS_SELECTIONS
from sekd.losses import DIVERGENCES
from sekd.policies import POLICIES
from sekd.scores import NORMALIZATIONS, RANDOM, SCORES, Scoring, make_scoring
from sekd.validation import (
    all_options,
    check_names,
    check_numbers,
    check_prompts,
    check_rollouts,
    check_sampling,
    check_selection,
    import_module,
    is_installed,
    list_of_texts,
    parse_score,
    within,
)


def _help(text: str) -> dict:
    return {"help": text.replace("%", "%%")}  # argparse formats it


def _option(name: str) -> Any:
    """The field of an option of a policy or divergence: default and help stand in its record."""
    option = all_options()[name]
    return field(default=option.default, metadata=_help(option.help))


@dataclass
class SEKDConfig(TrainingArguments):
    """``transformers.TrainingArguments`` and the fields of selective distillation; each field has its help.

    Raises:
        ValueError: an invalid value, with the field, the value and how to fix it.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "chat_template_kwargs", "position_score"]  # noqa: RUF012

    import_modules: list[str] = field(
        default_factory=list,
        metadata=_help("Modules to import first, which add your own scores, policies, divergences or engines."),
    )

    # The teacher
    teacher_model_name_or_path: str | None = field(default=None, metadata=_help("Folder or hub id of the teacher."))
    teacher_model_revision: str = field(default="main", metadata=_help("Branch, tag or commit of the teacher."))
    teacher_dtype: str = field(
        default="bfloat16",
        metadata=_help("Dtype of the teacher's weights: auto, bfloat16, float16 or float32."),
    )

    teacher_cache: str | None = field(
        default=None,
        metadata=_help("Folder of `sekd cache build`: its rs_kd targets replace the teacher, which is not loaded."),
    )

    cache_teacher_entropy: bool = field(
        default=False,
        metadata=_help(
            "`sekd cache build` keeps the teacher's entropy too, a byte a position, for position_score teacher_entropy."
        ),
    )

    # What is distilled, and where
    lmbda: float = field(
        default=0.0,
        metadata=_help(
            "Share of on-policy optimizer steps: 0 learns from the data, 1 from rollouts, between draws for each step."
        ),
    )
    divergence: str | None = field(
        default=None,
        metadata=_help(
            f"One of {', '.join(DIVERGENCES)}. Default: reverse_kl if lmbda > 0 and class_selection is full, else "
            "forward_kl."
        ),
    )
    jsd_beta: float = _option("jsd_beta")
    skew_alpha: float = _option("skew_alpha")
    decoupled_alpha: float = _option("decoupled_alpha")
    decoupled_beta: float = _option("decoupled_beta")
    kd_weight: float = field(
        default=1.0, metadata=_help("Weight of the divergence in the loss; the rest is cross-entropy.")
    )
    kd_temperature: float = field(default=1.0, metadata=_help("Temperature of both distributions in the divergence."))
    position_score: dict | str | None = field(
        default="student_entropy",
        metadata=_help(
            f"How important a position is: {', '.join(SCORES)}; or weights of several scores, such as "
            '{"student_entropy": 1.0, "kl": 0.5}.'
        ),
    )
    score_source: str = field(
        default="exact",
        metadata=_help(
            "Where student_entropy comes from: exact runs the head over all positions; rollout uses the sampler's "
            "score_logprobs largest log-probabilities in on-policy steps."
        ),
    )
    score_logprobs: int = field(default=20, metadata=_help("Number of log-probabilities of score_source rollout."))
    score_normalization: str = field(
        default="none",
        metadata=_help(
            f"How each score is normalised within its sequence, before weights apply: {', '.join(NORMALIZATIONS)}."
        ),
    )
    position_policy: str = field(
        default="top_k", metadata=_help(f"Which positions are distilled: {', '.join(POLICIES)}.")
    )
    position_fraction: float = field(
        default=0.2, metadata=_help("Share k of a sequence's positions, in (0, 1]; all and weighted ignore it.")
    )
    position_skip: int = field(default=0, metadata=_help("Number of first positions of each document to leave out."))
    curriculum_steps: int = _option("curriculum_steps")
    gls_queue_size: int = _option("gls_queue_size")
    pos_rs_exponent: float = _option("pos_rs_exponent")
    pos_rs_coverage: float = _option("pos_rs_coverage")
    bandit_alpha: float = _option("bandit_alpha")
    bandit_ridge: float = _option("bandit_ridge")

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
        metadata=_help("Normalise the student over the kept classes and this number of random ones; 0 is all classes."),
    )

    # Samples
    sample_fraction: float = field(
        default=1.0, metadata=_help("Share l of the samples to train on, chosen once by the initial models.")
    )
    sample_score: str = field(
        default="student_entropy",
        metadata=_help(
            f"Samples are ranked by the mean of this score over their positions: {', '.join((*SCORES, RANDOM))}."
        ),
    )
    samples_file: str | None = field(
        default=None, metadata=_help("File of the scores and the choice. Default: samples.json in output_dir.")
    )
    sample_pool: int | None = field(
        default=None, metadata=_help("Number of first samples to take; a stream needs it for sample_fraction.")
    )

    # Data
    prompt_column: str = field(default="prompt", metadata=_help("Column of prompts: text or chat messages."))
    completion_column: str = field(default="completion", metadata=_help("Column of completions."))
    messages_column: str = field(default="messages", metadata=_help("Column of whole conversations."))
    text_column: str = field(default="text", metadata=_help("Column of plain text."))
    prompt_template: str = field(
        default="{prompt}", metadata=_help("Text around a text prompt; {prompt} is the prompt.")
    )
    use_chat_template: bool = field(
        default=False, metadata=_help("Text prompts become a user turn, and completions the assistant's turn.")
    )
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata=_help("Variables of the chat template, such as {enable_thinking: false}.")
    )
    system_prompt: str | None = field(default=None, metadata=_help("System turn before each chat prompt."))
    teacher_system_prompt: str | None = field(
        default=None,
        metadata=_help("System turn that the teacher sees instead of the student's, in chat prompts."),
    )
    teacher_prompt_prefix: str | None = field(
        default=None,
        metadata=_help(
            "Text before the prompt (or before the last user turn of a chat) that only the teacher sees. {column} "
            "becomes the row's value of that column, as in 'The answer is {answer}. '; other braces stay as they are."
        ),
    )
    text_prompt_length: int | None = field(
        default=None,
        metadata=_help(
            "On-policy from plain text: the first N tokens of a document are the prompt, and the student continues "
            "it. Documents of at most N tokens are dropped and counted."
        ),
    )
    supervise_prompt: bool = field(default=False, metadata=_help("Distil the prompt's tokens too (off-policy)."))
    packing: bool = field(default=True, metadata=_help("Pack text into max_length; documents never see each other."))
    max_length: int = field(default=1024, metadata=_help("Longest training sequence, in tokens."))
    max_prompt_length: int = field(default=512, metadata=_help("Longest prompt, in tokens."))
    overlong_prompts: str = field(
        default="error",
        metadata=_help("Prompts over max_prompt_length: error stops the run; drop drops and counts them."),
    )

    rollouts: str | None = field(
        default=None,
        metadata=_help("File of save_rollouts to learn from, off-policy, instead of dataset_name."),
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata=_help("Held-out data, like dataset_name. Default: dataset_test_split of dataset_name."),
    )
    max_eval_samples: int | None = field(
        default=None, metadata=_help("Number of held-out sequences to evaluate; all by default.")
    )

    # Rollouts
    rollout_engine: str = field(default="vllm", metadata=_help(f"What generates rollouts: {', '.join(ENGINES)}."))
    rollout_server_urls: list[str] = field(
        default_factory=lambda: ["http://127.0.0.1:8000"],
        metadata=_help("Servers of rollout_engine vllm_server (`sekd serve`); they share the load."),
    )
    rollout_timeout: float = field(
        default=600.0, metadata=_help("Seconds to wait for a rollout server, at the start and for each answer.")
    )
    rollout_transfer: str = field(
        default="file",
        metadata=_help("How whole weights reach rollout servers: file, or nccl from GPU to GPU (experimental)."),
    )
    temperature: float = field(default=1.0, metadata=_help("Sampling temperature; 0 is greedy."))
    top_p: float = field(
        default=1.0, metadata=_help("Nucleus sampling: sample from the smallest set of tokens with this probability.")
    )
    top_k: int = field(default=0, metadata=_help("Sample from the k likeliest tokens; 0 samples from all."))
    min_p: float = field(
        default=0.0, metadata=_help("Drop tokens whose probability is below this share of the likeliest token's.")
    )
    repetition_penalty: float = field(
        default=1.0, metadata=_help("Penalise tokens that are already in the text; 1 disables it.")
    )
    stop_strings: list[str] = field(
        default_factory=list, metadata=_help("Strings that end a completion, in addition to the stop tokens.")
    )
    max_completion_length: int = field(default=256, metadata=_help("Longest completion, in tokens."))
    vllm_gpu_memory_utilization: float = field(default=0.3, metadata=_help("Share of the GPU's memory for vLLM."))
    vllm_enforce_eager: bool = field(
        default=False, metadata=_help("Start vLLM at once without compiling the model; generation is slower then.")
    )
    vllm_sleep: bool = field(
        default=False, metadata=_help("vLLM frees the GPU's memory between rounds (rollout_engine vllm).")
    )
    vllm_kv_cache_gib: float = field(default=1.0, metadata=_help("Size of vLLM's key-value cache on a CPU, in GiB."))
    rollouts_per_prompt: int = field(
        default=1,
        metadata=_help("Completions sampled for each prompt (TRL: num_generations). Batch sizes count completions."),
    )
    rollout_batches: int = field(
        default=1,
        metadata=_help("Optimizer steps whose rollouts are generated in one round, with the weights before it."),
    )
    rollout_staleness: int = field(
        default=0,
        metadata=_help("1 generates the next round while this one is trained on (rollout_engine vllm_server)."),
    )
    save_rollouts: bool = field(
        default=False,
        metadata=_help(
            "Keep rollouts in output_dir/rollouts.jsonl (other processes: rollouts_1.jsonl, ...) for --rollouts."
        ),
    )
    log_completions_steps: int = field(default=50, metadata=_help("Print a few rollouts every N steps; 0 is never."))

    # Memory
    head_chunk_rows: int = field(default=256, metadata=_help("Positions that pass an LM head at once."))

    # Defaults of TrainingArguments that distillation wants otherwise
    learning_rate: float = field(default=1e-5, metadata=_help("Initial learning rate."))
    bf16: bool | None = field(
        default=None,
        metadata=_help("bf16 autocast over float32 weights. Default: true if the hardware computes in bf16."),
    )
    logging_steps: float = field(default=10, metadata=_help("Log every N steps."))
    remove_unused_columns: bool = field(default=False, metadata=_help("Unused: sekd reads its own columns."))
    logging_nan_inf_filter: bool = field(default=False, metadata=_help("Unused: a non-finite loss stops the run."))

    def __post_init__(self) -> None:
        self.import_modules = list_of_texts("import_modules", self.import_modules)
        for name in self.import_modules:
            import_module(name)
        check_names(self)
        is_dense = CLASS_SELECTIONS[self.class_selection].select is None
        if self.teacher_cache is not None and is_dense:
            self.class_selection, is_dense = "rs_kd", False  # what a cache holds
        if self.divergence is None:
            self.divergence = "reverse_kl" if self.lmbda > 0 and is_dense else "forward_kl"
        if self.rollouts is not None:
            # After the divergence: a replay of an on-policy recipe keeps its divergence, and generates nothing.
            self.lmbda, self.rollouts_per_prompt, self.score_source, self.save_rollouts = 0.0, 1, "exact", False
        self.position_score = parse_score(self.position_score)
        self._check()
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.bf16 is None:
            self.bf16 = not self.fp16 and _bf16_is_native(self.use_cpu)
        super().__post_init__()
        # The loader gives samples, not tensors, so each process reads its own share of a stream.
        self.accelerator_config.dispatch_batches = False

    def _check(self) -> None:
        own = [f for f in fields(self) if f.name in SEKDConfig.__annotations__]
        check_numbers(self, [f.name for f in own if f.type in (int, float, "int", "float")])
        check_selection(self)
        check_prompts(self)
        check_sampling(self)
        check_rollouts(self)
        within("lmbda", self.lmbda, 0, 1, "0 is off-policy, 1 on-policy")
        within("kd_weight", self.kd_weight, 0, 1, "1 is the divergence alone, 0 cross-entropy alone")
        if self.kd_temperature <= 0:
            raise ValueError(f"kd_temperature {self.kd_temperature} must be above 0; 1 leaves the distributions alone")
        for name in ("max_length", "max_prompt_length", "max_completion_length", "head_chunk_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.torch_compile:
            raise ValueError("torch_compile: true is not supported: the student's forward is called in parts")
        if any(name in str(self.optim) for name in ("bnb", "8bit", "4bit")) and not is_installed("bitsandbytes"):
            raise ValueError(f"optim {self.optim} needs bitsandbytes: run `pip install bitsandbytes`")

    def check_stream(self) -> None:
        """Raise ValueError if samples are to be chosen from a whole stream."""
        if self.sample_fraction < 1 and self.sample_pool is None:
            raise ValueError(
                f"sample_fraction {self.sample_fraction} needs the number of samples, and a stream has no length; set "
                "sample_pool to the number of first samples to choose from, or dataset_streaming: false"
            )

    @property
    def teacher_context(self) -> list[str]:
        """The set fields that give the teacher another prompt than the student."""
        return [n for n in ("teacher_system_prompt", "teacher_prompt_prefix") if getattr(self, n) is not None]

    @property
    def scoring(self) -> Scoring | None:
        """The scores that the position policy reads; None if it needs no score."""
        policy = POLICIES[self.position_policy]
        if policy.reads is not None:
            return Scoring(policy.reads) if policy.reads else None
        if policy.uniform_if_all and self.position_fraction == 1:
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


def _bf16_is_native(on_cpu: bool) -> bool:
    """Whether bf16 is faster than float32 here, not merely emulated."""
    if on_cpu:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 8
