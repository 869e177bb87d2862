"""A student beside its teacher, both given by name: on texts, and on the student's own completions."""

import json
import math
import re
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from evaluation_helpers import measure
from helpers import EOS, VOCAB, add_lora, make_model, make_tokenizer, make_trainer, make_vllm_model, messages, save_pair
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rollouts import Rollout
from sekd.data.batch import Sample
from sekd.eval import distillation
from sekd.eval.distillation import measure_distillation
from sekd.eval.distillation_data import DistillationOptions, prepare_distillation
from sekd.eval.divergence import get_answers, make_result, measure_completions, measure_texts
from sekd.eval.held_out import Pair
from sekd.teachers import LiveTeacher

QUIET = dict(engine="hf", dtype="float32")
LOAD = {bits: f"teacher_load_in_{bits}bit" for bits in (4, 8)}


@pytest.fixture
def folder(tmp_path, tokenizer, pairs, texts):
    """A student, a teacher, texts.jsonl and pairs.jsonl."""
    save_pair(tmp_path, tokenizer, texts)
    pairs.to_json(tmp_path / "pairs.jsonl")
    return tmp_path


def names(folder):
    return str(folder / "student"), str(folder / "teacher")


def prepare(models, **options):
    return prepare_distillation(models[0], DistillationOptions(models[1], **options))


def dense(model, ids, vocab=None):
    """log-probabilities of each position, in float64."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, :, :vocab].double().log_softmax(-1)


def compare(p, q, y):
    """The numbers of a position, class by class."""
    confidence, guess = q.max(0)
    return {
        "nll": -q[y].item(),
        "teacher_ce": -p[y].item(),
        "forward_kl": sum(a.exp() * (a - b) for a, b in zip(p, q, strict=True)).item(),
        "reverse_kl": sum(b.exp() * (b - a) for a, b in zip(p, q, strict=True)).item(),
        "student_entropy": -sum(b.exp() * b for b in q).item(),
        "top1_agreement": float(p.argmax() == guess),
        "sampled_reverse_kl": (q[y] - p[y]).item(),
        "confidence": confidence.exp().item(),
        "hit": float(guess == y),
    }


def mean(numbers):
    return sum(numbers) / len(numbers)


def test_a_text_gives_the_dense_numbers_of_each_document_and_of_all(folder, tokenizer, texts):
    result = measure("text", *names(folder), text=str(folder / "texts.jsonl"), limit=9, **QUIET)
    student, teacher = (AutoModelForCausalLM.from_pretrained(name) for name in names(folder))
    positions = []
    for item, text in zip(result.items, texts["text"][:9], strict=True):
        ids = [*tokenizer(text)["input_ids"], EOS]
        q, p = dense(student, ids), dense(teacher, ids)
        own = [compare(p[t], q[t], ids[t + 1]) for t in range(len(ids) - 1)]
        assert item.weight == len(own)
        assert item.metrics == {name: pytest.approx(mean([o[name] for o in own]), rel=1e-4) for name in item.metrics}
        assert item.loglikelihoods == (pytest.approx(-sum(o["nll"] for o in own), rel=1e-5),)
        assert (item.prompt, item.answer) == ("", f"{text} <eos>")
        positions += own
    for name in ("nll", "forward_kl", "reverse_kl", "student_entropy", "top1_agreement"):
        assert result.scores[name].value == pytest.approx(mean([o[name] for o in positions]), rel=1e-4), name
    assert result.scores["perplexity"].value == pytest.approx(math.exp(mean([o["nll"] for o in positions])), rel=1e-4)
    bins = [[o for o in positions if min(int(o["confidence"] * 15), 14) == b] for b in range(15)]
    ece = sum(abs(sum(o["hit"] - o["confidence"] for o in b)) for b in bins) / len(positions)
    assert result.scores["ece"].value == pytest.approx(ece, rel=1e-4)
    assert (result.task, result.main) == ("text", "forward_kl")
    assert 0 < result.scores["top1_agreement"].value < 1


@pytest.mark.parametrize("file", ["texts.jsonl", "pairs.jsonl"])
def test_the_numbers_are_those_of_the_trainer_on_the_same_rows(folder, tokenizer, pairs, file):
    options = dict(text=str(folder / file), limit=20, max_length=24, batch_size=3, **QUIET)
    scores = measure("text", *names(folder), **options).scores
    rows = Dataset.from_json(str(folder / file)).select(range(20))
    student, teacher = (AutoModelForCausalLM.from_pretrained(name) for name in names(folder))
    options = dict(packing=False, max_length=24, max_prompt_length=23)
    trainer = make_trainer(folder, tokenizer, rows, student, teacher, dict(eval_dataset=rows), **options)
    metrics = trainer.evaluate()
    for name in ("forward_kl", "reverse_kl", "student_entropy", "top1_agreement", "perplexity", "ece"):
        assert scores[name].value == pytest.approx(metrics[f"eval_{name}"], rel=1e-5), name
    assert scores["nll"].value == pytest.approx(metrics["eval_student_ce"], rel=1e-5)


def test_prompts_of_a_chat_are_not_measured(folder, tokenizer):
    rows = [messages(("user", "w1 w2"), ("assistant", "w3 w4")), messages(("user", "w5"), ("assistant", "w6"))]
    Dataset.from_list(rows).to_json(folder / "chats.jsonl")
    result = measure("text", *names(folder), text=str(folder / "chats.jsonl"), **QUIET)
    assert [item.weight for item in result.items] == [3, 2]
    assert result.items[0].answer == "w3 w4 <eos>"


def test_completions_give_the_dense_numbers_of_each_prompt(tokenizer):
    """Two completions a prompt, one of them empty; the teacher has fewer classes; a copy gives no item."""
    student, teacher = make_model("untied"), make_model("untied", 1)
    completions = [[5, 6, 7, EOS], [8, 9], [10, EOS], [11, 12, 13], [], [], [7], [8]]
    prompts = [[1, 2, 3], [4, 5], [6], [1, 2, 3]]
    samples = [Sample(ids, [0] * len(ids), i if i < 3 else -1, len(ids)) for i, ids in enumerate(prompts)]
    rollouts = [
        Rollout(prompts[i // 2], ids, 0, "stop" if EOS in ids else "length") for i, ids in enumerate(completions)
    ]
    pair = Pair(student, LiveTeacher(teacher, 121), 121, torch.device("cpu"), batch_size=3, chunk_rows=4)
    answers = ["w7", "w13", None, None]
    items = measure_completions(pair, samples, rollouts, tokenizer, answers)
    assert [item.index for item in items] == [0, 1, 2]
    positions = []
    for item, own in zip(items[:2], (completions[:2], completions[2:4]), strict=True):
        prompt = prompts[item.index]
        of_item = []
        for ids in own:
            p, q = (dense(model, prompt + ids, 121) for model in (teacher, student))
            where = range(len(prompt) - 1, len(prompt) + len(ids) - 1)
            of_item += [compare(p[t], q[t], (prompt + ids)[t + 1]) for t in where]
        assert item.weight == len(of_item) == sum(map(len, own))
        for name in ("forward_kl", "reverse_kl", "student_entropy", "top1_agreement", "sampled_reverse_kl"):
            assert item.metrics[name] == pytest.approx(mean([o[name] for o in of_item]), rel=1e-4, abs=1e-6), name
        positions += of_item
    assert items[0].outputs == ("w5 w6 w7", "w8 w9")
    assert (items[0].prompt, items[0].answer) == ("w1 w2 w3", "w7")
    assert [item.metrics["length"] for item in items] == [3, 2.5, 0]
    assert [item.metrics["cut_off"] for item in items] == [0.5, 0.5, 1]
    assert items[2].metrics.keys() == {"length", "cut_off"}
    assert items[2].weight == 0
    result = make_result("rollouts", items, {}, 1.0)
    assert result.main == "math_verify"
    ungraded = [replace(i, metrics={k: v for k, v in i.metrics.items() if k != "math_verify"}) for i in items]
    assert make_result("rollouts", ungraded, {}, 1.0).main == "reverse_kl"
    assert result.scores["reverse_kl"].value == pytest.approx(mean([o["reverse_kl"] for o in positions]), rel=1e-4)
    assert result.scores["length"].value == pytest.approx((3 + 2.5 + 0) / 3)
    sharpened = measure_completions(pair, samples, rollouts, tokenizer, samples_as_is=False)
    assert not any("sampled_reverse_kl" in item.metrics for item in sharpened)


def test_the_teacher_reads_its_own_prompt(tokenizer):
    student, teacher = make_model("untied"), make_model("untied", 1)
    contexts, prompts, completions = [[9, 8, 7], [6]], [[1, 2], [3]], [[20], [21, 22], [23], [24, 25]]
    samples = [Sample(ids, [0] * len(ids), i, len(ids), None, contexts[i]) for i, ids in enumerate(prompts)]
    rollouts = [Rollout(prompts[i // 2], ids, 0, "length") for i, ids in enumerate(completions)]
    pair = Pair(student, LiveTeacher(teacher, VOCAB), VOCAB, torch.device("cpu"))
    for i, item in enumerate(measure_completions(pair, samples, rollouts, tokenizer)):
        numbers = []
        for ids in completions[2 * i : 2 * i + 2]:
            q, p = (dense(m, start[i] + ids)[-len(ids) - 1 :] for m, start in ((student, prompts), (teacher, contexts)))
            numbers += [compare(p[t], q[t], y)["reverse_kl"] for t, y in enumerate(ids)]
        assert item.metrics["reverse_kl"] == pytest.approx(mean(numbers), rel=1e-4)


def test_right_answers_are_counted_over_the_completions_of_a_prompt(tokenizer):
    """Answers are the text after ####: 2 of 4 right, then none of 4, then 4 of 4."""
    student = make_model("untied")
    pair = Pair(student, LiveTeacher(student, VOCAB), VOCAB, torch.device("cpu"))
    samples = [Sample([i + 1], [0], i, 1) for i in range(3)]
    completions = [[20], [21], [20], [22], [23], [24], [25], [26], [30], [30], [30], [30]]
    rollouts = [Rollout([i // 4 + 1], [*ids, EOS], 0, "stop") for i, ids in enumerate(completions)]
    items = measure_completions(pair, samples, rollouts, tokenizer, ["by hand #### w20", "w99", "w30"])
    assert [item.correct for item in items] == [0.5, 0, 1]
    assert [item.metrics["pass@4"] for item in items] == [1, 0, 1]
    scores = make_result("rollouts", items, {}, 1.0).scores
    assert scores["math_verify"].value == scores["avg@4"].value == pytest.approx(0.5)
    assert scores["pass@4"].value == pytest.approx(2 / 3)
    assert scores["avg@4"].stderr == pytest.approx(math.sqrt(0.25 / 3))  # 0.5, 0, 1: variance 0.25 of 3 items
    assert scores["reverse_kl"].value == pytest.approx(0, abs=1e-6)  # the teacher is the student
    assert scores["top1_agreement"].value == 1


@pytest.mark.slow
def test_the_student_samples_from_its_own_distribution(folder):
    """log q(y) - log p(y) at the drawn tokens is near the exact KL(q||p): within 4 standard errors."""
    options = dict(
        prompts=str(folder / "pairs.jsonl"), max_new_tokens=6, repeats=8, answer_column="completion", **QUIET
    )
    result = measure("rollouts", *names(folder), **options)
    differences = [i.metrics["sampled_reverse_kl"] - i.metrics["reverse_kl"] for i in result.items]
    weights = [item.weight for item in result.items]
    average = sum(w * d for w, d in zip(weights, differences, strict=True)) / sum(weights)
    error = math.sqrt(sum((w * (d - average)) ** 2 for w, d in zip(weights, differences, strict=True))) / sum(weights)
    assert len(result.items) == 64
    assert 0 < error < 0.1 * result.scores["reverse_kl"].value
    assert abs(average) < 4 * error
    again = measure("rollouts", *names(folder), **options)
    assert again.items == result.items, "the same seed draws the same tokens"
    other = measure("rollouts", *names(folder), **options, seed=1)
    assert other.items[0].outputs != result.items[0].outputs
    assert len({*result.items[0].outputs}) > 1


@pytest.mark.slow
def test_an_adapter_is_measured_with_its_base(folder, tokenizer):
    """As the same model with the adapter merged in; its tokenizer may be its base's."""
    base = AutoModelForCausalLM.from_pretrained(folder / "student")
    torch.manual_seed(0)
    adapted = add_lora(base)
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")
    files = dict(text=str(folder / "texts.jsonl"), prompts=str(folder / "pairs.jsonl"))
    options = dict(**files, limit=6, max_new_tokens=4, temperature=0, **QUIET)
    of_adapter, of_merged, of_base = (
        [result.scores for result in measure_distillation(prepare((str(folder / name), names(folder)[1]), **options))]
        for name in ("adapter", "merged", "student")
    )
    for own, merged, other in zip(of_adapter, of_merged, of_base, strict=True):
        assert own["reverse_kl"].value == pytest.approx(merged["reverse_kl"].value, rel=1e-4)
        assert abs(own["reverse_kl"].value - other["reverse_kl"].value) > 0.01
    as_teacher = measure("text", str(folder / "merged"), str(folder / "adapter"), **options)
    assert as_teacher.scores["forward_kl"].value == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_teacher_gives_the_numbers_of_one_quantized_by_hand(folder, bits):
    pytest.importorskip("bitsandbytes")
    student = make_vllm_model()
    student.save_pretrained(folder / "student")
    make_vllm_model(1, intermediate=128).save_pretrained(folder / "teacher")
    files = dict(text=str(folder / "texts.jsonl"), prompts=str(folder / "pairs.jsonl"))
    options = files | dict(limit=4, max_new_tokens=4, temperature=0, **QUIET)
    whole, quantized = (
        [*measure_distillation(prepare(names(folder), **options, **more))] for more in ({}, {LOAD[bits]: True})
    )
    by_hand = AutoModelForCausalLM.from_pretrained(
        names(folder)[1],
        dtype=torch.float32,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(
            **{f"load_in_{bits}bit": True}, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
    ).eval()
    prepared = prepare(names(folder), **options)
    pair = Pair(student, LiveTeacher(by_hand, VOCAB), VOCAB, torch.device("cpu"), batch_size=8)
    items = measure_texts(pair, prepared.texts, prepared.tokenizer)
    assert [item.metrics for item in quantized[0].items] == [item.metrics for item in items]
    for before, after in zip(whole, quantized, strict=True):
        assert [item.outputs for item in after.items] == [item.outputs for item in before.items], "the student is whole"
        assert [item.metrics["student_entropy"] for item in after.items] == [
            item.metrics["student_entropy"] for item in before.items
        ]
        assert after.scores["forward_kl"].value != before.scores["forward_kl"].value
        assert after.settings == before.settings | {"teacher_bits": bits}


def test_only_the_classes_of_both_models_count(folder):
    """The student is padded to 512 classes: its distribution is that over the teacher's 128, and it draws no other."""
    make_vllm_model(3, vocab=512).save_pretrained(folder / "student")
    files = dict(text=str(folder / "texts.jsonl"), prompts=str(folder / "pairs.jsonl"))
    prepared = prepare(names(folder), **files, limit=8, max_new_tokens=6, **QUIET)
    of_text, of_rollouts = measure_distillation(prepared)
    student, teacher = (AutoModelForCausalLM.from_pretrained(name) for name in names(folder))
    expected = []
    for sample in prepared.texts:
        q, p = (dense(model, sample.input_ids, VOCAB) for model in (student, teacher))
        expected += [compare(p[t], q[t], y)["reverse_kl"] for t, y in enumerate(sample.input_ids[1:])]
    assert of_text.scores["reverse_kl"].value == pytest.approx(mean(expected), rel=1e-4)
    assert of_rollouts.scores["length"].value > 5, "three quarters of the student's own classes are forbidden"
    assert all(re.fullmatch(r"(w\d+ ?|<\w+> ?)*", output) for item in of_rollouts.items for output in item.outputs)


def test_settings_tell_what_the_numbers_depend_on(folder):
    files = dict(text=str(folder / "texts.jsonl"), prompts=str(folder / "pairs.jsonl"))
    base = dict(**files, limit=4, **QUIET)
    first = prepare(names(folder), **base).settings
    assert prepare(names(folder), **base, batch_size=1).settings == first
    json.dumps(first)
    changes = [
        {"temperature": 0.5},
        {"max_new_tokens": 7},
        {"seed": 3},
        {"repeats": 2, "answer_column": "completion"},
        {"limit": 3},
        {"prompt_template": "w1 {prompt}"},
    ]
    for change in changes:
        changed = prepare(names(folder), **base | change).settings
        assert changed["rollouts"] != first["rollouts"], change
    make_model("untied", 5).save_pretrained(folder / "teacher")
    retrained = prepare(names(folder), **base).settings
    assert retrained["text"] != first["text"], "another teacher in the same folder"


def test_only_the_chosen_tasks_run(folder):
    files = dict(text=str(folder / "texts.jsonl"), prompts=str(folder / "pairs.jsonl"))
    prepared = prepare(names(folder), **files, limit=3, max_new_tokens=3, **QUIET)
    assert [result.task for result in measure_distillation(prepared)] == ["text", "rollouts"]
    assert [result.task for result in measure_distillation(prepared, ["text"])] == ["text"]
    assert [*measure_distillation(prepared, [])] == []


@pytest.mark.parametrize(
    ("completion", "is_answer"),
    [
        ("2 + 3 = 5\n#### 5", True),
        ("so it is \\boxed{5}", True),
        ("5", True),
        ("-$1,234.50", True),
        ("20%", True),
        ("there are 5 of them", False),
        ("the boxed set of 5", False),
        ("Paris", False),
        ("5 6", False),
        ("", False),
    ],
)
def test_a_completion_that_states_a_mathematical_answer_is_one(tokenizer, monkeypatch, completion, is_answer):
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **_: f" {completion} " * (ids == [3, 4]))
    answers = get_answers([Sample([1, 2, 3, 4], [0, 0, 1, 1], 0, 2)], tokenizer)
    assert answers == [completion if is_answer else None]


PAIRS, TEXTS = "{folder}/pairs.jsonl", "{folder}/texts.jsonl"
WRONG = {
    "nothing": ({}, "needs --text FILE, --prompts FILE, or both"),
    "limit": ({"text": TEXTS, "limit": 0}, "limit 0 must be at least 1"),
    "greedy repeats": ({"prompts": PAIRS, "repeats": 2, "temperature": 0}, "repeats 2 at temperature 0"),
    "two kinds of weights": ({"text": TEXTS, LOAD[4]: True, LOAD[8]: True}, "a teacher has one kind of weights"),
    "servers": ({"prompts": PAIRS, "engine": "vllm_server"}, "choose one of vllm, hf"),
    "no file": ({"text": "{folder}/none.jsonl"}, "text '.*none.jsonl': no such file"),
    "empty file": ({"prompts": "{folder}/empty.jsonl"}, "empty.jsonl is empty"),
    "no text": ({"text": PAIRS, "prompt_column": "question"}, "lacks prompt_column: 'question'"),
    "no prompt": ({"prompts": PAIRS, "prompt_column": "question"}, "its columns are 'prompt'"),
    "plain text": ({"prompts": TEXTS}, "is plain text .*set text_prompt_length"),
    "no answers": (
        {"prompts": PAIRS, "repeats": 4},
        "gives no avg@4: name their column with answer_column.*'completion'",
    ),
    "no such answers": (
        {"prompts": PAIRS, "answer_column": "gold"},
        "answer_column 'gold': .* lacks it; its columns are",
    ),
    "missing answer": (
        {"prompts": "{folder}/holes.jsonl", "answer_column": "answer"},
        "holds None, which is no answer",
    ),
    "long prompt": ({"prompts": PAIRS, "max_new_tokens": 2045}, "the longest prompt has 8 tokens, 2053 with max_new"),
    "long text": (
        {"text": "{folder}/long.jsonl", "max_length": 4000},
        "3001 tokens, and the models have 2048 positions",
    ),
    "cut prompts": ({"text": PAIRS, "max_length": 5}, "of 64 rows have no token to measure.*raise max_length"),
    "empty prompt": ({"prompts": "{folder}/blank.jsonl"}, "1 of 2 prompts are empty"),
    "no template": ({"prompts": PAIRS, "use_chat_template": True}, "no chat template"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=[*WRONG])
def test_wrong_input_is_one_error_before_a_model_loads(folder, monkeypatch, options, message):
    monkeypatch.setattr("sekd.eval.distillation.load_weights", None)
    (folder / "empty.jsonl").touch()
    Dataset.from_list([{"prompt": "w1", "answer": "w2"}, {"prompt": "w3", "answer": None}]).to_json(
        folder / "holes.jsonl"
    )
    Dataset.from_list([{"text": "w1 " * 3000}]).to_json(folder / "long.jsonl")
    Dataset.from_list([{"prompt": "w1"}, {"prompt": ""}]).to_json(folder / "blank.jsonl")
    if "use_chat_template" in options:
        plain = make_tokenizer()
        plain.chat_template = None
        for name in names(folder):
            plain.save_pretrained(name)
            (folder / name / "chat_template.jinja").unlink()
    options = {k: v.replace("{folder}", str(folder)) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message) as caught:
        measure("rollouts", *names(folder), **QUIET | options)
    assert "\n" not in str(caught.value)


def test_models_that_cannot_be_compared_are_refused(folder, tokenizer):
    options = dict(text=str(folder / "texts.jsonl"), **QUIET)
    student, teacher = names(folder)
    with pytest.raises(ValueError, match=r"--teacher '.*gone'.*no such folder"):
        prepare((student, str(folder / "gone")), **options)
    other = make_tokenizer()
    other.add_tokens(["w1000"])
    other.save_pretrained(teacher)
    with pytest.raises(ValueError, match="different tokenizers: 1 tokens differ, for example 'w1000'"):
        prepare((student, teacher), **options)
    for path in (folder / "teacher").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"--teacher '.*teacher': the folder has no tokenizer"):
        prepare((student, teacher), **options)
    tokenizer.save_pretrained(teacher)
    weights = folder / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=re.compile("--teacher '.*teacher' cannot be loaded: ")):
        measure("text", student, teacher, **options)


def test_a_model_whose_files_lack_weights_is_refused(folder):
    """As benchmarks do: transformers would draw them at random."""
    path = folder / "student" / "model.safetensors"
    weights = load_file(path)
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"MODEL '.*student' cannot be loaded: its files lack 1 weights, such as"):
        measure("text", *names(folder), text=str(folder / "texts.jsonl"), **QUIET)


def test_the_seconds_of_generating_are_those_of_rollouts(folder, monkeypatch):
    """By a clock that moves while a model is loaded and while the student generates."""
    clock = [0]

    def spend(seconds, function):
        def spending(*args):
            clock[0] += seconds
            return function(*args)

        return spending

    monkeypatch.setattr(distillation, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(distillation, "load_weights", spend(1000, distillation.load_weights))
    monkeypatch.setattr(distillation, "_generate", spend(100, distillation._generate))
    files = dict(text=str(folder / "texts.jsonl"), prompts=str(folder / "pairs.jsonl"))
    results = measure_distillation(prepare(names(folder), **files, limit=3, max_new_tokens=3, **QUIET))
    seconds = {}
    for result in results:
        seconds[result.task] = result.seconds
        clock[0] += 10  # what is done with the result
    assert seconds == {"text": 0, "rollouts": 100}


def test_the_models_are_gone_at_the_end(folder, monkeypatch):
    loaded, alive = [], []
    load, free = distillation.load_weights, distillation.free_memory

    def watch(*args):
        model = load(*args)
        loaded.append(weakref.ref(next(model.parameters())))
        return model

    def look():
        free()
        alive.append(sum(one() is not None for one in loaded))

    monkeypatch.setattr(distillation, "load_weights", watch)
    monkeypatch.setattr(distillation, "free_memory", look)
    options = dict(text=str(folder / "texts.jsonl"), prompts=str(folder / "pairs.jsonl"), limit=2, max_new_tokens=2)
    assert len([*measure_distillation(prepare(names(folder), **options, **QUIET))]) == 2
    assert alive == [1, 0], "after generating, and at the end"


def test_the_grader_is_tried_before_a_model_loads(folder, monkeypatch):
    def refuse():
        raise ValueError("no math-verify")

    monkeypatch.setattr("sekd.eval.answers.check_grader", refuse)
    options = dict(prompts=str(folder / "pairs.jsonl"), **QUIET)
    prepare(names(folder), **options)
    with pytest.raises(ValueError, match="no math-verify"):
        prepare(names(folder), **options, answer_column="completion")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_vllm_generates_what_transformers_does(tmp_path, tokenizer, pairs, kind):
    pytest.importorskip("vllm")
    make_vllm_model(1).save_pretrained(tmp_path / "teacher")
    student = make_vllm_model()
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    student.save_pretrained(tmp_path / "whole")
    torch.manual_seed(0)
    add_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")).save_pretrained(tmp_path / "adapter")
    for name in ("whole", "adapter", "teacher"):
        tokenizer.save_pretrained(tmp_path / name)
    pairs.to_json(tmp_path / "pairs.jsonl")
    options = dict(prompts=str(tmp_path / "pairs.jsonl"), limit=12, max_new_tokens=5, answer_column="completion")
    models = str(tmp_path / kind), str(tmp_path / "teacher")
    greedy = [
        measure("rollouts", *models, **options, **QUIET | {"engine": engine}, temperature=0)
        for engine in ("hf", "vllm")
    ]
    assert greedy[0].items == greedy[1].items
    assert greedy[0].settings != greedy[1].settings
    drawn = measure("rollouts", *models, **options, **QUIET | {"engine": "vllm"}, repeats=3)
    assert all(len(item.outputs) == 3 for item in drawn.items)
