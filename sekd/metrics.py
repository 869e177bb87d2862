"""What a run logs: names, means and their short forms."""

from collections.abc import Mapping

SHOWN = {
    "loss": "loss {:.4f}",
    "divergence": "div {:.4f}",
    "entropy": "H {:.2f}",
    "entropy_selected": "H_sel {:.2f}",
    "selected_fraction": "sel {:.0%}",
    "tokens_per_second": "{:,.0f} tok/s",
    "completion_length": "len {:.0f}",
    "cut_fraction": "cut {:.0%}",
    "selection_agreement": "agree {:.0%}",
    "rollout_tokens_per_second": "gen {:,.0f} tok/s",
    "eval_forward_kl": "held-out KL(p|q) {:.4f}",
    "eval_reverse_kl": "KL(q|p) {:.4f}",
    "eval_student_ce": "CE {:.4f}",
}


def means(sums: Mapping[str, float], seconds: float) -> dict[str, float]:
    """What is logged of the sums over the steps since the last log."""
    selected = max(sums["selected_rows"], 1)
    found = {
        "divergence": sums["divergence"] / selected,
        "selected_fraction": sums["selected_rows"] / max(sums["rows"], 1),
        "tokens_per_second": sums["tokens"] / seconds,
    }
    if "entropy" in sums:  # a sampled softmax without scores never knows it
        found["entropy"] = sums["entropy"] / max(sums["entropy_rows"], 1)
        found["entropy_selected"] = sums["selected_entropy"] / selected
    if trained := sums.get("trained_rollouts"):
        found |= {
            "cut_fraction": sums["cut_rollouts"] / trained,
            "empty_completions": sums["empty_rollouts"],
            "rollout_age": sums["stale_steps"] / trained,
            "rollout_share": sums["rollout_wait"] / seconds,
        }
    if rollouts := sums.get("rollouts"):  # in the steps that begin a round
        found |= {
            "completion_length": sums["rollout_tokens"] / rollouts,
            "rollout_tokens_per_second": sums["rollout_tokens"] / sums["rollout_seconds"],
        }
    if checked := sums.get("agreement_rows"):
        found["selection_agreement"] = sums["agreement"] / checked
    return found
