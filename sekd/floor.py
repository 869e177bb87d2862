"""How near a run is to the arithmetic: the least time that its steps need on this machine."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from sekd.config import SEKDConfig
from sekd.distill import Method
from sekd.flops import BatchShape, Cost, batch_cost, generation_cost, optimizer_cost
from sekd.hardware import measure_rates
from sekd.model_shape import ModelShape
from sekd.models import compute_dtype, unwrap
from sekd.types import Batch

logger = logging.get_logger(__name__)


class Floor:
    """Counts the FLOPs of a run's steps, and the seconds that a machine at its best rates would need for them.

    Each part of a step takes the longer of its computing and its moving of memory (:mod:`sekd.flops`). The rates are
    measured once. Of models whose arithmetic is not known, nothing is counted.

    Args:
        teacher: None if the run has no teacher model.
        generates: the rollouts are generated on this machine, and not on servers.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, method: Method, args: SEKDConfig, generates: bool
    ) -> None:
        self.method, self.args, self.generates = method, args, generates
        self.batches: list[tuple[BatchShape, Tensor, Tensor]] = []
        self.steps = 0
        self.student: ModelShape | None = None
        self.teacher: ModelShape | None = None
        try:
            self.student = read_shape(student)
            self.teacher = None if teacher is None else read_shape(teacher)
        except ValueError as error:
            self.student = None
            logger.info(f"no FLOPs are logged: {error}")

    def count_batch(self, batch: Batch, step: int, sums: Mapping[str, Tensor]) -> None:
        """Count a micro-batch. ``sums`` has its numbers of valid ``positions`` and of ``selected`` ones."""
        sequences, tokens = batch.input_ids.shape
        shape = shape_batch(self.method, self.args, sequences, tokens, step, batch.student_entropy is None)
        if batch.teacher_input_ids is not None:
            shape = replace(shape, teacher_tokens=batch.teacher_input_ids.shape[1])
        self.batches.append((shape, sums["positions"], sums["selected"]))

    def count_step(self) -> None:
        """Count an optimizer step."""
        self.steps += 1

    def take(self) -> dict[str, float]:
        """``flops`` and ``floor_seconds`` since the last call: this process's, without generation."""
        batches, steps, self.batches, self.steps = self.batches, self.steps, [], 0
        if self.student is None:
            return {}
        numbers = torch.stack([torch.stack(n) for _, *n in batches]).tolist() if batches else []  # one transfer
        alike = defaultdict(list)
        for (shape, *_), positions_and_chosen in zip(batches, numbers, strict=True):
            alike[shape].append(positions_and_chosen)
        costs = [self._optimize() * steps]
        for shape, rows in alike.items():  # the cost is linear in both numbers, so their means give it
            mean = shape.with_positions(*(sum(column) / len(rows) for column in zip(*rows, strict=True)))
            costs += [cost * len(rows) for cost in batch_cost(self.student, self.teacher, mean).values()]
        return {"flops": sum(cost.flops for cost in costs), "floor_seconds": sum(map(self._seconds, costs))}

    def of_rollouts(self, sums: Mapping[str, float]) -> dict[str, float]:
        """As :meth:`take`, of the rollouts in the sums of a log, over all processes."""
        number, processes = sums.get("rollouts", 0.0), self.args.world_size
        if not number or self.student is None or not self.generates:
            return {}
        at_once = number / sums["rounds"]
        lengths = sums["rollout_prompt_tokens"] / number, sums["rollout_tokens"] / number
        cost = generation_cost(self.student, at_once, *lengths, self._size) * sums["rounds"]
        return {"flops": cost.flops, "floor_seconds": self._seconds(cost) / processes}

    @property
    def _size(self) -> int:
        return compute_dtype(self.args).itemsize

    def _optimize(self) -> Cost:
        assert self.student is not None
        return optimizer_cost(self.student, count_state_bytes(self.args)) * (
            1 / (self.args.world_size if self.args.fsdp else 1)
        )

    def _seconds(self, cost: Cost) -> float:
        rates = measure_rates(self.args.device, compute_dtype(self.args))
        return cost.seconds(rates.flops, rates.bytes)


def read_shape(model: nn.Module) -> ModelShape:
    """The shape of a model, with the adapter that it trains.

    Raises:
        ValueError: its arithmetic is not known.
    """
    inner: Any = unwrap(model)
    return ModelShape.from_config(inner.config, next(iter(getattr(inner, "peft_config", {}).values()), None))


def shape_batch(
    method: Method, args: SEKDConfig, sequences: int, tokens: int, step: int, scores_exactly: bool = True
) -> BatchShape:
    """A micro-batch [sequences tokens] of a run at an optimizer step. All its positions are valid, none is chosen.

    ``scores_exactly`` is False where the sampler's own entropies are the scores.
    """
    scoring = method.get_scoring(step) if scores_exactly else None
    recomputes = bool(args.fp16 or method.sampled_softmax)
    return BatchShape(
        sequences,
        tokens,
        sequences * tokens,
        0,
        scores_student=scoring is not None,
        scores_teacher=scoring is not None and scoring.needs_teacher,
        looks_back=method.policy.looks_back,
        loss_classes=method.sampled_softmax or None,
        logit_passes=1 + recomputes,
        target_passes=1 + (method.divergence.factors is not None),
        checkpointing=args.gradient_checkpointing,
        chunk_rows=method.chunk_rows,
        compute_bytes=compute_dtype(args).itemsize,
    )


def count_state_bytes(args: SEKDConfig) -> float:
    """Bytes that the optimizer keeps of each trained parameter, at least."""
    name = str(getattr(args.optim, "value", args.optim))
    moments = 2 if "adam" in name else 1 if "lion" in name else 0
    return moments * (1 if "8bit" in name else 4)
