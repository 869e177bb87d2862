"""Scores of newer papers, as a module of your own would add them: ``import_modules: [newer_scores]``.

docs/results.md says how they compare. p is the teacher's distribution, q the student's, y the next token.
"""

import torch

from sekd.distributions import kl_divergence
from sekd.policies import POLICIES, Policy
from sekd.policies.ranks import top_k
from sekd.scores import SCORES, Rows, Score

SUPPORT = 16


def dial(rows: Rows):
    """|p(y) - q(y)|: DIAL-OPD with beta 1 (arXiv 2610.11659), a gap of logits times the mean mass that it moves."""
    p, q = (logp.gather(1, rows.targets[:, None])[:, 0].exp() for logp in (rows.teacher, rows.student_logp))
    return (p - q).abs()


def ta_divergence(rows: Rows):
    """KL(p || q) on the student's 16 likeliest classes, both scaled to sum to 1 there (TA-OPD, arXiv 2605.26844)."""
    q, ids = rows.student_logp.topk(min(SUPPORT, rows.student_logp.shape[1]))
    return kl_divergence(rows.teacher.gather(1, ids).log_softmax(-1), q.log_softmax(-1))


def ta_coverage(rows: Rows):
    """The teacher's probability of the student's 16 likeliest classes (TA-OPD)."""
    ids = rows.student_logp.topk(min(SUPPORT, rows.student_logp.shape[1])).indices
    return rows.teacher.gather(1, ids).exp().sum(-1)


def ier(rows: Rows):
    """Signal over noise of the sampled reverse-KL gradient (IER-OPD, arXiv 2609.24432), over all classes.

    The signal is Var_q[r] with r = log q - log p. The noise is E_q[(r - b)^2 (1/q - 1)] - Var_q[r], with the baseline b
    that makes it least.
    """
    q = rows.student_logp.exp()
    r = (rows.student_logp - rows.teacher).clamp(-30, 30)
    signal = (q * (r - (q * r).sum(-1, keepdim=True)).square()).sum(-1)
    rest = 1 - q  # q (1/q - 1)
    b = (rest * r).sum(-1, keepdim=True) / rest.sum(-1, keepdim=True)
    noise = (rest * (r - b).square()).sum(-1) - signal
    return signal / noise.clamp(min=1e-8)


def scale(scores, valid, low, high):
    """Scores between two quantiles of the batch, as 0 to 1; those outside become 0 or 1."""
    first, last = torch.quantile(scores[valid], torch.tensor([low, high], device=scores.device))
    return ((scores - first) / (last - first).clamp(min=1e-12)).clamp(0, 1)


def ta(scores, valid, fraction=0.2, step=0, generator=None):
    """The highest products of divergence and coverage, each scaled by its 5 % and 95 % quantiles in the batch."""
    return top_k(scale(scores[..., 0], valid, 0.05, 0.95) * scale(scores[..., 1], valid, 0.05, 0.95), valid, fraction)


def tip_of_batch(scores, valid, fraction=0.2, step=0, generator=None):
    """The highest h + d - h d, both scaled over the batch, the top 2 % of entropies cut (TIP, arXiv 2604.14084)."""
    h, d = scale(scores[..., 0], valid, 0.0, 0.98), scale(scores[..., 1], valid, 0.0, 1.0)
    return top_k(h + d - h * d, valid, fraction)


SCORES |= {name: Score(function) for name, function in {"dial": dial, "ier": ier}.items()}
SCORES |= {"ta_divergence": Score(ta_divergence), "ta_coverage": Score(ta_coverage)}
POLICIES["ta"] = Policy(ta, reads=("ta_divergence", "ta_coverage"))
POLICIES["tip_of_batch"] = Policy(tip_of_batch, reads=("student_entropy", "reverse_kl"))
