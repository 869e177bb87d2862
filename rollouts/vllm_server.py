"""vLLM over HTTP: its OpenAI-compatible server, unmodified, on this machine or others."""

import contextlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict

from rollouts.base import (
    Adapter,
    BaseEngine,
    EngineSetup,
    Rollout,
    RolloutConfigError,
    RolloutError,
    Sampling,
    Weights,
    named_weights,
    request_seeds,
    separate_seeds,
)
from rollouts.claims import FAILED_LOAD, Claim
from rollouts.http import Client, RequestRejected, ServerUnavailable
from rollouts.nccl import NCCLTransfer
from rollouts.server_checks import check_server, wait_for_server

NEW_WEIGHTS = 3600.0
"""Seconds that a server may take to load weights."""


class VLLMServerEngine(BaseEngine):
    """One or more vLLM servers, started with VLLM_SERVER_DEV_MODE=1 (``sekd serve``).

    Weights reach the servers as files in ``weights_folder``, which every server must see under the same path. Whole
    weights and adapters alike get a new name at each sync.

    Each sync has a version. It is checked on each server before and after a round: a restarted server is synced again,
    and the completions that it sampled without the weights are discarded. Failed requests are sent again, also to other
    servers. Each request has its own seed, so the completions do not depend on which server answers.

    Whole weights belong to one trainer: see :class:`rollouts.claims.Claim`. The version is written *before* the weights
    are loaded, and read again afterwards. So a version that is still this trainer's says that nobody has loaded other
    weights. Adapters have names of their own, so trainers with adapters may share a server.

    Args:
        urls: the servers, such as "http://127.0.0.1:8000"; they share the load.
        timeout: seconds to wait for a server, at the start and whenever none answers.
        request_timeout: seconds for one answer. A server that takes longer counts as dead.
        dtype: the dtype in which weights are sent; None keeps their own.
        transfer: "file", or "nccl" from the trainer's GPU to the servers'. Adapters are always files.
        parallel: simultaneous requests per server.
        evaluation_context: tokens of the longest prompt with its completion in :meth:`generate_with`, if that is more
            than ``max_prompt_length`` and ``max_completion_length`` together.
        sampling: the other fields of :class:`rollouts.base.Sampling`. The model's own stop tokens end a completion too.

    Raises:
        RolloutError: a server did not answer within ``timeout``, or another trainer took it; the message has its URL.
        RolloutConfigError: a server has too short a context, was not started in development mode, refuses a request, or
            serves another trainer.
    """

    uses_servers = True
    generates_in_background = True
    takes_sampling = True
    remedy = (
        "it serves another model, or does not take this student's weights: start it with model_name_or_path, or "
        "use rollout_engine: hf"
    )

    @classmethod
    def start(cls, setup: EngineSetup) -> "VLLMServerEngine":
        """Connect to the servers that the run's settings name."""
        folder = os.path.join(setup.output_dir, "rollout_weights")
        shutil.rmtree(folder, ignore_errors=True)  # a killed run may have left weights
        options = setup.options
        return cls(
            options["rollout_server_urls"],
            **asdict(setup.sampling),
            weights_folder=folder,
            max_prompt_length=setup.max_prompt_length,
            dtype=None if setup.dtype == torch.float32 else setup.dtype,
            transfer=options["rollout_transfer"],
            timeout=options["rollout_timeout"],
            request_timeout=options["rollout_timeout"],
            evaluation_context=setup.evaluation_context,
        )

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
        evaluation_context: int = 0,
        **sampling: Any,
    ) -> None:
        self.sampling = Sampling(temperature, max_completion_length, **sampling)
        self.urls = [url.rstrip("/") for url in ([urls] if isinstance(urls, str) else urls)]
        self.timeout, self.dtype = timeout, dtype
        self.weights_folder = os.path.abspath(weights_folder)
        self.step, self.round = 0, 0
        self.version: str | None = None  # before the first sync, any weights are right
        self.path = ""
        self.is_adapter = False
        if transfer == "nccl" and not torch.cuda.is_available():
            raise RolloutConfigError('transfer "nccl" sends from GPU to GPU, and the trainer has none; use "file"')
        self.transfer, self.weights = transfer, dict[str, torch.Tensor]()
        self.peers: dict[str, tuple[NCCLTransfer, str]] = {}  # by URL, with the last version that each one sent
        self.http = Client(request_timeout)
        self.closed = threading.Event()
        self.pool = ThreadPoolExecutor(parallel * len(self.urls))
        context = max(max_prompt_length + max_completion_length, evaluation_context)
        ranks = []
        for url in self.urls:
            wait_for_server(self.http, url, timeout)
            ranks.append(check_server(self.http, url, self.sampling, context, transfer))
        self.lora_rank = min(ranks)
        if max(ranks) and not self.lora_rank:
            raise RolloutConfigError(f"some of rollout_server_urls have --enable-lora and some do not: {self.urls}")
        self.claim = Claim(self.http, self.weights_folder)
        self.loaded: set[str] = set()  # the URLs that have the whole weights of this version

    def generate(self, prompts: Sequence[list[int]]) -> list[Rollout]:
        seeds = request_seeds(self.sampling.seed, self.step, self.round, len(prompts))
        self.round += 1
        return self._generate(prompts, self.sampling, seeds)

    def generate_with(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[Rollout]:
        return self._generate(prompts, sampling, separate_seeds(sampling, len(prompts)))

    def _generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int | None]) -> list[Rollout]:
        requests = {i: (prompt, sampling, seed) for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))}
        rollouts: dict[int, Rollout] = {}
        reasons: dict[str, str] = {}
        failed: set[str] = set()  # servers whose last answer failed; they are asked only if no other is ready
        deadline, pause = time.monotonic() + self.timeout, 0.5
        while requests:
            if self.closed.is_set():
                raise RolloutError("the rollout engine was closed in the middle of a round")
            answers, failed = self._ask(requests, reasons, failed)
            rollouts |= answers
            requests = {i: request for i, request in requests.items() if i not in answers}
            if answers:
                deadline, pause = time.monotonic() + self.timeout, 0.5
            elif len(failed) < len(self.urls):
                continue
            elif time.monotonic() > deadline:
                raise RolloutError(
                    f"no rollout server gave the {len(requests)} missing completions within {self.timeout:.0f} s: "
                    f"{'; '.join(reasons.values())}. Restart it with `sekd serve`, or raise "
                    "rollout_timeout"
                )
            else:
                self.closed.wait(pause)
                pause = min(2 * pause, 10.0)
        return [rollouts[i] for i in range(len(prompts))]

    def _ask(
        self, requests: dict[int, tuple[list[int], Sampling, int | None]], reasons: dict[str, str], failed: set[str]
    ) -> tuple[dict[int, Rollout], set[str]]:
        """Ask the servers that have this step's weights, and keep the answers of those that still have them afterwards.

        Returns (answers by request, failed URLs). ``reasons`` gets the reason of each failure, by URL.
        """
        ready = [url for url in self.urls if self._has_weights(url, reasons)]
        chosen = [url for url in ready if url not in failed] or ready
        asked = {
            url: {i: self.pool.submit(self._complete, url, *requests[i]) for i in list(requests)[n :: len(chosen)]}
            for n, url in enumerate(chosen)
        }
        rollouts: dict[int, Rollout] = {}
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
                rollouts |= answers
            else:
                failed.add(url)
        return rollouts, failed

    def sync_weights(self, model: Weights, step: int) -> None:
        self.step, self.round, old, was_adapter = step, 0, self.path, self.is_adapter
        name, self.is_adapter = f"{step}-{uuid.uuid4().hex[:12]}", isinstance(model, Adapter)
        self.version = name if self.is_adapter else self.claim.make_version(name)
        self.loaded.clear()
        self.path = os.path.join(self.weights_folder, name)
        if isinstance(model, Adapter):
            model.save(self.path)
        elif self.lora_rank:
            raise RolloutConfigError(
                f"rollout servers {self.urls} were started with --enable-lora and take adapters only; restart them "
                "without it for whole or merged weights, or with a larger --max-lora-rank"
            )
        elif self.transfer == "nccl":
            # Copies on the GPU: a restarted server may need these weights while the student already trains on.
            self.weights = {n: t.to("cuda", self.dtype or t.dtype, copy=True) for n, t in named_weights(model)}
        else:
            # Copies: a file keeps one of two names for the same tensor, but vLLM's reload needs both.
            weights = {
                name: tensor.to("cpu", self.dtype or tensor.dtype, copy=True) for name, tensor in named_weights(model)
            }
            os.makedirs(self.path)
            save_torch_state_dict(weights, self.path)
        for url in self.urls:  # a server that is down gets the weights when it is needed
            if self._has_weights(url, {}) and was_adapter:
                self._unload_adapter(url, os.path.basename(old))
        if old:
            shutil.rmtree(old, ignore_errors=True)

    def _unload_adapter(self, url: str, adapter: str) -> None:
        with contextlib.suppress(ServerUnavailable, RequestRejected):  # a restarted server does not have it
            self.http.send(url, "/v1/unload_lora_adapter", {"lora_name": adapter}, timeout=10)

    def close(self) -> None:
        self.closed.set()
        self.http.close()
        self.pool.shutdown(cancel_futures=True)
        if self.is_adapter:
            for url in self.urls:
                self._unload_adapter(url, os.path.basename(self.path))
            self.is_adapter = False
        self.claim.close()
        if self.path:
            shutil.rmtree(self.path, ignore_errors=True)

    def logprobs(self, token_ids: list[int]) -> dict[str, list[float]]:
        served = {}
        for url in self.urls:
            if self._has_weights(url, {}):
                with contextlib.suppress(ServerUnavailable):
                    served[f"rollout server {url}"] = self._logprobs(url, token_ids)
        return served

    def _logprobs(self, url: str, ids: list[int]) -> list[float]:
        body = dict(prompt=ids, max_tokens=1, temperature=1.0, prompt_logprobs=0, return_token_ids=True)
        body |= {"model": self.version} if self.is_adapter else {}
        answer = self.http.call(url, "/v1/completions", body)
        try:
            entries = zip(ids[1:], answer["choices"][0]["prompt_logprobs"][1:], strict=True)
            return [entry[str(token)]["logprob"] for token, entry in entries]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ServerUnavailable(f"rollout server {url} did not answer with log-probabilities: {error}") from error

    def _complete(self, url: str, prompt: list[int], sampling: Sampling, seed: int | None) -> Rollout:
        body = {"prompt": prompt, "seed": seed, "return_token_ids": True, **sampling.for_vllm()}
        body |= {"return_tokens_as_token_ids": True}  # otherwise two tokens with the same text share an entry
        body |= {"model": self.version} if self.is_adapter else {}
        try:
            answer = self.http.call(url, "/v1/completions", body)
            (choice,) = answer["choices"]
            ids, reason = choice["token_ids"], choice["finish_reason"]
            if choice["prompt_token_ids"] != prompt or reason not in ("stop", "length") or not ids:
                raise ValueError(f"finish_reason {reason!r}, {len(ids)} tokens")
            return Rollout(prompt, ids, self.step, reason, _read_top(choice, sampling.top_logprobs))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, RequestRejected) and not (self.is_adapter and error.code == 404):
                raise
            raise ServerUnavailable(f"rollout server {url} did not answer with a completion: {error}") from error

    def _has_weights(self, url: str, reasons: dict[str, str], resend: bool = True) -> bool:
        """Whether a server has the weights of this step. With ``resend``, a server without them gets them here."""
        try:
            version = self.claim.read(url)
            if self.is_adapter:
                loaded = {model["id"] for model in self.http.call(url, "/v1/models", timeout=30)["data"]}
                has = self.version in loaded
            else:
                has = self.version is None or (version == self.version and url in self.loaded)
            if has:
                return True
            reasons[url] = f"rollout server {url} was restarted"
            if not resend or self.closed.is_set():
                return False
            if self.is_adapter:
                self._load_adapter(url)
                self.http.call(url, "/reset_prefix_cache", {})
            else:
                self._load_whole(url, version)
        except ServerUnavailable as error:
            reasons[url] = str(error)
            return False
        return True

    def _load_whole(self, url: str, version: str) -> None:
        """Load whole weights into a server of this trainer, whose weight version was ``version``."""
        self.loaded.discard(url)
        self.claim.take(url)
        self.claim.write(url, str(self.version))
        if self.transfer == "nccl":
            self._load_over_nccl(url, version)
        else:
            self._load(url)
        self.http.call(url, "/reset_prefix_cache", {})
        try:
            if self.claim.read(url) != self.version:
                raise ServerUnavailable(f"rollout server {url} was restarted")
        except ServerUnavailable:
            raise
        except RolloutError:  # another trainer took the server, and these weights may have replaced its own
            self.claim.write(url, FAILED_LOAD)
            raise
        self.loaded.add(url)

    def _load_adapter(self, url: str) -> None:
        body = {"lora_name": self.version, "lora_path": self.path}
        try:
            self.http.send(url, "/v1/load_lora_adapter", body, NEW_WEIGHTS)
        except (ServerUnavailable, RequestRejected) as error:
            if isinstance(error, ServerUnavailable) and "answered 500" not in str(error):
                raise
            raise RolloutConfigError(
                f"rollout server {url} cannot load the student's LoRA adapter ({error}): it serves another model, does "
                f"not see {self.path}, or cannot adapt these layers; restart it with model_name_or_path, "
                "--enable-lora and --max-lora-rank, or choose other lora_target_modules"
            ) from error

    def _load(self, url: str) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": self.path}}
        try:
            self.http.call(url, "/collective_rpc", body, NEW_WEIGHTS)
        except ServerUnavailable as error:
            if "collective_rpc method failed" not in str(error):
                raise
            # The server runs on. It would accept later weights without an error and keep some of the old ones.
            self.claim.write(url, FAILED_LOAD)
            raise RolloutConfigError(
                f"rollout server {url} cannot load the student's weights: it serves another model, or does not see "
                f"{self.path}; restart it with model_name_or_path"
            ) from error

    def _load_over_nccl(self, url: str, version: str) -> None:
        peer, sent = self.peers.pop(url, (None, ""))
        try:
            if peer is None or sent != version:  # a restarted server has left the group
                workers = self.http.call(url, "/get_world_size")["world_size"]
                peer = NCCLTransfer(url, workers, NEW_WEIGHTS)
            peer.send(self.weights)
        except ServerUnavailable:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            self.claim.write(url, FAILED_LOAD)
            raise RolloutConfigError(
                f"rollout server {url} did not take the weights over NCCL ({error}): it serves another model, or "
                'shares a GPU with the trainer; restart it, or use transfer "file"'
            ) from error
        self.peers[url] = peer, str(self.version)


def _read_top(choice: dict[str, Any], count: int) -> np.ndarray | None:
    """The server lists the likeliest tokens, and also the sampled token if it is not one of them."""
    if not count:
        return None
    positions = [sorted(entry.values(), reverse=True)[:count] for entry in choice["logprobs"]["top_logprobs"]]
    top = np.array(positions, np.float32)
    if top.shape != (len(choice["token_ids"]), count):
        raise ValueError(f"log-probabilities of shape {top.shape}")
    return top
