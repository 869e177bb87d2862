"""What vLLM needs to run inside this process: the environment that it reads, and options for the machine."""

import os
import shutil
import sysconfig
import warnings
from typing import Any

import torch


def _can_compile() -> bool:
    """Whether torch.compile can target this CPU: it needs a C++ compiler and Python's headers."""
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    return shutil.which(os.environ.get("CXX", "g++")) is not None and os.path.exists(header)


def set_up_vllm(kv_cache_gib: float, enforce_eager: bool = False) -> dict[str, Any]:
    """Set the environment of an engine inside this process, import vLLM, and return the options of ``vllm.LLM``.

    Args:
        kv_cache_gib: memory for the key-value cache on a CPU.
        enforce_eager: neither compile the model nor capture CUDA graphs.

    Raises:
        ImportError: vLLM is not installed.
    """
    # Otherwise vLLM would start a second process, and pin each thread of this one to a core.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(kv_cache_gib)))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch warns about vLLM's own code
        from vllm import LLM  # noqa: F401  # it reads the environment above
        from vllm.platforms import current_platform  # noqa: F401
    options = {}
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")  # on a CPU, its saved files cannot be loaded again
        enforce_eager = enforce_eager or not _can_compile()
        options = {"block_size": 32}  # not 128: rollouts of a prompt share whole blocks of its keys and values
    return {
        **options,
        "enforce_eager": enforce_eager,
        "distributed_executor_backend": "uni",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
