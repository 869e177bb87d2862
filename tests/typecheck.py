"""The type checker that jaxtyping applies under pytest: beartype, to which 1 is a float (PEP 484)."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def typechecker(function: Callable[..., Any]) -> Callable[..., Any]:
    # TrainingArguments' own defaults do not keep to its annotations.
    return function if "SEKDConfig" in getattr(function, "__qualname__", "") else _check(function)
