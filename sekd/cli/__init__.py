"""The ``sekd`` command. Only the module of the chosen command is imported. It imports what it needs when it runs."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from sekd.cli.common import Stopped, WrongInput

COMMANDS = {
    "demo": ("sekd.cli.demo", "run the main job on a tiny pair, from nothing, in 5 minutes"),
    "train": ("sekd.cli.train", "distil as a recipe says"),
    "samples": ("sekd.cli.samples", "choose the samples to train on"),
    "rollouts": ("sekd.cli.rollouts", "generate rollouts of the initial student into a file"),
    "cache": ("sekd.cli.cache", "build, check and share an offline cache of a teacher"),
    "evaluate": ("sekd.cli.evaluate", "evaluate models on benchmarks, and compare them"),
    "sweep": ("sekd.cli.sweep", "run methods x grid x seeds, evaluate them, and compare"),
    "report": ("sekd.cli.report", "show runs on one page: results, curves, chosen positions"),
    "watch": ("sekd.cli.watch", "show a run in the terminal while it trains"),
    "serve": ("sekd.cli.serve", "serve a student for rollouts with vLLM"),
    "recipes": ("sekd.cli.recipes", "list the recipes that sekd ships"),
}
"""Name -> module and help. A module has ``add_arguments(parser)``, and ``run(options)`` returns the exit status."""

EXAMPLES = """\
examples:
  sekd demo
  sekd train gsm8k_on_policy_sekd --max_steps 100
  sekd train --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    The exit status is 0, 1 (training stopped), 2 (an invalid input), 130 (Ctrl-C) or 143 (SIGTERM).
    """
    argv = sys.argv[1:] if argv is None else [*argv]
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="sekd",
        description="Selective knowledge distillation of language models.",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {}
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, formatter_class=raw, allow_abbrev=False)
        if name in argv[:1]:
            modules[name] = importlib.import_module(module)
            modules[name].add_arguments(command)
    options, rest = parser.parse_known_args(argv)
    if rest and "overrides" not in options:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.overrides = rest
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional kernels at every import
    try:
        return modules[options.command].run(options)
    except KeyboardInterrupt:
        print("sekd: stopped", file=sys.stderr)
        return 130
    except (WrongInput, Stopped, FloatingPointError) as error:
        print(f"sekd: {error}", file=sys.stderr)
        return 2 if isinstance(error, WrongInput) else getattr(error, "status", 1)
