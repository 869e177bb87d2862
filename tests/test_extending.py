"""The examples of docs/extending.md, each as a module outside the package that a recipe imports, train."""

import math
import re
import sys
from pathlib import Path

import pytest
import yaml
from helpers import save_pair

from rollouts import ENGINES
from sekd import SEKDConfig
from sekd.classes import CLASS_SELECTIONS
from sekd.losses import DIVERGENCES
from sekd.policies import POLICIES
from sekd.recipe import Run
from sekd.scores import SCORES

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
MODULES = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.M)[:6]

REGISTRIES = (SCORES, POLICIES, DIVERGENCES, CLASS_SELECTIONS, ENGINES)


@pytest.fixture
def recipe(tmp_path, tokenizer, texts, pairs, monkeypatch):
    """A function that writes a recipe importing my_strategies.py beside it; every registry is as before afterwards."""
    save_pair(tmp_path, tokenizer, texts)
    pairs.to_json(tmp_path / "pairs.jsonl")
    (tmp_path / "my_strategies.py").write_text("\n\n".join(MODULES))
    before = [dict(registry) for registry in REGISTRIES]
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(**choices):
        keys = dict(
            output_dir=str(tmp_path / "run"),
            model_name_or_path=str(tmp_path / "student"),
            teacher_model_name_or_path=str(tmp_path / "teacher"),
            dataset_name=str(tmp_path / "pairs.jsonl"),
            import_modules=["my_strategies"],
            rollout_engine="hf",
            teacher_dtype="float32",
            bf16=False,
            max_steps=2,
            per_device_train_batch_size=4,
            max_completion_length=4,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_completions_steps=0,
        )
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys | choices))
        return str(tmp_path / "recipe.yaml")

    yield write
    for registry, content in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(content)
    sys.modules.pop("my_strategies", None)


@pytest.mark.parametrize(
    "choices",
    [
        dict(position_score="margin", divergence="hellinger"),
        dict(position_score={"margin": 1.0, "kl": 0.5}, sample_score="margin", sample_fraction=0.5),
        dict(position_policy="every_other", class_selection="nucleus", class_samples=8),
        dict(position_policy="shrinking", save_strategy="steps", save_steps=1),
        dict(rollout_engine="stop", lmbda=1.0),
    ],
)
def test_strategies_from_a_users_module_train(recipe, choices):
    run = Run.parse(recipe(**choices))
    trainer = run.trainer()
    trainer.train()
    trainer.close()
    assert trainer.state.global_step == 2
    if trainer.method.policy.has_state:
        resumed = Run.parse(recipe(**choices)).trainer()
        resumed.train(resume_from_checkpoint=str(Path(run.args.output_dir) / "checkpoint-1"))
        assert resumed.method.policy.steps == 2, "one from the checkpoint, and one more"
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])


def test_an_example_takes_at_most_15_lines():
    assert len(MODULES) == 6
    for module in MODULES:
        assert len([line for line in module.splitlines() if line.strip()]) <= 15, module


def test_names_are_checked_after_the_imports(recipe):
    with pytest.raises(ValueError, match=r"position_score 'gap' is unknown; choose from student_entropy, .*, margin"):
        Run.parse(recipe(position_score="gap"))


def test_a_module_that_is_missing_is_named(recipe):
    with pytest.raises(ValueError, match=r"'no_such_module' cannot be imported: .*; put it beside the recipe"):
        Run.parse(recipe(import_modules=["no_such_module"]))


def test_names_of_others_are_refused_without_the_module(recipe):
    with pytest.raises(ValueError, match="position_score 'margin' is unknown"):
        SEKDConfig(output_dir="unused", position_score="margin")
