"""The type checker that jaxtyping applies under pytest: beartype, to which 1 is a float (PEP 484)."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_checked: dict[tuple[Any, ...], Callable[..., Any]] = {}


def typechecker(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the arguments of a function that has jaxtyping's copy of a signature, and no effect.

    A nested function comes at each call of the function around it. With the same signature, its first check serves.
    """
    # TrainingArguments' own defaults do not keep to its annotations.
    if "SEKDConfig" in function.__qualname__:
        return function
    if function.__defaults__ or function.__kwdefaults__:  # beartype checks these now
        return _check(function)
    key = function.__module__, function.__qualname__, function.__code__, *function.__annotations__.items()
    if key not in _checked:
        _checked[key] = _check(function)
    return _checked[key]
