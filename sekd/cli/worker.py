"""``python -m sekd.cli.worker``: a command in a process that ends with its parent. A sweep starts its runs so."""

import ctypes
import os
import resource
import signal
import sys

from sekd.cli import main

PR_SET_PDEATHSIG = 1
"""From Linux's sys/prctl.h."""


def end_with(parent: int) -> None:
    """Let the kernel kill this process when the thread that started it ends. It does so on Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before
            os._exit(128 + signal.SIGKILL)


def measure_memory() -> int:
    """The most bytes that this process had at once: allocated on its GPU if it used one, else resident."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run(arguments: list[str]) -> int:
    """Run a command. The arguments are the parent's id, the folder of the run that is finished then, the command."""
    parent, finished, *command = arguments
    end_with(int(parent))
    status = main(command)
    if status == 0 and finished:
        from sekd.sweep.run_state import finish

        finish(finished, measure_memory())
    return status


if __name__ == "__main__":  # worker processes import this file again
    sys.exit(run(sys.argv[1:]))
