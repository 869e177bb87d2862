"""The method on one screen: hidden states -> scores -> weights -> targets -> rows of loss -> their weighted sum.

Selective knowledge distillation (arXiv 2602.01395, equations 3 to 5). The student's backbone runs once, with a graph.
Its head runs over every valid row without a graph where positions are scored, and with a graph over the chosen rows
only; the teacher's head runs over the chosen rows (and over all, if a score needs it). Nothing of size B*T*V exists at
any time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sekd.cache.teacher import CachedTeacher
from sekd.classes import SampledHead, classes_at, negative_classes, sparse_forward_kl, top_k_classes, trim
from sekd.config import SEKDConfig
from sekd.distributions import cross_entropy, entropy
from sekd.heads import Head, chunked_entropy, in_chunks
from sekd.losses import ON_LOG_PROBABILITIES, at_kd, at_kd_factors, forward_kl, reduce
from sekd.models import get_head, hidden_states
from sekd.policies import make_policy
from sekd.policies.bandit import Bandit
from sekd.policies.gls import Gls
from sekd.policies.ranks import Generators, eligible, top_k, uniform
from sekd.scores import Rows, Scoring
from sekd.teachers import Teacher
from sekd.types import Batch, SparseTargets

AGREEMENT_STEPS = 10
"""Where the sampler's entropy chooses positions, every so many steps one sequence a batch is scored exactly too."""


@dataclass(frozen=True)
class Method:
    """The choices of one distillation: which rows and classes, and what is minimised on them.

    ``scoring`` is None where the policy looks at no score; ``divergence`` takes log-probabilities. A row's loss is
    ``kd_weight * temperature^2 * D(p_T, q_T) + (1 - kd_weight) * CE``. ``class_samples`` is the number of draws
    (``rs_kd``) or classes (``top_k_classes``); ``sampled_softmax`` the number of negatives, 0 for all classes.
    """

    scoring: Scoring | None
    policy: Callable[..., Float[Tensor, "B T"]]
    divergence: Callable[..., Float[Tensor, " N"]]
    kd_weight: float = 1.0
    temperature: float = 1.0
    skip_first: int = 0
    class_selection: str = "full"
    class_samples: int = 64
    sampled_softmax: int = 0
    vocab: int | None = None
    chunk_rows: int = 256
    seed: int = 0
    fraction: float = 0.2

    @classmethod
    def from_config(cls, args: SEKDConfig, vocab: int | None = None) -> "Method":
        """What a configuration asks for; ``vocab`` are the classes that both models have."""
        policy = make_policy(args.position_policy, args.position_fraction, **args.policy_options)
        if isinstance(policy, Gls):
            policy.whole_steps = True
        divergence = ON_LOG_PROBABILITIES[str(args.divergence)]
        return cls(
            scoring=args.scoring,
            policy=policy,
            divergence=partial(divergence, **args.divergence_options) if args.divergence_options else divergence,
            kd_weight=args.kd_weight,
            temperature=args.kd_temperature,
            skip_first=args.position_skip,
            class_selection=args.class_selection,
            class_samples=args.class_samples,
            sampled_softmax=args.sampled_softmax,
            vocab=vocab,
            chunk_rows=args.head_chunk_rows,
            seed=args.seed,
            fraction=args.position_fraction,
        )


def distill(
    student: nn.Module, teacher: Teacher, batch: Batch, method: Method, step: int = 0, generator: Generators = None
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The loss of a batch, *summed* over its sequences, and sums for the metrics.

    Divide by the number of sequences in the whole optimizer step. Call it inside the student's wrappers
    (:func:`sekd.models.run_inside`). The sums: ``tokens`` (padding included), ``rows`` (valid ones), ``entropy`` over
    ``entropy_rows`` (all valid rows; the chosen ones where no score was needed), and over ``selected_rows``
    ``selected_entropy`` and ``divergence``. With the sampler's entropy (``batch.student_entropy``) now and then those
    of :func:`agreement`.
    """
    head = get_head(student, method.vocab).in_autocast_dtype()
    rows = hidden_states(student, batch)[batch.valid]  # [N D], with graph
    targets = batch.targets[batch.valid]  # [N]
    teacher_rows = teacher.rows(batch)  # of the N valid rows

    allowed = eligible(batch.valid, method.skip_first, batch.position_ids)
    scores, entropies = torch.zeros(batch.valid.shape, device=rows.device), None
    checked: dict[str, Tensor] = {}
    if method.scoring is not None:
        if batch.student_entropy is not None:  # the sampler's own, instead of a pass of the head
            entropies = batch.student_entropy[batch.valid]
            row_scores = entropies[:, None]
            if step % AGREEMENT_STEPS == 0:
                checked = agreement(head, rows, batch.valid, batch.student_entropy, method)
        else:
            row_scores, entropies = score_rows(
                head, teacher, rows, targets, teacher_rows, method.scoring, method.chunk_rows
            )  # [N C] and [N], no graph
        if not row_scores.isfinite().all():  # a policy might choose nothing, and the loss would be 0
            samples = batch.sample_ids.tolist()
            raise FloatingPointError(
                f"a position score is not finite at step {step}, on samples {samples}; training stops before the "
                "weights take it. A lower learning_rate or max_grad_norm may help, or bf16: false"
            )
        scores = torch.zeros(*batch.valid.shape, row_scores.shape[1], device=rows.device)
        scores = method.scoring.combine(scores.masked_scatter(batch.valid[..., None], row_scores), allowed)  # [B T]
    weights = method.policy(scores, allowed, step=step, generator=generator)  # [B T]
    chosen = (weights > 0)[batch.valid]  # [N]
    if method.divergence is at_kd and not isinstance(method.policy, Gls):
        # A mean over the rows of the batch, as gls has it already.
        weights = (weights > 0) * batch.valid.any(1).sum() / chosen.sum().clamp(min=1)

    rows, targets, teacher_rows = rows[chosen], targets[chosen], tuple(r[chosen] for r in teacher_rows)
    if isinstance(method.policy, Bandit):
        method.policy.remember(batch, chosen, teacher_rows)
    if method.class_selection == "full":
        losses, divergences, found = dense_losses(head, teacher, rows, targets, teacher_rows, method)
    else:
        if isinstance(teacher, CachedTeacher):
            target = trim(SparseTargets(*teacher_rows[:2]))
        else:
            draws = uniform((weights > 0).sum(1) * method.class_samples, generator, torch.float64)
            target = sparse_targets(teacher, teacher_rows, draws.view(-1, method.class_samples).to(rows.device), method)
        losses, divergences, found = sparse_losses(head, rows, targets, target, method, step)

    sums = {
        "tokens": torch.tensor(batch.input_ids.numel(), device=rows.device),
        "rows": batch.valid.sum(),
        "selected_rows": chosen.sum(),
        "divergence": divergences.sum(),
        **checked,
    }
    if entropies is not None:
        sums |= {"selected_entropy": entropies[chosen].sum(), "entropy": entropies.sum(), "entropy_rows": sums["rows"]}
    elif found is not None:
        sums |= {"selected_entropy": found.sum(), "entropy": found.sum(), "entropy_rows": sums["selected_rows"]}
    return reduce(losses, weights[weights > 0]), sums


@torch.no_grad()
def agreement(
    head: Head,
    rows: Float[Tensor, "N D"],
    valid: Bool[Tensor, "B T"],
    sampled: Float[Tensor, "B T"],
    method: Method,
) -> dict[str, Tensor]:
    """How many of the positions that exact entropy would choose in the batch's first sequence (``agreement_rows``) the
    sampler's entropy chooses too (``agreement``), by rank."""
    first, valid = rows[: int(valid[0].sum())], valid[:1]
    exact = torch.zeros(valid.shape, device=rows.device)
    exact = exact.masked_scatter(valid, chunked_entropy(first, head, method.chunk_rows))
    theirs, ours = (top_k(scores, valid, method.fraction) > 0 for scores in (exact, sampled[:1]))
    return {"agreement": (theirs & ours).sum(), "agreement_rows": theirs.sum()}


@torch.no_grad()
def score_rows(
    head: Head,
    teacher: Teacher | None,
    rows: Float[Tensor, "N D"],
    targets: Int[Tensor, " N"],
    teacher_rows: tuple[Tensor, ...],
    scoring: Scoring,
    chunk_rows: int,
) -> tuple[Float[Tensor, "N C"], Float[Tensor, " N"]]:
    """The scores that the policy reads, and the student's entropy, of each row."""

    def of_chunk(rows: Tensor, targets: Tensor, *teacher_rows: Tensor) -> tuple[Tensor, Tensor]:
        q = head(rows).log_softmax(-1)
        known = teacher.for_scores(*teacher_rows) if teacher and scoring.needs_teacher else {}
        scores = scoring.of(Rows(q, targets, **known))
        column = scoring.names.index("student_entropy") if "student_entropy" in scoring.names else None
        return scores, entropy(q) if column is None else scores[:, column]

    scores, entropies = in_chunks(of_chunk, (rows, targets, *teacher_rows), chunk_rows)
    return scores, entropies


def dense_losses(
    head: Head,
    teacher: Teacher,
    rows: Float[Tensor, "N D"],
    targets: Int[Tensor, " N"],
    teacher_rows: tuple[Tensor, ...],
    method: Method,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"], Float[Tensor, " N"] | None]:
    """Loss (with graph) and divergence of each row over all classes; its entropy too, if no score asked for it."""
    needs_entropy = method.scoring is None
    extra: tuple[Tensor, ...] = ()
    if method.divergence is at_kd:  # it ranks the rows of the whole batch
        extra = (at_kd_factors(teacher_cross_entropy(teacher, teacher_rows, targets, method.chunk_rows)),)

    def of_chunk(rows: Tensor, targets: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        extra_rows, teacher_rows = others[: len(extra)], others[len(extra) :]
        q, p = head(rows).log_softmax(-1), teacher.logits(*teacher_rows).log_softmax(-1)
        T = method.temperature
        q_T, p_T = (q, p) if T == 1 else ((q / T).log_softmax(-1), (p / T).log_softmax(-1))
        divergence = method.divergence(q_T, p_T, targets, *extra_rows)
        columns = _mix(divergence, q, targets, method), divergence.detach()
        return (*columns, entropy(q.detach())) if needs_entropy else columns

    losses, divergences, *entropies = in_chunks(of_chunk, (rows, targets, *extra, *teacher_rows), method.chunk_rows)
    return losses, divergences, entropies[0] if entropies else None


@torch.no_grad()
def sparse_targets(
    teacher: Teacher, teacher_rows: tuple[Tensor, ...], draws: Float[Tensor, "N U"], method: Method
) -> SparseTargets:
    """The classes of each row that the student is compared on, from a live teacher."""

    def of_chunk(draws: Tensor, *teacher_rows: Tensor) -> tuple[Tensor, Tensor]:
        target = drawn(teacher.logits(*teacher_rows), draws, method)
        return target.ids, target.probs

    return trim(SparseTargets(*in_chunks(of_chunk, (draws, *teacher_rows), method.chunk_rows)))


def drawn(logits: Float[Tensor, "N V"], draws: Float[Tensor, "N U"], method: Method) -> SparseTargets:
    """The classes of rows whose teacher logits are known; unused slots are not trimmed."""
    p = (logits if method.temperature == 1 else logits / method.temperature).softmax(-1)
    return classes_at(p, draws) if method.class_selection == "rs_kd" else top_k_classes(p, method.class_samples)


def sparse_losses(
    head: Head,
    rows: Float[Tensor, "N D"],
    targets: Int[Tensor, " N"],
    target: SparseTargets,
    method: Method,
    step: int,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"], Float[Tensor, " N"] | None]:
    """As :func:`dense_losses`, with forward KL to the kept classes; the entropy is unknown to a sampled softmax."""
    T, sampled = method.temperature, None
    if method.sampled_softmax:
        negatives = negative_classes(head.classes, method.sampled_softmax, method.seed * 2**32 + step)
        sampled = SampledHead(head, target, negatives)
    needs_entropy = method.scoring is None and sampled is None

    def of_chunk(rows: Tensor, targets: Tensor, ids: Tensor, probs: Tensor) -> tuple[Tensor, ...]:
        part = SparseTargets(ids, probs)
        if sampled is not None:
            divergence = sparse_forward_kl(sampled.log_probs(rows, ids, probs > 0, T), part)
            return method.kd_weight * T**2 * divergence, divergence.detach()
        q = head(rows).log_softmax(-1)
        q_T = q if T == 1 else (q / T).log_softmax(-1)
        divergence = sparse_forward_kl(q_T.gather(1, ids), part)
        columns = _mix(divergence, q, targets, method), divergence.detach()
        return (*columns, entropy(q.detach())) if needs_entropy else columns

    losses, divergences, *entropies = in_chunks(of_chunk, (rows, targets, target.ids, target.probs), method.chunk_rows)
    return losses, divergences, entropies[0] if entropies else None


def _mix(divergence: Tensor, q: Tensor, targets: Tensor, method: Method) -> Tensor:
    loss = method.kd_weight * method.temperature**2 * divergence
    if method.kd_weight < 1:
        loss = loss + (1 - method.kd_weight) * cross_entropy(q, targets)
    return loss


@torch.no_grad()
def teacher_cross_entropy(
    teacher: Teacher, teacher_rows: tuple[Tensor, ...], targets: Int[Tensor, " N"], chunk_rows: int
) -> Float[Tensor, " N"]:
    """CE_t of each row."""

    def of_chunk(targets: Tensor, *teacher_rows: Tensor) -> tuple[Tensor]:
        return (cross_entropy(teacher.logits(*teacher_rows).log_softmax(-1), targets),)

    return in_chunks(of_chunk, (targets, *teacher_rows), chunk_rows)[0]


@torch.no_grad()
def kl_after_step(
    student: nn.Module,
    teacher: Teacher,
    batch: Batch,
    chosen: Bool[Tensor, " N"],
    teacher_rows: tuple[Tensor, ...],
    method: Method,
) -> Float[Tensor, " K"]:
    """KL(p || q) of the K rows that a step chose, with the student as it is now: what the bandit is rewarded by."""
    head = get_head(student, method.vocab).in_autocast_dtype()

    def of_chunk(rows: Tensor, *teacher_rows: Tensor) -> tuple[Tensor]:
        return (forward_kl(head(rows).log_softmax(-1), teacher.logits(*teacher_rows).log_softmax(-1)),)

    rows = hidden_states(student, batch)[batch.valid][chosen]
    return in_chunks(of_chunk, (rows, *teacher_rows), method.chunk_rows)[0]
