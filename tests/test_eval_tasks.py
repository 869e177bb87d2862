"""Names become tasks and splits; the records fit lm-eval's own files."""

from pathlib import Path

import pytest

from sekd.eval import tasks
from sekd.eval.task_data import KINDS
from sekd.eval.tasks import SUITES, TASKS, resolve_tasks


def test_suites_and_tasks():
    assert resolve_tasks(["paper"]) == [
        ("hellaswag", "validation"),
        ("piqa", "validation"),
        ("arc_easy", "test"),
        ("gsm8k", "test"),
        ("lambada_openai", "test"),
        ("ifeval", "train"),
    ]
    assert resolve_tasks(["gsm8k@train[:500]", "gsm8k", "svamp"]) == [
        ("gsm8k", "train[:500]"),
        ("gsm8k", "test"),
        ("svamp", "test"),
    ]
    assert resolve_tasks(["paper", "gsm8k"]) == resolve_tasks(["paper"])  # no task twice


def test_the_validation_suite_touches_nothing_of_the_paper_suite():
    ours, theirs = SUITES["validation"].tasks, SUITES["paper"].tasks
    assert all(split.partition("[")[0] != theirs[task] for task, split in ours.items())
    assert {*ours} < {*theirs}


def test_suite_means_name_scores_of_their_tasks():
    for suite in SUITES.values():
        for name, scores in suite.means.items():
            assert scores.keys() <= suite.tasks.keys()
            if name == "accuracy":
                assert scores == {task: TASKS[task].main for task in scores}
    assert len(SUITES["paper"].means["accuracy"]) == 5
    assert len(SUITES["validation"].means["accuracy"]) == 4


def test_every_column_has_a_known_kind():
    for spec in TASKS.values():
        assert {*spec.columns.values()} <= KINDS.keys()


def test_records_are_as_lm_eval_has_them():
    """Dataset, split, and where few-shot examples come from."""
    lm_eval_tasks = pytest.importorskip("lm_eval.tasks")
    from lm_eval.tasks._yaml_loader import load_yaml

    for name, spec in TASKS.items():
        if isinstance(spec.config, dict):
            continue
        config = load_yaml(Path(lm_eval_tasks.__file__).parent / spec.config, resolve_func=False)
        assert config["task"] == name
        assert (config["dataset_path"], config.get("dataset_name")) == spec.hub
        assert (config.get("test_split") or config["validation_split"]) == spec.split
        own = config.get("fewshot_split") or config.get("training_split")
        assert spec.shots_split in (own, None)
        assert spec.shots_split is not None or config.get("num_fewshot") == 0 or own is None


@pytest.mark.slow
def test_unknown_names_list_the_nearest():
    """lm-eval's own names count: it has thousands."""
    pytest.importorskip("lm_eval")
    for name, nearest in (
        ("papr", "paper"),
        ("arc_esy", "arc_easy"),
        ("wikitex", "wikitext"),
        ("hella_swag", "hellaswag"),
    ):
        with pytest.raises(ValueError, match=rf"unknown suite or task '{name}'; nearest are [^.]*{nearest}"):
            resolve_tasks([name])
    with pytest.raises(
        ValueError,
        match=r"unknown suite or task 'qqqqqqqqqq'\. Suites: paper, validation, distillation; tasks: arc_easy",
    ):
        resolve_tasks(["qqqqqqqqqq"])
    assert resolve_tasks(["wikitext"]) == [("wikitext", None)]
    assert resolve_tasks(["wikitext@validation"]) == [("wikitext", "validation")]
    expanded = resolve_tasks(["mmlu"])  # a group of groups of tags
    assert len(expanded) == 57
    assert ("mmlu_astronomy", None) in expanded
    assert {name for name, _ in resolve_tasks(["ai2_arc"])} == {"arc_easy", "arc_challenge"}  # a tag


def test_names_without_a_task():
    with pytest.raises(ValueError, match="no task is named; the suites are paper, validation"):
        resolve_tasks([])
    with pytest.raises(ValueError, match="'paper@test': a suite has the splits of its tasks"):
        resolve_tasks(["paper@test"])


def test_lm_eval_is_not_installed(monkeypatch):
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"evaluation needs lm-eval, which is not installed: pip install 'sekd\[eval\]'"
    ):
        tasks.check_lm_eval()
