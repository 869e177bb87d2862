"""SEKDConfig: every choice of a run except the student and the data. It is checked before anything is loaded."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from rollouts import ENGINES
from sekd.classes import CLASS_SELECTIONS
from sekd.hardware import choose_dtype
from sekd.registry import check_records, import_module
from sekd.selection_config import SelectionConfig, help_
from sekd.validation import check_config
from sekd.validation.selection import check_names
from sekd.validation.training import choose_better_direction, count_steps
from sekd.validation.values import check_types


@dataclass
class SEKDConfig(SelectionConfig, TrainingArguments):
    """``transformers.TrainingArguments`` and the fields of selective distillation. Each field has its help.

    Raises:
        ValueError: an invalid value. The error names the field, the value and how to fix it.
    """

    import_modules: list[str] = field(
        default_factory=list,
        metadata=help_("Modules that sekd imports first. They add your own scores, policies, divergences or engines."),
    )

    # The teacher
    teacher_model_name_or_path: str | None = field(default=None, metadata=help_("Folder or hub id of the teacher."))
    teacher_model_revision: str = field(default="main", metadata=help_("Branch, tag or commit of the teacher."))
    teacher_dtype: str | None = field(
        default=None,
        metadata=help_(
            "Dtype of the teacher's weights: auto (as they were saved), bfloat16, float16 or float32. Default: "
            "bfloat16 if the hardware computes in bf16 natively, else float32."
        ),
    )
    teacher_load_in_4bit: bool = field(
        default=False, metadata=help_("Hold the teacher in 4 bits (NF4), except its head; needs bitsandbytes.")
    )
    teacher_load_in_8bit: bool = field(
        default=False, metadata=help_("Hold the teacher in 8 bits, except its head; needs bitsandbytes.")
    )
    teacher_device: str | None = field(
        default=None,
        metadata=help_("Device of the teacher, such as cuda:1 beside one process. Default: the student's."),
    )
    teacher_fsdp: bool = field(
        default=False,
        metadata=help_("Shard the teacher over the processes of each machine (FSDP2). Default: each holds all of it."),
    )

    teacher_cache: str | None = field(
        default=None,
        metadata=help_(
            "Folder that `sekd cache build` wrote. Its rs_kd targets replace the teacher, which is then not loaded."
        ),
    )

    cache_teacher_entropy: bool = field(
        default=False,
        metadata=help_(
            "Let `sekd cache build` also store the teacher's entropy (a byte a position), which position_score "
            "teacher_entropy needs."
        ),
    )

    # Data
    prompt_column: str = field(default="prompt", metadata=help_("Column of prompts: text or chat messages."))
    completion_column: str = field(default="completion", metadata=help_("Column of completions."))
    messages_column: str = field(default="messages", metadata=help_("Column of whole conversations."))
    text_column: str = field(default="text", metadata=help_("Column of plain text."))
    prompt_template: str = field(
        default="{prompt}", metadata=help_("Template of text prompts; {prompt} is replaced by the prompt.")
    )
    use_chat_template: bool = field(
        default=False, metadata=help_("Make a text prompt a user turn, and its completion the assistant's turn.")
    )
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata=help_("Variables of the chat template, such as {enable_thinking: false}.")
    )
    system_prompt: str | None = field(default=None, metadata=help_("System turn before each chat prompt."))
    eos: str | None = field(
        default=None,
        metadata=help_(
            "Token that ends a completion, such as '<|im_end|>' where the chat template ends turns with it. Default: "
            "the tokenizer's EOS token."
        ),
    )
    teacher_system_prompt: str | None = field(
        default=None,
        metadata=help_("System turn that the teacher reads in chat prompts, instead of the student's."),
    )
    teacher_prompt_prefix: str | None = field(
        default=None,
        metadata=help_(
            "Text before the prompt (in a chat, before the last user turn) that only the teacher reads. {column} "
            "becomes the row's value of that column, as in 'The answer is {answer}. '; {{ and }} stand for { and }."
        ),
    )
    text_prompt_length: int | None = field(
        default=None,
        metadata=help_(
            "On-policy from plain text: the first N tokens of a document are the prompt, and the student continues "
            "it. Documents of at most N tokens are left out; the log says how many."
        ),
    )
    supervise_prompt: bool = field(
        default=False, metadata=help_("Distil at the prompt's tokens too (off-policy steps only).")
    )
    packing: bool = field(
        default=True,
        metadata=help_(
            "Pack documents of plain text into sequences of max_length; attention stays within each document."
        ),
    )
    max_length: int = field(default=1024, metadata=help_("Longest training sequence, in tokens."))
    max_prompt_length: int = field(  # type: ignore[assignment] # __post_init__ sets it
        default=None,
        metadata=help_("Longest prompt, in tokens. Default: 512; with lmbda < 1, half of max_length if that is less."),
    )
    overlong_prompts: str = field(
        default="error",
        metadata=help_("Prompts over max_prompt_length: error stops the run; drop leaves them out and logs how many."),
    )

    dataset_num_proc: int | None = field(
        default=None, metadata=help_("Processes that tokenize data in memory; one by default.")
    )
    shuffle_buffer: int = field(
        default=0,
        metadata=help_(
            "Shuffle a stream in a buffer of N samples, seeded by data_seed (or seed). 0 keeps the order of the data."
        ),
    )
    max_tokens: int | None = field(
        default=None,
        metadata=help_(
            "Train on N tokens of packed text: max_steps = ceil(N / (max_length x sequences of a step)). Replaces "
            "max_steps."
        ),
    )

    rollouts: str | None = field(
        default=None,
        metadata=help_(
            "Train off-policy on this file of rollouts, of `sekd rollouts` or save_rollouts, instead of dataset_name. "
            "sample_fraction and sample_pool do not choose from it again."
        ),
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata=help_("Held-out data, like dataset_name. Default: dataset_test_split of dataset_name."),
    )
    max_eval_samples: int | None = field(
        default=None, metadata=help_("Number of held-out sequences to evaluate; all by default.")
    )
    eval_suite: list[str] = field(
        default_factory=list,
        metadata=help_(
            "What each evaluation in training measures besides held-out data: suites (paper, validation) and tasks, as "
            "for `sekd evaluate`, and distillation (fresh rollouts of the held-out prompts)."
        ),
    )
    eval_limit: int = field(default=100, metadata=help_("Items of each task of eval_suite: the first ones."))
    eval_data_dir: list[str] = field(
        default_factory=list,
        metadata=help_("Folders with the data of the tasks, as --data-dir of `sekd evaluate`. Default: the hub."),
    )
    eval_chat_template: bool = field(
        default=False, metadata=help_("Ask the tasks of eval_suite in the student's chat template.")
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata=help_("Stop after this many evaluations in a row without a better metric_for_best_model."),
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata=help_("A metric that is better by no more than this does not count as better.")
    )

    # Rollouts
    rollout_engine: str = field(default="vllm", metadata=help_(f"What generates rollouts: {', '.join(ENGINES)}."))
    rollout_server_urls: list[str] = field(
        default_factory=lambda: ["http://127.0.0.1:8000"],
        metadata=help_("Servers of rollout_engine vllm_server (`sekd serve`); they share the load."),
    )
    rollout_timeout: float = field(
        default=600.0, metadata=help_("Seconds to wait for a rollout server, at the start and for each answer.")
    )
    rollout_transfer: str = field(
        default="file",
        metadata=help_(
            "How full weights (not LoRA adapters) reach rollout servers: file, or nccl (GPU to GPU, experimental)."
        ),
    )
    temperature: float = field(default=1.0, metadata=help_("Sampling temperature; 0 is greedy."))
    top_p: float = field(
        default=1.0,
        metadata=help_("Nucleus sampling: sample from the smallest set of tokens with this probability."),
    )
    top_k: int = field(default=0, metadata=help_("Sample from the k likeliest tokens; 0 samples from all."))
    min_p: float = field(
        default=0.0, metadata=help_("Drop tokens whose probability is below this share of the likeliest token's.")
    )
    repetition_penalty: float = field(
        default=1.0, metadata=help_("Penalise tokens that are already in the text; 1 disables it.")
    )
    stop_strings: list[str] = field(
        default_factory=list, metadata=help_("Strings that end a completion, in addition to the stop tokens.")
    )
    max_completion_length: int = field(default=256, metadata=help_("Longest completion, in tokens."))
    vllm_gpu_memory_utilization: float = field(default=0.3, metadata=help_("Share of the GPU's memory for vLLM."))
    vllm_enforce_eager: bool = field(
        default=False, metadata=help_("Start vLLM at once without compiling the model; generation is slower then.")
    )
    vllm_sleep: bool = field(
        default=False, metadata=help_("vLLM frees the GPU's memory between rounds (rollout_engine vllm).")
    )
    vllm_kv_cache_gib: float = field(default=1.0, metadata=help_("Size of vLLM's key-value cache on a CPU, in GiB."))
    rollouts_per_prompt: int = field(
        default=1,
        metadata=help_("Completions sampled for each prompt (TRL: num_generations). Batch sizes count completions."),
    )
    rollout_batches: int = field(
        default=1,
        metadata=help_(
            "Optimizer steps per round of generation. All rollouts of a round come from the weights at its start."
        ),
    )
    rollout_staleness: int = field(
        default=0,
        metadata=help_(
            "1: generate the next round while training on this one, with the weights at this round's start "
            "(rollout_engine vllm_server)."
        ),
    )
    save_rollouts: bool = field(
        default=False,
        metadata=help_(
            "Write all rollouts to output_dir/rollouts.jsonl (other processes: rollouts_1.jsonl, ...), to train on "
            "them again with --rollouts."
        ),
    )
    log_completions_steps: int = field(default=50, metadata=help_("Print a few rollouts every N steps; 0 is never."))

    record_selection: int = field(
        default=4,
        metadata=help_(
            "Sequences whose chosen positions are kept for `sekd report`, at the start, after each quarter of the "
            "steps, and at the end; 0 keeps none."
        ),
    )
    profile: int = field(
        default=0,
        metadata=help_(
            "Record N optimizer steps after a short warm-up: a trace in output_dir/profile and, on a GPU, the memory."
        ),
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata=help_("Delete the checkpoints and the student of an earlier run in output_dir. Default: refuse."),
    )
    save_on_signal: bool = field(
        default=True,
        metadata=help_("On SIGTERM, end the current step, save a checkpoint and stop with exit status 143."),
    )
    merge_adapter: bool = field(
        default=False,
        metadata=help_(
            "At the end, write a whole student in float32, with the adapter merged into its base, instead of the "
            "adapter alone."
        ),
    )

    # Memory
    head_chunk_rows: int = field(
        default=256, metadata=help_("Positions that an LM head computes at once; fewer need less memory.")
    )
    activation_offloading: bool = field(
        default=False,
        metadata=help_(
            "Hold the activations of the student's backbone in the CPU's memory until the backward pass: less GPU "
            "memory, slower steps."
        ),
    )

    # Other defaults than those of TrainingArguments
    learning_rate: float = field(default=1e-5, metadata=help_("Initial learning rate."))
    bf16: bool | None = field(
        default=None,
        metadata=help_("bf16 autocast over float32 weights. Default: true if the hardware computes in bf16 natively."),
    )
    logging_steps: float = field(default=10, metadata=help_("Log every N steps."))
    remove_unused_columns: bool = field(default=False, metadata=help_("Unused: sekd reads its own columns."))
    logging_nan_inf_filter: bool = field(default=False, metadata=help_("Unused: a non-finite loss stops the run."))
    # transformers' annotations of these two lack the truth values that they may have.
    resume_from_checkpoint: str | bool | None = field(
        default=None,
        metadata=help_("true resumes from the newest whole checkpoint in output_dir; or a checkpoint's folder."),
    )
    fsdp: str | bool | None = field(default=None, metadata=help_("true shards the student over the processes (FSDP2)."))

    def __post_init__(self) -> None:
        check_types(self)
        for name in self.import_modules:
            import_module(name)
        check_records()
        check_names(self)
        is_dense = CLASS_SELECTIONS[self.class_selection].select is None
        if self.teacher_cache is not None and is_dense:
            self.class_selection, is_dense = "rs_kd", False  # what a cache holds
        if self.divergence is None:
            self.divergence = "reverse_kl" if self.any_on_policy and is_dense else "forward_kl"
        if self.rollouts is not None:
            # This comes after the choice of the divergence: a replay of an on-policy recipe keeps its divergence.
            self.lmbda, self.rollouts_per_prompt, self.score_source, self.save_rollouts = 0.0, 1, "exact", False
            self.sample_fraction, self.sample_pool = 1.0, None  # they chose the prompts
            if self.max_prompt_length is None:
                self.max_prompt_length = max(1, min(512, self.max_length - 1))  # what fits was completed
        if self.max_prompt_length is None:
            self.max_prompt_length = 512 if self.all_on_policy else max(1, min(512, self.max_length // 2))
        check_config(self)
        if not torch.accelerator.is_available():
            self.use_cpu = True
        self.greater_is_better = choose_better_direction(self)
        dtype = choose_dtype(self.use_cpu)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and dtype == "bfloat16"
        if self.teacher_dtype is None and self.teacher_cache is None:
            self.teacher_dtype = dtype
        super().__post_init__()
        # The loader gives samples and not tensors, so each process must read its own share of a stream.
        self.accelerator_config.dispatch_batches = False
        if self.max_tokens is not None:
            self.max_steps = count_steps(self, self.max_tokens)

    def __getstate__(self) -> dict[str, Any]:
        """Without tokens of accounts, since ``training_args.bin`` is in checkpoints, which may go to the hub."""
        return {name: None if name.endswith("_token") else value for name, value in vars(self).items()}

    def check_stream(self) -> None:
        """Raise ValueError if samples are to be chosen from a whole stream."""
        if self.sample_fraction < 1 and self.sample_pool is None:
            raise ValueError(
                f"sample_fraction {self.sample_fraction} needs the number of samples, and a stream has no length; set "
                "sample_pool to the number of first samples to choose from, or dataset_streaming: false"
            )

    @property
    def sequences_per_step(self) -> int:
        """The sequences of an optimizer step, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def teacher_context(self) -> list[str]:
        """The set fields that give the teacher another prompt than the student."""
        return [n for n in ("teacher_system_prompt", "teacher_prompt_prefix") if getattr(self, n) is not None]
