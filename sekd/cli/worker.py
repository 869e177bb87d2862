"""``python -m sekd.cli.worker``: a command in a process that ends with its parent. A sweep starts its runs so."""

import ctypes
import os
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


def run(arguments: list[str]) -> int:
    """Run a command. The arguments are the parent's id, the folder of the run that is finished then, the command."""
    parent, finished, *command = arguments
    end_with(int(parent))
    status = main(command)
    if status == 0 and finished:
        from sekd.hardware import measure_memory
        from sekd.sweep.run_state import finish

        finish(finished, measure_memory())
    return status


if __name__ == "__main__":  # worker processes import this file again
    sys.exit(run(sys.argv[1:]))
