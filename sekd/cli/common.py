"""What the commands share: their errors, and the arguments of a command that takes a recipe."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager


class WrongInput(Exception):
    """The user's input cannot work; the message says why."""


class Stopped(Exception):
    """Training stopped for a reason outside of it; the message says why."""


@contextmanager
def reading_input() -> Iterator[None]:
    """Errors in here are about the user's input; outside, in training, they keep their traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise WrongInput(str(error)) from error


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Take a recipe, and every other ``--key value`` as ``options.overrides``."""
    parser.usage = f"{parser.prog} RECIPE [--key value ...]"
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a name that `sekd recipes` lists")
    parser.set_defaults(overrides=[])
