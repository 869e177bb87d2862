"""Read a recipe and the command line. What needs no torch is checked before torch is imported."""

import difflib
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sekd.notation import read_mapping


@dataclass(frozen=True)
class Purpose:
    """How a command that does not train changes a recipe: ``keys`` beat the recipe's, and ``left_out`` are removed.

    With a ``reason``, the log names the recipe's values that have no effect, and says why.
    """

    keys: Mapping[str, Any]
    left_out: Collection[str] = ()
    reason: str | None = None


CACHE = Purpose(
    {"lmbda": 0.0, "divergence": "forward_kl", "score_source": "exact", "rollouts_per_prompt": 1},
    reason="a cache is for forward KL at positions of the data",
)
"""To build a cache of the teacher, which holds targets of the data."""

ROLLOUTS = Purpose(
    {"lmbda": 1.0, "score_source": "exact"},
    left_out=("rollouts", "teacher_cache", "class_selection", "class_samples", "max_tokens"),
)
"""To generate rollouts: the student completes the data's prompts."""

SAME_CHOICE = {"max_steps": "max_tokens", "max_tokens": "max_steps"}
"""Keys that replace each other: ``--max_steps 10`` beats ``max_tokens`` of the recipe."""


def parse_recipe(recipe: str, overrides: Sequence[str] = (), purpose: Purpose | None = None) -> tuple[Any, Any, Any]:
    """Read a recipe and command-line overrides as ScriptArguments, SEKDConfig and ModelConfig.

    A ``purpose`` changes the recipe's values.

    Raises:
        ValueError: a missing file, a file that is not a mapping, an unknown key (the error names the nearest one), or
            an invalid value.
    """
    recipe = find_recipe(recipe)
    files, flags = read_files(recipe), read_flags(overrides)
    from transformers.utils import logging
    from trl import ModelConfig, ScriptArguments

    from sekd.config import SEKDConfig
    from sekd.validation.values import is_list, read_field

    records = (ScriptArguments, SEKDConfig, ModelConfig)
    owners = {f.name: record for record in records for f in fields(record) if f.init}
    for file, keys in files.items():
        _check_known(keys, owners, "the recipe" if file == recipe else f"the recipe's base {file!r}")
    above: dict[str, Any] = {}
    for key, texts in flags.items():
        if key not in owners and key.startswith("no_") and key[3:] in owners:
            if texts:
                raise ValueError(f"--{key} takes no value; write --{key} alone, or --{key[3:]} {texts[0]}")
            key, texts = key[3:], ["false"]
        _check_known([key], owners, "the command line")
        above[key] = texts if len(texts) > 1 and is_list(owners[key], key) else _join(key, texts)
    values = {key: read_field(owners[key], key, value) for key, value in merge_keys(*files.values(), above).items()}
    if purpose is not None:
        unused = [f"{key} {values[key]}" for key, value in purpose.keys.items() if values.get(key, value) != value]
        if unused and purpose.reason:
            line = f"{purpose.reason}; for it the recipe's {', '.join(unused)} have no effect"
            logging.get_logger(__name__).warning(line)
        values = {key: value for key, value in values.items() if key not in purpose.left_out} | {**purpose.keys}
    if "import_modules" in values:
        folders = [os.path.dirname(os.path.abspath(file)) for file in files]
        _let_import_from(*reversed(folders), os.getcwd())
    try:
        script, args, model = (
            record(**{key: value for key, value in values.items() if owners[key] is record}) for record in records
        )
    except (ValueError, OSError) as error:  # transformers' messages may have several lines
        raise ValueError(" ".join(str(error).split())) from error
    return script, args, model


def read_recipe(path: str) -> dict[str, Any]:
    """The keys and values of a recipe, as YAML has them. They beat the keys of its ``base``.

    Raises:
        ValueError: as :func:`read_files`.
    """
    return merge_keys(*read_files(path).values())


def merge_keys(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of all layers. A later layer beats an earlier one, also where :data:`SAME_CHOICE` pairs keys."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, other in SAME_CHOICE.items():
            if layer.get(key) is not None and other not in layer:
                merged.pop(other, None)
        merged |= layer
    return merged


def read_text(recipe: str, overrides: Sequence[str], key: str) -> str | None:
    """The text of a key on the command line, else in the recipe; None if neither has it.

    Raises:
        ValueError: as :func:`find_recipe`, :func:`read_files` and :func:`read_flags`; or the value is no text.
    """
    flags, value = read_flags(overrides), read_recipe(find_recipe(recipe)).get(key)
    if key in flags:
        value = _join(key, flags[key])
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key} {value!r} must be a text")
    return value


def read_files(path: str) -> dict[str, dict[str, Any]]:
    """The files that a recipe is in, and the keys of each: its ``base`` if it has one, then its own file.

    ``base`` is a path relative to the recipe's folder, or the name of a shipped recipe.

    Raises:
        ValueError: a file is not YAML, or not a mapping of names to values; or ``base`` is not the name of a recipe
            that has no base itself.
    """
    keys = _read_file(path)
    if "base" not in keys:
        return {path: keys}
    base = keys.pop("base")
    if not isinstance(base, str) or not base:
        raise ValueError(f"recipe {path!r}: base {base!r} must be the path of a recipe, or the name of a shipped one")
    try:
        file = find_recipe(base, os.path.dirname(path))
    except ValueError as error:
        raise ValueError(f"recipe {path!r}: base: {error}") from error
    base_keys = _read_file(file)
    if "base" in base_keys:
        raise ValueError(
            f"recipe {path!r}: its base {base!r} has a base itself, {base_keys['base']!r}; a base must be whole, "
            "so copy the keys of one of the two"
        )
    return {file: base_keys, path: keys}


def _read_file(path: str) -> dict[str, Any]:
    keys = read_mapping("recipe", path)
    for key in keys:
        if not isinstance(key, str):
            raise ValueError(f"recipe {path!r}: the key {'null' if key is None else repr(key)} is not a name")
    if "env" in keys:
        raise ValueError("a recipe cannot set env: set environment variables in the shell, NAME=value sekd train ...")
    return keys


def read_flags(words: Sequence[str]) -> dict[str, list[str]]:
    """``--key value ...`` and ``--key=value`` as the texts of each key.

    Raises:
        ValueError: words before the first key.
    """
    flags: dict[str, list[str]] = {}
    texts: list[str] | None = None
    for word in words:
        if word.startswith("--"):
            key, equals, text = word[2:].partition("=")
            texts = flags[key.replace("-", "_")] = [text] if equals else []
        elif texts is None:
            raise ValueError(f"{word!r} on the command line belongs to no key; write --key value")
        else:
            texts.append(word)
    return flags


def _join(key: str, texts: list[str]) -> str | bool:
    """The one text of a key. A key alone means true."""
    if len(texts) > 1:
        raise ValueError(f"--{key} takes one value, but got {' '.join(texts)!r}; write every key as --key value")
    return texts[0] if texts else True


def _check_known(keys: Collection[str], known: Collection[str], place: str) -> None:
    for key in keys:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            hint = f"the nearest key is {nearest[0]!r}" if nearest else "`sekd train --help` lists the keys"
            raise ValueError(f"unknown key {key!r} in {place}; {hint}")


def find_recipe(name: str, folder: str = "") -> str:
    """The path of a recipe. ``name`` is a file, or a shipped recipe (``x``, ``x.yaml`` or ``recipes/x.yaml``).

    A relative path is relative to ``folder``; by default, to the working directory.

    Raises:
        ValueError: there is no such file and no such shipped recipe.
    """
    path = os.path.join(folder, name)
    if os.path.isfile(path):
        return path
    shipped = list_recipes()
    place, stem = os.path.split(name)
    stem = stem.removesuffix(".yaml")
    if place in ("", "recipes") and stem in shipped:
        return shipped[stem]
    if os.path.isdir(path):
        raise ValueError(f"recipe {name!r} is a folder; a recipe is a YAML file")
    nearest = difflib.get_close_matches(stem, shipped, n=1)
    hint = f"the nearest is {nearest[0]!r}" if nearest else "`sekd recipes` lists them"
    raise ValueError(f"recipe {name!r}: no such file, and no recipe that sekd ships; {hint}")


def list_recipes() -> dict[str, str]:
    """The shipped recipes: name -> path."""
    folder = recipe_folder()
    names = sorted(name for name in os.listdir(folder) if name.endswith(".yaml"))
    return {name.removesuffix(".yaml"): os.path.join(folder, name) for name in names}


def recipe_folder() -> str:
    """The folder of the shipped recipes: beside the package in a checkout, inside it in a wheel."""
    package = os.path.dirname(os.path.abspath(__file__))
    inside = os.path.join(package, "recipes")
    return inside if os.path.isdir(inside) else os.path.join(os.path.dirname(package), "recipes")


def _let_import_from(*folders: str) -> None:
    """Append folders to sys.path: at the end, so that they hide no installed package.

    They stay there, since worker processes import from them too.
    """
    sys.path.extend(folder for folder in folders if folder not in sys.path)
