"""Every recipe parses, and starts on tiny models with its own choices."""

import os
from pathlib import Path

import pytest
import yaml
from helpers import make_model, make_vllm_model

from sekd.cli import main
from sekd.parse import list_recipes, parse_recipe, recipe_folder

RECIPES = [f"{name}.yaml" for name in list_recipes()]


def path(name):
    return os.path.join(recipe_folder(), name)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_parses_and_names_its_command(name):
    parse_recipe(path(name))
    assert f"sekd train recipes/{name}" in Path(path(name)).read_text()


def test_the_papers_hyperparameters():
    """arXiv 2602.01395, tables 8 and 9."""
    script, args, model = parse_recipe(path("fineweb_edu_sekd.yaml"))
    assert (model.model_name_or_path, args.teacher_model_name_or_path) == ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B")
    assert (args.max_length, args.per_device_train_batch_size, args.gradient_accumulation_steps) == (512, 2, 8)
    assert (args.learning_rate, args.optim, args.weight_decay) == (1e-5, "adamw_8bit", 0)
    assert (args.position_fraction, args.kd_weight, args.kd_temperature) == (0.2, 1.0, 1.0)
    assert (args.position_score, args.position_policy, args.divergence) == ("student_entropy", "top_k", "forward_kl")
    assert args.max_steps * 16 * 512 >= 80e6
    assert script.dataset_streaming


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_starts(name, tmp_path, tokenizer, pairs, texts):
    """Its own choices, on models and data of this test: vLLM, Adam8bit and streaming are the recipe's."""
    keys = yaml.safe_load(Path(path(name)).read_text())
    on_policy = keys["lmbda"] > 0
    for folder, seed in (("student", 0), ("teacher", 1)):
        (make_vllm_model(seed) if on_policy else make_model("tied", seed)).save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    data = tmp_path / "data.jsonl"
    if "text_column" in keys:
        texts.to_json(data)
    else:
        pairs.rename_columns({"prompt": "question", "completion": "answer"}).to_json(data)
    flags = {
        "model_name_or_path": tmp_path / "student",
        "teacher_model_name_or_path": tmp_path / "teacher",
        "dataset_name": data,
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "max_length": 64,
        "max_prompt_length": 32,
        "max_completion_length": 8,
        "save_strategy": "no",
        "vllm_enforce_eager": True,
    }
    if "text_prompt_length" in keys:
        flags["text_prompt_length"] = 16
    assert (
        main(["train", path(name), *(part for key, value in flags.items() for part in (f"--{key}", str(value)))]) == 0
    )
    assert (tmp_path / "run" / "model.safetensors").exists()
