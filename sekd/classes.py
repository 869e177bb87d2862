"""Which classes? A teacher's distribution becomes a few classes a row, and a student is compared with it on those.

RS-KD (Anshumann et al., 2025; arXiv 2602.01395, table 1) draws U classes with replacement from p. Its target has the
frequencies of the draws, so in expectation its loss has the gradient of forward KL.
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sekd.heads import Head
from sekd.types import SparseTargets


def sample_classes(
    teacher_probs: Float[Tensor, "N V"], num_samples: int, generator: torch.Generator | None = None
) -> SparseTargets:
    """The unique classes among ``num_samples`` draws with replacement from each row, with count / draws (RS-KD)."""
    draws = torch.rand(len(teacher_probs), num_samples, generator=generator, dtype=torch.float64)
    return trim(classes_at(teacher_probs, draws.to(teacher_probs.device)))


def classes_at(teacher_probs: Float[Tensor, "N V"], draws: Float[Tensor, "N U"]) -> SparseTargets:
    """:func:`sample_classes` by inverse transform of given numbers in [0, 1), so that draws can be seeded by row."""
    drawn, is_sound = _inverse_transform(teacher_probs, draws)
    drawn = drawn.sort(dim=1).values
    is_new = torch.ones_like(drawn, dtype=torch.bool)
    is_new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    slot = is_new.cumsum(1) - 1
    ids = torch.zeros_like(drawn).scatter_(1, slot, drawn)
    counts = torch.zeros(drawn.shape, device=drawn.device)
    counts = counts.scatter_add_(1, slot, torch.ones_like(counts))
    # A teacher that overflowed must end in a loss that is nan, as over all classes; looking here would cost a sync.
    return SparseTargets(ids, (counts / draws.shape[1]).masked_fill(~is_sound[:, None], torch.nan))


def _inverse_transform(
    probs: Float[Tensor, "N V"], draws: Float[Tensor, "N U"]
) -> tuple[Int[Tensor, "N U"], Bool[Tensor, " N"]]:
    """The class at which the running sum of a row passes a draw's part of the row's sum; and which rows have a sum
    that is finite and above 0.

    In two steps, blocks of classes and then the classes of each draw's block: a running sum over all classes, which
    needs float64 since float32 loses the tail of a large vocabulary, would take longer than the softmax.
    """
    vocab = probs.shape[1]
    # About the fewest values to add up, V / size + U * size; vocabularies are often multiples of a power of 2.
    size = 1 << max(math.isqrt(vocab // draws.shape[1]).bit_length() - 1, 0)
    blocks = (nn.functional.pad(probs, (0, -vocab % size)) if vocab % size else probs).unflatten(1, (-1, size))
    sums = blocks.sum(-1, dtype=torch.float32)
    block, rest = _first_over(sums, draws)
    inside, _ = _first_over(blocks.gather(1, block[..., None].expand(-1, -1, size)), rest[..., None])
    whole = sums.sum(-1)
    return block * size + inside[..., 0], whole.isfinite() & (whole > 0)


def _first_over(values: Float[Tensor, "*R C"], draws: Float[Tensor, "*R U"]) -> tuple[Tensor, Tensor]:
    """Where the running sum passes each draw's part of the whole, and how far into that value, in [0, 1)."""
    ends = values.cumsum(-1, dtype=torch.float64)
    aim = (draws * ends[..., -1:]).minimum(ends[..., -1:].nextafter(torch.zeros_like(ends[..., -1:])))
    # Never a value of 0; nor behind the last one, unless the values are no distribution.
    place = torch.searchsorted(ends, aim, right=True).clamp(max=values.shape[-1] - 1)
    begin = torch.where(place > 0, ends.gather(-1, (place - 1).clamp(min=0)), 0)
    return place, (aim - begin) / (ends.gather(-1, place) - begin)


def trim(target: SparseTargets) -> SparseTargets:
    """Without the slots that no row uses; used slots come first."""
    width = int((target.probs != 0).sum(1).max()) if len(target.probs) else 1
    return SparseTargets(target.ids[:, :width], target.probs[:, :width])


def top_k_classes(teacher_probs: Float[Tensor, "N V"], num_classes: int) -> SparseTargets:
    """The likeliest classes, their probabilities scaled to sum to 1: a *biased* baseline (Raman et al., 2023)."""
    probs, ids = teacher_probs.topk(min(num_classes, teacher_probs.shape[1]), dim=-1)
    return SparseTargets(ids, (probs / probs.sum(-1, keepdim=True)).float())


def sparse_forward_kl(student_logp: Float[Tensor, "N K"], target: SparseTargets) -> Float[Tensor, " N"]:
    """sum_v p~(v) (log p~(v) - log q(v)) over the kept classes v; ``student_logp`` is log q at ``target.ids``."""
    logs = target.probs.clamp(min=torch.finfo(target.probs.dtype).tiny).log()
    return (target.probs * (logs - student_logp)).where(target.probs != 0, 0).sum(-1)


def negative_classes(vocab: int, count: int, seed: int) -> Int[Tensor, " M"]:
    """``count`` different classes drawn uniformly: all of them where there are no more."""
    return torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))[:count].sort().values


class SampledHead:
    """log q of a few classes a row without the full vocabulary's logits (sampled softmax, Bengio & Senecal, 2008).

    Z is estimated by the kept classes C of the row, plus the uniform ``negatives`` outside C times
    (V - |C|) / their number: unbiased for Z, consistent for log Z, and exact where the negatives are the whole
    vocabulary. Only the head's columns of these classes are read. The head must be a plain linear layer.
    """

    def __init__(self, head: Head, target: SparseTargets, negatives: Int[Tensor, " M"]) -> None:
        linear: Any = head.projection
        self.head, self.negatives = head, negatives.to(target.ids.device)
        self.vocab = head.classes
        columns, place = torch.cat([target.ids[target.probs > 0], self.negatives]).unique(return_inverse=True)
        # Taken once, outside of the chunks: each gather's gradient is as large as the whole head.
        self.weight = linear.weight[columns]
        self.bias = None if linear.bias is None else linear.bias[columns]
        self.places = torch.zeros(self.vocab, dtype=torch.long, device=columns.device).scatter_(
            0, columns, torch.arange(len(columns), device=columns.device)
        )
        self.negative_places = place[len(place) - len(self.negatives) :]

    def log_probs(
        self, rows: Float[Tensor, "N D"], ids: Int[Tensor, "N K"], kept: Bool[Tensor, "N K"], temperature: float = 1.0
    ) -> Float[Tensor, "N K"]:
        """log q at ``ids``; slots that are not ``kept`` are padding, and count for nothing."""
        logits = self.head.finish(torch.nn.functional.linear(rows, self.weight, self.bias)) / temperature
        own = logits.gather(1, self.places[ids]).masked_fill(~kept, -1e30)
        hit = torch.zeros(logits.shape, device=rows.device).scatter_add_(1, self.places[ids], kept.float()) > 0
        others = logits.masked_fill(hit, -1e30)[:, self.negative_places]
        sampled = (~hit[:, self.negative_places]).sum(1)
        unseen = self.vocab - kept.sum(1)
        correction = torch.where(sampled > 0, unseen / sampled.clamp(min=1), 1).log()
        log_z = torch.logaddexp(own.logsumexp(1), others.logsumexp(1) + correction)
        return torch.where(kept, own, 0) - log_z[:, None]


CLASS_SELECTIONS = ("full", "rs_kd", "top_k_classes")
