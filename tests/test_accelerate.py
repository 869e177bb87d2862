"""The configurations of `accelerate launch` parse, and start two processes."""

import json
import os
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from helpers import run_command, save_pair

from sekd.cli import main
from sekd.parse import recipe_folder

FOLDER = Path(recipe_folder()) / "accelerate"
CONFIGURATIONS = sorted(path.name for path in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_parses_and_names_its_command(name):
    assert load_config_from_file(str(FOLDER / name)).num_processes > 1
    assert f"accelerate launch --config_file recipes/accelerate/{name} -m sekd.cli train" in (FOLDER / name).read_text()


@pytest.mark.slow
@pytest.mark.xdist_group("two processes")
@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if name != "fsdp2.yaml"])
def test_a_configuration_starts_two_processes(tmp_path, tokenizer, pairs, name):
    """test_trainer_distributed.py starts FSDP2's."""
    if "zero" in name:
        pytest.importorskip("deepspeed")
    save_pair(tmp_path, tokenizer)
    pairs.to_json(tmp_path / "pairs.jsonl")
    keys = {
        "model_name_or_path": str(tmp_path / "student"),
        "teacher_model_name_or_path": str(tmp_path / "teacher"),
        "dataset_name": str(tmp_path / "pairs.jsonl"),
        "max_steps": 2,
        "bf16": False,
        "teacher_dtype": "float32",
        "logging_steps": 1,
        "report_to": "none",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / name)]
    launch += ["--num_processes=2", "--main_process_port=0", "-m", "sekd.cli"]
    train = ["train", str(tmp_path / "recipe.yaml"), "--output_dir"]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    run_command([*launch, *train, str(tmp_path / "two"), "--per_device_train_batch_size=4"], environment)
    assert main([*train, str(tmp_path / "one"), "--per_device_train_batch_size=8"]) == 0
    two, one = (
        [json.loads(line).get("loss") for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()][:2]
        for run in ("two", "one")
    )
    assert two == pytest.approx(one, rel=1e-5)
    assert (tmp_path / "two" / "model.safetensors").exists()
