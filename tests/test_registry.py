"""What a user's module may add wrongly is named before anything loads."""

import pytest
from helpers import config

from rollouts import ENGINES
from sekd.losses import DIVERGENCES
from sekd.policies import POLICIES, Policy, make_policy
from sekd.scores import SCORES


@pytest.mark.parametrize(
    ("registry", "record", "message"),
    [
        (SCORES, lambda rows: rows.targets, r"'mine' is registered as .*; wrap it: Score\(...\)"),
        (POLICIES, lambda s, v, **_: v, r"'mine' is registered as .*; wrap it: Policy\(...\)"),
        (DIVERGENCES, lambda q, p, y: q.sum(-1), r"'mine' is registered as .*; wrap it: Divergence\(...\)"),
        (POLICIES, Policy(make_policy, reads=("nope",)), r"'mine' reads \('nope',\); it must be a tuple of names"),
        (ENGINES, object, r"rollout_engine 'mine' is registered as .*; it must subclass BaseEngine"),
    ],
)
def test_wrong_entries_are_named(monkeypatch, registry, record, message):
    monkeypatch.setitem(registry, "mine", record)
    with pytest.raises(ValueError, match=message):
        config()


@pytest.mark.parametrize(("text", "message"), [("def f(:\n", "invalid syntax"), ("import no_such", "No module named")])
def test_a_module_with_an_error_is_named(tmp_path, monkeypatch, text, message):
    (tmp_path / "my_broken_module.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"import_modules: 'my_broken_module' cannot be imported: {message}"):
        config(import_modules=["my_broken_module"])
