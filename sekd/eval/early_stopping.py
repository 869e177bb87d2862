"""Stop a run whose best evaluation is long ago."""

from collections.abc import Iterable

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState

from sekd.config import SEKDConfig


def make_early_stopping(args: SEKDConfig) -> list[EarlyStoppingCallback]:
    """transformers' callback as ``early_stopping_patience`` asks for it, or none."""
    if args.early_stopping_patience is None:
        return []
    return [EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold)]


def resume_early_stopping(callbacks: Iterable[TrainerCallback], state: TrainerState) -> None:
    """Go on counting evaluations without a better metric where the checkpoint of ``state`` stopped.

    transformers itself would begin again at 0, so that a resumed run would end later than an undisturbed one.
    """
    saved = state.stateful_callbacks.get(EarlyStoppingCallback.__name__, [])
    of_callbacks = iter(saved if isinstance(saved, list) else [saved])
    for callback in callbacks:
        if isinstance(callback, EarlyStoppingCallback) and (entry := next(of_callbacks, None)) is not None:
            callback.early_stopping_patience_counter = entry["attributes"]["early_stopping_patience_counter"]
