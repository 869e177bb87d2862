"""Which ways to sample, engines and rounds work."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rollouts import ENGINES, get_trait
from sekd.validation.values import within

if TYPE_CHECKING:
    from rollouts import RolloutEngine
    from sekd.config import SEKDConfig


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


def check_rollouts(args: "SEKDConfig") -> None:
    """Check engines, rounds and reuse."""
    engine = ENGINES[args.rollout_engine]
    for name in ("rollouts_per_prompt", "rollout_batches"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} {getattr(args, name)} must be at least 1")
    if args.rollouts_per_prompt > 1 and not args.all_on_policy:
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
    if args.any_on_policy and args.temperature > 2 and not engine.shares_model:
        raise ValueError(
            f"temperature {args.temperature:g} is above 2, vLLM's maximum; lower it, or use rollout_engine: hf"
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


def engine_trait(args: "SEKDConfig", engine: "RolloutEngine | None", name: str) -> Any:
    """A property of a run's engine: of the ``engine`` that was passed, else of the one of its name."""
    return get_trait(ENGINES[args.rollout_engine] if engine is None else engine, name)
