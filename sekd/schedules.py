"""Numbers that change during a run: a value for each optimizer step."""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

Scheduled = float | dict[int | str, Any]
"""A number, ``{step: number}``, or ``{linear: {step: number}}``."""

LINEAR = "linear"


@dataclass(frozen=True)
class Schedule:
    """A number for each optimizer step, from 0. ``points`` are (step, value) in ascending order of step, from step 0.

    Each value holds until the next point. With ``is_linear`` the values between two points lie on a line. The last
    value holds until the end.
    """

    points: tuple[tuple[int, float], ...]
    is_linear: bool = False

    def value(self, step: int) -> float:
        """The value at a step. On a line it is rounded down to 12 decimals: up, it could raise a budget's ceiling."""
        place = bisect_right(self.points, step, key=lambda point: point[0])
        before, value = self.points[place - 1]
        if not self.is_linear or place == len(self.points):
            return value
        after, target = self.points[place]
        low, high = Fraction(str(value)), Fraction(str(target))
        exact = low + (high - low) * Fraction(step - before, after - before)
        return float(Fraction(math.floor(exact * 10**12), 10**12))

    @property
    def lowest(self) -> float:
        """The lowest value of all steps."""
        return min(value for _, value in self.points)

    @property
    def highest(self) -> float:
        """The highest value of all steps."""
        return max(value for _, value in self.points)

    @property
    def is_constant(self) -> bool:
        """Whether all steps have the same value."""
        return self.lowest == self.highest

    def check_values(self, name: str, is_valid: Callable[[float], bool], hint: str) -> None:
        """Raise ValueError for a value that is not valid. ``name`` is the field."""
        for step, value in self.points:
            if not is_valid(value):
                place = f" at step {step}" if len(self.points) > 1 else ""
                raise ValueError(f"{name} {value}{place} {hint}")


def make_schedule(name: str, value: Any) -> Schedule:
    """The schedule of a field's value, as :data:`Scheduled` says. A number is the same at every step.

    Raises:
        ValueError: a mapping of another form, a first step other than 0, or steps that do not ascend.
    """
    if isinstance(value, Schedule):
        return value
    if not isinstance(value, dict):
        return Schedule(((0, value),))
    is_linear = [*value] == [LINEAR]
    steps = value[LINEAR] if is_linear else value
    if not isinstance(steps, dict) or not all(_is_step(k) and _is_number(v) for k, v in steps.items()):
        raise ValueError(
            f"{name} {value} must map whole numbers of steps to numbers: write {{0: 1.0, 500: 0.2}}, or "
            f"{{{LINEAR}: {{0: 1.0, 500: 0.2}}}}"
        )
    numbers = [*steps]
    if numbers[:1] != [0]:
        raise ValueError(f"{name} {value} must begin with step 0, such as {{0: 1.0, 500: 0.2}}")
    if numbers != sorted(numbers):
        raise ValueError(f"{name} {value}: the steps must ascend; sort them")
    return Schedule(tuple((step, float(number)) for step, number in steps.items()), is_linear)


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
