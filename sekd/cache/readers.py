"""Who lets the teacher read samples: this process, or Ray actors on many machines. The bytes are the same.

The teacher reads one sample at a time, and draws are seeded by the sample's key. So the bytes of a sample depend on
nothing but the sample and the settings: not on its neighbours, the order, the process, or where a build was cut off.
(Other hardware, or another number of threads, may round a logit differently.)
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sekd.cache.codec import encode, entropy_to_bytes
from sekd.cache.store import Encoded
from sekd.config import SEKDConfig
from sekd.data.batch import Sample, collate
from sekd.distill import Method, drawn
from sekd.distributions import entropy
from sekd.fingerprints import sample_key, weights_fingerprint
from sekd.heads import in_chunks
from sekd.models import check_head, count_classes, freeze, load_teacher
from sekd.teachers.live import LiveTeacher
from sekd.types import Batch

# Whatever head_chunk_rows is: the last bits of a logit may depend on how many rows pass the head with it.
CHUNK_ROWS, FEW_ROWS = 256, 16
RETRIES = 3
Prepared = Sequence[Mapping[str, Any]]


@runtime_checkable
class Reader(Protocol):
    """Something that reads prepared samples; ``facts`` are what the manifest says of its teacher."""

    facts: dict[str, Any]

    def encode_all(self, parts: Iterable[tuple[int, Prepared]]) -> Iterator[tuple[int, list[Encoded]]]:
        """Each numbered part, encoded, in any order."""


class LocalReader:
    """The teacher in this process; ``classes`` are those of the student's head."""

    def __init__(self, teacher: Any, classes: int, args: SEKDConfig) -> None:
        vocab = min(classes, count_classes(teacher))
        self.teacher = LiveTeacher(teacher, vocab)
        self.method = replace(Method.from_config(args, vocab), class_selection="rs_kd")
        self.with_entropy = args.cache_teacher_entropy
        self.facts = {
            "weights": weights_fingerprint(teacher),
            "dtype": str(teacher.dtype).removeprefix("torch."),
            "vocab": vocab,
        }

    def encode_all(self, parts: Iterable[tuple[int, Prepared]]) -> Iterator[tuple[int, list[Encoded]]]:
        for number, rows in parts:
            yield number, self.encode(rows)

    def encode(self, rows: Prepared) -> list[Encoded]:
        """What the cache keeps of some samples."""
        return [self._encode(row) for row in rows]

    @torch.no_grad()
    def _encode(self, row: Mapping[str, Any]) -> Encoded:
        head, method = self.teacher.head, self.method
        device: Any = self.teacher.model.device
        inputs = collate([Sample(**row)], 0)
        batch = {name: tensor.to(device) for name, tensor in inputs.items()}
        (hidden,), key = self.teacher.rows(Batch(**batch)), sample_key(row)

        def of_chunk(projected: Tensor, draws: Tensor) -> tuple[Tensor, ...]:
            logits = head.finish(projected)
            target = drawn(logits, draws, method)
            columns = target.ids, target.probs
            return (*columns, entropy(logits.log_softmax(-1))) if self.with_entropy else columns

        draws = sample_draws(key, method.seed, len(hidden), method.class_samples).to(device)
        # A CPU multiplies many rows faster, and takes the softmax of few rows faster, since these stay in its cache.
        few = FEW_ROWS if hidden.device.type == "cpu" else CHUNK_ROWS
        found = [
            in_chunks(of_chunk, (head.project(some), their_draws), few)
            for some, their_draws in zip(hidden.split(CHUNK_ROWS), draws.split(CHUNK_ROWS), strict=True)
        ]
        ids, probs, *entropies = (torch.cat(column).cpu() for column in zip(*found, strict=True))
        if not probs.isfinite().all():
            raise FloatingPointError(
                f"the teacher's distribution is not finite at some position of sample {row['sample_id']}; look at it, "
                "or choose another teacher_dtype"
            )
        counts = (probs * method.class_samples).round().long().numpy()
        codes = [entropy_to_bytes(e, head.classes) for e in entropies]
        data = encode(ids.numpy(), counts, head.classes, *codes)
        return key, len(counts), int((counts > 0).sum()), data


def load_reader(
    args: SEKDConfig, attention: str | None, classes: int, packed: bool, device: torch.device | None = None
) -> LocalReader:
    """A reader of the teacher that ``args`` names, on ``device``, or else on this process's accelerator or CPU."""
    teacher: Any = freeze(load_teacher(str(args.teacher_model_name_or_path), args, attention))
    teacher = teacher.to(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    check_head(teacher, packed)
    return LocalReader(teacher, classes, args)


def sample_draws(key: bytes, seed: int, rows: int, draws: int) -> torch.Tensor:
    """The numbers in [0, 1) that choose the classes of a sample, [rows draws]."""
    number = int.from_bytes(
        hashlib.blake2b(key + seed.to_bytes(8, "little", signed=True), digest_size=8).digest(), "little"
    )
    generator = torch.Generator().manual_seed(number % 2**63)
    return torch.rand(rows, draws, generator=generator, dtype=torch.float64)


class RayReaders:
    """Teachers in ``workers`` Ray actors: of the cluster that RAY_ADDRESS names, or else of one started here.

    Samples travel to the actors and their bytes back, so only this process needs the cache's folder; the teacher must
    be loadable by its name on each machine. An actor whose process dies is started again and its part read again.
    """

    def __init__(self, workers: int, load: Callable[[], LocalReader]) -> None:
        import ray

        self.ray, self.started = ray, not ray.is_initialized()
        self.actors: list[Any] = []
        if self.started:
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns that this will change
            ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        try:
            there = ray.cluster_resources()
            share = {f"num_{name.lower()}s": min(1, there.get(name, 0) / workers) for name in ("CPU", "GPU")}
            actor = ray.remote(max_restarts=-1, max_task_retries=RETRIES, **share)(_Actor)
            # A sum over threads rounds as their number says.
            self.actors = [actor.remote(load, torch.get_num_threads()) for _ in range(workers)]
            try:
                facts = ray.get([a.facts.remote() for a in self.actors])
            except ray.exceptions.RayActorError as error:
                reason = str(error).strip().splitlines()[-1]
                raise ValueError(f"a Ray worker cannot load the teacher: {reason}") from error
            if any(f != facts[0] for f in facts):
                raise ValueError(f"the Ray workers loaded different teachers: {facts}; give them the same files")
            self.facts = facts[0]
        except BaseException:
            self.close()
            raise

    def encode_all(self, parts: Iterable[tuple[int, Prepared]]) -> Iterator[tuple[int, list[Encoded]]]:
        todo, running = iter(parts), dict[Any, tuple[int, Any]]()
        free = self.actors * 2  # the next part waits at its actor, so that none is idle
        while True:
            while free and (part := next(todo, None)):
                actor = free.pop()
                running[actor.encode.remote(part[1])] = part[0], actor
            if not running:
                return
            (done,), _ = self.ray.wait(list(running))
            number, actor = running.pop(done)
            free.append(actor)
            try:
                samples = self.ray.get(done)
            except self.ray.exceptions.RayActorError as error:
                raise RuntimeError(
                    f"the Ray worker of shard {number} died {1 + RETRIES} times, out of memory perhaps; the finished "
                    "shards stay, and the same command goes on"
                ) from error
            except self.ray.exceptions.RayTaskError as error:
                raise error.cause from None  # what went wrong there, as it would have here
            yield number, samples

    def close(self) -> None:
        """End the actors, and the Ray that was started here."""
        if self.started:
            self.ray.shutdown()
        else:
            for actor in self.actors:
                self.ray.kill(actor)


class _Actor:
    """A :class:`LocalReader` in a process of Ray's."""

    def __init__(self, load: Callable[[], LocalReader], threads: int) -> None:
        torch.set_num_threads(threads)
        self.reader = load()

    def facts(self) -> dict[str, Any]:
        return self.reader.facts

    def encode(self, rows: Prepared) -> list[Encoded]:
        return self.reader.encode(rows)
