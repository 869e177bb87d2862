"""Names of models that are none say so, with the key."""

import shutil

import pytest
from helpers import make_model
from peft import LoraConfig

from sekd.cli import main
from sekd.pretrained import check_model_name, load_config, load_tokenizer


@pytest.mark.parametrize("name", ["./data/nope", "/data/nope", "~/nope", "a/b/c", "nope/", ""])
def test_a_folder_that_is_not_there(name):
    with pytest.raises(ValueError, match=rf"^teacher_model_name_or_path '{name}': no such folder$"):
        check_model_name("teacher_model_name_or_path", name)


def test_names_that_may_be_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "Qwen/Qwen3-1.7B"):
        check_model_name("model_name_or_path", name)
    message = r"^model_name_or_path 'data/nope': no such folder, and the hub gives no .*: We couldn't"
    for load in (load_tokenizer, load_config):
        with pytest.raises(ValueError, match=message):
            load("model_name_or_path", "data/nope", "main")


def test_a_folder_without_a_model_or_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"the folder holds no model, since it has no config.json"):
        check_model_name("model_name_or_path", str(tmp_path))
    make_model().save_pretrained(tmp_path)
    assert load_config("model_name_or_path", str(tmp_path), None).vocab_size
    with pytest.raises(ValueError, match=r"^model_name_or_path '.*': the folder has no tokenizer; save"):
        load_tokenizer("model_name_or_path", str(tmp_path), None)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"^model_name_or_path '.*': the folder's tokenizer cannot be loaded: "):
        load_tokenizer("model_name_or_path", str(tmp_path), None)
    with pytest.raises(ValueError, match=r"is a file; name the folder of the model"):
        check_model_name("model_name_or_path", str(tmp_path / "config.json"))


@pytest.mark.parametrize("key", ["model_name_or_path", "teacher_model_name_or_path", "dataset_name"])
@pytest.mark.parametrize("name", ["./data/nope", "data/nope"])
def test_a_typo_in_a_path_names_its_key(recipe, key, name, capsys):
    assert main(["train", recipe, f"--{key}", name]) == 2
    assert f"sekd: {key} '{name}': no such f" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["model_name_or_path", "teacher_model_name_or_path"])
def test_a_missing_tokenizer_names_its_key(recipe, key, tmp_path, capsys):
    shutil.copytree(tmp_path / "student", tmp_path / "bare", ignore=shutil.ignore_patterns("token*"))
    assert main(["train", recipe, f"--{key}", str(tmp_path / "bare")]) == 2
    assert f"sekd: {key} '{tmp_path / 'bare'}': the folder has no tokenizer" in capsys.readouterr().err


def test_an_adapter_whose_base_is_gone(tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path="/nowhere/base")
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the base of the adapter '.*' is gone: '/nowhere/base'; name the folder"):
        load_config("model_name_or_path", str(tmp_path), None)
