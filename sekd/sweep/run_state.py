"""What a sweep knows of each of its runs: what the recipe gives, whether it is finished, and how it is started.

A run's folder has ``sweep.json``: the keys that it was started with, whether it was resumed, and, once the process of
the run ended well, that it is finished. The files of the run are there before that.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import yaml
from transformers.utils import logging

from sekd.checkpoints import RunRefused, check_checkpoint, find_checkpoint, list_checkpoints
from sekd.files import DamagedFile, read_checked, write_atomically, write_checked
from sekd.pretrained import CONFIGS
from sekd.recipe import Run
from sekd.run_folder import check_results
from sekd.sweep.file import Sweep, SweepRun

STATE, RECIPE, LOG = "sweep.json", "sweep_recipe.yaml", "train.log"


@dataclass(frozen=True)
class Facts:
    """What a sweep needs of the recipe of a run.

    Attributes:
        steps: the number of optimizer steps; 0 if the epochs decide.
        epochs: the number of epochs, where they decide.
        evaluates: whether the training evaluates.
        metric: ``metric_for_best_model`` with ``eval_`` before it; None if the recipe does not say it.
        greater_is_better: whether more of the metric is better.
        keeps_best: whether the student at the end is the one with the best metric.
    """

    steps: int
    epochs: float
    evaluates: bool
    metric: str | None
    greater_is_better: bool
    keeps_best: bool


def check_runs(sweep: Sweep) -> dict[str, Facts]:
    """Parse the recipe of every run; what each gives, by the folder of the run.

    Raises:
        ValueError: an invalid key or value, with the name of the run; a table that would be empty; a grid without a
            score that chooses its points.
    """
    facts = {}
    with tempfile.TemporaryDirectory() as folder, _without_warnings():  # each run gives its own
        for run in sweep.runs:
            path = os.path.join(folder, RECIPE)
            write_recipe(path, run)
            if run.keys.get("import_modules") and run.modules not in sys.path:
                sys.path.append(run.modules)
            try:
                facts[run.folder] = _get_facts(Run.parse(path).args)
            except ValueError as error:
                raise ValueError(f"{run.name}: {error}") from error
    if sweep.validation is None and sweep.test is None:
        for run in sweep.runs:
            if not facts[run.folder].evaluates:
                raise ValueError(
                    f"{run.name}: nothing is evaluated, so the table would be empty; add test or validation to the "
                    "sweep, or set eval_strategy"
                )
    if sweep.has_grid and sweep.validation is None:
        for run in sweep.runs:
            if facts[run.folder].metric is None or not facts[run.folder].evaluates:
                raise ValueError(
                    f"{run.name}: nothing chooses the best point of the grid; add validation to the sweep, or set "
                    "metric_for_best_model and eval_strategy"
                )
    return facts


@contextmanager
def _without_warnings() -> Iterator[None]:
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _get_facts(args: Any) -> Facts:
    metric = args.metric_for_best_model
    return Facts(
        max(0, int(args.max_steps)),
        float(args.num_train_epochs),
        args.eval_strategy != "no",
        None if metric is None else f"eval_{metric.removeprefix('eval_')}",
        bool(args.greater_is_better),
        bool(args.load_best_model_at_end),
    )


def check_state(run: SweepRun) -> None:
    """Check that a run's folder is free, or holds this run.

    Raises:
        ValueError: the run was started with other keys, or the folder has the results of another run.
    """
    state = read_state(run.folder)
    if state is None:
        check_results(run.folder, overwrite=False)
        return
    before, now = state["keys"], _list_keys(run)
    lines = [
        f"{key} {json.dumps(now.get(key))} (it has {json.dumps(before.get(key))})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if lines:
        raise ValueError(
            f"{run.name}: {run.folder!r} was started with other keys: {', '.join(lines)}; take them back, delete the "
            "folder, or name another output_dir"
        )


def read_state(folder: str) -> dict[str, Any] | None:
    """The content of ``sweep.json``; None if the folder has none that is whole."""
    try:
        return read_checked(os.path.join(folder, STATE))
    except (FileNotFoundError, DamagedFile):
        return None


def is_finished(run: SweepRun) -> bool:
    """Whether the run ended well and its student is there."""
    state = read_state(run.folder)
    has_model = any(os.path.isfile(os.path.join(run.folder, name)) for name in CONFIGS)
    return state is not None and state["finished"] and has_model


def begin(run: SweepRun) -> list[str]:
    """Write what a run's folder needs before its process starts, and return the arguments of ``sekd``.

    A run with a whole checkpoint is resumed. What a run without one left is deleted by the run itself.
    """
    resumes = _can_resume(run.folder)
    write_checked(
        os.path.join(run.folder, STATE),
        {"keys": _list_keys(run), "resumed": resumes, "finished": False, "memory": None},
    )
    path = os.path.join(run.folder, RECIPE)
    write_recipe(path, run)
    flag = "--resume_from_checkpoint" if resumes else "--overwrite_output_dir"
    return ["train", path, flag, "true"]


def finish(folder: str, memory: int) -> None:
    """Note that a run is finished. ``memory`` is the most bytes that it had at once: on its accelerator, if any."""
    state = read_state(folder)
    if state is not None:
        write_checked(os.path.join(folder, STATE), {**state, "finished": True, "memory": memory})


def describe_state(run: SweepRun) -> str:
    """What the sweep would do with a run."""
    if is_finished(run):
        return "finished"
    steps = [*list_checkpoints(run.folder)]
    return f"resume from step {steps[-1]}" if steps and _can_resume(run.folder) else "run"


def measure_progress(run: SweepRun, facts: Facts) -> float:
    """The share of a run that is done, as its last log says: 0 to 1."""
    logs = read_logs(run.folder)
    if not logs:
        return 0.0
    done = logs[-1].get("step", 0) / facts.steps if facts.steps else logs[-1].get("epoch", 0.0) / facts.epochs
    return min(1.0, float(done))


def read_logs(folder: str) -> list[dict[str, Any]]:
    """The logs of a run. The last line may be half written."""
    logs: list[dict[str, Any]] = []
    try:
        with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
            for line in file:
                logs.append(json.loads(line))
    except FileNotFoundError:
        pass
    except ValueError:
        return logs
    return logs


def read_evaluation_logs(folder: str, facts: Facts) -> dict[str, float]:
    """The ``eval_`` metrics of a run's student: of its last evaluation, or of the best one if it keeps that."""
    by_step: dict[int, dict[str, float]] = {}
    for log in read_logs(folder):
        if scores := {name: value for name, value in log.items() if name.startswith("eval_") and _is_score(name)}:
            by_step.setdefault(log["step"], {}).update(scores)
    if not by_step:
        return {}
    steps: Sequence[int] = [step for step in by_step if facts.metric in by_step[step]]
    if facts.keeps_best and facts.metric is not None and steps:
        choose = max if facts.greater_is_better else min
        return by_step[choose(steps, key=lambda step: by_step[step][str(facts.metric)])]
    return by_step[max(by_step)]


def _is_score(name: str) -> bool:
    return not name.endswith(("_runtime", "_per_second", "_seconds", "_share", "_stderr", "_positions"))


def _can_resume(folder: str) -> bool:
    try:
        return not check_checkpoint(find_checkpoint(folder))["save_only_model"]
    except RunRefused:
        return False


def _list_keys(run: SweepRun) -> dict[str, Any]:
    """The keys of a run as JSON has them. The folder may move."""
    keys = {key: value for key, value in run.keys.items() if key != "output_dir"}
    return json.loads(json.dumps(keys, default=str))


def write_recipe(path: str, run: SweepRun) -> None:
    write_atomically(path, yaml.safe_dump(run.keys, sort_keys=False, allow_unicode=True))
