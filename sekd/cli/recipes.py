"""``sekd recipes``."""

import argparse
import itertools
import re
from collections.abc import Mapping
from typing import Any

import yaml

from sekd.cli.common import reading_input
from sekd.notation import load_yaml
from sekd.parse import find_recipe, list_recipes, read_files, read_recipe

DESCRIPTION = """\
List the recipes that sekd ships. `sekd train NAME` runs one. `sekd recipes show NAME` prints one, merged with its base.

examples:
  sekd recipes
  sekd recipes show gsm8k_on_policy_sekd > my_recipe.yaml
  sekd train my_recipe.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    show = actions.add_parser("show", help="print a recipe, merged with its base", allow_abbrev=False)
    show.add_argument("name", metavar="NAME", help="a name that `sekd recipes` lists, or a YAML file")


def run(options: argparse.Namespace) -> int:
    if options.action is None:
        list_summaries(list_recipes())
        return 0
    with reading_input():
        text = merge_text(find_recipe(options.name))
    print(text, end="")
    return 0


def list_summaries(paths: Mapping[str, str]) -> None:
    """Print a line for each file, by name: its name, and the first sentence of its comment."""
    width = max(map(len, paths))
    for name, path in paths.items():
        summary = re.split(r"(?<=\.)\s", " ".join(read_comment(path)), maxsplit=1)[0]
        print(f"{name:<{width}}  {summary}")


def merge_text(path: str) -> str:
    """The text of a recipe without a base. Else the recipe's first comment, and its keys merged with the base's.

    The lines of a key, and the comments directly above them, are taken unchanged from the file whose value counts.

    Raises:
        ValueError: as :func:`sekd.parse.read_files`.
    """
    texts = []
    for file in read_files(path):
        with open(file, encoding="utf-8") as opened:
            texts.append(opened.read())
    if len(texts) == 1:
        return texts[0]
    comment = "".join(itertools.takewhile(lambda line: line.startswith("#"), texts[1].splitlines(keepends=True)))
    keys = read_recipe(path)
    merged = comment + _merge_lines(_split_keys(texts[0]), _split_keys(texts[1]), keys)
    if _means(merged, keys):
        return merged
    # A key's lines alone may mean something else: an alias refers to another line, or all keys are on one line.
    return comment + yaml.safe_dump(keys, sort_keys=False, allow_unicode=True)


def _means(text: str, keys: Mapping[str, Any]) -> bool:
    try:
        return load_yaml(text) == keys
    except ValueError:
        return False


def _merge_lines(base: Mapping[str, list[str]], own: Mapping[str, list[str]], keys: Mapping[str, Any]) -> str:
    """The lines of ``keys``, from the recipe's ``own``, else from its base. A blank line precedes the first new key."""
    lines: list[str] = []
    is_new = False
    for key in keys:
        part = own.get(key, base.get(key, []))
        begins_new = key not in base and not is_new
        is_new |= key not in base
        if lines and (begins_new or base.get(key, part)[:1] == ["\n"]):
            lines.append("\n")
        lines += part[1:] if part[:1] == ["\n"] else part
    return "".join(lines)


def _split_keys(text: str) -> dict[str, list[str]]:
    """The lines of each key of a YAML mapping. They begin with the blank line and the comments above it, if any."""
    node: Any = yaml.compose(text, yaml.SafeLoader)
    lines = [line if line.endswith("\n") else line + "\n" for line in text.splitlines(keepends=True)]
    keys, starts = [key.value for key, _ in node.value], [key.start_mark.line for key, _ in node.value]
    parts: dict[str, list[str]] = {}
    first = len([*itertools.takewhile(lambda line: line.startswith("#"), lines)])  # after the comment of the file
    for key, start, last in zip(keys, starts, [*starts, len(lines)][1:], strict=True):
        while last > start + 1 and re.match(r"#|\s*$", lines[last - 1]):
            last -= 1
        above = "".join(lines[min(first, start) : start]).strip()
        is_apart = start > first and not lines[first].strip()
        parts[key] = ["\n"] * is_apart + [above + "\n"] * bool(above) + lines[start:last]
        first = last
    return parts


def read_comment(path: str) -> list[str]:
    """The lines of the comment at the top of a recipe, up to its indented commands."""
    with open(path, encoding="utf-8") as file:
        return [line[2:].strip() for line in itertools.takewhile(re.compile(r"# \S").match, file)]
