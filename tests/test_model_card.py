"""README.md beside a student: true, without paths of this machine, and not to be broken by any name."""

import re
import shutil

import pytest
import yaml
from cache_helpers import make_cache
from datasets import Dataset
from helpers import add_lora, config, make_model, make_trainer, save_pair
from huggingface_hub import ModelCard
from transformers import TrainerState

from sekd.classes import CLASS_SELECTIONS, ClassSelection
from sekd.cli import main
from sekd.model_card import MARK, CardSource, make_card
from sekd.policies import POLICIES, Policy
from sekd.policies.stateless import all_positions
from sekd.selection_words import describe_selection

NASTY = "a|b `c` ``d``\n---\ntags: [x]\n<script>"


def write(args=None, keys=None, student="", teacher="", log=(), **options):
    data = Dataset.from_dict({"input_ids": [[1, 2], [3]]})
    source = CardSource(args or config(), keys or {}, student, teacher, data, **options)
    return make_card(source, TrainerState(global_step=7, log_history=[*log]))


def read_table(card, title):
    """The cells of the first table after a line."""
    lines = card.split(title)[1].split("\n| --- |")[1].splitlines()[1:]
    rows = [line for line in lines[: next((i for i, line in enumerate(lines) if not line), len(lines))]]
    return {cells[0]: cells[1:] for cells in ([c.strip() for c in re.split(r"(?<!\\)\|", r)[1:-1]] for r in rows)}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            dict(lmbda=1.0),
            "reverse KL at the 20 % of the positions with the highest student entropy, on-policy",
        ),
        (dict(position_policy="all"), "forward KL at every position, off-policy"),
        (dict(position_fraction=1.0), "forward KL at every position, off-policy"),
        (
            dict(position_policy="random", position_fraction=0.0025, divergence="jsd"),
            "JSD at 0.25 % of the positions, drawn at random, off-policy",
        ),
        (
            dict(position_score={"kl": 0.5, "student_entropy": 1}, position_policy="weighted", lmbda=0.5),
            "reverse KL at every position, weighted by its sum of 0.5 x KL and 1 x student entropy, on-policy in 50 % "
            "of the steps",
        ),
        (
            dict(class_selection="rs_kd", class_samples=12, sample_fraction=0.2, kd_weight=0.9, kd_temperature=2.0),
            "forward KL at the 20 % of the positions with the highest student entropy, over 12 classes drawn from the "
            "teacher, mixed with cross-entropy (kd_weight 0.9), at temperature 2, on the 20 % of the samples with the "
            "highest student entropy, off-policy",
        ),
        (
            dict(sample_fraction=0.5, sample_score="random", position_policy="gls", position_score="ce_ratio"),
            "forward KL at the positions whose CE ratio is in the highest 20 % of the recent ones, on the 50 % of the "
            "samples drawn at random, off-policy",
        ),
    ],
)
def test_the_selection_in_a_sentence(options, sentence):
    assert describe_selection(config(**options)) == sentence


def test_every_strategy_has_words(monkeypatch):
    assert all(policy.words for policy in POLICIES.values())
    assert all(classes.words for classes in CLASS_SELECTIONS.values() if classes.select is not None)
    monkeypatch.setitem(POLICIES, "mine", Policy(all_positions))
    monkeypatch.setitem(CLASS_SELECTIONS, "few", ClassSelection(CLASS_SELECTIONS["rs_kd"].select))
    sentence = describe_selection(config(position_policy="mine", class_selection="few"))
    assert sentence == "forward KL at positions that `mine` chooses, over classes that `few` chooses, off-policy"


def test_a_card_of_a_recipe(tmp_path, recipe, tokenizer, monkeypatch):
    """What the numbers of the card say is what metrics.jsonl and the data say."""
    (tmp_path / "student").mkdir(exist_ok=True)
    (tmp_path / "student" / "README.md").write_text("---\nlicense: mit\n---\n")
    held_out = ["--dataset_test_split", "train[:8]", "--dataset_train_split", "train[8:]", "--eval_strategy", "steps"]
    assert main(["train", recipe, *held_out, "--eval_steps", "4", "--seed", "7"]) == 0
    folder = tmp_path / "run"
    card = (folder / "README.md").read_text()
    assert ModelCard(card).data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "mit",
        "tags": ["sekd", "knowledge-distillation"],
    }, "no name of a local folder, which may be another model's on the hub"
    assert "# A student of `teacher`\n" in card
    assert "- Student: `student`\n- Teacher: `teacher`\n- Data: `pairs.jsonl` (split `train[8:]`): 56 samples" in card
    assert str(tmp_path) not in card
    run = read_table(card, "## Training")
    assert run["optimizer steps"] == ["4"]
    assert run["learning rate"] == ["0.001, `linear`"]
    assert run["seed"] == ["7"]
    logs = [yaml.safe_load(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last_log = [log for log in logs if "loss" in log][-1]
    assert read_table(card, "The last log, of step 4")["`loss`"] == [f"{last_log['loss']:.4g}"]
    (evaluation,) = [log for log in logs if "eval_loss" in log]
    shown = read_table(card, "## Evaluation")
    assert shown["`eval_loss`"] == [f"{evaluation['eval_loss']:.4g}"]
    assert shown["`eval_ece`"] == [f"{evaluation['eval_ece']:.1%}".replace("%", " %")]
    assert not re.search("runtime|per_second", card)


@pytest.mark.parametrize(
    ("options", "best"),
    [
        ({}, 2),
        (dict(metric_for_best_model="acc"), 3),
        (dict(metric_for_best_model="eval_mine"), 1),
        (dict(metric_for_best_model="mine", greater_is_better=False), 4),
        (dict(metric_for_best_model="absent"), 4),
    ],
)
def test_the_best_evaluation(options, best):
    numbers = [(2.0, 0.1, 9), (1.0, 0.2, 8), (1.5, 0.4, 7), (3.0, 0.3, 1)]
    log = [dict(step=i, eval_loss=loss, eval_acc=acc, eval_mine=n) for i, (loss, acc, n) in enumerate(numbers, 1)]
    card = write(config(**options), log=log)
    assert ("best, step" in card) == (best != 4)
    loss, acc, _ = numbers[best - 1]
    shown = read_table(card, "## Evaluation")
    assert shown["`eval_loss`"] == ["3"] + [f"{loss:g}"] * (best != 4)
    assert shown["`eval_acc`"] == ["30.0 %"] + [f"{acc * 100:.1f} %"] * (best != 4)


def test_hub_ids_are_links_and_front_matter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = dict(dataset_name="openai/gsm8k", dataset_config="main", dataset_train_split="train[:90%]")
    card = write(config(eval_dataset_name="me/held-out"), keys, "Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B", is_adapter=True)
    assert ModelCard(card).data.to_dict() == {
        "base_model": "Qwen/Qwen3-1.7B",
        "datasets": ["openai/gsm8k", "me/held-out"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "teacher": "Qwen/Qwen3-8B",
        "tags": ["sekd", "knowledge-distillation", "lora"],
    }
    assert "- Teacher: [Qwen/Qwen3-8B](https://huggingface.co/Qwen/Qwen3-8B)\n" in card
    data = "[openai/gsm8k](https://huggingface.co/datasets/openai/gsm8k) (configuration `main`, split `train[:90%]`)"
    assert f"- Data: {data}: 2 samples of 3 tokens" in card
    assert "PEFT must be installed" in card
    (tmp_path / "Qwen" / "Qwen3-8B").mkdir(parents=True)
    card = write(student="Qwen/Qwen3-1.7B", teacher="Qwen/Qwen3-8B")
    assert "- Teacher: `Qwen3-8B`\n" in card, "a folder of this name is what from_pretrained takes"
    assert "teacher" not in ModelCard(card).data.to_dict()


def test_a_student_without_a_name_has_no_license(tmp_path, monkeypatch):
    """Not that of the README in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: gpl\n---\n")
    assert "license" not in ModelCard(write()).data.to_dict()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_teacher_is_named_by_its_bits(bits):
    pytest.importorskip("bitsandbytes")
    args = config(bf16=False, teacher_dtype="bfloat16", **{f"teacher_load_in_{bits}bit": True})
    assert read_table(write(args), "## Training")["precision"] == [f"float32, teacher {bits}-bit"]


@pytest.mark.parametrize("name", [NASTY, f"/home/me/secret/{NASTY}", "x/../../y\n---\n# z", "`", "|", " ", "\\|"])
def test_no_name_breaks_a_card(name):
    keys = dict(dataset_name=name, dataset_config=NASTY, dataset_train_split=NASTY)
    log = [{"step": 1, "loss": 1.0, NASTY: 2.0}, {"step": 1, f"eval_{NASTY}": 0.5, "eval_loss": 1.0}]
    more = {"license": name, "tags": [name]}
    card = write(config(), keys, name, name, log=log, is_adapter=True, more=more)
    front = ModelCard(card)
    assert front.data.to_dict()["license"] == name
    assert front.data.to_dict()["tags"][-1] == name
    plain = write(config(), {}, "", "", log=[{"step": 1, "loss": 1.0}, {"step": 1, "eval_loss": 1.0}], is_adapter=True)
    assert front.text.count("\n#") == plain.count("\n#"), "another heading"
    assert front.text.count("\n- ") == 3
    for line in front.text.splitlines():
        if line.startswith("|"):
            assert len(re.split(r"(?<!\\)\|", line)) == 4, "two cells"
    assert "/home" not in front.text
    assert "<script>" not in re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", front.text), "outside of code"


def test_without_a_network_or_a_log(tokenizer, pairs, tmp_path):
    best = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    held_out = dict(eval_dataset=pairs.select(range(2)))
    trainer = make_trainer(tmp_path, tokenizer, pairs, None, None, held_out, **best)
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "came from Python" in card
    assert "last log" not in card
    assert "wall time" not in card


def test_a_selection_of_samples_is_counted(tokenizer, pairs, tmp_path):
    chosen = make_trainer(tmp_path, tokenizer, pairs, sample_fraction=0.25)
    tokens = sum(len(sample["input_ids"]) for sample in chosen.train_dataset)
    chosen.save_model()
    assert f"16 samples of {tokens} tokens" in (tmp_path / "README.md").read_text()
    stream = make_trainer(tmp_path / "stream", tokenizer, pairs.to_iterable_dataset())
    stream.save_model()
    assert "read as a stream" in (tmp_path / "stream" / "README.md").read_text()


def test_the_teacher_of_a_cache(tokenizer, pairs, tmp_path):
    make_cache(tmp_path / "cache", tokenizer, pairs)
    options = dict(teacher_cache=str(tmp_path / "cache"), class_samples=16)
    source = CardSource(config(**options), {}, "", "", pairs.map(lambda row: {"input_ids": [1]}))
    assert source.teacher, "the cache names it"
    shutil.rmtree(tmp_path / "cache")
    card = make_card(source, TrainerState())
    assert "off-policy, from a cache of the teacher." in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("student", ["whole", "adapter"])
def test_a_card_that_the_user_wrote_stays(tokenizer, pairs, tmp_path, student):
    """PEFT would write into it."""
    model = make_model("untied") if student == "whole" else add_lora(make_model("untied"))
    trainer = make_trainer(tmp_path, tokenizer, pairs, model)
    trainer.save_model()
    first = (tmp_path / "README.md").read_text()
    assert MARK in first
    trainer.create_model_card(license="mit")
    assert ModelCard((tmp_path / "README.md").read_text()).data.license == "mit"
    mine = first.replace(MARK, "My words.")
    (tmp_path / "README.md").write_text(mine)
    trainer.save_model()
    trainer.create_model_card(license="gpl")
    assert (tmp_path / "README.md").read_text() == mine


def test_a_merged_student_is_no_adapter(tokenizer, pairs, tmp_path):
    save_pair(tmp_path, tokenizer)
    trainer = make_trainer(tmp_path / "run", tokenizer, pairs, add_lora(make_model("untied")), merge_adapter=True)
    trainer.save_model()
    assert ModelCard((tmp_path / "run" / "README.md").read_text()).data.library_name == "transformers"
