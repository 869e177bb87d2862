"""Which classes? At each position a few classes of the teacher's distribution replace the whole of it.

RS-KD (Anshumann et al., 2025; arXiv 2602.01395, table 1) draws U classes with replacement from p. Its target
is the relative frequency of each class among the draws. Its loss has the gradient of forward KL in expectation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sekd.heads import Head
from sekd.types import SparseTargets


def sample_classes(
    teacher_probs: Float[Tensor, "N V"], num_samples: int, generator: torch.Generator | None = None
) -> SparseTargets:
    """RS-KD targets: draw ``num_samples`` classes with replacement at each position.

    The targets are the unique classes. The probability of a class is its count / ``num_samples``.
    """
    draws = torch.rand(len(teacher_probs), num_samples, generator=generator, dtype=torch.float64)
    return trim(classes_at(teacher_probs, draws.to(teacher_probs.device)))


def classes_at(teacher_probs: Float[Tensor, "N V"], draws: Float[Tensor, "N U"]) -> SparseTargets:
    """:func:`sample_classes` from uniform numbers that the caller has drawn."""
    drawn, is_sound = _inverse_transform(teacher_probs, draws)
    drawn = drawn.sort(dim=1).values
    is_new = torch.ones_like(drawn, dtype=torch.bool)
    is_new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    slot = is_new.cumsum(1) - 1
    ids = torch.zeros_like(drawn).scatter_(1, slot, drawn)
    counts = torch.zeros(drawn.shape, device=drawn.device)
    counts = counts.scatter_add_(1, slot, torch.ones_like(counts))
    # A teacher that overflowed must give a loss of nan, as it does over all classes. A check here would cost a sync.
    return SparseTargets(ids, (counts / draws.shape[1]).masked_fill(~is_sound[:, None], torch.nan))


def _inverse_transform(
    probs: Float[Tensor, "N V"], draws: Float[Tensor, "N U"]
) -> tuple[Int[Tensor, "N U"], Bool[Tensor, " N"]]:
    """The class of each draw, and whether the probabilities of each position have a finite sum above 0.

    A draw's class is the first one whose running sum exceeds the draw times the whole sum. It is found in two steps:
    the block of classes, then the class in the block. A running sum over all classes would take longer than the
    softmax. It would need float64, because float32 loses the tail of a large vocabulary.
    """
    vocab = probs.shape[1]
    # The number of added values is V / size + U * size. This power of 2 is near the size with the fewest, and powers
    # of 2 often divide V.
    size = 1 << max(math.isqrt(vocab // draws.shape[1]).bit_length() - 1, 0)
    blocks = (nn.functional.pad(probs, (0, -vocab % size)) if vocab % size else probs).unflatten(1, (-1, size))
    sums = blocks.sum(-1, dtype=torch.float32)
    block, rest = _first_over(sums, draws)
    inside, _ = _first_over(blocks.gather(1, block[..., None].expand(-1, -1, size)), rest[..., None])
    whole = sums.sum(-1)
    return block * size + inside[..., 0], whole.isfinite() & (whole > 0)


def _first_over(values: Float[Tensor, "*R C"], draws: Float[Tensor, "*R U"]) -> tuple[Tensor, Tensor]:
    """Two tensors: the index that each draw falls on, and where within that index's value it falls, in [0, 1).

    A draw falls on the first index at which the running sum exceeds the draw times the whole sum.
    """
    ends = values.cumsum(-1, dtype=torch.float64)
    aim = (draws * ends[..., -1:]).minimum(ends[..., -1:].nextafter(torch.zeros_like(ends[..., -1:])))
    # An index past the end, or one whose value is 0, is possible only if the values are not a distribution.
    place = torch.searchsorted(ends, aim, right=True).clamp(max=values.shape[-1] - 1)
    begin = torch.where(place > 0, ends.gather(-1, (place - 1).clamp(min=0)), 0)
    return place, (aim - begin) / (ends.gather(-1, place) - begin)


def trim(target: SparseTargets) -> SparseTargets:
    """Drop the slots that no position uses. Used slots come first."""
    width = int((target.probs != 0).sum(1).max()) if len(target.probs) else 1
    return SparseTargets(target.ids[:, :width], target.probs[:, :width])


def top_k_classes(teacher_probs: Float[Tensor, "N V"], num_classes: int) -> SparseTargets:
    """The likeliest classes, with probabilities scaled to sum to 1 (Raman et al., 2023). A *biased* baseline."""
    probs, ids = teacher_probs.topk(min(num_classes, teacher_probs.shape[1]), dim=-1)
    return SparseTargets(ids, (probs / probs.sum(-1, keepdim=True)).float())


def sparse_forward_kl(student_logp: Float[Tensor, "N K"], target: SparseTargets) -> Float[Tensor, " N"]:
    """sum_v p~(v) (log p~(v) - log q(v)) over the kept classes v; ``student_logp`` is log q at ``target.ids``."""
    logs = target.probs.clamp(min=torch.finfo(target.probs.dtype).tiny).log()
    return (target.probs * (logs - student_logp)).where(target.probs != 0, 0).sum(-1)


def negative_classes(vocab: int, count: int, seed: int) -> Int[Tensor, " M"]:
    """``count`` different classes drawn uniformly, or all classes if there are fewer."""
    return torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))[:count].sort().values


class SampledHead:
    """log q of a few classes without logits of the whole vocabulary (sampled softmax, Bengio & Senecal, 2008).

    The estimate of Z has two parts: the sum over the position's kept classes C, and the sum over the uniform
    ``negatives`` outside C times (V - |C|) / their number. It is unbiased for Z, consistent for log Z, and exact if
    the negatives are the whole vocabulary. Only the head's columns of these classes are read. The head must be a plain
    linear layer.
    """

    def __init__(self, head: Head, target: SparseTargets, negatives: Int[Tensor, " M"]) -> None:
        linear: Any = head.projection
        self.head, self.negatives = head, negatives.to(target.ids.device)
        self.vocab = head.classes
        columns, place = torch.cat([target.ids[target.probs > 0], self.negatives]).unique(return_inverse=True)
        # Gathered once and not in each chunk, because the gradient of each gather is as large as the whole head.
        self.weight = linear.weight[columns]
        self.bias = None if linear.bias is None else linear.bias[columns]
        self.places = torch.zeros(self.vocab, dtype=torch.long, device=columns.device).scatter_(
            0, columns, torch.arange(len(columns), device=columns.device)
        )
        self.negative_places = place[len(place) - len(self.negatives) :]

    def log_probs(
        self, hidden: Float[Tensor, "N D"], ids: Int[Tensor, "N K"], kept: Bool[Tensor, "N K"], temperature: float = 1.0
    ) -> Float[Tensor, "N K"]:
        """log q at ``ids``. Slots that are not ``kept`` are padding and do not count."""
        logits = self.head.finish(torch.nn.functional.linear(hidden, self.weight, self.bias)) / temperature
        own = logits.gather(1, self.places[ids]).masked_fill(~kept, -1e30)
        hit = torch.zeros_like(logits).scatter_add_(1, self.places[ids], kept.to(logits.dtype)) > 0
        others = logits.masked_fill(hit, -1e30)[:, self.negative_places]
        sampled = (~hit[:, self.negative_places]).sum(1)
        unseen = self.vocab - kept.sum(1)
        correction = torch.where(sampled > 0, unseen / sampled.clamp(min=1), 1).log()
        log_z = torch.logaddexp(own.logsumexp(1), others.logsumexp(1) + correction)
        return torch.where(kept, own, 0) - log_z[:, None]


@dataclass(frozen=True)
class ClassSelection:
    """``select(teacher_probs [N V], draws [N U]) -> SparseTargets`` with at most U classes; None keeps all classes.

    ``draws`` are uniform numbers in [0, 1). ``in_cache``: these are the targets
    of a teacher cache, which ``rs_kd`` alone has. ``words`` name the classes in a model card, with {classes} for their
    number.
    """

    select: Callable[[Float[Tensor, "N V"], Float[Tensor, "N U"]], SparseTargets] | None = None
    in_cache: bool = False
    words: str = ""

    def from_logits(
        self, logits: Float[Tensor, "N V"], draws: Float[Tensor, "N U"], temperature: float = 1.0
    ) -> SparseTargets:
        """The selected classes of the teacher's logits; unused slots are not trimmed."""
        assert self.select is not None
        return self.select((logits if temperature == 1 else logits / temperature).softmax(-1), draws)


CLASS_SELECTIONS: dict[str, ClassSelection] = {
    "full": ClassSelection(),
    "rs_kd": ClassSelection(classes_at, in_cache=True, words="{classes} classes drawn from the teacher"),
    "top_k_classes": ClassSelection(
        lambda probs, draws: top_k_classes(probs, draws.shape[1]), words="the teacher's {classes} likeliest classes"
    ),
}
