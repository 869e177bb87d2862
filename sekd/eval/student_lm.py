"""The student as it is in a trainer, as one of lm-eval's models."""

import copy
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rollouts import Sampling
from sekd.heads import in_chunks
from sekd.models import causal_lm, get_head, hidden_states, run_inside
from sekd.on_policy.engines import Generate
from sekd.types import IGNORE, Batch

MAX_STOP_STRINGS = 4
"""Stop strings that an engine gets: a vLLM server takes no more. Outputs are cut at the others afterwards."""

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""lm-eval's request for a log-likelihood: its key, the tokens of the context, and those of the continuation."""


class StudentLM(HFLM):
    """lm-eval's interface of the student inside its wrappers (DDP, FSDP2, PEFT), with the trainer's precision.

    Its numbers are those of lm-eval's ``HFLM`` on the same weights, but no logits [B T V] exist: the head runs at the
    continuations' positions alone, in chunks. It changes neither weights nor modes nor random generators.

    Every process must ask for the same. The processes share the work, and each gets all answers. So for lm-eval this is
    one model in one process (``world_size`` 1).

    Args:
        model: the student. The caller puts it into evaluation mode.
        tokenizer: it is copied, since lm-eval may change it.
        generate: gives one rollout a prompt, for this process's prompts. Every process calls it equally often, with
            equally many prompts.
        batch_size: sequences in a forward pass.
        chunk_rows: positions that the head computes at once.
    """

    takes_seed = True
    """A sampled request has a ``seed`` among its options (:func:`sekd.eval.harness.run_prepared`)."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
        generate: Generate,
        batch_size: int = 8,
        chunk_rows: int = 256,
    ) -> None:
        # HFLM's own __init__ would change the model's mode and tie its weights.
        TemplateLM.__init__(self)
        lm = causal_lm(model)
        self.student, self.processes, self.generate, self.chunk_rows = model, accelerator, generate, chunk_rows
        self.tokenizer: Any = copy.deepcopy(tokenizer)
        self.backend = "causal"
        self._model, self._config, self._device = lm, lm.config, accelerator.device
        self._max_length = resolve_max_length(lm.config, self.tokenizer)
        self._rank, self._world_size = 0, 1
        self.batch_size_per_gpu = batch_size
        self.add_bos_token = self.custom_prefix_token_id = self.enable_thinking = None
        self.chat_template_args: dict[str, Any] = {}
        eos: Any = lm.generation_config.eos_token_id if lm.generation_config is not None else None
        stop_ids = {self.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
        self.stop_ids: list[int] = sorted(stop_ids - {None})

    # Log-likelihoods

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """For each request, the continuation's log-likelihood, and whether each of its tokens is the likeliest one."""
        of_input: dict[tuple[int, ...], list[int]] = defaultdict(list)  # choices of one token have the same input
        for i, (_, context, continuation) in enumerate(requests):
            of_input[tuple([*context, *continuation][-self.max_length - 1 : -1])].append(i)
        inputs = sorted(of_input, key=lambda ids: (-len(ids), ids))
        answers: dict[int, tuple[float, bool]] = {}
        share = self._take_share(inputs)
        for start in range(0, len(share), self.batch_size):
            part = share[start : start + self.batch_size]
            places = [(row, i) for row, ids in enumerate(part) for i in of_input[ids]]
            scored = self._score(part, [(row, requests[i][2]) for row, i in places])
            for (_, i), answer in zip(places, scored, strict=True):
                is_new = i not in answers
                answers[i] = answer
                if is_new:
                    self._announce("loglikelihood", requests[i][0], answer)
        answers = self._gather(answers)
        return [answers[i] for i in range(len(requests))]

    def _score(
        self, inputs: Sequence[Sequence[int]], continuations: Sequence[tuple[int, list[int]]]
    ) -> list[tuple[float, bool]]:
        """The answers for continuations, each with the row of its input, whose last tokens predict it."""
        width = max(map(len, inputs))
        ids = torch.zeros(len(inputs), width, dtype=torch.long)
        for row, tokens in enumerate(inputs):  # padding on the right is never seen
            ids[row, : len(tokens)] = torch.tensor(tokens)
        rows = [row for row, continuation in continuations for _ in continuation]
        columns = [column for row, c in continuations for column in range(len(inputs[row]) - len(c), len(inputs[row]))]
        targets = [token for _, continuation in continuations for token in continuation]
        places = torch.tensor([rows, columns, targets], device=self.device)
        batch = Batch(
            input_ids=ids.to(self.device),
            targets=torch.full_like(ids, IGNORE, device=self.device),
            position_ids=torch.arange(width, device=self.device).expand(len(inputs), width),
            sample_ids=torch.arange(len(inputs), device=self.device),
        )
        with self.processes.autocast():
            logp, is_likeliest = run_inside(self.student, self._measure, batch, *places)
        counts = [len(continuation) for _, continuation in continuations]
        parts = zip(logp.cpu().split(counts), is_likeliest.cpu().split(counts), strict=True)
        return [(part.double().sum().item(), bool(likeliest.all())) for part, likeliest in parts]

    def _measure(self, batch: Batch, rows: Tensor, columns: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        head = get_head(self.student).in_autocast_dtype()

        def measure_chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            logp = head(hidden).log_softmax(-1)
            return logp.gather(1, targets[:, None])[:, 0], logp.argmax(-1) == targets

        return in_chunks(measure_chunk, [hidden_states(self.student, batch)[rows, columns], targets], self.chunk_rows)

    # Outputs

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The output for each request (a prompt, and lm-eval's options of sampling), without its stop string."""
        groups: dict[str, list[int]] = defaultdict(
            list
        )  # all requests of a group share the first one's seed; the place is added
        for i, request in enumerate(requests):
            options = {name: value for name, value in request.args[1].items() if name != "seed"}
            groups[json.dumps(options, sort_keys=True)].append(i)
        outputs: dict[int, str] = {}
        for group in groups.values():
            outputs |= self._generate_group([requests[i].args for i in group], group)
        return [outputs[i] for i in range(len(requests))]

    def _generate_group(self, requests: list[tuple[str, dict[str, Any]]], numbers: list[int]) -> dict[int, str]:
        """The outputs of requests with the same options, by their numbers."""
        eos = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        options = normalize_gen_kwargs(requests[0][1], self.max_gen_toks)
        until = [text for text in handle_stop_sequences(options.get("until"), eos=eos) if text]
        sampling = self._make_sampling(options, until)
        room = self.max_length - sampling.max_completion_length
        prompts = [self.tok_encode(context)[-room:] or [self.prefix_token_id] for context, _ in requests]
        order = sorted(range(len(requests)), key=lambda i: -len(prompts[i]))
        outputs: dict[int, str] = {}
        share = self._take_share(order)
        size = self.batch_size * max(1, 32 // self.batch_size)
        for start in range(0, len(share), size):  # parts, so that the progress is seen
            part = share[start : start + size]
            # An engine gives the prompts of a call different seeds, and each call the same ones.
            seed = (sampling.seed or 0) + start * self.processes.num_processes + self.processes.process_index
            rollouts = self.generate([prompts[i] for i in part], replace(sampling, seed=seed))
            for i, rollout in zip(part, rollouts, strict=True):
                text = self.tok_decode(rollout.completion_ids)
                is_new = numbers[i] not in outputs
                outputs[numbers[i]] = text = postprocess_generated_text(text, until, None)
                if is_new:
                    self._announce("generate_until", requests[i], text)
        return self._gather(outputs)

    def _make_sampling(self, options: dict[str, Any], until: list[str]) -> Sampling:
        """lm-eval's options for an engine. A special token among the stop strings is not in decoded text."""
        special = {self.tokenizer.convert_ids_to_tokens(i): i for i in self.tokenizer.all_special_ids}
        texts = [text for text in until if text not in special]
        temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
        return Sampling(
            temperature=temperature,
            max_completion_length=options["max_gen_toks"],
            top_p=float(options.get("top_p") or 1.0) if temperature else 1.0,
            top_k=int(options.get("top_k") or 0) if temperature else 0,
            repetition_penalty=float(options.get("repetition_penalty") or 1.0),
            stop_token_ids=sorted({*self.stop_ids, *(special[text] for text in until if text in special)}),
            stop=texts[:MAX_STOP_STRINGS],
            seed=options.get("seed", 0),
        )

    # Processes

    def _take_share(self, items: Sequence[Any]) -> list[Any]:
        """This process's part. The last item is repeated until all processes have equally many."""
        count = self.processes.num_processes
        return [*items, *items[-1:] * (-len(items) % count)][self.processes.process_index :: count]

    def _gather(self, answers: dict[int, Any]) -> dict[int, Any]:
        """The answers of all processes, by the request's number."""
        if self.processes.num_processes == 1:
            return answers
        return {i: answer for part in gather_object([answers]) for i, answer in part.items()}

    def _announce(self, kind: str, request: Any, answer: Any) -> None:
        """Tell lm-eval's hook of a finished request. The bar of this process moves at the pace of all."""
        if request is not None:
            self.cache_hook.add_partial(kind, request, answer)
