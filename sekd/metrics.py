"""The numbers that a run logs: their names, means and short forms on the progress line."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from sekd.classes import CLASS_SELECTIONS
from sekd.config import SEKDConfig
from sekd.hardware import widest_float
from sekd.timing import PARTS

SELECTED = "_selected"
"""How the names of means over the chosen positions end."""

SHOWN = {
    "loss": "loss {:.4f}",
    "entropy": "H {:.2f}",
    "entropy_selected": "H_sel {:.2f}",
    "selected_fraction": "sel {:.0%}",
    "tokens_per_second": "{:,.0f} tok/s",
    "completion_length": "len {:.0f}",
    "cut_fraction": "cut {:.0%}",
    "selection_agreement": "agree {:.0%}",
    "rollout_tokens_per_second": "gen {:,.0f} tok/s",
    "floor_share": "floor {:.0%}",
    "eval_forward_kl": "held-out KL(p|q) {:.4f}",
    "eval_reverse_kl": "KL(q|p) {:.4f}",
    "eval_student_ce": "CE {:.4f}",
}


def name_divergence(args: SEKDConfig) -> str:
    """The name under which the mean divergence is logged. It says what is measured, and on which classes.

    ``forward_kl_selected`` compares whole distributions. ``rs_kd_forward_kl_selected``, the estimate on sampled classes
    that a cache gives too, is another quantity.
    """
    is_sampled = CLASS_SELECTIONS[args.class_selection].select is not None
    return f"{f'{args.class_selection}_' * is_sampled}{args.divergence}{SELECTED}"


def format_line(logs: Mapping[str, float], more: Mapping[str, str] | None = None) -> str:
    """The short form of a log; empty if it has nothing to show. ``more`` has forms of other metrics than ``SHOWN``."""
    divergences = {
        name: name.removesuffix(SELECTED) + "_sel {:.4f}"
        for name in logs
        if name.endswith(SELECTED) and name not in SHOWN
    }
    forms = {"loss": SHOWN["loss"], **divergences, **SHOWN, **(more or {})}
    return "  ".join(form.format(logs[name]) for name, form in forms.items() if name in logs)


def add_sums(sums: defaultdict[str, Tensor | float], more: Mapping[str, Tensor | float]) -> None:
    """Add each number of ``more`` to the sum of its name, in float64 where the device has it."""
    for name, value in more.items():
        sums[name] += value.to(widest_float(value.device)) if isinstance(value, Tensor) else value


def sum_all(sums: Mapping[str, Tensor | float], accelerator: Accelerator) -> dict[str, Any]:
    """Each sum over all processes: a number, or a nested list for a tensor with several entries."""
    device = accelerator.device
    dtype = widest_float(device)
    tensors = {name: torch.as_tensor(sums[name], dtype=dtype, device=device) for name in sorted(sums)}
    return {name: accelerator.reduce(tensor, "sum").tolist() for name, tensor in tensors.items()}


def compute_means(sums: Mapping[str, float], seconds: float, divergence: str) -> dict[str, float]:
    """The logged numbers, from sums over the steps since the last log, which was ``seconds`` ago.

    ``divergence`` is the name of the mean divergence (:func:`name_divergence`).
    """
    selected = max(sums["selected"], 1)
    metrics = {
        divergence: sums["divergence"] / selected,
        "selected_fraction": sums["selected"] / max(sums["positions"], 1),
        "tokens_per_second": sums["tokens"] / seconds,
        "padding_share": sums["padding"] / max(sums["tokens"], 1),
    }
    if "entropy" in sums:  # a sampled softmax without scores does not compute it
        metrics["entropy"] = sums["entropy"] / max(sums["entropy_positions"], 1)
        metrics["entropy_selected"] = sums["selected_entropy"] / selected
    if trained := sums.get("trained_rollouts"):
        metrics |= {
            "cut_fraction": sums["cut_rollouts"] / trained,
            "empty_completions": sums["empty_rollouts"],
            "rollout_age": sums["stale_steps"] / trained,
        }
    if rollouts := sums.get("rollouts"):  # only steps that begin a round have these
        metrics |= {
            "completion_length": sums["rollout_tokens"] / rollouts,
            "rollout_tokens_per_second": sums["rollout_tokens"] / sums["rollout_seconds"],
        }
    if checked := sums.get("agreement_positions"):
        metrics["selection_agreement"] = sums["agreement"] / checked
    return metrics


def compute_speed(sums: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Where the time of the steps since the last log went, and how fast that was.

    Shares are of ``seconds``. The sum of a part, such as ``teacher_seconds``, is the mean over the processes.
    """
    shares = {part: sums.get(f"{part}_seconds", 0.0) / seconds for part in PARTS}
    metrics = {f"{part}_share": share for part, share in shares.items() if share}
    if sums.get("trained_rollouts"):
        metrics["rollout_share"] = shares["generation"] + shares["sync"]
    if flops := sums.get("flops"):
        metrics["flops_per_second"] = flops / seconds
        metrics["floor_share"] = sums["floor_seconds"] / seconds
    return metrics


def sum_up_time(sums: Mapping[str, float]) -> dict[str, float]:
    """The seconds of each part of a whole run, ``other_seconds``, their sum ``train_seconds``, and how fast it was."""
    seconds = sums["seconds"]
    parts = {name: sums[name] for name in (f"{part}_seconds" for part in PARTS) if sums.get(name)}
    speed = compute_speed(sums, seconds)
    summary = {**parts, "other_seconds": max(seconds - sum(parts.values()), 0.0), "train_seconds": seconds}
    return summary | {name: speed[name] for name in ("flops_per_second", "floor_share") if name in speed}
