"""The progress bar of an evaluation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm


@contextmanager
def show_bar(
    name: str, total: int, hidden: bool = False, initial: int = 0, leave: bool = True
) -> Iterator[Callable[[int], Any]]:
    """A bar with the remaining time. It gives the function that moves the bar on.

    ``initial`` of the ``total`` are done already: they do not count for the speed. ``leave`` keeps the bar at the end.
    """
    with tqdm(
        total=total,
        desc=name,
        initial=initial,
        disable=hidden,
        leave=leave,
        dynamic_ncols=True,
        mininterval=0.5,
        smoothing=0.1,
    ) as bar:
        yield bar.update
