"""All strategies: the dicts of records together, and the users' modules that add to them."""

import importlib
from collections.abc import Collection

from rollouts import ENGINES, BaseEngine
from sekd.classes import CLASS_SELECTIONS, ClassSelection
from sekd.losses import DIVERGENCES, Divergence
from sekd.options import Option
from sekd.policies import POLICIES, Policy
from sekd.scores import SCORES, Score


def import_module(name: str) -> None:
    """Import a user's module, which adds strategies; ValueError if there is none, or if it has an error."""
    try:
        importlib.import_module(name)
    except (ImportError, SyntaxError) as error:
        hint = ""
        if isinstance(error, ModuleNotFoundError) and error.name in (name, name.split(".")[0]):
            hint = "; put it beside the recipe or into the current folder, or install it, and name it without .py"
        raise ValueError(f"import_modules: {name!r} cannot be imported: {error}{hint}") from error


def check_records() -> None:
    """Check the entries of the dicts: a user may have added a bare function, or a policy that reads unknown scores."""
    kinds = (SCORES, Score), (POLICIES, Policy), (DIVERGENCES, Divergence), (CLASS_SELECTIONS, ClassSelection)
    for registry, kind in kinds:
        for name, record in registry.items():
            if not isinstance(record, kind):
                raise ValueError(f"{name!r} is registered as {record!r}; wrap it: {kind.__name__}(...)")
    for name, policy in POLICIES.items():
        if isinstance(policy.reads, str) or any(score not in SCORES for score in policy.reads or ()):
            raise ValueError(f"position_policy {name!r} reads {policy.reads!r}; it must be a tuple of names of scores")
    for name, engine in ENGINES.items():
        if not (isinstance(engine, type) and issubclass(engine, BaseEngine)):
            raise ValueError(f"rollout_engine {name!r} is registered as {engine!r}; it must subclass BaseEngine")


def all_options() -> dict[str, Option]:
    """Every option of a policy or divergence, by the field that sets it."""
    options = [*(p.options for p in POLICIES.values()), *(d.options for d in DIVERGENCES.values())]
    return {option.field: option for by_name in options for option in by_name.values()}


def one_of(name: str, value: object, names: Collection[str]) -> None:
    """Raise ValueError for an unknown name."""
    if value not in names:
        raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(names)}")
