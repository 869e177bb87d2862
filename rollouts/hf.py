"""Generation with transformers: slower than vLLM, but it works everywhere."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rollouts.base import (
    BaseEngine,
    EngineSetup,
    Rollout,
    Sampling,
    Weights,
    named_weights,
    request_seeds,
    separate_seeds,
)


class HFEngine(BaseEngine):
    """``generate`` of transformers, in batches of ``batch_size`` prompts.

    Args:
        model: a folder or hub id, or a model. A model is shared: passing the same model to :meth:`sync_weights` copies
            nothing.
        tokenizer: needed for stop strings. If ``model`` is a name, its own tokenizer is the default.
        sampling: the other fields of :class:`rollouts.base.Sampling`. The model's own stop tokens end a completion too.
    """

    per_process = True
    shares_model = True
    takes_sampling = True

    @classmethod
    def start(cls, setup: EngineSetup) -> "HFEngine":
        """Sample from the student itself."""
        return cls(setup.model, tokenizer=setup.tokenizer, **asdict(setup.sampling))

    def __init__(
        self,
        model: str | nn.Module,
        temperature: float = 1.0,
        max_completion_length: int = 256,
        *,
        batch_size: int = 32,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **sampling: Any,
    ) -> None:
        self.sampling = options = Sampling(temperature, max_completion_length, **sampling)
        self.model = model
        if isinstance(model, str):
            self.model = AutoModelForCausalLM.from_pretrained(model)
            tokenizer = tokenizer or (AutoTokenizer.from_pretrained(model) if options.stop else None)
        eos = self.model.generation_config.eos_token_id
        self.eos_ids = eos if isinstance(eos, list) else [eos] if eos is not None else []
        self.tokenizer = tokenizer
        self._check_stop(options)
        self.batch_size, self.step, self.round = batch_size, 0, 0

    def generate(self, prompts: Sequence[list[int]]) -> list[Rollout]:
        seeds = request_seeds(self.sampling.seed, self.step, self.round, len(prompts))
        self.round += 1
        return self._generate(prompts, self.sampling, seeds)

    def generate_with(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[Rollout]:
        self._check_stop(sampling)
        return self._generate(prompts, sampling, separate_seeds(sampling, len(prompts)))

    def _check_stop(self, sampling: Sampling) -> None:
        if sampling.stop and self.tokenizer is None:
            raise ValueError(f"stop {list(sampling.stop)!r} needs a tokenizer; pass it, or the model by its name")

    @torch.no_grad()
    def _generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int | None]) -> list[Rollout]:
        # transformers reads every option that a call leaves out from the model's own generation_config.
        was_training, own_config = self.model.training, self.model.generation_config
        self.model.eval()
        self.model.generation_config = _make_config(sampling, self._get_stop_ids(sampling))
        rollouts: list[Rollout] = []
        try:
            for start in range(0, len(prompts), self.batch_size):
                rollouts += self._batch(prompts[start : start + self.batch_size], sampling, seeds[start])
        finally:
            self.model.train(was_training)
            self.model.generation_config = own_config
        return rollouts

    def _get_stop_ids(self, sampling: Sampling) -> list[int]:
        return [*dict.fromkeys([*self.eos_ids, *sampling.stop_token_ids])]

    def _batch(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int | None) -> list[Rollout]:
        width = max(map(len, prompts))
        device = next(self.model.parameters()).device
        ids = torch.empty(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # generation appends on the right, so padding goes to the left
            # Pad with the prompt's first token: a repetition penalty also applies to masked tokens.
            ids[row] = torch.tensor([*prompt[:1] * (width - len(prompt)), *prompt])
            mask[row, width - len(prompt) :] = 1
        stopped = _StopStrings(self.tokenizer, sampling.stop, width, len(prompts))
        with (
            torch.random.fork_rng(enabled=seed is not None),
            _record_top_logprobs(self.model, sampling.top_logprobs) as top,
        ):
            if seed is not None:
                torch.manual_seed(seed)
            output = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                logits_processor=_order_processors(sampling),
                stopping_criteria=[stopped],
                synced_gpus=any(isinstance(module, FSDPModule) for module in self.model.modules()) or None,
            )
        if sampling.top_logprobs and not top:
            raise ValueError(f"{type(self.model).__name__} generates with another model's forward; pass that model")
        logprobs = torch.stack(top, dim=1).numpy() if top else [None] * len(prompts)
        completions = output[:, width:].tolist()
        stops = self._get_stop_ids(sampling)
        rows = zip(prompts, completions, stopped.ends, logprobs, strict=True)
        return [self._rollout(stops, *row) for row in rows]

    def _rollout(
        self, stops: Sequence[int], prompt: list[int], output: list[int], end: int | None, top: np.ndarray | None
    ) -> Rollout:
        token_end = next((i + 1 for i, token in enumerate(output) if token in stops), None)
        lengths = [length for length in (token_end, end) if length is not None]
        ids, reason = (output[: min(lengths)], "stop") if lengths else (output, "length")
        return Rollout(prompt, ids, self.step, reason, None if top is None else top[: len(ids)])

    def sync_weights(self, model: Weights, step: int) -> None:
        if model is not self.model:
            state = self.model.state_dict()
            with torch.no_grad():
                for name, tensor in named_weights(model):
                    state[name].copy_(tensor)
        self.step, self.round = step, 0

    @torch.no_grad()
    def logprobs(self, token_ids: list[int]) -> dict[str, list[float]]:
        was_training = self.model.training
        self.model.eval()
        ids = torch.tensor([token_ids], device=next(self.model.parameters()).device)
        logp = self.model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        self.model.train(was_training)
        return {type(self).__name__: logp.gather(1, ids[0, 1:, None])[:, 0].tolist()}

    def close(self) -> None:
        self.model = None


def _make_config(sampling: Sampling, stop_ids: list[int]) -> GenerationConfig:
    """All options but temperature and truncation, which transformers has in another order than vLLM."""
    return GenerationConfig(
        do_sample=sampling.temperature > 0,
        **(dict(temperature=1.0, top_p=1.0, top_k=0) if sampling.temperature > 0 else {}),
        repetition_penalty=sampling.repetition_penalty,
        max_new_tokens=sampling.max_completion_length,
        eos_token_id=stop_ids or None,
        pad_token_id=stop_ids[0] if stop_ids else 0,
        use_cache=True,
    )


def _order_processors(sampling: Sampling) -> LogitsProcessorList:
    """Forbidden classes, temperature and truncation, in the order of vLLM. transformers applies them after a penalty.

    ``generate`` itself would apply ``min_p`` last, to what ``top_p`` left: then other tokens can be drawn.
    """
    processors = LogitsProcessorList()
    if sampling.classes is not None:
        processors.append(_ForbidClasses(sampling.classes))
    if sampling.temperature > 0:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.min_p > 0:
            processors.append(MinPLogitsWarper(sampling.min_p))
        if sampling.top_k > 0:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
    return processors


class _ForbidClasses(LogitsProcessor):
    """No token id from ``classes`` on is drawn."""

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        forbidden = torch.arange(scores.shape[1], device=scores.device) >= self.classes
        return scores.masked_fill(forbidden, -torch.inf)


class _StopStrings(StoppingCriteria):
    """Stops sequences whose completion contains a stop string, and records their lengths in ``ends``.

    The criterion of transformers also searches the prompt, supports few kinds of tokenizers, and does not return the
    length. Afterwards the length is lost, because the padding of a finished sequence may be a stop token.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str], width: int, count: int) -> None:
        self.tokenizer, self.strings, self.width = tokenizer, strings, width
        self.ends: list[int | None] = [None] * count

    def __call__(self, ids: Tensor, scores: Tensor | None, **_: Any) -> Tensor:
        if self.strings:
            texts = self.tokenizer.batch_decode(ids[:, self.width :], skip_special_tokens=True)
            length = ids.shape[1] - self.width
            hits = [any(string in text for string in self.strings) for text in texts]
            self.ends = [end or (length if hit else None) for end, hit in zip(self.ends, hits, strict=True)]
        return torch.tensor([end is not None for end in self.ends], device=ids.device)


@contextmanager
def _record_top_logprobs(model: nn.Module, count: int) -> Iterator[list[Tensor]]:
    """The ``count`` largest log-probabilities [B K] of each token that ``model`` generates in the block.

    They are read from the model's output. The scores that ``generate`` can return are of size B*T*V.
    """
    recorded: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        logp = output.logits[:, -1].float().log_softmax(-1)
        recorded.append(logp.topk(min(count, logp.shape[1])).values.cpu())

    handle = model.register_forward_hook(keep) if count else None
    try:
        yield recorded
    finally:
        if handle is not None:
            handle.remove()
