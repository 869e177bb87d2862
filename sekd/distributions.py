"""Entropy, cross-entropy and KL of log-probabilities: the arithmetic that scores and losses share."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def entropy(logp: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """H = -sum p log p of each row, in nats."""
    return -(logp.exp() * logp).sum(-1)


def entropy_from_top(logprobs: Float[Tensor, "N K"], classes: int) -> Float[Tensor, " N"]:
    """H of rows of which the K largest log-probabilities are known: what is left is spread evenly over the others.

    Even is as uncertain as can be, so this is never below H; and no other class is likelier than the K-th, so with
    m the probability that is left and p_K the K-th largest it is above H by at most m log((V - K) p_K / m).
    """
    rest = (1 - logprobs.double().exp().sum(-1)).clamp(min=0)  # in float32 rounding would be all that is left
    tail = torch.special.xlogy(rest, rest / max(classes - logprobs.shape[1], 1))
    return (entropy(logprobs.double()) - tail).float()


def cross_entropy(logp: Float[Tensor, "N V"], targets: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """-log p(y) of each row, in nats."""
    return -logp.gather(-1, targets[:, None])[:, 0]


def kl_divergence(logp: Float[Tensor, "N V"], logq: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """KL(p || q) of each row, in nats."""
    return (logp.exp() * (logp - logq)).sum(-1)
