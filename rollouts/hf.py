"""transformers' own generation: slower than vLLM, and everywhere."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from rollouts.base import Rollout, Weights, named_weights, request_seeds


class HFEngine:
    """transformers ``generate``, in batches of ``batch_size`` prompts.

    Args:
        model: a folder or hub id, or a model, which is then shared: handing that same model to
            :meth:`sync_weights` copies nothing.
        stop_token_ids: tokens that end a completion, beside the model's own.
        seed: makes sampling repeatable; None draws from torch's global generator.
    """

    def __init__(
        self,
        model: str | nn.Module,
        temperature: float = 1.0,
        max_completion_length: int = 256,
        *,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        stop_token_ids: Sequence[int] = (),
        seed: int | None = 0,
        batch_size: int = 32,
    ) -> None:
        self.model: Any = model
        if isinstance(model, str):
            self.model = AutoModelForCausalLM.from_pretrained(model)
        own = self.model.generation_config.eos_token_id
        own_ids = own if isinstance(own, list) else [own] if own is not None else []
        self.stop_ids = [*dict.fromkeys([*own_ids, *stop_token_ids])]
        sampling = dict(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p or None)
        self.generation = GenerationConfig(
            do_sample=temperature > 0,
            **(sampling if temperature > 0 else {}),
            max_new_tokens=max_completion_length,
            eos_token_id=self.stop_ids or None,
            pad_token_id=self.stop_ids[0] if self.stop_ids else 0,
            use_cache=True,
        )
        self.batch_size, self.seed, self.step, self.round = batch_size, seed, 0, 0

    @torch.no_grad()
    def generate(self, prompts: Sequence[list[int]]) -> list[Rollout]:
        # What a call does not set, transformers takes from the model's own file: repetition penalties and the like.
        was_training, own = self.model.training, self.model.generation_config
        self.model.eval()
        self.model.generation_config = self.generation
        seeds = request_seeds(self.seed, self.step, self.round, len(prompts))
        self.round += 1
        rollouts: list[Rollout] = []
        try:
            for start in range(0, len(prompts), self.batch_size):
                rollouts += self._batch(prompts[start : start + self.batch_size], seeds[start])
        finally:
            self.model.train(was_training)
            self.model.generation_config = own
        return rollouts

    def _batch(self, prompts: Sequence[list[int]], seed: int | None) -> list[Rollout]:
        width = max(map(len, prompts))
        device = next(self.model.parameters()).device
        ids = torch.full((len(prompts), width), self.generation.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # generation appends on the right, so padding goes to the left
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            output = self.model.generate(input_ids=ids.to(device), attention_mask=mask.to(device))
        return [self._rollout(p, o) for p, o in zip(prompts, output[:, width:].tolist(), strict=True)]

    def _rollout(self, prompt: list[int], output: list[int]) -> Rollout:
        end = next((i + 1 for i, token in enumerate(output) if token in self.stop_ids), None)
        return Rollout(prompt, output[:end], self.step, "length" if end is None else "stop")

    def sync_weights(self, model: Weights, step: int) -> None:
        if model is not self.model:
            own = self.model.state_dict()
            with torch.no_grad():
                for name, tensor in named_weights(model):
                    own[name].copy_(tensor)
        self.step, self.round = step, 0

    def close(self) -> None:
        self.model = None
