"""``sekd recipes``."""

import argparse
import itertools
import re
import shutil
import textwrap

from sekd.cli.common import reading_input
from sekd.parse import find_recipe, list_recipes

DESCRIPTION = """\
List the recipes that sekd ships, or print one of them. `sekd train NAME` runs it.

examples:
  sekd recipes
  sekd recipes gsm8k_on_policy_sekd > my_recipe.yaml
  sekd train my_recipe.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this recipe")


def run(options: argparse.Namespace) -> int:
    if options.name is None:
        show_recipes()
        return 0
    with reading_input(), open(find_recipe(options.name), encoding="utf-8") as file:
        print(file.read(), end="")
    return 0


def show_recipes() -> None:
    """Print the name of each shipped recipe, and the first sentence of its comment."""
    width = min(shutil.get_terminal_size().columns, 120)
    for name, path in list_recipes().items():
        summary = textwrap.fill(read_summary(path), width - 4, break_on_hyphens=False)
        print(f"{name}\n{textwrap.indent(summary, '    ')}")


def read_summary(path: str) -> str:
    """The first sentence of the comment at the top of a recipe. The comment ends before its indented commands."""
    with open(path, encoding="utf-8") as file:
        comment = [line[2:].strip() for line in itertools.takewhile(re.compile(r"# \S").match, file)]
    return re.split(r"(?<=\.)\s", " ".join(comment), maxsplit=1)[0]
