"""Every recipe parses, and starts on tiny models with its own choices; so does each row of the sweeps."""

import itertools
from pathlib import Path

import pytest
import yaml
from helpers import make_model, make_vllm_model

from sekd.cli import main
from sekd.parse import find_recipe, list_recipes, parse_recipe, read_recipe, recipe_folder
from sekd.sweep.file import read_sweep

RECIPES = [*list_recipes()]
FAST = ["fineweb_edu_sekd", "gsm8k_off_policy_sekd_3x", "gsm8k_on_policy_qlora", "gsm8k_self_distillation"]
"""A stream that is packed; samples and classes; an adapter on 4-bit weights; a teacher that reads more."""
SWEEPS = [
    pytest.param(path, method, id=f"{path.stem}-{method}")
    for path in sorted(Path(recipe_folder(), "sweeps").glob("*.yaml"))
    for method in yaml.safe_load(path.read_text())["methods"]
]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_parses_and_names_its_command(name):
    parse_recipe(name)
    text = Path(find_recipe(name)).read_text()
    assert f"sekd train recipes/{name}.yaml" in text
    comment = [*itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())]
    assert name == "demo" or any(line.startswith("# Cost: ") for line in comment), "a line `# Cost: ` is missing"
    assert read_recipe(find_recipe(name))["output_dir"] == f"runs/{name}" or name == "demo"


@pytest.mark.parametrize(("path", "method"), SWEEPS)
def test_every_row_of_a_sweep_parses(path, method, tmp_path, own_strategies, monkeypatch):
    run = next(run for run in read_sweep(str(path)).runs if run.method == method)
    monkeypatch.syspath_prepend(run.modules)
    (tmp_path / "row.yaml").write_text(yaml.safe_dump(run.keys))
    parse_recipe(str(tmp_path / "row.yaml"))


def test_the_papers_hyperparameters():
    """arXiv 2602.01395, tables 8 and 9."""
    script, args, model = parse_recipe("fineweb_edu_sekd")
    assert (model.model_name_or_path, args.teacher_model_name_or_path) == ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B")
    assert (args.max_length, args.per_device_train_batch_size, args.gradient_accumulation_steps) == (512, 2, 8)
    assert (args.learning_rate, args.optim, args.weight_decay) == (1e-5, "adamw_8bit", 0)
    assert (args.position_fraction, args.kd_weight, args.kd_temperature) == (0.2, 1.0, 1.0)
    assert (args.position_score, args.position_policy, args.divergence) == ("student_entropy", "top_k", "forward_kl")
    assert args.max_steps * 16 * 512 >= 80e6
    assert script.dataset_streaming


@pytest.mark.parametrize("side", ["off", "on"])
def test_the_rows_of_table_5_differ_in_the_selection_alone(side):
    """arXiv 2602.01395, tables 5, 8 and 9."""
    selection = {"position_policy", "position_score", "position_fraction", "sample_score", "sample_fraction"}
    selection |= {"output_dir", "class_selection", "class_samples", "save_steps"}
    rows = ["full_kd", "random", "sekd", "pos_rs", "pos_rs_corrected", "topsmp", "sekd_topsmp"]
    rows += ["sekd_3x"] if side == "off" else []
    shared, policies = [], []
    for row in rows:
        keys = read_recipe(find_recipe(f"gsm8k_{side}_policy_{row}"))
        shared.append({key: value for key, value in keys.items() if key not in selection})
        policies.append((keys["position_policy"], keys.get("sample_fraction"), keys.get("class_selection")))
        assert keys.get("sample_score", keys.get("position_score", "student_entropy")) == "student_entropy"
    assert all(keys == shared[0] for keys in shared)
    assert policies[:5] == [(policy, None, None) for policy in ("all", "random", "top_k", "pos_rs", "pos_rs_corrected")]
    assert policies[5:] == [("all", 0.2, None), ("top_k", 0.2, None), ("top_k", 0.2, "rs_kd")][: len(rows) - 5]
    divergence = {"off": "forward_kl", "on": "reverse_kl"}[side]
    assert (shared[0]["divergence"], shared[0]["learning_rate"], shared[0]["seed"]) == (divergence, 1e-5, 1340)


@pytest.mark.parametrize("name", FAST)
def test_recipes_start(name, tmp_path, tokenizer, pairs, texts):
    """Their own choices, but transformers generates the rollouts."""
    train(name, tmp_path, tokenizer, pairs, texts, rollout_engine="hf")


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_starts(name, tmp_path, tokenizer, pairs, texts):
    """Its own choices: vLLM, Adam8bit, adapters and streaming are the recipe's.

    A recipe that differs from its base in the selection or the teacher alone leaves vLLM to the test of its base.
    """
    own = yaml.safe_load(Path(find_recipe(name)).read_text())
    changes = {"rollout_engine": "hf"} if "base" in own and "use_peft" not in own else {}
    train(name, tmp_path, tokenizer, pairs, texts, **changes)


def train(name, folder, tokenizer, pairs, texts, **changes):
    """Two steps of a recipe on models and data of this test, after the commands whose output it names."""
    keys = read_recipe(find_recipe(name))
    for model, seed in (("student", 0), ("teacher", 1)):
        made = make_vllm_model(seed, intermediate=128) if keys["lmbda"] > 0 else make_model("tied", seed)
        made.save_pretrained(folder / model)
        tokenizer.save_pretrained(folder / model)
    data = folder / "data.jsonl"
    if "text_column" in keys:
        texts.to_json(data)
    else:
        pairs.rename_columns({"prompt": "question", "completion": "answer"}).to_json(data)
    flags = {
        "model_name_or_path": folder / "student",
        "teacher_model_name_or_path": folder / "teacher",
        "dataset_name": data,
        "output_dir": folder / "run",
        "max_steps": 2,
        "max_length": 64,
        "max_prompt_length": 32,
        "max_completion_length": 8,
        "save_strategy": "no",
        "vllm_enforce_eager": True,
    }
    if "text_prompt_length" in keys:
        flags["text_prompt_length"] = 16
    if "rollouts" in keys:
        flags |= {"rollouts": folder / "rollouts.jsonl", "teacher_cache": folder / "cache"}
    words = [part for key, value in (flags | changes).items() for part in (f"--{key}", str(value))]
    for command in (["rollouts"], ["cache", "build"]) if "rollouts" in keys else ():
        assert main([*command, name, *words]) == 0
    assert main(["train", name, *words]) == 0
    is_adapter = keys.get("use_peft") and not keys.get("merge_adapter")
    assert (folder / "run" / "model.safetensors").exists() != bool(is_adapter)
    assert (folder / "run" / "adapter_model.safetensors").exists() == bool(is_adapter)
