"""Several processes as one: the main one acts, and all get its result or its error."""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")


def run_on_main(function: Callable[[], T]) -> T:
    """Call ``function`` in the main process; its result, or its error, is that of every process."""
    payload: list[Any] = [None]
    state = PartialState()
    if state.is_main_process:
        try:
            payload = [function()]
        except Exception as error:
            payload = [error]
    if state.num_processes > 1:
        broadcast_object_list(payload)
    if isinstance(payload[0], Exception):
        raise payload[0]
    return payload[0]
