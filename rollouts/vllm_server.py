"""vLLM over HTTP: its own OpenAI-compatible server, unmodified, on this machine or others."""

import json
import os
import shutil
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from tqdm.auto import tqdm

from rollouts.base import Rollout, RolloutError, Weights, named_weights, request_seeds

NEW_WEIGHTS = 3600.0
"""Seconds that a server may take to load weights."""

BROKEN = "a load failed"
"""The version of the weights of a server that must be started again."""


class _Unavailable(RolloutError):
    """A server that may answer later, or another one may."""


class VLLMServerEngine:
    """One or more vLLM servers that were started with VLLM_SERVER_DEV_MODE=1 (``scripts/serve_student.sh``).

    Weights reach them as a file in ``weights_folder``, which they must see under the same name. Each server is told
    the version of its weights and asked for it before and after a round: one that was started again in between gets
    the weights again, and what it wrote without them is thrown away. Requests that fail are sent again, to the other
    servers too; their seeds are their own, so the completions are the same whoever writes them.

    Args:
        urls: of the servers, such as "http://127.0.0.1:8000"; they share the load.
        timeout: seconds to wait for a server, at the start and whenever none answers.
        request_timeout: seconds for one answer; a server that hangs longer counts as dead.
        dtype: of the weights on their way; None leaves them as they are.
        parallel: requests in flight at each server.

    Raises:
        RolloutError: no server answered within ``timeout``, by its URL.
        ValueError: a server whose context is too short, that runs without the development mode, or that refuses a
            request.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        temperature: float = 1.0,
        max_completion_length: int = 256,
        *,
        weights_folder: str,
        max_prompt_length: int = 512,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        stop_token_ids: Sequence[int] = (),
        seed: int | None = 0,
        dtype: torch.dtype | None = None,
        timeout: float = 600.0,
        request_timeout: float = 600.0,
        parallel: int = 64,
    ) -> None:
        self.urls = [url.rstrip("/") for url in ([urls] if isinstance(urls, str) else urls)]
        self.timeout, self.request_timeout, self.dtype = timeout, request_timeout, dtype
        self.weights_folder = os.path.abspath(weights_folder)
        self.sampling = dict(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            max_tokens=max_completion_length,
            stop_token_ids=list(stop_token_ids),
            return_token_ids=True,
        )
        self.seed, self.step, self.round = seed, 0, 0
        self.version: str | None = None  # until the first sync any weights will do
        self.path = ""
        # The environment's proxies are for the way out, not for servers of one's own.
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self.pool = ThreadPoolExecutor(parallel * len(self.urls))
        context = max_prompt_length + max_completion_length
        for url in self.urls:
            self._wait_for(url)
            self._check(url, context)

    def generate(self, prompts: Sequence[list[int]]) -> list[Rollout]:
        seeds = request_seeds(self.seed, self.step, self.round, len(prompts))
        requests = dict(enumerate(zip(prompts, seeds, strict=True)))
        self.round += 1
        found: dict[int, Rollout] = {}
        reasons: dict[str, str] = {}
        deadline, pause = time.monotonic() + self.timeout, 0.5
        while requests:
            answers = self._ask(requests, reasons)
            found |= answers
            requests = {i: request for i, request in requests.items() if i not in answers}
            if answers:
                deadline, pause = time.monotonic() + self.timeout, 0.5
            elif time.monotonic() > deadline:
                raise RolloutError(
                    f"no rollout server gave the {len(requests)} missing completions within {self.timeout:.0f} s: "
                    f"{'; '.join(reasons.values())}. Start it again with scripts/serve_student.sh, or raise "
                    "rollout_timeout"
                )
            else:
                time.sleep(pause)
                pause = min(2 * pause, 10.0)
        return [found[i] for i in range(len(prompts))]

    def _ask(self, requests: dict[int, tuple[list[int], int | None]], reasons: dict[str, str]) -> dict[int, Rollout]:
        """What the servers that hold this step's weights, still at the end, answered; why not, by URL."""
        ready = [url for url in self.urls if self._has_weights(url, reasons)]
        asked = {
            url: {i: self.pool.submit(self._complete, url, *requests[i]) for i in list(requests)[n :: len(ready)]}
            for n, url in enumerate(ready)
        }
        found: dict[int, Rollout] = {}
        for url, futures in asked.items():
            answers = {}
            for i, future in futures.items():
                try:
                    answers[i] = future.result()
                except _Unavailable as error:
                    reasons[url] = str(error)
            if self._has_weights(url, reasons, resend=False):
                found |= answers
        return found

    def sync_weights(self, model: Weights, step: int) -> None:
        self.step, self.round, old = step, 0, self.path
        self.version = f"{step}-{uuid.uuid4().hex[:12]}"
        self.path = os.path.join(self.weights_folder, self.version)
        os.makedirs(self.path)
        weights = {name: tensor.to("cpu", self.dtype or tensor.dtype) for name, tensor in named_weights(model)}
        save_torch_state_dict(weights, self.path)
        for url in self.urls:  # one that is down gets them when it is needed
            self._has_weights(url, {})
        if old:
            shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        if self.path:
            shutil.rmtree(self.path, ignore_errors=True)

    def logprobs(self, ids: list[int], url: str) -> list[float]:
        """A server's log-probability of each token but the first."""
        body = dict(prompt=ids, max_tokens=1, temperature=1.0, prompt_logprobs=0, return_token_ids=True)
        (choice,) = self._call(url, "/v1/completions", body)["choices"]
        return [
            entry[str(token)]["logprob"] for token, entry in zip(ids[1:], choice["prompt_logprobs"][1:], strict=True)
        ]

    def _complete(self, url: str, prompt: list[int], seed: int | None) -> Rollout:
        answer = self._call(url, "/v1/completions", {"prompt": prompt, "seed": seed, **self.sampling})
        try:
            (choice,) = answer["choices"]
            ids, reason = choice["token_ids"], choice["finish_reason"]
            if choice["prompt_token_ids"] != prompt or reason not in ("stop", "length") or not ids:
                raise ValueError(f"finish_reason {reason!r}, {len(ids)} tokens")
        except (KeyError, TypeError, ValueError) as error:
            raise _Unavailable(f"rollout server {url} answered with no completion: {error}") from error
        return Rollout(prompt, ids, self.step, reason)

    def _has_weights(self, url: str, reasons: dict[str, str], resend: bool = True) -> bool:
        """Whether a server holds the weights of this step; they are sent again if it does not."""
        try:
            version = self._call(url, "/weight_info", timeout=30)["weight_version"]
            if version == BROKEN:
                raise ValueError(
                    f"rollout server {url} once failed to load weights, and keeps some of others since; start it again"
                )
            if self.version in (None, version):
                return True
            reasons[url] = f"rollout server {url} was started again"
            if not resend:
                return False
            self._load(url)
            self._call(url, "/reset_prefix_cache", {})
            self._call(url, "/update_weight_version", {"new_version": self.version})
        except _Unavailable as error:
            reasons[url] = str(error)
            return False
        return True

    def _load(self, url: str) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": self.path}}
        try:
            self._call(url, "/collective_rpc", body, NEW_WEIGHTS)
        except _Unavailable as error:
            if "collective_rpc method failed" not in str(error):
                raise
            # It runs, and cannot. From here on it would take weights without complaint and keep some of the old.
            self._call(url, "/update_weight_version", {"new_version": BROKEN})
            raise ValueError(
                f"rollout server {url} cannot load the student's weights: it serves another model, or does not see "
                f"{self.path}; start it again with model_name_or_path"
            ) from error

    def _wait_for(self, url: str) -> None:
        deadline = time.monotonic() + self.timeout
        with tqdm(desc=f"waiting for {url}", total=round(self.timeout), unit="s", leave=False, delay=1.0) as bar:
            while True:
                try:
                    return self._call(url, "/health", timeout=10)
                except _Unavailable as error:
                    if (left := deadline - time.monotonic()) <= 0:
                        raise RolloutError(
                            f"rollout server {url} did not answer within {self.timeout:.0f} s ({error}); start it "
                            "with scripts/serve_student.sh, or raise rollout_timeout"
                        ) from error
                bar.update(round(self.timeout - left) - bar.n)
                time.sleep(min(1.0, left))

    def _check(self, url: str, context: int) -> None:
        (model, *_) = self._call(url, "/v1/models")["data"]
        if model["max_model_len"] < context:
            raise ValueError(
                f"rollout server {url} has a context of {model['max_model_len']} tokens, and prompts and completions "
                f"take up to {context}; start it with --max-model-len {context}"
            )
        try:
            self._call(url, "/weight_info")
        except ValueError as error:
            raise ValueError(
                f"rollout server {url} takes no weights; start it with VLLM_SERVER_DEV_MODE=1, as "
                "scripts/serve_student.sh does"
            ) from error

    def _call(self, url: str, path: str, body: dict[str, Any] | None = None, timeout: float | None = None) -> Any:
        """The server's answer as JSON; an empty one is None."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
        try:
            with self.opener.open(request, timeout=timeout or self.request_timeout) as response:
                content = response.read()
            return json.loads(content) if content else None
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")[:500]
            if 400 <= error.code < 500 and error.code not in (408, 429):
                raise ValueError(f"rollout server {url}{path} refused: {error.code} {text}") from error
            raise _Unavailable(f"rollout server {url} answered {error.code} {text}") from error
        except (urllib.error.URLError, HTTPException, OSError) as error:
            reason = getattr(error, "reason", error)
            raise _Unavailable(f"rollout server {url} does not answer: {reason}") from error
        except ValueError as error:
            raise _Unavailable(f"rollout server {url} answered with no JSON: {error}") from error
