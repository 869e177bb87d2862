"""The method on one screen: hidden states -> scores -> weights -> targets -> losses -> their weighted sum.

Selective knowledge distillation (arXiv 2602.01395, equations 3 to 5). The student's backbone runs once, with a graph.
Its head runs twice: over all valid positions, without a graph, to score them; then over the chosen positions, with a
graph. Without a score the first pass is left out. The teacher's head runs over the chosen positions, and over all valid
positions only if a score needs it. Nothing of size B*T*V exists at any time. :func:`distill` is the whole method; the
functions below it are its steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sekd.classes import CLASS_SELECTIONS, ClassSelection, SampledHead, negative_classes
from sekd.config import SEKDConfig
from sekd.distributions import cross_entropy, entropy
from sekd.head_loss import loss_in_chunks
from sekd.heads import Head, count_product_rows, in_chunks, in_pieces
from sekd.losses import DIVERGENCES, MEANS, Divergence, forward_kl, reduce
from sekd.models import get_head, hidden_states
from sekd.policies import POLICIES, PositionPolicy, make_policy
from sekd.policies.ranks import Generators, Valid, check_weights, eligible, uniform
from sekd.scores import Rows, Scoring
from sekd.teachers import Teacher
from sekd.timing import timed
from sekd.types import Batch, DenseTargets, Positions, SparseTargets, TeacherState, at_temperature

Inspect = Callable[[Head, Positions, Batch, Valid], dict[str, Tensor]]
"""``inspect(head, positions, batch, allowed)`` measures something. Its sums join the metrics.

The positions are all valid ones; ``allowed`` [B T] marks those that the policy may choose.
"""


@dataclass(frozen=True)
class Method:
    """The choices of one distillation: which positions and classes, and what is minimised there.

    ``scoring`` is None if the policy reads no score; with ``uniform_if_all`` it reads none at fraction 1. The loss of
    a position is
    ``kd_weight * temperature^2 * D(p_T, q_T) + (1 - kd_weight) * CE``. ``class_samples`` is the number of draws
    (``rs_kd``) or classes (``top_k_classes``). ``sampled_softmax`` is the number of negatives, 0 for all classes.
    ``vocab`` is the number of classes that teacher and student share.
    """

    scoring: Scoring | None
    policy: PositionPolicy
    divergence: Divergence
    uniform_if_all: bool = False
    kd_weight: float = 1.0
    temperature: float = 1.0
    skip_first: int = 0
    classes: ClassSelection = CLASS_SELECTIONS["full"]
    class_samples: int = 64
    sampled_softmax: int = 0
    vocab: int | None = None
    chunk_rows: int = 256
    seed: int = 0

    @classmethod
    def from_config(cls, args: SEKDConfig, vocab: int | None = None) -> "Method":
        """The method of a configuration. The caller must call ``policy.end_step`` after each optimizer step."""
        return cls(
            scoring=args.scoring,
            policy=make_policy(args.position_policy, args.fraction_schedule, whole_steps=True, **args.policy_options),
            uniform_if_all=POLICIES[args.position_policy].uniform_if_all,
            divergence=DIVERGENCES[str(args.divergence)].with_options(**args.divergence_options),
            kd_weight=args.kd_weight,
            temperature=args.kd_temperature,
            skip_first=args.position_skip,
            classes=CLASS_SELECTIONS[args.class_selection],
            class_samples=args.class_samples,
            sampled_softmax=args.sampled_softmax,
            vocab=vocab,
            chunk_rows=args.head_chunk_rows,
            seed=args.seed,
        )

    def get_scoring(self, step: int) -> Scoring | None:
        """The scores that the policy reads at a step, or None."""
        # A log needs the entropy of each of its steps. With a sampled softmax, only the scores give it.
        is_uniform = self.uniform_if_all and not self.sampled_softmax and self.policy.fraction.value(step) == 1
        return None if is_uniform else self.scoring

    @property
    def mean_over(self) -> str:
        """What the loss is a mean over, a key of :data:`MEANS`: the wider one of the policy's and the divergence's."""
        return max(self.policy.mean_over, self.divergence.mean_over, key=[*MEANS].index)


def distill(
    student: nn.Module,
    teacher: Teacher,
    batch: Batch,
    method: Method,
    step: int = 0,
    generator: Generators = None,
    inspect: Inspect | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The loss of a batch, *summed* over its sequences, and the sums of :func:`sum_metrics`.

    Divide by the number of sequences in the whole optimizer step. Call it inside the student's wrappers
    (:func:`sekd.models.run_inside`).
    """
    head = get_head(student, method.vocab).in_autocast_dtype()
    with timed("student"):
        hidden = hidden_states(student, batch)[batch.valid]  # [N D], with graph
    with timed("teacher"):
        positions = Positions(hidden, batch.targets[batch.valid], teacher.read(batch))
    allowed = eligible(batch.valid, method.skip_first, batch.position_ids)
    checks = inspect(head, positions, batch, allowed) if inspect else {}

    scores, entropies = score_batch(head, teacher, positions, batch, allowed, method, step)  # no graph
    weights = check_weights(method.policy(scores, allowed, step=step, generator=generator), allowed)  # [B T]
    weights = MEANS[method.mean_over](weights, batch.valid)
    chosen = (weights > 0)[batch.valid]  # [N]

    positions = positions[chosen]
    method.policy.observe(batch, chosen, positions.teacher)
    draw = partial(draw_numbers, weights, method.class_samples, generator)
    with timed("loss"):
        targets = teacher.targets(positions, method.classes, method.temperature, draw, method.chunk_rows)
        weights = weights[weights > 0]  # [N]
        loss, divergences, *extra = total_loss(head, positions, targets, weights, method, step, entropies is None)

    return loss, sum_metrics(batch, chosen, divergences, entropies, extra) | checks


@timed("scoring")
def score_batch(
    head: Head, teacher: Teacher, positions: Positions, batch: Batch, allowed: Valid, method: Method, step: int
) -> tuple[Float[Tensor, "B T *C"], Float[Tensor, " N"] | None]:
    """The scores that the policy reads, and the student's entropy at each valid position.

    If the policy reads no score, the scores are 0 and the entropy is None.

    Raises:
        FloatingPointError: a score that is not finite; it names the samples.
    """
    scoring = method.get_scoring(step)
    if scoring is None:
        return torch.zeros(batch.valid.shape, device=positions.device), None
    if batch.student_entropy is not None:  # the sampler's own entropy, instead of a pass of the head
        entropies = batch.student_entropy[batch.valid]
        scores = entropies[:, None]
    else:
        scores, entropies = score_positions(head, teacher, positions, scoring, method.chunk_rows)
    if not scores.isfinite().all():  # otherwise a policy might choose nothing, and a loss of 0 would hide it
        raise FloatingPointError(
            f"a position score is not finite at step {step}, on samples {batch.sample_ids.tolist()}; training stops "
            "before this changes the weights. A lower learning_rate or max_grad_norm may help, or bf16: false"
        )
    grid = torch.zeros(*batch.valid.shape, scores.shape[1], device=scores.device, dtype=scores.dtype)
    return scoring.combine(grid.masked_scatter(batch.valid[..., None], scores), allowed), entropies


@torch.no_grad()
def score_positions(
    head: Head, teacher: Teacher | None, positions: Positions, scoring: Scoring, chunk_rows: int
) -> tuple[Float[Tensor, "N C"], Float[Tensor, " N"]]:
    """The scores of each position, and the student's entropy there."""

    def score_chunk(positions: Positions) -> tuple[Tensor, ...]:
        of_teacher = teacher.score_inputs(positions.teacher) if teacher and scoring.needs_teacher else {}

        def score_piece(logits: Tensor, targets: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
            q = head.finish(logits).log_softmax(-1)
            rows = Rows(q, targets, **dict(zip(of_teacher, columns, strict=True)))
            scores = scoring.score(rows)
            return scores, scoring.student_entropy(scores, rows)

        return in_pieces(score_piece, [head.project(positions.hidden), positions.targets, *of_teacher.values()])

    scores, entropies = in_chunks(score_chunk, [positions], chunk_rows, count_product_rows(positions.hidden))
    return scores, entropies


def draw_numbers(weights: Float[Tensor, "B T"], draws: int, generator: Generators) -> Float[Tensor, "N U"]:
    """Uniform numbers for the class draws of each chosen position, from the generator of its sequence."""
    return uniform((weights > 0).sum(1) * draws, generator, torch.float64).view(-1, draws).to(weights.device)


def total_loss(
    head: Head,
    positions: Positions,
    targets: DenseTargets | SparseTargets,
    weights: Float[Tensor, " N"],
    method: Method,
    step: int,
    with_entropy: bool,
) -> tuple[Tensor, ...]:
    """The weighted sum of the losses, and tensors [N] without a graph: the divergence, and the student's entropy.

    The entropy is there if ``with_entropy``.
    """
    if method.sampled_softmax:
        assert isinstance(targets, SparseTargets)
        losses, *columns = sampled_losses(head, positions, targets, method, step)
        return reduce(losses, weights), *columns
    factors = batch_factors(positions, targets, method)

    def loss_chunk(
        logits: Tensor, ids: Tensor, targets: DenseTargets | SparseTargets, weights: Tensor, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        q = logits.log_softmax(-1)
        q_T = at_temperature(q, method.temperature)
        divergence = targets.compare(method.divergence, q_T, ids, method.temperature, *factors)
        if divergence.shape != ids.shape:
            raise ValueError(f"the divergence returned shape {[*divergence.shape]}; it must be [{len(ids)}]")
        loss = method.kd_weight * method.temperature**2 * divergence
        if method.kd_weight < 1:
            loss = loss + (1 - method.kd_weight) * cross_entropy(q, ids)
        return (reduce(loss, weights), divergence, *((entropy(q.detach()),) if with_entropy else ()))

    parts = [positions.targets, targets, weights, *factors]
    return loss_in_chunks(loss_chunk, head, positions.hidden, parts, method.chunk_rows)


def sampled_losses(
    head: Head, positions: Positions, targets: SparseTargets, method: Method, step: int
) -> tuple[Tensor, ...]:
    """Tensors [N]: the loss (with graph) and the divergence, with a sampled softmax.

    It cannot give the student's entropy or cross-entropy.
    """
    T = method.temperature
    negatives = negative_classes(head.classes, method.sampled_softmax, method.seed * 2**32 + step)
    sparse = method.divergence.sparse
    assert sparse is not None
    sampled = SampledHead(head, targets, negatives)

    def loss_chunk(positions: Positions, targets: SparseTargets) -> tuple[Tensor, ...]:
        student_logp = sampled.log_probs(positions.hidden, targets.ids, targets.probs > 0, T)
        divergence = sparse(student_logp, targets)
        return method.kd_weight * T**2 * divergence, divergence.detach()

    return in_chunks(loss_chunk, [positions, targets], method.chunk_rows)


@torch.no_grad()
def batch_factors(
    positions: Positions, targets: DenseTargets | SparseTargets, method: Method
) -> tuple[Float[Tensor, "N F"], ...]:
    """The divergence's factors, computed on all chosen positions of the batch. Empty if it has none."""
    if method.divergence.factors is None:
        return ()

    def teacher_ce(positions: Positions, targets: DenseTargets) -> tuple[Tensor]:
        return (cross_entropy(targets.log_probs(), positions.targets),)

    return (method.divergence.factors(*in_chunks(teacher_ce, [positions, targets], method.chunk_rows)),)


def sum_metrics(
    batch: Batch,
    chosen: Bool[Tensor, " N"],
    divergences: Float[Tensor, " K"],
    entropies: Float[Tensor, " N"] | None,
    chosen_entropies: list[Float[Tensor, " K"]],
) -> dict[str, Tensor]:
    """Sums for the metrics.

    Numbers: ``tokens`` (padding included), ``positions`` (valid) and ``selected``. Sums over the ``selected``
    positions: ``divergence`` and ``selected_entropy``. ``entropy`` is a sum over ``entropy_positions``: all valid
    positions, or the chosen ones if the policy reads no score. A sampled softmax without scores has no entropy.
    """
    sums = {
        "tokens": torch.tensor(batch.input_ids.numel(), device=chosen.device),
        "positions": batch.valid.sum(),
        "selected": chosen.sum(),
        "divergence": divergences.sum(),
    }
    if entropies is not None:
        selected, whole, number = entropies[chosen].sum(), entropies.sum(), sums["positions"]
    elif chosen_entropies:
        selected = whole = chosen_entropies[0].sum()
        number = sums["selected"]
    else:  # a sampled softmax without scores does not compute it
        return sums
    return sums | {"selected_entropy": selected, "entropy": whole, "entropy_positions": number}


@torch.no_grad()
def kl_after_step(
    student: nn.Module, teacher: Teacher, batch: Batch, chosen: Bool[Tensor, " N"], state: TeacherState, method: Method
) -> Float[Tensor, " K"]:
    """KL(p || q) of the K positions that a step chose, with the student after the step. The bandit learns from it."""
    head = get_head(student, method.vocab).in_autocast_dtype()

    def kl_chunk(positions: Positions) -> tuple[Tensor]:
        p = teacher.logits(positions.teacher).log_softmax(-1)
        return (forward_kl(head(positions.hidden).log_softmax(-1), p),)

    positions = Positions(hidden_states(student, batch)[batch.valid][chosen], batch.targets[batch.valid][chosen], state)
    return in_chunks(kl_chunk, [positions], method.chunk_rows)[0]
