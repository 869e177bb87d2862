"""``sekd sweep``."""

import argparse
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from sekd.cli import evaluate
from sekd.cli.common import Stopped, reading_input
from sekd.cli.recipes import list_summaries

DESCRIPTION = """\
Run methods x grid x seeds as a sweep file says, evaluate each run, and compare the methods with a baseline.

Each run is a process of its own. What is finished is skipped, and what was interrupted is resumed, also after kill -9.
A run that fails is reported, and the others continue. The best point of a grid is chosen on `validation`; the table has
`test`: mean ± standard deviation over seeds, and paired differences. Without FILE, the shipped sweeps are listed.

examples:
  sekd sweep                                          # list the shipped sweeps
  sekd sweep gsm8k_table5 --dry-run
  sekd sweep my_sweep.yaml --jobs 4 --max_steps 500   # a key of all recipes
  sekd sweep my_sweep.yaml --engine ray

output_dir gets a folder for each run, table.md, table.csv and results.json. The exit status is 0, 1 (a run failed), 2
(wrong input), 130 (Ctrl-C) or 143 (SIGTERM).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.usage = f"{parser.prog} [FILE] [--jobs N] [--engine local|ray] [--dry-run] [--only-table] [--key value ...]"
    add = parser.add_argument
    add("file", nargs="?", metavar="FILE", help="a YAML file, or the name of a shipped sweep")
    add("--jobs", type=int, metavar="N", help="runs at once (one a GPU, or 1)")
    add("--engine", default="local", metavar="NAME", help="local or ray (%(default)s)")
    add("--dry-run", action="store_true", help="check all runs, and print what would run")
    add("--only-table", action="store_true", help="make the table of what is finished")
    parser.set_defaults(overrides=[])


def run(options: argparse.Namespace) -> int:
    if options.file is None:
        from sekd.sweep.file import list_sweeps

        list_summaries(list_sweeps())
        return 0
    with reading_input():
        from sekd.sweep.engines import ENGINES
        from sekd.sweep.file import read_sweep
        from sekd.sweep.run_state import check_runs, check_state
        from sekd.sweep.steps import check_choice, make_table, run_sweep
        from sekd.validation.values import is_installed

        if options.engine not in ENGINES:
            raise ValueError(f"--engine {options.engine!r}: choose one of {', '.join(ENGINES)}")
        package = ENGINES[options.engine].requires
        if package is not None and not is_installed(package):
            raise ValueError(f"--engine {options.engine} needs {package}, which is not installed; use --engine local")
        if options.jobs is not None and options.jobs < 1:
            raise ValueError(f"--jobs {options.jobs} must be at least 1")
        sweep = read_sweep(options.file, options.overrides)
        for stage in ("validation", "test"):
            check_evaluation(stage, getattr(sweep, stage))
        check_choice(sweep)
        facts = check_runs(sweep)
        for one in sweep.runs:
            check_state(one)
        if options.dry_run:
            show_runs(sweep)
            return 0
        if options.only_table:
            make_table(sweep, facts)
            return 0
    with _noting_sigterm() as signals:
        try:
            with reading_input():
                failures = run_sweep(sweep, facts, options.engine, options.jobs)
        except KeyboardInterrupt as error:
            raise Stopped(str(error) or "stopped", 128 + signals[-1]) from error
    if failures:
        print(f"{len(failures)} failed:", *failures, sep="\n  ", file=sys.stderr)
    print(f"the table is in {sweep.output_dir}: table.md, table.csv and results.json")
    return int(bool(failures))


@contextmanager
def _noting_sigterm() -> Iterator[list[int]]:
    """Let SIGTERM end the block as Ctrl-C does. The last number of the list is that of the signal."""
    signals = [int(signal.SIGINT)]

    def stop(number: int, frame: Any) -> NoReturn:
        signals.append(number)
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGTERM, previous)


def show_runs(sweep: Any) -> None:
    """Print each run, and what would be done with it."""
    from sekd.sweep.run_state import describe_state
    from sekd.sweep.steps import list_before_choice

    first = list_before_choice(sweep)
    for run in sweep.runs:
        state = describe_state(run)
        state = "run if chosen" if state == "run" and run not in first else state
        print(f"{state:22} {run.name}  ->  {run.folder}")
    if waiting := [run for run in sweep.runs if run not in first]:
        chosen = len({(run.method, run.seed) for run in waiting})
        print(f"{len(first)} runs choose the points of the grids; then {chosen} of {len(waiting)} follow there")
    for stage in ("validation", "test"):
        if (options := getattr(sweep, stage)) is not None:
            from sekd.sweep.file import as_words

            print(f"{stage:22} sekd evaluate RUN {shlex.join(as_words(options))}")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are ValueErrors."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def check_evaluation(stage: str, options: dict[str, Any] | None) -> None:
    """Check the options of ``validation`` or ``test`` as ``sekd evaluate`` does.

    Raises:
        ValueError: an unknown option, or an invalid value.
    """
    if options is None:
        return
    from sekd.eval.tasks import DISTILLATION, check_lm_eval, resolve_tasks
    from sekd.sweep.file import as_words

    parser = _Parser(prog="sekd evaluate", allow_abbrev=False, add_help=False)
    evaluate.add_arguments(parser)
    try:
        given = parser.parse_args(["RUN", *as_words(options)])
        names = evaluate.list_names(given)
        check_lm_eval()
        benchmarks = [name for name in names if name != DISTILLATION]
        tasks = resolve_tasks(benchmarks) if benchmarks else []
        evaluate.check_effects(given, bool(tasks), DISTILLATION in names)
        evaluate.read_options(given, measures_distance=DISTILLATION in names)
    except ValueError as error:
        raise ValueError(f"{stage}: {error}") from error
