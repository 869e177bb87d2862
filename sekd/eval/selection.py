"""What a report shows of a few sequences: which positions are chosen, why, and what both models say there.

A run keeps snapshots of the same sequences, before, during and after the training: about 90 bytes a position each.
"""

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial

import torch
from datasets import Dataset, IterableDataset
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerState
from transformers.utils import logging

from sekd.config import SEKDConfig
from sekd.data.batch import Sample, collate
from sekd.distill import Method, score_batch
from sekd.distributions import cross_entropy, entropy
from sekd.eval.held_out import Pair
from sekd.eval.snapshots import FOLDER, NUMBERS, Snapshot, list_snapshots, read_snapshot, write_snapshot
from sekd.files import DamagedFile
from sekd.heads import in_chunks
from sekd.losses import MEANS, forward_kl, reverse_kl
from sekd.models import evaluating, get_head, hidden_states, run_inside
from sekd.on_policy.schedule import is_on_policy
from sekd.policies.ranks import Generators, check_weights, eligible
from sekd.teachers import Teacher
from sekd.types import Batch, Positions, SparseTargets, at_temperature

logger = logging.get_logger(__name__)

SNAPSHOTS = 5
"""The student before the training, after each quarter of the steps, and at the end."""
TOP = 5
"""The likeliest classes of each model that are kept."""


@torch.no_grad()
def measure_selection(
    student: nn.Module, teacher: Teacher, batch: Batch, method: Method, step: int, generator: Generators = None
) -> dict[str, Float[Tensor, "N ..."] | Int[Tensor, "N ..."]]:
    """What a step would choose of a batch, at each of its N valid positions.

    The columns are :data:`sekd.eval.snapshots.NUMBERS`, ``weight``, ``scores`` [N C], and of the likeliest classes
    ``student_ids``, ``student_probs``, ``teacher_ids`` and ``teacher_probs`` [N TOP].

    A cache has some of the teacher's classes only: ``forward_kl`` then is the estimate on them, and the other numbers
    of the teacher are NaN. The policy's state stays as it is. Call it inside the student's wrappers.
    """
    head, valid = get_head(student, method.vocab).in_autocast_dtype(), batch.valid
    positions = Positions(hidden_states(student, batch)[valid], batch.targets[valid], teacher.read(batch))
    allowed = eligible(valid, method.skip_first, batch.position_ids)
    scores, _ = score_batch(head, teacher, positions, batch, allowed, method, step)
    policy = copy.deepcopy(method.policy)
    weights = check_weights(policy(scores, allowed, step=step, generator=generator), allowed)
    weights = MEANS[method.mean_over](weights, valid)

    def describe_chunk(positions: Positions) -> tuple[Tensor, ...]:
        q = head(positions.hidden).log_softmax(-1)
        own = entropy(q), cross_entropy(q, positions.targets)
        if teacher.has_logits:
            p = teacher.logits(positions.teacher).log_softmax(-1)
            compared = entropy(p), forward_kl(q, p), reverse_kl(q, p)
            top = _take_top(p.exp())
        else:
            targets = teacher.targets(positions, method.classes, method.temperature, _no_draws, method.chunk_rows)
            assert isinstance(targets, SparseTargets)
            q_T = at_temperature(q, method.temperature).gather(1, targets.ids)
            unknown = torch.full_like(own[0], torch.nan)
            log_p = targets.probs.clamp(min=torch.finfo(q.dtype).tiny).log()
            compared = unknown, (targets.probs * (log_p - q_T)).sum(1), unknown
            top = _take_top(targets.probs, targets.ids)
        return *own, *compared, *_take_top(q.exp()), *top

    *numbers, student_ids, student_probs, teacher_ids, teacher_probs = in_chunks(
        describe_chunk, [positions], method.chunk_rows
    )
    return {
        **dict(zip(NUMBERS, numbers, strict=True)),
        "weight": weights[valid],
        "scores": scores[valid].view(len(positions), *(scores.shape[2:] or (1,)))[:, : len(name_scores(method, step))],
        "student_ids": student_ids,
        "student_probs": student_probs,
        "teacher_ids": teacher_ids,
        "teacher_probs": teacher_probs,
    }


def name_scores(method: Method, step: int) -> list[str]:
    """The names of the columns of ``scores``: none if the policy reads no score."""
    scoring = method.get_scoring(step)
    if scoring is None:
        return []
    return [*scoring.names] if scoring.weights is None or len(scoring.names) == 1 else [" + ".join(scoring.names)]


def _take_top(probs: Float[Tensor, "N V"], ids: Int[Tensor, "N V"] | None = None) -> tuple[Tensor, Tensor]:
    """The ids and the probabilities of the :data:`TOP` likeliest classes. Missing classes have probability 0."""
    top, places = probs.topk(min(TOP, probs.shape[1]))
    chosen = places if ids is None else ids.gather(1, places)
    missing = TOP - top.shape[1]
    return nn.functional.pad(chosen, (0, missing)), nn.functional.pad(top, (0, missing))


def _no_draws() -> Tensor:
    raise AssertionError("a teacher without logits has drawn its classes before")


def choose_steps(max_steps: int) -> set[int]:
    """The steps before which a run of ``max_steps`` keeps a snapshot. The last snapshot is after the training."""
    return {round(max_steps * i / (SNAPSHOTS - 1)) for i in range(SNAPSHOTS)}


def decode_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> dict[int, str]:
    """The text of each token within a text: some tokenizers drop the space before the first token that they decode."""
    before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    start, texts = tokenizer.decode(before), {}
    for token in tokens:
        both = tokenizer.decode([*before, token])
        texts[token] = both.removeprefix(start) if before and both.startswith(start) else tokenizer.decode([token])
    return texts


class SelectionRecorder:
    """Keeps the snapshots of a run. Every process calls it; one of them writes.

    Args:
        folder: the run's ``output_dir``.
        held_out: the sequences to keep. Without them, the first ones of the first step that it sees are kept.
        is_on_policy: whether a step learns from rollouts.
        number: the number of sequences; 0 keeps nothing.
        writes: whether this process writes.
    """

    def __init__(
        self,
        folder: str,
        tokenizer: PreTrainedTokenizerBase,
        held_out: Sequence[Sample],
        is_on_policy: Callable[[int], bool],
        number: int,
        writes: bool = True,
    ) -> None:
        self.folder, self.tokenizer, self.held_out = os.path.join(folder, FOLDER), tokenizer, [*held_out]
        self.is_on_policy, self.number, self.writes = is_on_policy, number, writes
        self.begin()

    def begin(self) -> None:
        """Forget the sequences of the previous attempt."""
        self.samples: list[Sample] = []
        self.source = ""

    def record(
        self,
        pair: Pair,
        method: Method,
        make_generators: Callable[[Batch], Generators],
        state: TrainerState,
        samples: Sequence[Sample],
        is_end: bool = False,
    ) -> None:
        """Keep a snapshot of the student after ``state.global_step`` steps, if one is due. At the end one always is.

        ``samples`` are the samples of the next step. A run without held-out sequences keeps the first of these.
        """
        if not self.number:
            return
        step, due = state.global_step, choose_steps(state.max_steps)
        if not self.samples:
            self._choose_samples(step, due, samples)
        if not self.samples or not (is_end or step in due):
            return
        parts: list[dict[str, Tensor]] = []
        for start in range(0, len(self.samples), pair.batch_size):
            fields = collate(self.samples[start : start + pair.batch_size], pair.pad_token_id)
            batch = Batch.from_inputs(fields).to(pair.device)
            arguments = pair.student, pair.teacher, batch, method, step, make_generators(batch)
            with torch.no_grad(), pair.autocast(), evaluating(pair.student):  # DDP would wait for a gradient
                parts.append(run_inside(pair.student, lambda _, a=arguments: measure_selection(*a), batch))
        columns = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
        if self.writes:
            self._write(step, name_scores(method, step), columns)

    def _write(self, step: int, scores: list[str], columns: dict[str, Tensor]) -> None:
        batch = Batch.from_inputs(collate(self.samples, 0))
        columns["sample"], columns["position"] = batch.valid.nonzero().T
        tokens = {token for sample in self.samples for token in sample.input_ids}
        tokens |= {token for name in ("student_ids", "teacher_ids") for token in columns[name].unique().tolist()}
        texts = decode_tokens(self.tokenizer, sorted(tokens))
        samples = [asdict(sample) for sample in self.samples]
        narrow = {name: column.to(_choose_dtype(name)).contiguous() for name, column in columns.items()}
        write_snapshot(self.folder, Snapshot(step, self.source, scores, samples, texts, narrow))

    def _choose_samples(self, step: int, due: set[int], samples: Sequence[Sample]) -> None:
        """Choose held-out sequences, else those from before a resume, else ``samples``. Remove later snapshots."""
        kept = self.held_out or samples
        self.source = "rollouts of the first step" if self.is_on_policy(step) else "training data"
        if self.held_out:
            self.source = "held-out data"
        for snapshot_step, path in list_snapshots(self.folder).items():
            if snapshot_step > step or snapshot_step not in due:
                if self.writes:
                    os.remove(path)
            elif not self.held_out:
                try:
                    snapshot = read_snapshot(path)
                    kept, self.source = [Sample(**fields) for fields in snapshot.samples], snapshot.source
                except DamagedFile as error:
                    logger.warning(f"{error}; the report will have other sequences from here on")
        self.samples = [replace(sample, entropies=None) for sample in kept[: self.number]]


def make_recorder(
    args: SEKDConfig, tokenizer: PreTrainedTokenizerBase, held_out: Dataset | IterableDataset | None, has_logits: bool
) -> SelectionRecorder:
    """The recorder of a run.

    It keeps held-out sequences, or else the first sequences of the first step: rollouts on-policy. An on-policy run has
    no use for held-out completions. A cache (no ``has_logits``) knows the training sequences alone.
    """
    has_held_out = held_out is not None and has_logits and not args.all_on_policy
    rows = held_out.take(args.record_selection) if held_out is not None and has_held_out else []
    return SelectionRecorder(
        str(args.output_dir),
        tokenizer,
        [Sample(**row) for row in rows],
        partial(is_on_policy, args),
        args.record_selection,
        writes=args.process_index == 0,
    )


def _choose_dtype(name: str) -> torch.dtype:
    if name.endswith("_ids") or name in ("sample", "position"):
        return torch.int32
    return torch.float32 if name in ("weight", "scores") else torch.float16
