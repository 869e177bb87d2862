"""Does the rollout engine sample with the student's weights? Log-probabilities are compared after weight syncs."""

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from rollouts import RolloutConfigError, RolloutEngine, RolloutError, get_logprobs, get_trait
from sekd.models import evaluating, unwrap, without_autocast
from sekd.on_policy.engines import samples_from

CHECK_EVERY = 10
"""Each of the first syncs is checked, later every tenth. The weights differ from the second sync on, but hardly while
the learning rate warms up. A check costs a forward pass of at most ``PROBE_TOKENS`` tokens and one request, so a tenth
of that is not seen in the time of a round."""

PROBE_TOKENS = 64

MAX_DIFFERENCE = 0.1
"""Largest mean difference of log-probabilities: rounding to bf16 makes about 0.03, and another model much more."""

ROUNDING_FACTOR = 2.0
"""A student with large logits rounds more, 0.3 with every second layer cut out of SmolLM2. So a difference is also
allowed below this multiple of the student's own rounding: its log-probabilities in autocast's dtype against float32.
Only float32 weights can tell that; FSDP2 gathers them in bf16, where the allowance is 0."""

STALE_DIFFERENCE = 0.03
"""From this difference on, an engine is refused whose log-probabilities are far nearer to earlier weights' than to the
current ones'. It is above what rounding makes, so an engine is not refused for weights that have hardly changed."""


class WeightCheck:
    """Compares an engine's log-probabilities of the run's first prompts with the student's.

    It applies to every engine that samples from a copy of the weights and gives log-probabilities.

    Args:
        limit: the number of tokens that the engine takes.
        autocast: returns the context of the student's forward pass.
        broadcast: gives every process the main process's value, and raises the errors among them everywhere.
    """

    def __init__(
        self, limit: int, autocast: Callable[[], AbstractContextManager], broadcast: Callable[[Any], Any]
    ) -> None:
        self.limit, self.autocast, self.broadcast = min(PROBE_TOKENS, limit), autocast, broadcast
        self.syncs = 0
        self.ids: list[int] = []
        self.earlier: list[Tensor] = []  # the student's log-probabilities at earlier checks
        self.differences: list[float] = []  # since the last log

    @torch.no_grad()
    def check_sync(self, engine: RolloutEngine | None, model: nn.Module, prompts: Sequence[list[int]]) -> None:
        """Check the engine after a sync, if this sync's turn has come.

        Every process must call this after each sync, also without an engine: it helps with the student's forward pass.

        Raises:
            RolloutConfigError: the engine samples from another model, or has kept earlier weights.
        """
        number, self.syncs = self.syncs, self.syncs + 1
        if (number >= CHECK_EVERY and number % CHECK_EVERY) or samples_from(engine, model):
            return
        self.ids = self.ids or [*itertools.chain(*prompts)][: self.limit]
        if len(self.ids) < 2:
            self.ids = []
            return
        served = self.broadcast(_ask(engine, self.ids))
        if not served:
            return
        with self.autocast():
            current = self._compute(model)
        limit = MAX_DIFFERENCE
        is_float32 = all(weight.dtype == torch.float32 for weight in model.parameters())
        if self.broadcast(any(_difference(logprobs, current) >= limit for logprobs in served.values())) and is_float32:
            with without_autocast(model):
                limit = max(limit, ROUNDING_FACTOR * _difference(self._compute(model).tolist(), current))
        error = None if engine is None else self._compare(engine, served, current, limit)
        self.earlier.append(current)
        self.broadcast(error)

    def _compute(self, model: nn.Module) -> Tensor:
        """The student's log-probability of each token but the first."""
        student = unwrap(model)
        device = next(student.parameters()).device
        with evaluating(student):
            logits = student(input_ids=torch.tensor([self.ids], device=device), use_cache=False).logits[0]
        return logits.float().log_softmax(-1)[:-1].cpu().gather(1, torch.tensor(self.ids[1:])[:, None])[:, 0]

    def _compare(
        self, engine: RolloutEngine, served: dict[str, list[float]], current: Tensor, limit: float
    ) -> RolloutConfigError | None:
        for name, logprobs in served.items():
            difference = _difference(logprobs, current)
            self.differences.append(difference)
            past = min((_difference(logprobs, earlier) for earlier in self.earlier), default=difference)
            is_stale = difference > STALE_DIFFERENCE and difference > 2 * past
            if difference < limit and not is_stale:
                continue
            why = "it still has those of an earlier sync" if is_stale else "it samples from another model"
            return RolloutConfigError(
                f"{name} computes other probabilities than the student after weight sync {self.syncs} "
                f"(log-probabilities differ by {difference:.2g} on average), so {why}: {get_trait(engine, 'remedy')}"
            )
        return None

    def take_log(self) -> dict[str, float]:
        """The number of comparisons since the last call and their largest difference; nothing without one."""
        differences, self.differences = self.differences, []
        return {"weight_checks": len(differences), "weight_difference": max(differences)} if differences else {}


def _ask(engine: RolloutEngine | None, ids: list[int]) -> dict[str, list[float]] | Exception:
    try:
        return {} if engine is None else get_logprobs(engine, ids)
    except (RolloutError, RolloutConfigError) as error:
        return error


def _difference(logprobs: list[float], other: Tensor) -> float:
    return float((torch.tensor(logprobs, dtype=other.dtype) - other).abs().mean())
