"""A sweep from its file to its table: train, evaluate, choose, compare. What is done is not done again."""

import hashlib
import json
import os
import shlex
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from sekd.eval.records import TaskResult
from sekd.eval.result_files import load_results, name_folder
from sekd.files import lock_folder
from sekd.metric_kinds import MetricKind
from sekd.sweep.engines import ENGINES, Engine, Job, describe_status, read_last_error
from sekd.sweep.file import Sweep, SweepRun, as_words, list_suites, make_file_name
from sekd.sweep.run_state import (
    LOG,
    Facts,
    begin,
    check_state,
    is_finished,
    measure_progress,
    read_evaluation_logs,
    read_logs,
    read_state,
)
from sekd.sweep.scores import Column, make_columns, make_log_columns
from sekd.sweep.table import NOTES, Line, choose_places, write_table

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} [{elapsed}<{remaining}{postfix}]"
LOOK = 2.0
"""Seconds between two looks at the progress of the runs."""


class Failures(list[str]):
    """What failed, a line each."""


def run_sweep(sweep: Sweep, facts: dict[str, Facts], engine: str, jobs: int | None) -> Failures:
    """Train and evaluate what is not done, and make the table.

    Args:
        sweep: see :class:`Sweep`.
        facts: of each run, as :func:`sekd.sweep.run_state.check_runs` gives them.
        engine: a name in ``ENGINES``.
        jobs: how many processes run at once; None for one a GPU.

    Raises:
        ValueError: another sweep holds the folder, or a run's folder has another run.
        KeyboardInterrupt: the user stopped it; the message says what is left.
    """
    refusal = f"another sweep is writing into output_dir {sweep.output_dir!r}; wait for it, or name another folder"
    with lock_folder(sweep.output_dir, ValueError(refusal)):
        for run in sweep.runs:
            check_state(run)
        failures = Failures()
        with closing(ENGINES[engine].make(jobs)) as made:
            train_all(list_before_choice(sweep), facts, made, failures)
            evaluate_all(sweep, facts, "validation", made, failures)
            if later := list_after_choice(sweep, facts):
                train_all(later, facts, made, failures)
                evaluate_all(sweep, facts, "validation", made, failures)
            evaluate_all(sweep, facts, "test", made, failures)
        make_table(sweep, facts, failures)
    return failures


def train_all(runs: Sequence[SweepRun], facts: dict[str, Facts], engine: Engine, failures: Failures) -> None:
    """Train the runs that are not finished."""
    waiting = [run for run in runs if not is_finished(run)]
    by_name = {run.name: run for run in waiting}

    def make(run: SweepRun) -> Callable[[], Job]:
        path = (run.modules,) if run.keys.get("import_modules") else ()
        log = os.path.join(run.folder, LOG)
        return lambda: Job(run.name, tuple(begin(run)), log, run.folder, os.getcwd(), path)

    def measure(job: Job) -> float:
        run = by_name[job.name]
        return measure_progress(run, facts[run.folder])

    run_jobs(engine, "training", [make(run) for run in waiting], len(runs), failures, measure)


def evaluate_all(sweep: Sweep, facts: dict[str, Facts], stage: str, engine: Engine, failures: Failures) -> None:
    """Evaluate the finished runs on ``validation``, which chooses the points, or the chosen ones on ``test``."""
    options = getattr(sweep, stage)
    if options is None:
        return
    models = {run.name: (run.folder, run.folder) for run in list_evaluated(sweep, facts, stage)}
    if stage == get_shown_stage(sweep):
        models |= {name: (model, name_reference(sweep, name)) for name, model in sweep.references.items()}
    jobs = []
    for name, (model, folder) in models.items():
        output = name_output(folder, stage, options)
        if not is_evaluated(output):
            arguments = ("evaluate", model, *as_words(options), "--output", output)
            log = os.path.join(folder, f"{stage}.log")
            jobs.append(Job(f"{name} ({stage})", arguments, log, None, os.getcwd()))
    run_jobs(engine, stage, [partial(_get, job) for job in jobs], len(models), failures)


def list_before_choice(sweep: Sweep) -> list[SweepRun]:
    """The runs that need no choice: all runs of ``grid_seeds``, and all runs of methods with one point."""
    return [run for run in sweep.runs if run.seed in sweep.grid_seeds or len(sweep.list_places(run.method)) == 1]


def list_after_choice(sweep: Sweep, facts: dict[str, Facts]) -> list[SweepRun]:
    """The runs of the other seeds, at the points that were chosen. A method waits until its whole grid is finished."""
    first, chosen = list_before_choice(sweep), choose_points(sweep, facts)
    waiting = {run.method for run in first if not is_finished(run)}
    later = [run for run in sweep.runs if run not in first and run.method not in waiting]
    return [run for run in later if chosen.get(run.method) == run.place]


def run_jobs(
    engine: Engine,
    title: str,
    jobs: Sequence[Callable[[], Job]],
    total: int,
    failures: Failures,
    measure: Callable[[Job], float] = lambda job: 0.0,
) -> None:
    """Run jobs with a bar for all of them. A job that fails is reported, and the others continue.

    Args:
        engine: runs them.
        title: of the bar.
        jobs: each makes a job when its turn comes.
        total: with those that were done before.
        failures: gets a line for each job that failed.
        measure: the share of a running job that is done.

    Raises:
        KeyboardInterrupt: with a message that says what is left.
    """
    waiting, done = deque(jobs), total - len(jobs)
    with tqdm(total=total, initial=done, desc=title, smoothing=0, bar_format=BAR, dynamic_ncols=True) as bar:
        try:
            while waiting or engine.running:
                while waiting and len(engine.running) < engine.jobs:
                    engine.start(waiting.popleft()())
                for job, status in engine.wait(LOOK):
                    done += 1
                    if status:
                        line = f"{job.name}: {describe_status(status)}: {read_last_error(job.log)} ({job.log})"
                        failures.append(line)
                        bar.write(f"failed: {line}", file=sys.stderr)
                bar.n = done + sum(measure(job) for job in engine.running)
                bar.set_postfix_str(f"{len(engine.running)} running, {len(failures)} failed" if failures else "")
        except KeyboardInterrupt as error:
            left = len(waiting) + len(engine.running)
            engine.close()
            raise KeyboardInterrupt(
                f"stopped in {title}: {total - left} of {total} are done, {left} are left; the same command resumes"
            ) from error


def _get(job: Job) -> Job:
    return job


def list_evaluated(sweep: Sweep, facts: dict[str, Facts], stage: str) -> list[SweepRun]:
    """The finished runs that a stage evaluates.

    ``validation`` evaluates the runs that choose the points; all, if there is no ``test``. ``test`` evaluates the
    chosen points.
    """
    finished = [run for run in sweep.runs if is_finished(run)]
    if stage == "validation":
        return [run for run in finished if sweep.test is None or is_choosing(sweep, run)]
    chosen = choose_points(sweep, facts)
    return [run for run in finished if chosen.get(run.method) == run.place]


def is_choosing(sweep: Sweep, run: SweepRun) -> bool:
    """Whether the score of a run counts in the choice of its method's point."""
    return run.seed in sweep.grid_seeds and len(sweep.list_places(run.method)) > 1


def choose_points(sweep: Sweep, facts: dict[str, Facts]) -> dict[str, str]:
    """The point of each method, as text, that the table shows: the best one on the validation score.

    Only ``grid_seeds`` count, so that later seeds do not change the choice.
    """
    places = {method: sweep.list_places(method) for method in sweep.methods}
    chosen = {method: own[0] for method, own in places.items() if len(own) == 1}
    column, lines = score_grid(sweep, facts)
    if column is None:
        return chosen
    return chosen | choose_places(lines, column, column.kind.higher_is_better is not False)


def check_choice(sweep: Sweep) -> None:
    """Check that ``validation`` has one score that chooses the points of the grid.

    Raises:
        ValueError: it names several suites, or several tasks without a suite.
    """
    if sweep.validation is None or not sweep.has_grid:
        return
    tasks = sweep.validation.get("tasks") or []
    names = list_suites(sweep.validation) or (tasks if isinstance(tasks, list) else [tasks])
    if len(names) > 1:
        raise ValueError(
            f"validation names {' and '.join(names)}: one suite, or one task, chooses the points of the grid"
        )


def make_lines(runs: Iterable[SweepRun]) -> list[Line]:
    """The lines of some runs, which stand in the order of the columns' models."""
    lines: dict[tuple[str, str], Line] = {}
    for place, run in enumerate(runs):
        line = lines.setdefault((run.method, run.place), Line(run.method, run.place, {}))
        line.models[run.seed], line.folders[run.seed] = place, os.path.basename(run.folder)
    return [*lines.values()]


def make_table(sweep: Sweep, facts: dict[str, Facts], failures: Sequence[str] = ()) -> None:
    """Print and write the table of what is finished."""
    stage = get_shown_stage(sweep)
    columns, lines = gather_scores(sweep, facts)
    baseline = next((line for line in lines if line.method == sweep.baseline and None not in line.models), None)
    notes = [note.format(baseline=sweep.baseline, pairs="seeds and items" if stage else "seeds") for note in NOTES]
    if stage is not None:
        command = shlex.join(as_words(getattr(sweep, stage))).replace("\n", "\\n")
        notes.insert(0, f"{stage}: sekd evaluate {command}")
    if sweep.has_grid:
        measure = "validation" if sweep.validation else "metric_for_best_model"
        seeds = ", ".join(map(str, sweep.grid_seeds))
        notes.append(f"the points are the best ones on {measure}, over the seeds {seeds}")
    wanted = [*list_before_choice(sweep), *list_after_choice(sweep, facts)]
    missing = len(wanted) - sum(map(is_finished, wanted))
    notes += [f"{missing} of {len(wanted)} runs are not finished"] * (missing > 0)
    about = {"sweep": os.path.basename(sweep.path), "baseline": sweep.baseline, "stage": stage, "failures": [*failures]}
    write_table(sweep.output_dir, columns, lines, baseline, notes, about)


def gather_scores(sweep: Sweep, facts: dict[str, Facts]) -> tuple[list[Column], list[Line]]:
    """The scores and costs of the finished runs at the chosen points: references first, then methods in their order."""
    stage, chosen = get_shown_stage(sweep), choose_points(sweep, facts)
    runs = [run for run in sweep.runs if is_finished(run) and chosen.get(run.method) == run.place]
    references = sweep.references if stage is not None else {}
    if stage is None:
        logs = [read_evaluation_logs(run.folder, facts[run.folder]) for run in runs]
        columns = make_log_columns(logs, facts[sweep.runs[0].folder].metric)
    else:
        options = getattr(sweep, stage)
        results = [load_evaluation(run.folder, run.folder, stage, options) for run in runs]
        for name, model in references.items():
            results.append(load_evaluation(name_reference(sweep, name), model, stage, options))
        columns = make_columns(results, list_suites(options))
    before = [Line(name, "", {None: len(runs) + i}) for i, name in enumerate(references)]
    order = {method: place for place, method in enumerate(sweep.methods)}
    lines = sorted(make_lines(runs), key=lambda line: order[line.method])
    return [*columns, *make_cost_columns(runs, len(references))], [*before, *lines]


def score_grid(sweep: Sweep, facts: dict[str, Facts]) -> tuple[Column | None, list[Line]]:
    """What chooses the points: the score, and each point of each method with its runs of ``grid_seeds``.

    The score is None if there are no such runs, or if none of them has it.
    """
    runs = [run for run in sweep.runs if is_choosing(sweep, run) and is_finished(run)]
    if not runs:
        return None, []
    if sweep.validation is not None:
        results = [load_evaluation(run.folder, run.folder, "validation", sweep.validation) for run in runs]
        columns = make_columns(results, list_suites(sweep.validation))
        column = next((column for column in columns if column.is_main and column.shown), None)
    else:
        metric = str(facts[runs[0].folder].metric)
        logs = [read_evaluation_logs(run.folder, facts[run.folder]) for run in runs]
        higher = facts[runs[0].folder].greater_is_better
        column = Column(metric, MetricKind(higher), [log.get(metric) for log in logs], [None] * len(runs))
    return column, make_lines(runs)


def make_cost_columns(runs: Sequence[SweepRun], references: int) -> list[Column]:
    """Seconds of training, of runs that were not resumed, and the most memory that a process had, in GB."""
    seconds, memory = list[float | None](), list[float | None]()
    for run in runs:
        state = read_state(run.folder) or {}
        times = [log["train_runtime"] for log in read_logs(run.folder) if "train_runtime" in log]
        seconds.append(times[-1] if times and not state.get("resumed") else None)
        memory.append(state["memory"] / 1e9 if state.get("memory") else None)
    more = [None] * references
    nothing = [None] * (len(runs) + references)
    return [
        Column("training s", MetricKind(digits=0), [*seconds, *more], [*nothing], is_compared=False),
        Column("memory GB", MetricKind(digits=1), [*memory, *more], [*nothing], is_compared=False),
    ]


def get_shown_stage(sweep: Sweep) -> str | None:
    """The evaluation that the table shows: ``test``, else ``validation``, else None for the runs' own logs."""
    return next((stage for stage in ("test", "validation") if getattr(sweep, stage) is not None), None)


def name_reference(sweep: Sweep, name: str) -> str:
    """The folder of a reference's evaluations."""
    return os.path.join(sweep.output_dir, "references", make_file_name(name))


def name_output(folder: str, stage: str, options: dict[str, Any]) -> str:
    """The folder of an evaluation below a run's folder. Other options give another one."""
    code = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:8]
    return os.path.join(folder, "evaluations", f"{stage}-{code}")


def is_evaluated(output: str) -> bool:
    """Whether ``sekd evaluate`` ended well: it writes this file last."""
    return os.path.isfile(os.path.join(output, "comparison.md"))


def load_evaluation(folder: str, model: str, stage: str, options: dict[str, Any]) -> dict[str, TaskResult]:
    """The results of a model; none if it was not evaluated."""
    output = name_output(folder, stage, options)
    return load_results(name_folder(output, model)) if is_evaluated(output) else {}
