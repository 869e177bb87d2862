"""Entropy, cross-entropy and KL of log-probabilities: the arithmetic that scores and losses share."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def entropy(logp: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """H = -sum p log p of each position, in nats."""
    return -(logp.exp() * logp).sum(-1)


def entropy_from_top(logprobs: Float[Tensor, "N K"], classes: int) -> Float[Tensor, " N"]:
    """H from the K largest log-probabilities of a position, with the remaining probability spread evenly.

    An even spread is the most uncertain one, so the result is never below H. No remaining class is likelier than the
    K-th, so the result exceeds H by at most m log((V - K) p_K / m). Here m is the remaining probability, and p_K is
    the K-th largest one.
    """
    rest = (1 - logprobs.double().exp().sum(-1)).clamp(min=0)  # in float32, a small rest would be rounding error only
    tail = torch.special.xlogy(rest, rest / max(classes - logprobs.shape[1], 1))
    return (entropy(logprobs.double()) - tail).float()


def cross_entropy(logp: Float[Tensor, "N V"], targets: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """-log p(y) of each position, in nats."""
    return -logp.gather(-1, targets[:, None])[:, 0]


def kl_divergence(logp: Float[Tensor, "N V"], logq: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """KL(p || q) of each position, in nats."""
    return (logp.exp() * (logp - logq)).sum(-1)
