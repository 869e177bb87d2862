"""The names of logged numbers in words, with their units."""

NO_SCORES = ("runtime", "per_second", "_positions")
"""Endings of the logged numbers of an evaluation that are no scores."""

NAMES = {
    "loss": ("Loss", ""),
    "entropy": ("Student entropy", "nats"),
    "entropy_selected": ("Student entropy at chosen positions", "nats"),
    "selected_fraction": ("Positions chosen", "%"),
    "completion_length": ("Completion length", "tokens"),
    "cut_fraction": ("Completions cut off", "%"),
    "rollout_age": ("Age of rollouts", "steps"),
    "selection_agreement": ("Agreement with exact entropy", "%"),
    "grad_norm": ("Gradient norm", ""),
    "learning_rate": ("Learning rate", ""),
    "tokens_per_second": ("Speed", "tokens/s"),
    "floor_share": ("Least possible time / time", "%"),
    "forward_kl": ("KL(p‖q)", "nats"),
    "reverse_kl": ("KL(q‖p)", "nats"),
    "student_ce": ("Cross-entropy", "nats"),
    "teacher_ce": ("Teacher's cross-entropy", "nats"),
    "student_entropy": ("Student entropy", "nats"),
    "perplexity": ("Perplexity", ""),
    "ece": ("Calibration error", "%"),
    "top1_agreement": ("Same likeliest token", "%"),
}
"""Logged name -> words and unit. Shares are shown in percent."""


def name_curve(name: str) -> tuple[str, str]:
    """The words and the unit of a logged number."""
    if name in NAMES:
        return NAMES[name]
    base, words = name.removeprefix("eval_"), ""
    if base != name:
        words = "Held-out "
    elif name.endswith("_selected"):
        base = name.removesuffix("_selected")
    title, unit = NAMES.get(base, (base.replace("_", " ").replace("kl", "KL"), ""))
    if words:
        title = words + (title[0].lower() + title[1:] if title[1:2].islower() else title)
    elif base != name:
        title += " at chosen positions"
        unit = unit or "nats"
    return title, unit
