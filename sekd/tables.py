"""Print tables. A text is shown as it is: it is no markup, and it cannot steer the terminal."""

import unicodedata
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table


def print_table(table: Table, width: int | None = None) -> None:
    """Print a table, ``width`` characters wide or else as wide as the window. Brackets and colons are no markup."""
    Console(markup=False, emoji=False, width=width).print(table)


def print_facts(title: str, facts: Mapping[str, str]) -> None:
    """Print a table with a line for each fact: its name and its value."""
    table = Table(title=escape_controls(title), title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(name, escape_controls(value))
    print_table(table)


def escape_controls(text: str) -> str:
    """The text with control and format characters as escape sequences (``\\x1b``), except line breaks.

    Names in files of others, and generated texts, may have any character.
    """
    return "".join(
        c if c == "\n" or unicodedata.category(c)[0] != "C" else c.encode("unicode_escape").decode() for c in text
    )
