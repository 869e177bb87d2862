"""The files of a trained student: what transformers, PEFT and vLLM can load, and nothing of another student."""

import os

import pytest
import torch
from helpers import EXPERTS, add_lora, make_model, make_moe, make_trainer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from sekd.saving import merge_adapter

IDS = torch.arange(12)[None]
WHOLE = {"config.json", "generation_config.json", "model.safetensors"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


def assert_same_logits(one, other, tolerance=1e-4):
    assert (one.eval()(IDS).logits - other.eval()(IDS).logits).abs().max() < tolerance


@pytest.fixture
def adapted(tmp_path, monkeypatch):
    """A student with an adapter, whose base was named by a relative path."""
    make_model("untied").save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    return add_lora(AutoModelForCausalLM.from_pretrained("base"))


def model_files(folder):
    return {path.name for path in folder.iterdir()} & (WHOLE | ADAPTER | {"model.safetensors.index.json"})


def test_an_adapter_is_loaded_from_anywhere(tmp_path, tokenizer, pairs, adapted):
    trainer = make_trainer(tmp_path / "run", tokenizer, pairs, adapted)
    trainer.save_model()
    os.chdir("/")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert_same_logits(loaded, adapted)
    assert AutoTokenizer.from_pretrained(tmp_path / "run").get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: make_model("untied"), {}),
        (lambda: make_model("tied"), {}),
        (lambda: make_model("untied"), {"use_dora": True, "modules_to_save": ["lm_head"]}),
        (make_moe, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    ],
)
def test_a_merged_student_is_a_whole_one(tmp_path, tokenizer, pairs, make, options):
    """It has the logits of the student with its adapter, and the names and the files of a plain checkpoint."""
    adapted, plain = add_lora(make(), **options), make()
    plain.save_pretrained(tmp_path / "plain")
    before = {name: p.clone() for name, p in adapted.named_parameters()}
    trainer = make_trainer(tmp_path / "run", tokenizer, pairs, adapted, merge_adapter=True)
    trainer.save_model()
    assert all(torch.equal(p, before[name]) for name, p in adapted.named_parameters())
    assert model_files(tmp_path / "run") == WHOLE
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "run"), adapted)
    assert AutoTokenizer.from_pretrained(tmp_path / "run").get_vocab() == tokenizer.get_vocab()
    names = [sorted(safe_open(tmp_path / name / "model.safetensors", "pt").keys()) for name in ("plain", "run")]
    assert names[0] == names[1]


def test_an_adapter_is_merged_in_float32():
    """In bfloat16 the base would round the adapter away."""
    adapted = add_lora(make_model("tied").bfloat16())
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data *= 1e-3
    merged = merge_adapter(adapted)
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
    exact = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
    assert merged.dtype == torch.float32
    assert (merged.model.layers[0].self_attn.q_proj.weight - exact).abs().max() < 1e-7
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_a_checkpoint_keeps_the_adapter(tmp_path, tokenizer, pairs, adapted):
    saving = dict(save_strategy="steps", save_steps=1, max_steps=2, merge_adapter=True)
    trainer = make_trainer(tmp_path / "run", tokenizer, pairs, adapted, **saving)
    trainer.train()
    trainer.save_model()
    assert model_files(tmp_path / "run" / "checkpoint-1") == ADAPTER
    resumed = make_trainer(tmp_path / "run", tokenizer, pairs, add_lora(make_model("untied")), **saving)
    resumed.train(str(tmp_path / "run" / "checkpoint-1"))
    assert_same_logits(resumed.model, trainer.model)


def test_a_folder_holds_one_student(tmp_path, tokenizer, pairs, adapted):
    whole, folder = make_model("untied", seed=2), tmp_path / "run"
    whole.save_pretrained(folder, max_shard_size="50KB")
    assert (folder / "model.safetensors.index.json").exists(), "an earlier student in parts"
    for student, files in ((adapted, ADAPTER), (whole, WHOLE), (adapted, ADAPTER), (whole, WHOLE)):
        make_trainer(folder, tokenizer, pairs, student).save_model()
        assert model_files(folder) == files
        assert not list(folder.glob("model-*"))
        assert_same_logits(AutoModelForCausalLM.from_pretrained(folder), student, 1e-5)


def test_what_cannot_be_merged_or_saved_is_refused(tmp_path, tokenizer, pairs, adapted):
    with pytest.raises(ValueError, match="merge_adapter true, but the student has no adapter; set use_peft: true"):
        make_trainer(tmp_path / "run", tokenizer, pairs, merge_adapter=True)
    tied = add_lora(make_model("tied"), target_modules=["lm_head"])
    with pytest.raises(ValueError, match=r"the adapter changes lm_head, .* so nothing can load the merged weights"):
        make_trainer(tmp_path / "run", tokenizer, pairs, tied, merge_adapter=True)
    trainer = make_trainer(tmp_path / "run", tokenizer, pairs, adapted)
    with pytest.raises(ValueError, match="base' holds the base of the student's adapter"):
        trainer.save_model(str(tmp_path / "base"))
    assert (tmp_path / "base" / "model.safetensors").exists()
