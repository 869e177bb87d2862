"""Checks of single values. They raise ValueError, which names the field, the value and how to fix it."""

import importlib.util
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from sekd.config import SEKDConfig


def parse_score(value: Any) -> Any:
    """``position_score`` as a name or a mapping. The command line gives a mapping as text."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(
            f"position_score {value!r} is not a mapping; write for example '{{student_entropy: 1.0, kl: 0.5}}'"
        ) from error


def check_numbers(args: "SEKDConfig", names: Sequence[str]) -> None:
    """Check that the numeric fields are finite numbers."""
    for name in names:
        value = getattr(args, name)
        # argparse changes the type of an `int | None` field to int.
        if value is None and get_default(args, name) is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} {value!r} must be a finite number")
        whole = type(args).__dataclass_fields__[name].type in (int, "int")
        if whole and value != int(value):
            raise ValueError(f"{name} {value!r} must be a whole number")


def list_of_texts(name: str, value: Any) -> list[str]:
    """A list of texts. A single text becomes a list of one."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{name} {value!r} must be a list of texts that are not empty, such as [one, two]")
    return list(texts)


def within(name: str, value: float, low: float, high: float, hint: str) -> None:
    """Raise ValueError for a number outside [low, high]."""
    if not low <= value <= high:
        raise ValueError(f"{name} {value} is outside [{low}, {high}]; {hint}")


def is_installed(package: str) -> bool:
    """Whether a package can be imported. It is not imported here."""
    return importlib.util.find_spec(package) is not None


def get_default(args: "SEKDConfig", name: str) -> Any:
    return type(args).__dataclass_fields__[name].default
