"""Whether a vLLM server runs, and was started in a way that suits a run."""

import json
import time

from tqdm.auto import tqdm

from rollouts.base import RolloutConfigError, RolloutError, Sampling
from rollouts.http import Client, RequestRejected, ServerUnavailable, shorten


def wait_for_server(http: Client, url: str, timeout: float) -> None:
    """Wait until the server is healthy.

    Raises:
        RolloutError: it was not within ``timeout`` seconds.
        RolloutConfigError: something else than vLLM answers.
    """
    deadline = time.monotonic() + timeout
    with tqdm(desc=f"waiting for {url}", total=round(timeout), unit="s", leave=False, delay=1.0) as bar:
        while True:
            try:
                http.send(url, "/health", timeout=10)
                break
            except RequestRejected as error:
                raise _make_wrong_service_error(url, error) from error
            except ServerUnavailable as error:
                if (left := deadline - time.monotonic()) <= 0:
                    raise RolloutError(
                        f"rollout server {url} did not answer within {timeout:.0f} s ({error}); start it with "
                        "`sekd serve`, or raise rollout_timeout"
                    ) from error
            bar.update(round(timeout - left) - bar.n)
            time.sleep(min(1.0, left))
    try:
        content = http.send(url, "/version")
        json.loads(content)["version"]
    except RequestRejected as error:
        raise _make_wrong_service_error(url, error) from error
    except (KeyError, TypeError, ValueError) as error:
        raise _make_wrong_service_error(url, f"/version answers {shorten(content)}") from error


def _make_wrong_service_error(url: str, reason: object) -> RolloutConfigError:
    return RolloutConfigError(
        f"rollout_server_urls: {url} is not a vLLM server ({reason}); name a server that `sekd serve` started"
    )


def check_server(http: Client, url: str, sampling: Sampling, context: int, transfer: str) -> int:
    """The largest rank of LoRA adapters that the server takes; 0 if it takes none.

    Raises:
        RolloutConfigError: it takes no weights, no adapters in spite of --enable-lora, shorter prompts and completions
            than ``context``, or cannot sample as asked.
    """
    try:
        info = http.call(url, "/server_info?config_format=json")
    except RequestRejected as error:
        raise RolloutConfigError(
            f"rollout server {url} does not accept weights; start it with VLLM_SERVER_DEV_MODE=1, as `sekd serve` does"
        ) from error
    config, environment = info["vllm_config"], info["vllm_env"]
    model = config["model_config"]
    if model["max_model_len"] < context:
        raise RolloutConfigError(
            f"rollout server {url} has a context of {model['max_model_len']} tokens, and prompts and completions take "
            f"up to {context}; start it with --max-model-len {context}"
        )
    if model["max_logprobs"] != -1 and model["max_logprobs"] < sampling.top_logprobs:
        raise RolloutConfigError(
            f"rollout server {url} gives {model['max_logprobs']} log-probabilities per token, and "
            f"{sampling.top_logprobs} are needed; start it with --max-logprobs {sampling.top_logprobs}"
        )
    mode = model.get("logprobs_mode", "raw_logprobs")
    if sampling.top_logprobs and mode != "raw_logprobs":
        raise RolloutConfigError(
            f"rollout server {url} gives {mode}, and the model's own log-probabilities are needed; start it without "
            "--logprobs-mode"
        )
    max_stops = int(environment.get("VLLM_MAX_STOP_STRINGS") or 4)
    if len(sampling.stop) > max_stops:
        raise RolloutConfigError(
            f"rollout server {url} takes {max_stops} stop strings, and there are {len(sampling.stop)}; start it with "
            f"VLLM_MAX_STOP_STRINGS={len(sampling.stop)}"
        )
    backend = (config.get("weight_transfer_config") or {}).get("backend")
    if transfer == "nccl" and backend != "nccl":
        raise RolloutConfigError(
            f"rollout server {url} does not accept weights over NCCL; start it with --weight-transfer-config "
            '\'{"backend": "nccl"}\''
        )
    lora = config.get("lora_config")
    if lora and not environment.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        raise RolloutConfigError(
            f"rollout server {url} has --enable-lora but does not accept adapters; start it with "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, as `sekd serve` does"
        )
    return lora["max_lora_rank"] if lora else 0
