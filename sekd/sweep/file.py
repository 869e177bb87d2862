"""The file of a sweep, and the runs that it describes. What needs no torch is checked here."""

import difflib
import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sekd.notation import read_mapping
from sekd.parse import SAME_CHOICE, find_recipe, merge_keys, read_flags, read_recipe, recipe_folder

KEYS = (
    *("recipe", "output_dir", "keys", "methods", "grid", "seeds", "grid_seeds"),
    *("baseline", "validation", "test", "references"),
)
"""The keys of a sweep file."""
SET_BY_SWEEP = {"output_dir": "output_dir", "seed": "seeds", "resume_from_checkpoint": None}
"""Keys of a recipe that the sweep sets, and the key of the sweep file for each."""
SET_BY_EVALUATION = ("models", "output", "force")
"""Arguments of ``sekd evaluate`` that the sweep sets."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        method: its name.
        point: its values of the keys in the grid; empty without a grid.
        seed: of its recipe.
        keys: all keys of its recipe, with ``output_dir``.
        modules: the folder where ``import_modules`` of its recipe lie.
    """

    method: str
    point: dict[str, Any]
    seed: int
    keys: dict[str, Any]
    modules: str

    @property
    def folder(self) -> str:
        """Its ``output_dir``."""
        return str(self.keys["output_dir"])

    @property
    def place(self) -> str:
        """The point of the grid as text."""
        return describe_point(self.point)

    @property
    def name(self) -> str:
        """Method, point and seed as text."""
        return ", ".join(part for part in (self.method, self.place, f"seed {self.seed}") if part)


@dataclass(frozen=True)
class Sweep:
    """A sweep file that was checked.

    Attributes:
        path: of the file.
        output_dir: the folder of all runs and of the table.
        runs: seed by seed, so that an unfinished sweep compares all methods.
        methods: their names, in the order of the table.
        grid_seeds: the seeds that train every point of a grid. The others train the best point of each method.
        baseline: the method that the others are compared with.
        validation, test: arguments of ``sekd evaluate``; None without.
        references: models that are shown first, by name.
    """

    path: str
    output_dir: str
    runs: list[SweepRun]
    methods: list[str]
    grid_seeds: list[int]
    baseline: str
    validation: dict[str, Any] | None
    test: dict[str, Any] | None
    references: dict[str, str]

    def list_places(self, method: str) -> list[str]:
        """The points of a method's grid, as texts."""
        return [*dict.fromkeys(run.place for run in self.runs if run.method == method)]

    @property
    def has_grid(self) -> bool:
        """Whether any method has several points."""
        return any(len(self.list_places(method)) > 1 for method in self.methods)


def list_sweeps() -> dict[str, str]:
    """The shipped sweeps: name -> path."""
    folder = os.path.join(recipe_folder(), "sweeps")
    names = sorted(name for name in os.listdir(folder) if name.endswith(".yaml"))
    return {name.removesuffix(".yaml"): os.path.join(folder, name) for name in names}


def find_sweep(name: str) -> str:
    """The path of a sweep. ``name`` is a file, or a shipped sweep (``x``, ``x.yaml`` or ``recipes/sweeps/x.yaml``).

    Raises:
        ValueError: there is no such file and no such shipped sweep.
    """
    if os.path.isfile(name):
        return name
    shipped = list_sweeps()
    folder, base = os.path.split(name)
    base = base.removesuffix(".yaml")
    if folder in ("", "sweeps", os.path.join("recipes", "sweeps")) and base in shipped:
        return shipped[base]
    raise ValueError(f"sweep {name!r}: no such file, and no sweep that sekd ships ({', '.join(shipped)})")


def read_sweep(name: str, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file, and the recipes that it names, as runs.

    Args:
        name: a file or the name of a shipped sweep.
        overrides: ``--key value`` words of the command line; they beat ``keys`` of the file, and its ``output_dir``.

    Raises:
        ValueError: a missing file, an unknown or missing key, or a value of another kind. The keys of recipes are
            checked later, when the runs are parsed.
    """
    path = find_sweep(name)
    content = read_mapping("sweep", path)
    for key in content:
        if key not in KEYS:
            nearest = difflib.get_close_matches(str(key), KEYS, n=1)
            hint = f"the nearest key is {nearest[0]!r}" if nearest else f"the keys are {', '.join(KEYS)}"
            raise ValueError(
                f"unknown key {key!r} in the sweep; {hint}. Keys of a recipe belong below keys or a method"
            )
    flags = {key: _read_words(texts) for key, texts in read_flags(overrides).items()}
    output_dir = flags.pop("output_dir", content.get("output_dir"))
    if not isinstance(output_dir, str) or not output_dir:
        raise ValueError("the sweep has no output_dir: set it to the folder of all runs")
    methods = {name: _read_mapping(f"method {name!r}", keys) for name, keys in _read_methods(content).items()}
    seeds = _read_seeds("seeds", content.get("seeds"))
    grid_seeds = _read_seeds("grid_seeds", content.get("grid_seeds", seeds), among=seeds)
    baseline = content.get("baseline", next(iter(methods)))
    if baseline not in methods:
        raise ValueError(f"baseline {baseline!r} is no method; choose one of {', '.join(methods)}")
    references = _read_mapping("references", content.get("references"))
    for reference in references:
        if reference in methods:
            raise ValueError(f"references: {reference!r} is the name of a method too; rename one of them")
    stages = {stage: read_evaluation(stage, content.get(stage)) for stage in ("validation", "test")}
    if references and not any(stages.values()):
        raise ValueError("references are evaluated: add test or validation, or leave references out")
    sweep = Sweep(
        path,
        output_dir,
        _expand(path, content, methods, seeds, grid_seeds, flags, output_dir),
        [*methods],
        grid_seeds,
        baseline,
        stages["validation"],
        stages["test"],
        {str(name): str(model) for name, model in references.items()},
    )
    _check_folders(sweep)
    if "grid_seeds" in content and not sweep.has_grid:
        raise ValueError("grid_seeds has no effect without a grid: add one, or leave grid_seeds out")
    of_baseline = {run.seed for run in sweep.runs if run.method == baseline}
    for method in methods:
        if not any(run.seed in of_baseline for run in sweep.runs if run.method == method):
            raise ValueError(f"seeds of method {method!r}: the baseline {baseline!r} has none of them: add one")
    return sweep


def _expand(
    path: str,
    content: dict[str, Any],
    methods: dict[str, dict[str, Any]],
    seeds: list[int],
    grid_seeds: list[int],
    flags: dict[str, Any],
    output_dir: str,
) -> list[SweepRun]:
    """All runs: seeds x methods x points."""
    keys = _read_mapping("keys", content.get("keys"))
    runs = []
    for seed in seeds:
        for method, own in methods.items():
            own = {**own}
            own_seeds = _read_seeds(f"seeds of method {method!r}", own.pop("seeds", seeds), among=seeds)
            recipe = _find_recipe(path, method, own.pop("recipe", content.get("recipe")))
            grid = _read_grid(method, own.pop("grid", content.get("grid")))
            if math.prod(map(len, grid.values())) > 1 and not {*own_seeds} & {*grid_seeds}:
                raise ValueError(f"seeds of method {method!r}: none of them is in grid_seeds {grid_seeds}: add one")
            for key in (*keys, *own, *grid, *flags):
                if key in SET_BY_SWEEP:
                    use = SET_BY_SWEEP[key]
                    hint = f"set {use} of the sweep" if use else "the same command resumes what is unfinished"
                    raise ValueError(f"{key} of method {method!r}: the sweep sets it; {hint}")
            if twice := grid.keys() & own.keys():
                raise ValueError(
                    f"method {method!r} sets {min(twice)}, and the grid varies it: give the method a grid of its own"
                )
            if hidden := flags.keys() & {name for key in (*own, *grid) for name in (key, SAME_CHOICE.get(key))}:
                raise ValueError(
                    f"--{min(hidden)} has no effect, since method {method!r} or its grid sets it; change the sweep file"
                )
            for values in itertools.product(*grid.values()) if seed in own_seeds else ():
                point = dict(zip(grid, values, strict=True))
                folder = os.path.join(output_dir, _name_folder(method, point, seed))
                own_keys = {**own, **point, "seed": seed, "output_dir": folder}
                modules = os.path.dirname(os.path.abspath(recipe))
                merged = merge_keys(read_recipe(recipe), keys, flags, own_keys)
                runs.append(SweepRun(method, point, seed, merged, modules))
    return runs


def describe_point(point: Mapping[str, Any]) -> str:
    """The keys and values of a point of the grid as text."""
    return ", ".join(f"{key} {_write(value)}" for key, value in point.items())


def read_evaluation(stage: str, options: Any) -> dict[str, Any] | None:
    """The options of ``validation`` or ``test``; None without."""
    if options is None:
        return None
    options = _read_mapping(stage, options)
    if not options.keys() & {"suite", "tasks"}:
        raise ValueError(f"{stage} names nothing to evaluate: add suite or tasks")
    for name in SET_BY_EVALUATION:
        if name in options:
            raise ValueError(f"{stage}: the sweep sets {name} itself; leave it out")
    return options


def as_words(options: Mapping[str, Any]) -> list[str]:
    """The options of an evaluation as words of the command line of ``sekd evaluate``."""
    words: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def list_suites(options: Mapping[str, Any]) -> list[str]:
    """The suites that an evaluation names."""
    given = options.get("suite") or []
    return [name for part in (given if isinstance(given, list) else [given]) for name in str(part).split(",")]


def _read_methods(content: dict[str, Any]) -> dict[str, Any]:
    methods = _read_mapping("methods", content.get("methods"))
    if not methods:
        raise ValueError("the sweep has no methods: name at least one, with the keys in which its recipe differs")
    return {str(name): keys for name, keys in methods.items()}


def _read_mapping(name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} {value!r} must be a mapping such as {{key: value}}")
    return value


def _read_seeds(name: str, given: Any, among: Sequence[int] | None = None) -> list[int]:
    seeds = given if isinstance(given, list) else []
    whole = {seed for seed in seeds if type(seed) is int}
    if not whole or len(whole) < len(seeds):
        raise ValueError(f"{name} {given!r} must be a list of different whole numbers such as [1337, 1338, 1339]")
    if among is not None and (others := whole - {*among}):
        raise ValueError(f"{name} has {min(others)}, which is not among the seeds of the sweep, {[*among]}")
    return seeds


def _read_grid(method: str, grid: Any) -> dict[str, list[Any]]:
    for key, values in _read_mapping(f"grid of method {method!r}", grid).items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"grid of method {method!r}: {key} {values!r} must be a list of values")
    return grid or {}


def _find_recipe(path: str, method: str, recipe: Any) -> str:
    if not isinstance(recipe, str):
        raise ValueError(f"method {method!r} has no recipe: set recipe of the sweep to a file or a shipped recipe")
    beside = os.path.join(os.path.dirname(path), recipe)
    return beside if os.path.isfile(beside) else find_recipe(recipe)


def _read_words(texts: list[str]) -> Any:
    return True if not texts else texts[0] if len(texts) == 1 else texts


def _write(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _name_folder(method: str, point: Mapping[str, Any], seed: int) -> str:
    """The name of a run's folder, such as ``SE-KD-learning_rate_1e-05-seed_1337``."""
    parts = [method, *(f"{key}_{_write(value)}" for key, value in point.items()), f"seed_{seed}"]
    return "-".join(map(make_file_name, parts))


def make_file_name(text: str) -> str:
    """The text as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", text)


def _check_folders(sweep: Sweep) -> None:
    names: dict[str, str] = {}
    for run in sweep.runs:
        other = names.setdefault(run.folder, run.name)
        if other != run.name:
            raise ValueError(f"{other!r} and {run.name!r} have the same folder {run.folder!r}; rename a method")
