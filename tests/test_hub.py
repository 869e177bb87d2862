"""What a run uploads: the hub's real client sends it to a small server."""

import os
from pathlib import Path

import huggingface_hub.constants
import pytest
from helpers import add_lora, config, make_model, make_trainer
from hub_server import Hub

from sekd.hub import UPLOADED

TOKEN = "hf_secret"
REPOSITORY = dict(push_to_hub=True, hub_model_id="me/student", hub_token=TOKEN)
MODEL = {"config.json", "generation_config.json", "model.safetensors"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
BESIDE = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md", "recipe.yaml"}
BESIDE |= {"versions.json", "metrics.jsonl"}


def read(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def test_the_student_its_card_and_its_recipe_are_uploaded(tmp_path, tokenizer, pairs, hub):
    folder = tmp_path / "run"
    trainer = make_trainer(folder, tokenizer, pairs, lmbda=1.0, save_rollouts=True, **REPOSITORY)
    trainer.train()
    (folder / "notes.txt").write_text("not for the hub")
    assert not hub, "nothing is saved yet"
    trainer.save_model()
    assert hub.keys() == MODEL | BESIDE
    local = read(folder)
    assert "rollouts.jsonl" in local
    assert hub == {name: local[name] for name in hub}
    assert 'from_pretrained("me/student")' in hub["README.md"].decode()

    hub["added.txt"] = b"by someone else"
    trainer.push_to_hub(license="mit")  # transformers' create_model_card would replace the card
    assert b"license: mit\n" in hub["README.md"]
    assert b"## How to load it" in hub["README.md"]
    make_trainer(tmp_path / "two", tokenizer, pairs, add_lora(make_model("untied")), **REPOSITORY).save_model()
    assert hub.keys() - {"recipe.yaml", "versions.json", "metrics.jsonl", "added.txt"} == (
        ADAPTER | BESIDE - {"recipe.yaml", "versions.json", "metrics.jsonl"}
    ), "the whole student would be loaded instead of the adapter"


@pytest.mark.parametrize(
    ("strategy", "folders"),
    [
        ("end", set()),
        ("every_save", set()),
        ("checkpoint", {"last-checkpoint"}),
        ("all_checkpoints", {"checkpoint-1", "checkpoint-2"}),
    ],
)
def test_checkpoints_are_uploaded_as_hub_strategy_says(tmp_path, tokenizer, pairs, hub, strategy, folders):
    saving = dict(save_strategy="steps", save_steps=1, save_total_limit=1, hub_strategy=strategy, **REPOSITORY)
    trainer = make_trainer(tmp_path, tokenizer, pairs, **saving)
    trainer.train()
    assert not MODEL & read(tmp_path).keys(), "a killed process would leave half a model"
    assert {os.path.dirname(name) for name in hub} - {""} == folders
    assert bool(MODEL & hub.keys()) == (strategy != "end")
    last = "checkpoint-2/" if strategy == "all_checkpoints" else "last-checkpoint/"
    uploaded = {name.removeprefix(last): content for name, content in hub.items() if name.startswith(last)}
    if folders:
        assert uploaded == read(tmp_path / "checkpoint-2"), "a run can resume from it"
    assert not [name for name, content in hub.items() if TOKEN.encode() in content]


def test_a_checkpoint_stays_until_it_is_uploaded(tmp_path, tokenizer, pairs, hub, monkeypatch):
    """The next one would take its place (save_total_limit) in the middle of the upload."""
    warnings = []
    monkeypatch.setattr("sekd.hub.logger.warning", warnings.append)
    Hub.seconds = 0.5
    saving = dict(save_strategy="steps", save_steps=1, save_total_limit=1, hub_strategy="all_checkpoints")
    make_trainer(tmp_path, tokenizer, pairs, **saving, **REPOSITORY).train()
    assert not warnings
    assert "checkpoint-1/checkpoint.json" in hub


def test_a_hub_that_refuses(tmp_path, tokenizer, pairs, hub, monkeypatch):
    """A checkpoint that is not uploaded is a warning. A student that is not uploaded is an error of one line."""
    warnings = []
    monkeypatch.setattr("sekd.hub.logger.warning", warnings.append)
    trainer = make_trainer(tmp_path, tokenizer, pairs, save_strategy="steps", save_steps=1, **REPOSITORY)
    Hub.refuses = True
    trainer.train()
    assert len(warnings) == 2
    assert "a checkpoint was not uploaded to 'me/student': Client error '404" in warnings[0]
    with pytest.raises(OSError, match=f"the student is saved in '{tmp_path}', but not uploaded to 'me/student': ") as e:
        trainer.save_model()
    assert "\n" not in str(e.value)
    assert read(tmp_path).keys() > MODEL


def test_a_hub_that_cannot_be_reached(tmp_path, tokenizer, pairs, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ValueError, match=r"push_to_hub: the repository 'me/student' cannot be created: .*refused"):
        make_trainer(tmp_path, tokenizer, pairs, **REPOSITORY)


def test_what_cannot_be_uploaded_is_refused_before_anything_loads(monkeypatch):
    with pytest.raises(ValueError, match="push_to_hub true, but HF_HUB_OFFLINE forbids the network"):
        config(**REPOSITORY)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match="no repository can be named 'a b'; set hub_model_id: user/name"):
        config(push_to_hub=True, hub_token=TOKEN, hub_model_id="a b")
    monkeypatch.setattr("sekd.validation.training.get_token", lambda: None)
    with pytest.raises(ValueError, match="push_to_hub needs a token of the hub"):
        config(push_to_hub=True)


def test_what_is_uploaded_is_documented():
    page = (Path(__file__).parents[1] / "docs" / "runs.md").read_text()
    section = page.split("## The hub")[1].split("\n## ")[0]
    for name in ("README.md", "recipe.yaml", "versions.json", "metrics.jsonl"):
        assert name in UPLOADED
        assert f"`{name}`" in section
