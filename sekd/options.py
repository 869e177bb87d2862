"""Options of strategies."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """An option of a policy or divergence, and the field of :class:`sekd.config.SEKDConfig` that sets it.

    ``is_valid`` says whether a value is valid. The error is the field, the value and ``hint``.
    """

    field: str
    default: float
    is_valid: Callable[[Any], bool]
    hint: str
    help: str

    def check(self, value: Any, label: str | None = None) -> None:
        """Raise ValueError for an invalid value. ``label`` replaces the field's name in the message."""
        if not self.is_valid(value):
            raise ValueError(f"{label or self.field} {value} {self.hint}")
