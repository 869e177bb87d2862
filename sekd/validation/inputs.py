"""Which data, students and engines work with a configuration."""

from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from rollouts import ENGINES
from sekd.validation.rollouts import engine_trait
from sekd.validation.teachers import check_place
from sekd.validation.training import check_memory
from sekd.validation.values import get_default, is_installed

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from peft import PeftConfig

    from rollouts import RolloutEngine
    from sekd.config import SEKDConfig


logger = logging.get_logger(__name__)


def check_prompts(args: "SEKDConfig") -> None:
    """Check prompts from text, and prompts that only the teacher sees."""
    length, limit = args.text_prompt_length, args.max_prompt_length
    if length is not None and not 1 <= length <= limit:
        raise ValueError(
            f"text_prompt_length {length} must be a whole number from 1 to max_prompt_length {limit}; change either"
        )
    if "{prompt}" not in args.prompt_template:
        raise ValueError(f"prompt_template {args.prompt_template!r} lacks {{prompt}}, the place of the prompt")
    if isinstance(args.chat_template_kwargs, str):
        raise ValueError(f"chat_template_kwargs {args.chat_template_kwargs!r} must be a mapping such as {{key: value}}")
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
    if args.supervise_prompt and args.all_on_policy and args.sample_fraction == 1:
        raise ValueError(
            f"supervise_prompt true has no effect with lmbda {args.lmbda}: rollouts are distilled at their "
            "completions; leave it out, or set lmbda below 1"
        )
    if args.supervise_prompt and args.rollouts is not None:
        raise ValueError(
            f"supervise_prompt true has no effect with rollouts {args.rollouts!r}: only generated tokens are "
            "supervised; leave it out"
        )
    longest = args.max_prompt_length + args.max_completion_length
    if args.all_on_policy and args.max_length < longest and args.max_length != get_default(args, "max_length"):
        logger.warning(
            f"max_length {args.max_length} has no effect with lmbda {args.lmbda}: a rollout has at most "
            f"max_prompt_length {args.max_prompt_length} + max_completion_length {args.max_completion_length} tokens"
        )


def check_separate(student: Any, teacher: Any) -> None:
    """Check that a teacher and a student that are given as models share no weights: training changes the student's."""
    weights = [{id(p) for p in model.parameters()} for model in (student, teacher) if hasattr(model, "parameters")]
    if len(weights) == 2 and weights[0] & weights[1]:
        raise ValueError(
            "teacher_model shares weights with model, and training would change both; load the teacher a second time, "
            "or pass copy.deepcopy(model)"
        )


def check_engine(args: "SEKDConfig", quantized: bool, rollout_engine: "RolloutEngine | None" = None) -> None:
    """Check that the engine is installed, and takes the student."""
    requires = ENGINES[args.rollout_engine].requires
    if args.any_on_policy and rollout_engine is None and requires is not None and not is_installed(requires):
        raise ValueError(
            f"rollout_engine {args.rollout_engine!r} needs {requires}, which is not installed: run "
            '`bash scripts/setup.sh` (or `pip install "sekd[vllm]"` on a CUDA machine), or choose rollout_engine: hf'
        )
    if quantized and args.any_on_policy and not engine_trait(args, rollout_engine, "shares_model"):
        raise ValueError(f"rollout_engine {args.rollout_engine!r} cannot take a quantized student; use hf")


def check_inputs(
    args: "SEKDConfig",
    train_dataset: "Dataset | IterableDataset",
    init: dict[str, Any],
    adapter: "PeftConfig | None",
    is_quantized: bool,
    rollout_engine: "RolloutEngine | None",
) -> None:
    """Check that a trainer's data, student and engine work together."""
    from datasets import IterableDataset
    from transformers.integrations import is_deepspeed_zero3_enabled

    if adapter is not None and adapter.is_prompt_learning:
        raise ValueError(f"peft_type {adapter.peft_type} adds virtual tokens, which shift the positions; use LoRA")
    quantized = init.get("quantization_config") is not None or is_quantized
    if quantized and adapter is None:
        raise ValueError("a quantized student cannot be trained in full: set use_peft: true")
    if args.merge_adapter and adapter is None:
        raise ValueError(
            "merge_adapter true, but the student has no adapter; set use_peft: true, or remove merge_adapter"
        )
    if args.merge_adapter and quantized:
        raise ValueError(
            "merge_adapter true with a quantized student: the merged weights would be rounded again; remove "
            "merge_adapter, and merge the adapter into the unquantized base with PEFT after training"
        )
    check_engine(args, quantized, rollout_engine)
    is_stream = isinstance(train_dataset, IterableDataset)
    if args.shuffle_buffer and (not is_stream or args.sample_pool is not None):
        raise ValueError(
            f"shuffle_buffer {args.shuffle_buffer} is for streams that are read sample by sample (dataset_streaming: "
            "true without sample_pool); leave it out: other data is shuffled as a whole"
        )
    if args.shuffle_buffer and args.dataloader_num_workers > 1:
        raise ValueError(
            f"shuffle_buffer {args.shuffle_buffer} with dataloader_num_workers {args.dataloader_num_workers}: which "
            "samples each worker reads would depend on the seed; set dataloader_num_workers to 1"
        )
    if args.dataset_num_proc is not None and is_stream:
        raise ValueError(
            f"dataset_num_proc {args.dataset_num_proc} is for data in memory: a stream is tokenized while it is read; "
            "leave it out, or set dataloader_num_workers to the number of the stream's files"
        )
    if is_stream:
        if args.max_steps <= 0:
            raise ValueError("a stream has no length: set max_steps to the number of optimizer steps, or max_tokens")
        args.check_stream()
        if args.teacher_cache is not None and args.sample_pool is None:
            raise ValueError("teacher_cache needs data of known length; set sample_pool, or dataset_streaming: false")
    check_place(args)
    check_memory(args)
    is_single = rollout_engine is None and engine_trait(args, None, "single_process")
    if args.world_size > 1 and args.any_on_policy and is_single:
        raise ValueError(
            f"rollout_engine {args.rollout_engine!r} works with a single process; use vllm_server (or hf) with several"
        )
    if args.world_size > 1 and args.any_on_policy and engine_trait(args, rollout_engine, "uses_servers"):
        limit = args.ddp_timeout
        if args.rollout_timeout >= limit:
            raise ValueError(
                f"rollout_timeout {args.rollout_timeout:g} is not below ddp_timeout {limit}: while one process waits "
                "for a server, the others wait for it, and give up first; lower the first or raise the second"
            )
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "DeepSpeed ZeRO-3 gathers the student's head once a chunk of positions, and processes have different "
            "numbers of chunks, so they would wait for each other; use FSDP2 (fsdp: true), or ZeRO stage 2"
        )
