"""What the commands share: their errors, and the arguments of a command that takes a recipe."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager


class WrongInput(Exception):
    """The user's input is invalid. The message says why."""


class Stopped(Exception):
    """Something outside the training stopped it. The message says why; ``status`` is the exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def reading_input() -> Iterator[None]:
    """Turn errors in the block into WrongInput. Training runs outside of it, so its errors keep their traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise WrongInput(str(error)) from error


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the argument for a recipe. Every other ``--key value`` becomes part of ``options.overrides``."""
    parser.usage = f"{parser.prog} RECIPE [--key value ...]"
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a name that `sekd recipes` lists")
    parser.set_defaults(overrides=[])
