"""Scores, losses and whole steps again in float64, row by row, as their formulas say."""

import math
from fractions import Fraction

import torch
from helpers import VOCAB

from sekd.policies import make_policy

KINDS = ["random", "peaked", "flat", "single", "empty"]


def logits(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(6, 50, generator=generator)
    return {
        "random": random,
        "peaked": random * 30,
        "flat": torch.zeros(6, 50),
        "single": random[:1],
        "empty": random[:0],
    }[kind]


def teacher_logits(rows: int) -> torch.Tensor:
    return logits("random")[:rows].flip(-1) * 2


def log_softmax(row):
    """The definition, shifted by the largest so that float64 does not overflow."""
    shifted = row - row.max()
    return shifted - shifted.exp().sum().log()


SCORE_FORMULAS = {
    "student_entropy": lambda q, p, y: -sum(a.exp() * a for a in q),
    "teacher_entropy": lambda q, p, y: -sum(a.exp() * a for a in p),
    "student_ce": lambda q, p, y: -q[y],
    "teacher_ce": lambda q, p, y: -p[y],
    "kl": lambda q, p, y: sum(b.exp() * (b - a) for a, b in zip(q, p, strict=True)),
    "reverse_kl": lambda q, p, y: sum(a.exp() * (a - b) for a, b in zip(q, p, strict=True)),
    "ce_ratio": lambda q, p, y: -q[y] / (-p[y] + 1e-6),
}
"""Class by class, of the log-probabilities of one position, as in the paper's table 1."""


def score_oracle(name, student, teacher, targets):
    """Position by position in float64; a name with ``_plus_`` is a sum of two formulas."""
    values = []
    for z_q, z_p, y in zip(student.double(), teacher.double(), targets.tolist(), strict=True):
        q, p = log_softmax(z_q), log_softmax(z_p)
        values.append(sum(SCORE_FORMULAS[part](q, p, y) for part in name.split("_plus_")))
    return torch.stack(values) if values else student.new_zeros(0).double()


def kl(a, b):
    return torch.where(a > 0, a * (a.clamp(min=1e-300).log() - b.clamp(min=1e-300).log()), 0.0).sum()


def loss_oracle(name, q_logits, p_logits, targets, **options):
    """Row by row in float64 probabilities."""
    rows = []
    q_all, p_all = torch.softmax(q_logits.double(), -1), torch.softmax(p_logits.double(), -1)
    order = sorted(range(len(q_all)), key=lambda i: (p_all[i, targets[i]].item(), i))  # hardest first
    hard = set(order[: (len(order) + 1) // 2])
    for i, (q, p, y) in enumerate(zip(q_all, p_all, targets.tolist(), strict=True)):
        others = torch.arange(len(q)) != y
        q_rest, p_rest = q[others].sum(), p[others].sum()
        target = kl(torch.stack([p[y], p_rest]), torch.stack([q[y], q_rest]))
        rest = kl(p[others] / p_rest, q[others] / q_rest)
        if name == "forward_kl":
            rows.append(kl(p, q))
        elif name == "reverse_kl":
            rows.append(kl(q, p))
        elif name == "jsd":
            beta = options.get("beta", 0.5)
            m = beta * p + (1 - beta) * q
            rows.append(beta * kl(p, m) + (1 - beta) * kl(q, m))
        elif name == "skew_kl":
            alpha = options.get("alpha", 0.1)
            rows.append(kl(p, alpha * p + (1 - alpha) * q))
        elif name == "total_variation":
            rows.append((p - q).abs().sum() / 2)
        elif name == "decoupled_kl":
            rows.append(options.get("alpha", 1.0) * target + options.get("beta", 8.0) * rest)
        elif i in hard:
            rows.append(0.8 * len(q_all) / len(hard) * (target + rest))
        else:
            rows.append(0.2 * len(q_all) / (len(q_all) - len(hard)) * rest)
    return torch.stack(rows) if rows else q_logits.new_zeros(0).double()


def naive(student, teacher, documents, fraction, divergence="reverse_kl", kd_weight=1.0, temperature=1.0):
    """The sum over sequences of the mean loss over chosen rows, in float64, one document after the other.

    ``documents`` holds, for each sequence, its packed documents as (ids, supervised) pairs.
    """
    student, teacher = student.double(), teacher.double()
    total = torch.zeros((), dtype=torch.float64)
    for sequence in documents:
        losses, entropies = [], []
        for ids, supervised in sequence:
            q_logits = student(input_ids=torch.tensor([ids])).logits[0]
            p_logits = teacher(input_ids=torch.tensor([ids])).logits[0].detach()
            for t in range(len(ids) - 1):
                if not supervised[t + 1]:
                    continue
                q = torch.softmax(q_logits[t], 0)
                entropies.append(float(-(q * q.log()).sum().detach()))
                q_T, p_T = torch.softmax(q_logits[t] / temperature, 0), torch.softmax(p_logits[t] / temperature, 0)
                if divergence == "reverse_kl":
                    value = (q_T * (q_T.log() - p_T.log())).sum()
                else:
                    value = (p_T * (p_T.log() - q_T.log())).sum()
                losses.append(kd_weight * temperature**2 * value - (1 - kd_weight) * q[ids[t + 1]].log())
        if not losses:
            continue
        k = max(1, math.ceil(Fraction(str(fraction)) * len(losses)))
        chosen = sorted(range(len(losses)), key=lambda i: (-entropies[i], i))[:k]
        total = total + sum(losses[i] for i in chosen) / k
    return total


# Every axis of a step on dense float64 rows


def dense_rows(student, teacher, batch):
    """Logits of both models and targets of the valid rows of each sequence, in float64."""
    for b in range(len(batch.input_ids)):
        valid = batch.valid[b]
        ids = batch.input_ids[b : b + 1]
        yield (
            student(input_ids=ids).logits[0][valid],
            teacher(input_ids=ids).logits[0][valid].detach(),
            batch.targets[b][valid],
        )


def seeded(batch):
    return [torch.Generator().manual_seed(100 + b) for b in range(len(batch.input_ids))]


def weights_by(args):
    """Weights of the rows, from the float64 oracle's scores."""

    def weights_of(q, p, targets, lengths, batch, step):
        names = args.scoring.names if args.scoring else ("student_entropy",)
        grid = torch.zeros(*batch.valid.shape, len(names), dtype=torch.float64)
        for c, name in enumerate(names):
            grid[..., c][batch.valid] = score_oracle(name, q, p, targets)
        scores = args.scoring.combine(grid, batch.valid) if args.scoring else grid[..., 0]
        policy = make_policy(args.position_policy, args.position_fraction, **args.policy_options)
        return policy(scores.float(), batch.valid, step=step, generator=seeded(batch))[batch.valid].double()

    return weights_of


def losses_by(name, **options):
    def losses_of(q, p, targets, weights, batch):
        chosen = weights > 0
        rows = torch.zeros(len(q), dtype=torch.float64)
        return rows.masked_scatter(chosen, loss_oracle(name, q[chosen], p[chosen], targets[chosen], **options))

    return losses_of


def sparse_rows(args):
    """The naive loss on sampled or truncated classes, with the draws that the generators give."""

    def losses_of(q, p, targets, weights, batch):
        generators, rows = seeded(batch), []
        for b, n in enumerate(batch.valid.sum(1).tolist()):
            chosen = weights[len(rows) : len(rows) + n] > 0
            if args.position_policy == "random":
                torch.rand(n, generator=generators[b])  # the policy drew first
            draws = torch.rand(int(chosen.sum()) * args.class_samples, generator=generators[b], dtype=torch.float64)
            draws = iter(draws.view(-1, args.class_samples))
            for t in range(n):
                row = len(rows)
                if not chosen[t]:
                    rows.append(q.new_zeros(()))
                    continue
                probs, log_q = p[row].softmax(-1), q[row].log_softmax(-1)
                numbers = next(draws)
                if args.class_selection == "rs_kd":
                    cumulative = probs.cumsum(-1)
                    target = torch.zeros(VOCAB, dtype=torch.float64)
                    for u in numbers.tolist():
                        target[int((cumulative <= u * cumulative[-1]).sum())] += 1 / args.class_samples
                else:
                    kept = probs.topk(args.class_samples).indices
                    target = torch.zeros_like(probs)
                    target[kept] = probs[kept] / probs[kept].sum()
                used = target > 0
                rows.append((target[used] * (target[used].log() - log_q[used])).sum())
        return torch.stack(rows)

    return losses_of


def naive_with_contexts(student, teacher, samples, divergence, fraction):
    """The sum over samples of the mean divergence of their rows of largest KL(p||q), one at a time, in float64."""
    student, teacher, total = student.double(), teacher.double(), torch.zeros((), dtype=torch.float64)
    for sample in samples:
        n = sample.prompt_length
        prompt, completion = sample.input_ids[:n], sample.input_ids[n:]
        theirs = prompt if sample.teacher_prompt_ids is None else sample.teacher_prompt_ids
        q = student(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].softmax(-1)
        p = teacher(torch.tensor([[*theirs, *completion]])).logits[0, len(theirs) - 1 : -1].softmax(-1).detach()
        assert len(q) == len(p) == len(completion)
        forward, reverse = (p * (p.log() - q.log())).sum(-1), (q * (q.log() - p.log())).sum(-1)
        kept = forward.detach().topk(math.ceil(fraction * len(completion))).indices
        total = total + (forward if divergence == "forward_kl" else reverse)[kept].mean()
    return total
