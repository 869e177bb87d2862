"""The student before it trains: adapters that are new, continued or refused, and weights that can be trained."""

import os
import shutil

import pytest
import torch
from helpers import add_lora, config, make_model, make_trainer, save_pair
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from sekd import SEKDTrainer
from sekd.data.prepare import prepare
from sekd.models import get_head, hidden_states, load_teacher
from sekd.pretrained import find_adapter, load_config
from sekd.recipe import Run
from sekd.samples import score_samples
from sekd.student import check_context, load_student
from sekd.types import Batch

IDS = torch.arange(12)[None]
LORA = dict(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.1)
FLAGS = ["--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "all-linear"]


@pytest.fixture
def pair(tmp_path, tokenizer):
    """The folders of a student, a teacher and an adapter of the student that changes it."""
    save_pair(tmp_path, tokenizer)
    adapted = add_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "student"), target_modules="all-linear")
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path


@pytest.fixture
def merged(pair):
    base = AutoModelForCausalLM.from_pretrained(pair / "student")
    return PeftModel.from_pretrained(base, pair / "adapter").merge_and_unload().eval()


def start(pair, tokenizer, pairs, student, name="run", optimizers=(None, None), **options):
    peft_config = options.pop("peft_config", None)
    trainer_options = dict(peft_config=peft_config, optimizers=optimizers)
    trainer_options["model_init_kwargs"] = options.pop("model_init_kwargs", None)
    student = str(pair / student) if isinstance(student, str) else student
    return make_trainer(pair / name, tokenizer, pairs, student, str(pair / "teacher"), trainer_options, **options)


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


# New adapters


def test_two_runs_of_one_seed_train_the_same_adapter(pair, tokenizer, pairs):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.manual_seed(ord(name))  # whatever the process did before
        trainer = start(pair, tokenizer, pairs, "student", name, peft_config=LoraConfig(**LORA), seed=seed)
        trainer.train()
        trainer.save_model()
    assert weights(pair / "a") == weights(pair / "b")
    assert weights(pair / "a") != weights(pair / "c")


# Adapters as students


def run(recipe, *flags):
    """The trainer of a recipe, after training, and its held-out cross-entropies before and after."""
    held_out = ["--eval_on_start", "true", "--eval_strategy", "steps", "--eval_steps", "4"]
    slices = ["--dataset_train_split", "train[8:]", "--dataset_test_split", "train[:8]", "--bf16", "false"]
    trainer = Run.parse(recipe, [*held_out, *slices, *FLAGS, *flags]).trainer()
    trainer.train()
    trainer.save_model()
    values = [log["eval_student_ce"] for log in trainer.state.log_history if "eval_student_ce" in log]
    return trainer, values[0], values[-1]


def test_a_run_continues_the_adapter_of_another(recipe, tmp_path, monkeypatch):
    """With the very recipe that made it, from elsewhere, whose own name for the base was a relative path."""
    monkeypatch.chdir(tmp_path)
    _, _, ended = run(recipe, "--output_dir", "one", "--model_name_or_path", "student")
    _, _, same = run(recipe, "--output_dir", "two", "--model_name_or_path", "student")
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert same == ended
    os.chdir("/")
    flags = ["--model_name_or_path", str(tmp_path / "one"), "--output_dir", str(tmp_path / "three")]
    trainer, started, _ = run(recipe, *flags)
    assert started == pytest.approx(ended, abs=1e-6)
    moved = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert moved
    assert all("lora_" in name for name in moved)
    assert weights(tmp_path / "three") != weights(tmp_path / "one")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], r"adapter' is an adapter of .*student': set use_peft: true to train it on, or merge it"),
        (["--use_peft", "true", "--lora_r", "8"], "lora_r 8 contradicts the adapter .* which has 4: remove lora_r"),
        (["--use_peft", "true", "--use_dora", "true"], "use_dora True contradicts"),
        (
            ["--use_peft", "true", "--lora_target_modules", "q_proj", "v_proj"],
            r"lora_target_modules \{'.*'\} contradicts",
        ),
    ],
)
def test_a_recipe_that_contradicts_the_adapter_is_refused(recipe, pair, flags, message, monkeypatch):
    monkeypatch.delattr("sekd.student.load_model")  # before anything loads
    flags = ["--model_name_or_path", str(pair / "adapter"), *flags]
    with pytest.raises(ValueError, match=message):
        Run.parse(recipe, flags).trainer()
    with pytest.raises(ValueError, match=message):
        Run.parse(recipe, [*flags, "--sample_fraction", "0.5"]).choose_samples()


def test_samples_are_scored_with_the_adapter(recipe, pair, tokenizer, pairs, merged):
    flags = [
        "--model_name_or_path",
        str(pair / "adapter"),
        "--use_peft",
        "true",
        "--sample_fraction",
        "0.5",
        "--bf16",
        "false",
    ]
    args = Run.parse(recipe, flags).args
    expected = score_samples(prepare(pairs, tokenizer, args), merged, None, args)
    chosen = Run.parse(recipe, flags).choose_samples()
    torch.testing.assert_close(torch.tensor(chosen["scores"]), expected, rtol=1e-4, atol=1e-4)
    trainer = Run.parse(recipe, flags).trainer()  # reads samples.json, or refuses it as another student's
    assert [*trainer.train_dataset["sample_id"]] == chosen["kept"]


def test_a_teacher_reads_with_its_adapter(pair, merged):
    args = config(teacher_dtype="float32")
    teacher = load_teacher(str(pair / "adapter"), args)
    batch = Batch(IDS, targets=IDS, position_ids=IDS, sample_ids=IDS[:, 0])
    logits = get_head(teacher)(hidden_states(teacher, batch)[0])
    torch.testing.assert_close(logits, merged(IDS).logits[0], rtol=1e-4, atol=1e-4)
    assert load_config("model_name_or_path", str(pair / "adapter"), None).vocab_size == 128


def test_an_adapter_of_a_hub_id_is_found(pair, monkeypatch, merged):
    """In the layout of the hub's cache."""
    commit = "a" * 40
    repository = pair / "hub" / "models--someone--adapter"
    shutil.copytree(pair / "adapter", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(pair / "hub"))
    assert find_adapter("someone/other") is None
    assert find_adapter("someone/adapter", "main").r == 4
    args = config()
    student = load_student("someone/adapter", args, revision="main", dtype=torch.float32)
    torch.testing.assert_close(student(IDS).logits, merged(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_peft_model_is_trained_on(pair, tokenizer, pairs, merged):
    base = AutoModelForCausalLM.from_pretrained(pair / "student")
    student = PeftModel.from_pretrained(base, pair / "adapter", is_trainable=True)
    trainer = start(pair, tokenizer, pairs, student)
    torch.testing.assert_close(trainer.model.eval()(IDS).logits, merged(IDS).logits, rtol=1e-4, atol=1e-4)
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert all(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if name in before)


def test_students_that_cannot_be_trained_on_are_refused(pair, tokenizer, pairs):
    def load(dtype=torch.float32):
        return AutoModelForCausalLM.from_pretrained(pair / "student", dtype=dtype)

    with pytest.raises(ValueError, match="peft_config asks for a new adapter, but the student has one"):
        start(pair, tokenizer, pairs, "adapter", peft_config=LoraConfig(**LORA))
    with pytest.raises(ValueError, match="peft_config asks for a new adapter, but the student has one"):
        start(pair, tokenizer, pairs, add_lora(load()), peft_config=LoraConfig(**LORA))
    for frozen in (PeftModel.from_pretrained(load(), pair / "adapter"), load().requires_grad_(False)):
        with pytest.raises(ValueError, match="no weights to train: they are all frozen"):
            start(pair, tokenizer, pairs, frozen)
    load().save_pretrained(pair / "adapter")
    with pytest.raises(ValueError, match=r"adapter' holds a whole model \(config.json\) and an adapter"):
        start(pair, tokenizer, pairs, "adapter")


@pytest.mark.parametrize("name", ["student", "adapter"])
def test_a_run_does_not_replace_its_own_models(pair, tokenizer, pairs, name):
    with pytest.raises(ValueError, match=r"output_dir .* holds the (student|base of the student's adapter), which"):
        start(pair, tokenizer, pairs, name, name="student")


# Half precision


def test_half_precision_weights_are_trained_with_an_optimizer_of_ones_own_alone(pair, tokenizer, pairs):
    half = make_model("untied").bfloat16()
    with pytest.raises(ValueError, match=r"trainable weights are bfloat16, .* load it in float32 \(dtype: float32"):
        start(pair, tokenizer, pairs, half)
    with pytest.raises(ValueError, match="trainable weights are float16"):
        start(pair, tokenizer, pairs, "student", model_init_kwargs=dict(dtype="float16"))
    optimizer = torch.optim.SGD(half.parameters(), lr=1e-3)
    start(pair, tokenizer, pairs, half, optimizers=(optimizer, None)).train()


def test_an_adapter_over_half_precision_is_float32(pair, tokenizer, pairs):
    student = AutoModelForCausalLM.from_pretrained(pair / "student", dtype=torch.bfloat16)
    trainer = start(pair, tokenizer, pairs, student, peft_config=LoraConfig(**LORA))
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_prompts_and_completions_fit_into_the_students_positions(tmp_path, tokenizer, pairs):
    """From the configuration alone: there are no weights in the folder."""
    pytest.importorskip("vllm")
    student = make_model("untied")
    student.config.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    values = dict(lmbda=1.0, max_prompt_length=1000, max_completion_length=1500)
    message = r"max_prompt_length 1000 \+ max_completion_length 1500 is more than the 2048 positions of the student"
    for engine in ("vllm", "vllm_server"):
        for model in (str(tmp_path / "student"), student):
            with pytest.raises(ValueError, match=message):
                SEKDTrainer(model, make_model("untied"), config(**values, rollout_engine=engine), pairs)
    for fits in (dict(max_completion_length=1048), dict(lmbda=0.0), dict(rollout_engine="hf")):
        check_context(config(**values | dict(rollout_engine="vllm") | fits), student, {}, None)
    student.config.rope_parameters |= dict(rope_type="linear", factor=2.0)
    check_context(config(**values, rollout_engine="vllm"), student, {}, None)
