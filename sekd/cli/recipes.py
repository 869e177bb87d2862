"""``sekd recipes``."""

import argparse
import itertools
import re
from collections.abc import Mapping

import yaml

from sekd.cli.common import reading_input
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
    """The file's own text, if the recipe has no base. Otherwise its first comment, and its keys merged with the base's.

    Raises:
        ValueError: as :func:`sekd.parse.read_files`.
    """
    files = read_files(path)
    with open(path, encoding="utf-8") as file:
        text = file.read()
    if len(files) == 1:
        return text
    comment = "".join(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True)))
    return comment + yaml.safe_dump(read_recipe(path), sort_keys=False, allow_unicode=True)


def read_comment(path: str) -> list[str]:
    """The lines of the comment at the top of a recipe, up to its indented commands."""
    with open(path, encoding="utf-8") as file:
        return [line[2:].strip() for line in itertools.takewhile(re.compile(r"# \S").match, file)]
