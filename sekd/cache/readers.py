"""Where a cache's teacher reads: in this process, or in Ray actors on many machines. The bytes are the same.

The teacher reads one sample at a time, and a sample's key seeds its draws. So the bytes of a sample depend on nothing
but the sample and the settings: not on other samples, their order, the process, or where a build was interrupted.
(Other hardware, or another number of threads, may round a logit differently.)
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sekd.cache.codec import encode, entropy_to_bytes
from sekd.cache.store import Encoded
from sekd.classes import CLASS_SELECTIONS
from sekd.cluster import connect_to_ray
from sekd.config import SEKDConfig
from sekd.data.batch import Sample, collate
from sekd.distributions import entropy
from sekd.fingerprints import sample_key, weights_fingerprint
from sekd.heads import in_chunks
from sekd.models import check_head, count_classes, load_teacher, place_teacher
from sekd.teachers.live import LiveTeacher
from sekd.types import Batch

CHUNK_POSITIONS, SOFTMAX_POSITIONS = 256, 16
"""Positions that pass the head together, and those that pass the softmax together on a CPU. Constants, whatever
head_chunk_rows is: the last bits of a logit may depend on how many positions are computed together."""

RETRIES = 3
"""How often Ray reads a part again after its worker died."""

Prepared = Sequence[Mapping[str, Any]]
"""Samples as :func:`sekd.data.prepare` returns them."""


@runtime_checkable
class Reader(Protocol):
    """Reads prepared samples with a teacher. ``facts`` describe the teacher: its weights, dtype and vocabulary."""

    facts: dict[str, Any]

    def encode_all(self, parts: Iterable[tuple[int, Prepared]]) -> Iterator[tuple[int, list[Encoded]]]:
        """Encode each numbered part. They are returned in any order."""


class LocalReader:
    """The teacher in this process; ``classes`` is the number of classes of the student's head."""

    def __init__(self, teacher: Any, classes: int, args: SEKDConfig) -> None:
        vocab = min(classes, count_classes(teacher))
        self.teacher = LiveTeacher(teacher, vocab)
        self.draws, self.temperature, self.seed = args.class_samples, args.kd_temperature, args.seed
        self.with_entropy = args.cache_teacher_entropy
        self.facts = {
            "weights": weights_fingerprint(teacher),
            "dtype": str(teacher.dtype).removeprefix("torch."),
            "vocab": vocab,
        }

    def encode_all(self, parts: Iterable[tuple[int, Prepared]]) -> Iterator[tuple[int, list[Encoded]]]:
        for number, samples in parts:
            yield number, self.encode(samples)

    def encode(self, samples: Prepared) -> list[Encoded]:
        """Encode samples, one at a time.

        Raises:
            FloatingPointError: a sample for which the teacher's distribution is not finite.
        """
        return [self._encode(sample) for sample in samples]

    @torch.no_grad()
    def _encode(self, sample: Mapping[str, Any]) -> Encoded:
        head = self.teacher.head
        device: Any = self.teacher.model.device
        inputs = collate([Sample(**sample)], 0)
        batch = {name: tensor.to(device) for name, tensor in inputs.items()}
        hidden, key = self.teacher.read(Batch(**batch))["hidden"], sample_key(sample)

        def draw_chunk(projected: Tensor, draws: Tensor) -> tuple[Tensor, ...]:
            logits = head.finish(projected)
            target = CLASS_SELECTIONS["rs_kd"].from_logits(logits, draws, self.temperature)
            columns = target.ids, target.probs
            return (*columns, entropy(logits.log_softmax(-1))) if self.with_entropy else columns

        draws = draw_uniforms(key, self.seed, len(hidden), self.draws).to(device)
        # A CPU multiplies many positions faster. It takes the softmax of few faster, since they stay in its cache.
        softmax_positions = SOFTMAX_POSITIONS if hidden.device.type == "cpu" else CHUNK_POSITIONS
        chunks = [
            in_chunks(draw_chunk, (head.project(some_hidden), some_draws), softmax_positions)
            for some_hidden, some_draws in zip(hidden.split(CHUNK_POSITIONS), draws.split(CHUNK_POSITIONS), strict=True)
        ]
        ids, probs, *entropies = (torch.cat(column).cpu() for column in zip(*chunks, strict=True))
        if not probs.isfinite().all():
            raise FloatingPointError(
                f"the teacher's distribution is not finite at a position of sample {sample['sample_id']}; look at the "
                "sample, or choose another teacher_dtype"
            )
        counts = (probs * self.draws).round().long().numpy()
        codes = [entropy_to_bytes(e, head.classes) for e in entropies]
        data = encode(ids.numpy(), counts, head.classes, *codes)
        return key, len(counts), int((counts > 0).sum()), data


def load_reader(
    args: SEKDConfig, attention: str | None, classes: int, packed: bool, device: torch.device | None = None
) -> LocalReader:
    """Load the teacher that ``args`` names onto ``device``, by default this process's accelerator, or else the CPU."""
    device = device or torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    teacher = place_teacher(load_teacher(str(args.teacher_model_name_or_path), args, attention, device), device)
    check_head(teacher, packed)
    return LocalReader(teacher, classes, args)


def draw_uniforms(key: bytes, seed: int, positions: int, draws: int) -> Float[Tensor, "N U"]:
    """The numbers in [0, 1) that choose the classes of a sample, seeded by the sample's key."""
    number = int.from_bytes(
        hashlib.blake2b(key + seed.to_bytes(8, "little", signed=True), digest_size=8).digest(), "little"
    )
    generator = torch.Generator().manual_seed(number % 2**63)
    return torch.rand(positions, draws, generator=generator, dtype=torch.float64)


class RayReaders:
    """Teachers in ``workers`` Ray actors, in the cluster that RAY_ADDRESS names or else in one that is started here.

    Samples travel to the actors, and their bytes travel back: only this process needs the cache's folder. Each machine
    must be able to load the teacher by its name. If an actor's process dies, Ray starts it again and reads its part
    again.

    Raises:
        ValueError: the actors cannot load the teacher, or load different ones.
    """

    def __init__(self, workers: int, load: Callable[[], LocalReader]) -> None:
        self.ray, self.started = connect_to_ray()
        ray = self.ray
        self.actors: list[Any] = []
        try:
            resources = ray.cluster_resources()
            share = {f"num_{name.lower()}s": min(1, resources.get(name, 0) / workers) for name in ("CPU", "GPU")}
            actor = ray.remote(max_restarts=-1, max_task_retries=RETRIES, **share)(_Actor)
            # The number of threads decides how a sum over threads rounds.
            self.actors = [actor.remote(load, torch.get_num_threads()) for _ in range(workers)]
            try:
                all_facts = ray.get([actor.facts.remote() for actor in self.actors])
            except ray.exceptions.RayActorError as error:
                reason = str(error).strip().splitlines()[-1]
                raise ValueError(f"a Ray worker cannot load the teacher: {reason}") from error
            if any(facts != all_facts[0] for facts in all_facts):
                raise ValueError(f"the Ray workers loaded different teachers: {all_facts}; give them the same files")
            self.facts = all_facts[0]
        except BaseException:
            self.close()
            raise

    def encode_all(self, parts: Iterable[tuple[int, Prepared]]) -> Iterator[tuple[int, list[Encoded]]]:
        waiting, running = iter(parts), dict[Any, tuple[int, Any]]()
        free = self.actors * 2  # each actor has its next part queued, so that no actor is idle
        while True:
            while free and (part := next(waiting, None)):
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
                    f"the Ray worker of shard {number} died {1 + RETRIES} times, perhaps because it ran out of memory; "
                    "the finished shards stay, and the same command resumes the build"
                ) from error
            except self.ray.exceptions.RayTaskError as error:
                raise error.cause from None  # the error that LocalReader would have raised
            yield number, samples

    def close(self) -> None:
        """End the actors, and Ray too if it was started here."""
        if self.started:
            self.ray.shutdown()
        else:
            for actor in self.actors:
                self.ray.kill(actor)


class _Actor:
    """A :class:`LocalReader` in a Ray process."""

    def __init__(self, load: Callable[[], LocalReader], threads: int) -> None:
        torch.set_num_threads(threads)
        self.reader = load()

    def facts(self) -> dict[str, Any]:
        return self.reader.facts

    def encode(self, samples: Prepared) -> list[Encoded]:
        return self.reader.encode(samples)
