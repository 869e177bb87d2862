"""Checks of single values. They raise ValueError, which names the field, the value and how to fix it.

:func:`read_field` is the only place that looks at the type of a value. The annotation of the field says which it is.
"""

import functools
import importlib.util
import math
import os
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sekd.notation import load_yaml

UNFIT: Any = object()
"""What a reader returns for a value of another kind."""

TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    dict: "a mapping such as {key: value}",
    str: "text (a number needs quotes)",
    list: "a list of texts that are not empty, such as [one, two]",
}
"""The kinds of values that a recipe can hold. A text is read as the first kind of the annotation that fits."""


def read_field(record: Any, name: str, value: Any) -> Any:
    """``value`` as the annotation of the field ``name`` of ``record`` has it. Text becomes what it spells.

    Raises:
        ValueError: the value is of another kind, or is not one of the field's choices.
    """
    field, kinds = record.__dataclass_fields__[name], _list_kinds(record)[name]
    if value is None and (NoneType in kinds or field.default is None):
        return None
    choices = field.metadata.get("choices")
    for kind in kinds:
        read = _read(name, value, kind)
        if read is not UNFIT and (choices is None or read in choices):
            return read
    described = [_describe(kind) for kind in kinds if kind is not NoneType]
    expected = f"one of {', '.join(choices)}" if choices else ", or ".join(described)
    raise ValueError(f"{name} {show(value)} must be {expected}")


def check_types(record: Any) -> None:
    """Read every field of a record with :func:`read_field`."""
    for f in fields(record):
        if f.init:
            setattr(record, f.name, read_field(type(record), f.name, getattr(record, f.name)))


def is_list(record: type, name: str) -> bool:
    """Whether a field takes several values."""
    return any((get_origin(kind) or kind) is list for kind in _list_kinds(record)[name])


@functools.cache
def _list_kinds(record: type) -> dict[str, list[Any]]:
    """The kinds of each field: the members of its annotation, the narrowest first."""
    kinds: dict[str, list[Any]] = {}
    order = [*EXPECTED]
    for name, hint in get_type_hints(record).items():
        members = [*get_args(hint)] if get_origin(hint) in (Union, UnionType) else [hint]
        if any(_is_enum(member) for member in members):
            members = [member for member in members if member is not str]  # the text is one of the enum's values
        places = [get_origin(member) or member for member in members]
        ranks = [order.index(place) if place in order else -1 for place in places]
        kinds[name] = [member for _, member in sorted(zip(ranks, members, strict=True), key=lambda pair: pair[0])]
    return kinds


def _read(name: str, value: Any, kind: Any) -> Any:
    origin = get_origin(kind) or kind
    if origin is bool:
        return TRUTH.get(str(value).lower(), UNFIT) if isinstance(value, bool | int | str) else UNFIT
    if origin in (int, float):
        return _read_number(value, origin)
    if origin is dict:
        return _read_mapping(name, value, kind)
    if origin is str:
        return os.fspath(value) if isinstance(value, str | os.PathLike) else UNFIT
    if origin is list:
        return _read_list(name, [value] if isinstance(value, str | Enum) else value, (get_args(kind) or (str,))[0])
    if origin is Literal:
        return next((choice for choice in get_args(kind) if choice is value), UNFIT)
    if _is_enum(kind):
        value = "no" if value is False else value  # YAML reads no as false
        return value if value in [member.value for member in kind] else UNFIT
    return value if kind is Any or (isinstance(kind, type) and isinstance(value, kind)) else UNFIT


def _read_list(name: str, items: Any, kind: Any) -> Any:
    if not isinstance(items, list | tuple):
        return UNFIT
    read = [_read(name, item, kind) for item in items]
    return UNFIT if any(item is UNFIT or item == "" for item in read) else read


def _read_number(value: Any, kind: type) -> Any:
    """A finite number; for the kind int a whole one. 1e2 is whole."""
    number: Any = value
    if isinstance(value, str):
        for read in (kind, float):
            try:
                number = read(value)
                break
            except ValueError:
                continue
    if isinstance(number, bool) or not isinstance(number, int | float):
        return UNFIT
    if not abs(number) < 2**63 and not (kind is float and isinstance(number, float) and math.isfinite(number)):
        return UNFIT
    if kind is float:
        return number
    return int(number) if number == int(number) else UNFIT


def _read_mapping(name: str, value: Any, kind: Any) -> Any:
    """A mapping, whose keys are texts unless the annotation says otherwise.

    The command line gives it as text. From Python it may be a dataclass.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return value
    if isinstance(value, str) and value.lstrip().startswith("{"):
        text = value
        try:
            value = load_yaml(text)
        except ValueError as error:
            raise ValueError(f"{name} {show(text)} is not a mapping; write for example '{{key: value}}'") from error
    keys, values = get_args(kind) or (str, Any)
    if not isinstance(value, dict) or not all(isinstance(key, keys) for key in value):
        return UNFIT
    read = {key: _read(name, item, values) for key, item in value.items()}
    return UNFIT if any(item is UNFIT for item in read.values()) else read


def _describe(kind: Any) -> str:
    if _is_enum(kind):
        return f"one of {', '.join(str(member.value) for member in kind)}"
    if get_origin(kind) is Literal:
        return " or ".join(str(choice).lower() for choice in get_args(kind))
    return EXPECTED.get(get_origin(kind) or kind) or f"a {getattr(kind, '__name__', kind)}, which only Python can give"


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def show(value: Any) -> str:
    """A value in a message: on one line, and not long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def within(name: str, value: float, low: float, high: float, hint: str) -> None:
    """Raise ValueError for a number outside [low, high]."""
    if not low <= value <= high:
        raise ValueError(f"{name} {value} is outside [{low}, {high}]; {hint}")


def is_installed(package: str) -> bool:
    """Whether a package can be imported. It is not imported here."""
    return importlib.util.find_spec(package) is not None


def get_default(record: Any, name: str) -> Any:
    """The default of a field of a record, or of its class."""
    field = record.__dataclass_fields__[name]
    return field.default if field.default_factory is MISSING else field.default_factory()
