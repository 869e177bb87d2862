"""``sekd watch``."""

import argparse

from sekd.cli.common import WrongInput, reading_input

DESCRIPTION = """\
Show a run in the terminal while it trains: progress, curves, the latest rollouts, and the positions that it chooses.

It ends when the run ends, or with Ctrl-C, and changes nothing. A finished run is shown once.

example:
  sekd watch runs/gsm8k
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("run", metavar="RUN", help="the output_dir of a run")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="between two looks (%(default)g)")


def run(options: argparse.Namespace) -> int:
    from sekd.report.read import check_run
    from sekd.report.watch import watch

    if not options.every > 0:
        raise WrongInput(f"--every {options.every:g} must be above 0")
    with reading_input():
        check_run(options.run)
        watch(options.run, options.every)
    return 0
