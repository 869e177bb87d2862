"""vLLM over HTTP: its own OpenAI-compatible server, unmodified, on this machine or others."""

import contextlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from tqdm.auto import tqdm

from rollouts.base import (
    Adapter,
    Rollout,
    RolloutConfigError,
    RolloutError,
    Sampling,
    Weights,
    named_weights,
    request_seeds,
)
from rollouts.http import Client, RequestRejected, ServerUnavailable
from rollouts.nccl import NCCLTransfer

NEW_WEIGHTS = 3600.0
"""Seconds that a server may take to load weights."""

FAILED_LOAD = "a load failed"
"""The version of the weights of a server that must be started again."""


class VLLMServerEngine:
    """One or more vLLM servers that were started with VLLM_SERVER_DEV_MODE=1 (``scripts/serve_student.sh``).

    Weights reach them as a file in ``weights_folder``, which they must see under the same name: all of them, or an
    adapter alone, under a new name each time. Each server is asked for the version of its weights before and after a
    round: one that was started again in between gets the weights again, and what it wrote without them is thrown away.
    Requests that fail are sent again, to the other servers too; their seeds are their own, so the completions are the
    same whoever writes them.

    Args:
        urls: of the servers, such as "http://127.0.0.1:8000"; they share the load.
        timeout: seconds to wait for a server, at the start and whenever none answers.
        request_timeout: seconds for one answer; a server that hangs longer counts as dead.
        dtype: of the weights on their way; None leaves them as they are.
        transfer: "file", or "nccl" from the trainer's GPU to the servers'; adapters are files in any case.
        parallel: requests in flight at each server.
        sampling: the other fields of :class:`rollouts.base.Sampling`. The model's own stop tokens end a completion too.

    Raises:
        RolloutError: no server answered within ``timeout``, by its URL.
        RolloutConfigError: a server whose context is too short, that runs without the development mode, or that
            refuses a request.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        temperature: float = 1.0,
        max_completion_length: int = 256,
        *,
        weights_folder: str,
        max_prompt_length: int = 512,
        dtype: torch.dtype | None = None,
        transfer: str = "file",
        timeout: float = 600.0,
        request_timeout: float = 600.0,
        parallel: int = 64,
        **sampling: Any,
    ) -> None:
        self.sampling = Sampling(temperature, max_completion_length, **sampling)
        self.urls = [url.rstrip("/") for url in ([urls] if isinstance(urls, str) else urls)]
        self.timeout, self.dtype = timeout, dtype
        self.weights_folder = os.path.abspath(weights_folder)
        self.step, self.round = 0, 0
        self.version: str | None = None  # until the first sync any weights will do
        self.path = ""
        self.is_adapter = False
        if transfer == "nccl" and not torch.cuda.is_available():
            raise RolloutConfigError('transfer "nccl" sends from GPU to GPU, and the trainer has none; use "file"')
        self.transfer, self.weights = transfer, dict[str, torch.Tensor]()
        self.peers: dict[str, tuple[NCCLTransfer, str]] = {}  # by URL, with the version that each sent last
        self.http = Client(request_timeout)
        self.closed = threading.Event()
        self.pool = ThreadPoolExecutor(parallel * len(self.urls))
        context = max_prompt_length + max_completion_length
        ranks = []
        for url in self.urls:
            self._wait_for(url)
            ranks.append(self._check(url, context))
        self.lora_rank = min(ranks)
        if max(ranks) and not self.lora_rank:
            raise RolloutConfigError(f"some of rollout_server_urls have --enable-lora and some have not: {self.urls}")

    def generate(self, prompts: Sequence[list[int]]) -> list[Rollout]:
        seeds = request_seeds(self.sampling.seed, self.step, self.round, len(prompts))
        requests = dict(enumerate(zip(prompts, seeds, strict=True)))
        self.round += 1
        found: dict[int, Rollout] = {}
        reasons: dict[str, str] = {}
        failed: set[str] = set()  # in their last try; left out while others are ready
        deadline, pause = time.monotonic() + self.timeout, 0.5
        while requests:
            if self.closed.is_set():
                raise RolloutError("the rollout engine was closed in the middle of a round")
            answers, failed = self._ask(requests, reasons, failed)
            found |= answers
            requests = {i: request for i, request in requests.items() if i not in answers}
            if answers:
                deadline, pause = time.monotonic() + self.timeout, 0.5
            elif len(failed) < len(self.urls):
                continue
            elif time.monotonic() > deadline:
                raise RolloutError(
                    f"no rollout server gave the {len(requests)} missing completions within {self.timeout:.0f} s: "
                    f"{'; '.join(reasons.values())}. Start it again with scripts/serve_student.sh, or raise "
                    "rollout_timeout"
                )
            else:
                self.closed.wait(pause)
                pause = min(2 * pause, 10.0)
        return [found[i] for i in range(len(prompts))]

    def _ask(
        self, requests: dict[int, tuple[list[int], int | None]], reasons: dict[str, str], failed: set[str]
    ) -> tuple[dict[int, Rollout], set[str]]:
        """What the servers that hold this step's weights, still at the end, answered; ``reasons`` why not, by URL; and
        which have failed now."""
        ready = [url for url in self.urls if self._has_weights(url, reasons)]
        chosen = [url for url in ready if url not in failed] or ready
        asked = {
            url: {i: self.pool.submit(self._complete, url, *requests[i]) for i in list(requests)[n :: len(chosen)]}
            for n, url in enumerate(chosen)
        }
        found: dict[int, Rollout] = {}
        failed = {url for url in self.urls if url not in chosen}
        for url, futures in asked.items():
            answers = {}
            for i, future in futures.items():
                try:
                    answers[i] = future.result()
                except ServerUnavailable as error:
                    reasons[url] = str(error)
                    failed.add(url)
            if self._has_weights(url, reasons, resend=False):
                found |= answers
            else:
                failed.add(url)
        return found, failed

    def sync_weights(self, model: Weights, step: int) -> None:
        self.step, self.round, old, was_adapter = step, 0, self.path, self.is_adapter
        self.version, self.is_adapter = f"{step}-{uuid.uuid4().hex[:12]}", isinstance(model, Adapter)
        self.path = os.path.join(self.weights_folder, self.version)
        if isinstance(model, Adapter):
            model.save(self.path)
        elif self.lora_rank:
            raise RolloutConfigError(
                f"rollout servers {self.urls} were started with --enable-lora and take adapters only; start them "
                "without it for whole or merged weights, or with a larger --max-lora-rank"
            )
        elif self.transfer == "nccl":
            # Copies, on the GPU: the student trains on while a server that was started again may want them.
            self.weights = {n: t.to("cuda", self.dtype or t.dtype, copy=True) for n, t in named_weights(model)}
        else:
            # Copies: of two names of one weight a file would keep one, and vLLM's reload wants both.
            weights = {
                name: tensor.to("cpu", self.dtype or tensor.dtype, copy=True) for name, tensor in named_weights(model)
            }
            os.makedirs(self.path)
            save_torch_state_dict(weights, self.path)
        for url in self.urls:  # one that is down gets them when it is needed
            if self._has_weights(url, {}) and was_adapter:
                self._forget(url, os.path.basename(old))
        if old:
            shutil.rmtree(old, ignore_errors=True)

    def _forget(self, url: str, adapter: str) -> None:
        with contextlib.suppress(ServerUnavailable, RequestRejected):  # one that was started again never had it
            self.http.send(url, "/v1/unload_lora_adapter", {"lora_name": adapter}, timeout=10)

    def close(self) -> None:
        self.closed.set()
        self.http.close()
        self.pool.shutdown(cancel_futures=True)
        if self.is_adapter:
            for url in self.urls:
                self._forget(url, os.path.basename(self.path))
            self.is_adapter = False
        if self.path:
            shutil.rmtree(self.path, ignore_errors=True)

    def logprobs(self, ids: list[int], url: str) -> list[float]:
        """A server's log-probability of each token but the first."""
        body = dict(prompt=ids, max_tokens=1, temperature=1.0, prompt_logprobs=0, return_token_ids=True)
        body |= {"model": self.version} if self.is_adapter else {}
        (choice,) = self.http.call(url, "/v1/completions", body)["choices"]
        return [
            entry[str(token)]["logprob"] for token, entry in zip(ids[1:], choice["prompt_logprobs"][1:], strict=True)
        ]

    def _complete(self, url: str, prompt: list[int], seed: int | None) -> Rollout:
        body = {"prompt": prompt, "seed": seed, "return_token_ids": True, **self.sampling.for_vllm()}
        body |= {"return_tokens_as_token_ids": True}  # else two tokens that read alike would share an entry
        body |= {"model": self.version} if self.is_adapter else {}
        try:
            answer = self.http.call(url, "/v1/completions", body)
            (choice,) = answer["choices"]
            ids, reason = choice["token_ids"], choice["finish_reason"]
            if choice["prompt_token_ids"] != prompt or reason not in ("stop", "length") or not ids:
                raise ValueError(f"finish_reason {reason!r}, {len(ids)} tokens")
            return Rollout(prompt, ids, self.step, reason, self._top(choice))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, RequestRejected) and not (self.is_adapter and error.code == 404):
                raise
            raise ServerUnavailable(f"rollout server {url} answered with no completion: {error}") from error

    def _top(self, choice: dict[str, Any]) -> np.ndarray | None:
        """The server lists the likeliest tokens, and the sampled one if it is not among them."""
        count = self.sampling.top_logprobs
        if not count:
            return None
        rows = [sorted(entry.values(), reverse=True)[:count] for entry in choice["logprobs"]["top_logprobs"]]
        found = np.array(rows, np.float32)
        if found.shape != (len(choice["token_ids"]), count):
            raise ValueError(f"log-probabilities of shape {found.shape}")
        return found

    def _has_weights(self, url: str, reasons: dict[str, str], resend: bool = True) -> bool:
        """Whether a server holds the weights of this step; they are sent again if it does not."""
        try:
            version = self.http.call(url, "/weight_info", timeout=30)["weight_version"]
            if version == FAILED_LOAD:
                raise RolloutConfigError(
                    f"rollout server {url} once failed to load weights, and keeps some of others since; start it again"
                )
            if self.is_adapter:
                loaded = {model["id"] for model in self.http.call(url, "/v1/models", timeout=30)["data"]}
                version = self.version if self.version in loaded else version
            if self.version in (None, version):
                return True
            reasons[url] = f"rollout server {url} was started again"
            if not resend:
                return False
            if self.is_adapter:
                self._load_adapter(url)
            elif self.transfer == "nccl":
                self._load_over_nccl(url, version)
            else:
                self._load(url)
            self.http.call(url, "/reset_prefix_cache", {})
            if not self.is_adapter:
                self.http.call(url, "/update_weight_version", {"new_version": self.version})
        except ServerUnavailable as error:
            reasons[url] = str(error)
            return False
        return True

    def _load_adapter(self, url: str) -> None:
        body = {"lora_name": self.version, "lora_path": self.path}
        try:
            self.http.send(url, "/v1/load_lora_adapter", body, NEW_WEIGHTS)
        except (ServerUnavailable, RequestRejected) as error:
            if isinstance(error, ServerUnavailable) and "answered 500" not in str(error):
                raise
            raise RolloutConfigError(
                f"rollout server {url} cannot load the student's LoRA adapter ({error}): it serves another model, does "
                f"not see {self.path}, or cannot adapt these layers; start it again with model_name_or_path, "
                "--enable-lora and --max-lora-rank, or choose other lora_target_modules"
            ) from error

    def _load(self, url: str) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": self.path}}
        try:
            self.http.call(url, "/collective_rpc", body, NEW_WEIGHTS)
        except ServerUnavailable as error:
            if "collective_rpc method failed" not in str(error):
                raise
            # It runs, and cannot. From here on it would take weights without complaint and keep some of the old.
            self.http.call(url, "/update_weight_version", {"new_version": FAILED_LOAD})
            raise RolloutConfigError(
                f"rollout server {url} cannot load the student's weights: it serves another model, or does not see "
                f"{self.path}; start it again with model_name_or_path"
            ) from error

    def _load_over_nccl(self, url: str, version: str) -> None:
        peer, sent = self.peers.pop(url, (None, ""))
        try:
            if peer is None or sent != version:  # a server that was started again has left the group
                workers = self.http.call(url, "/get_world_size")["world_size"]
                peer = NCCLTransfer(url, workers, NEW_WEIGHTS)
            peer.send(self.weights)
        except ServerUnavailable:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            self.http.call(url, "/update_weight_version", {"new_version": FAILED_LOAD})
            raise RolloutConfigError(
                f"rollout server {url} did not take the weights over NCCL ({error}): it serves another model, or "
                'shares a GPU with the trainer; start it again, or use transfer "file"'
            ) from error
        self.peers[url] = peer, str(self.version)

    def _wait_for(self, url: str) -> None:
        deadline = time.monotonic() + self.timeout
        with tqdm(desc=f"waiting for {url}", total=round(self.timeout), unit="s", leave=False, delay=1.0) as bar:
            while True:
                try:
                    return self.http.call(url, "/health", timeout=10)
                except ServerUnavailable as error:
                    if (left := deadline - time.monotonic()) <= 0:
                        raise RolloutError(
                            f"rollout server {url} did not answer within {self.timeout:.0f} s ({error}); start it "
                            "with scripts/serve_student.sh, or raise rollout_timeout"
                        ) from error
                bar.update(round(self.timeout - left) - bar.n)
                time.sleep(min(1.0, left))

    def _check(self, url: str, context: int) -> int:
        """The largest rank of a LoRA adapter that a server takes, 0 if it takes none; ValueError if it will not do."""
        try:
            info = self.http.call(url, "/server_info?config_format=json")
        except RequestRejected as error:
            raise RolloutConfigError(
                f"rollout server {url} takes no weights; start it with VLLM_SERVER_DEV_MODE=1, as "
                "scripts/serve_student.sh does"
            ) from error
        config = info["vllm_config"]
        longest, most = config["model_config"]["max_model_len"], config["model_config"]["max_logprobs"]
        if longest < context:
            raise RolloutConfigError(
                f"rollout server {url} has a context of {longest} tokens, and prompts and completions take up to "
                f"{context}; start it with --max-model-len {context}"
            )
        if most != -1 and most < self.sampling.top_logprobs:
            raise RolloutConfigError(
                f"rollout server {url} gives {most} log-probabilities a token, and {self.sampling.top_logprobs} are "
                f"asked for; start it with --max-logprobs {self.sampling.top_logprobs}"
            )
        mode = config["model_config"].get("logprobs_mode", "raw_logprobs")
        if self.sampling.top_logprobs and mode != "raw_logprobs":
            raise RolloutConfigError(
                f"rollout server {url} gives {mode}, and the model's own log-probabilities are asked for; start it "
                "without --logprobs-mode"
            )
        stops = int(info["vllm_env"].get("VLLM_MAX_STOP_STRINGS") or 4)
        if len(self.sampling.stop) > stops:
            raise RolloutConfigError(
                f"rollout server {url} takes {stops} stop strings, and there are {len(self.sampling.stop)}; start it "
                f"with VLLM_MAX_STOP_STRINGS={len(self.sampling.stop)}"
            )
        backend = (config.get("weight_transfer_config") or {}).get("backend")
        if self.transfer == "nccl" and backend != "nccl":
            raise RolloutConfigError(
                f"rollout server {url} takes no weights over NCCL; start it with --weight-transfer-config "
                '\'{"backend": "nccl"}\''
            )
        lora = config.get("lora_config")
        if lora and not info["vllm_env"].get("VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            raise RolloutConfigError(
                f"rollout server {url} has --enable-lora and takes no adapters; start it with "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, as scripts/serve_student.sh does"
            )
        return lora["max_lora_rank"] if lora else 0
