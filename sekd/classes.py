"""Which classes? A teacher's distribution becomes a few classes a row, and a student is compared with it on those.

RS-KD (Anshumann et al., 2025; arXiv 2602.01395, table 1) draws U classes with replacement from p. Its target has the
frequencies of the draws, so in expectation its loss has the gradient of forward KL.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

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
    # In float32 the running sum would lose the tail of a large vocabulary.
    cumulative = teacher_probs.cumsum(-1, dtype=torch.float64)
    last = teacher_probs.shape[1] - 1
    drawn = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True).clamp(max=last).sort(dim=1).values
    is_new = torch.ones_like(drawn, dtype=torch.bool)
    is_new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    slot = is_new.cumsum(1) - 1
    ids = torch.zeros_like(drawn).scatter_(1, slot, drawn)
    counts = torch.zeros(drawn.shape, device=drawn.device)
    counts = counts.scatter_add_(1, slot, torch.ones_like(counts))
    return SparseTargets(ids, counts / draws.shape[1])


def trim(target: SparseTargets) -> SparseTargets:
    """Without the slots that no row uses; used slots come first."""
    width = int((target.probs > 0).sum(1).max()) if len(target.probs) else 1
    return SparseTargets(target.ids[:, :width], target.probs[:, :width])


def top_k_classes(teacher_probs: Float[Tensor, "N V"], num_classes: int) -> SparseTargets:
    """The likeliest classes, their probabilities scaled to sum to 1: a *biased* baseline (Raman et al., 2023)."""
    probs, ids = teacher_probs.topk(min(num_classes, teacher_probs.shape[1]), dim=-1)
    return SparseTargets(ids, (probs / probs.sum(-1, keepdim=True)).float())


def sparse_forward_kl(student_logp: Float[Tensor, "N K"], target: SparseTargets) -> Float[Tensor, " N"]:
    """sum_v p~(v) (log p~(v) - log q(v)) over the kept classes v; ``student_logp`` is log q at ``target.ids``."""
    logs = target.probs.clamp(min=torch.finfo(target.probs.dtype).tiny).log()
    return (target.probs * (logs - student_logp)).where(target.probs > 0, 0).sum(-1)


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
