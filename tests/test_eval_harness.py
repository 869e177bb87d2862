"""Numbers of the harness are those of lm-eval's own command on the same rows, item by item."""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from harness_helpers import SHARED, make_text_lm, read_rows, run_lm_eval, run_task, write_rows

from sekd.eval.harness import run_prepared
from sekd.eval.ifeval import SENTENCE_RULES
from sekd.eval.prepared import TaskOptions, prepare_task
from sekd.eval.records import BINS, EvaluationRefused
from sekd.eval.tasks import TASKS

pytest.importorskip("lm_eval")
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")

MATH = {"aime25": [{"id": str(i), "problem": f"What is {i} + 2?", "answer": str(i + 2)} for i in range(6)]}
MATH["svamp"] = [{"Body": f"Ann has {i} pens.", "Question": "How many?", "Answer": f"{i}.0"} for i in range(6)]
WORDS = ["one", "a few of them", "many", "none"]
CHOICES = [
    {
        "question": f"Which is {i}?",
        "choices": {"text": WORDS[i % 4 :] + WORDS[: i % 4], "label": ["A", "B", "C", "D"]},
        "answerKey": "ABCD"[i % 3],
    }
    for i in range(12)
]
"""The shortest choice, which a random model likes best, is at each place."""


@pytest.fixture(scope="module")
def lm():
    return make_text_lm()


@pytest.fixture
def choices(tmp_path):
    """A folder with ARC-Easy rows, and its options."""
    write_rows(tmp_path / "arc_easy" / "test.jsonl", CHOICES)
    write_rows(tmp_path / "arc_easy" / "train.jsonl", CHOICES[::-1])
    return TaskOptions(data_dirs=(str(tmp_path),))


def index_wikitext(monkeypatch):
    """lm-eval has no other task: to read them all takes seconds."""
    import lm_eval.tasks

    folder = lm_eval.tasks.__path__[0] + "/wikitext"
    manager = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False)
    monkeypatch.setattr("sekd.eval.prepared.index_lm_eval", lambda: manager.task_index)


def compare(samples, results, ours, skip=()):
    """Every item and every score are the same."""
    theirs = defaultdict(dict)
    for sample in samples:
        suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
        item = theirs[sample["doc_id"]]
        item |= {metric + suffix: sample[metric] for metric in sample["metrics"]}
        item["prompt"], item["responses"] = sample["arguments"][0][0], sample["resps"]
    assert [item.index for item in ours.items] == sorted(theirs)
    for item in ours.items:
        their = theirs[item.index]
        assert item.prompt == their.pop("prompt")
        responses = their.pop("responses")
        if "perplexity" in their:
            their["nll"] = -their.pop("perplexity")
        mine = {name: value for name, value in item.metrics.items() if name != "math_verify"}
        assert mine == {name: value for name, value in their.items() if not isinstance(value, list)}
        if isinstance(responses[0][0], str):
            assert item.outputs == tuple(responses[0])
        else:
            assert item.loglikelihoods == tuple(response[0][0] for response in responses)
    for name, value in results.items():
        metric, _, filter_name = name.partition(",")
        if metric.endswith("_stderr") or filter_name == "" or metric in skip:
            continue
        score = ours.scores[metric if filter_name == "none" else name]
        assert score.value == pytest.approx(value, rel=1e-12)
    for name in ("acc", "acc_norm"):
        if name in ours.scores:
            stderr = np.std([item.metrics[name] for item in ours.items], ddof=1) / math.sqrt(len(ours.items))
            assert ours.scores[name].stderr == pytest.approx(stderr)


@needs_shared
@pytest.mark.parametrize(
    ("task", "shots", "chat"),
    [
        ("arc_easy", 0, False),
        ("arc_easy", 3, False),
        ("arc_easy", 0, True),
        ("hellaswag", 0, False),
        ("piqa", 0, False),
        ("piqa", 2, False),
        ("lambada_openai", 0, False),
        ("gsm8k", 0, False),
        pytest.param("gsm8k", 5, False, marks=pytest.mark.slow),
        pytest.param("gsm8k", 2, True, marks=pytest.mark.slow),
        ("ifeval", 0, False),
    ],
)
def test_numbers_are_those_of_lm_eval(tmp_path, lm, task, shots, chat):
    spec, changes = TASKS[task], {}
    rows = read_rows(task, 60)
    if task == "ifeval":  # punkt may be missing here
        rows = [row for row in rows if not {*row["instruction_id_list"]} & {*SENTENCE_RULES}]
    files = {spec.split: tmp_path / task / f"{spec.split}.jsonl"}
    write_rows(files[spec.split], rows[:20])
    if shots:
        files["train"] = tmp_path / task / "train.jsonl"
        write_rows(files["train"], rows[15:])
    elif spec.split != "train":
        changes = {"training_split": None, "fewshot_split": None}
        changes |= {"validation_split": None} if spec.split == "test" else {}
    if spec.main == "math_verify":
        changes["num_fewshot"] = 5  # lm-eval's own command changes any number but 0
    gen = {"gen_kwargs": "max_gen_toks=12"} if spec.main in ("math_verify", "prompt_level_strict_acc") else {}
    theirs = run_lm_eval(
        tmp_path,
        spec.config,
        {split: str(path) for split, path in files.items()},
        lm,
        changes,
        num_fewshot=shots,
        limit=18,
        fewshot_random_seed=7,
        apply_chat_template=chat,
        **gen,
    )
    options = TaskOptions(
        shots=shots, limit=18, seed=7, data_dirs=(str(tmp_path),), chat_template=chat, max_new_tokens=12
    )
    ours = run_task(lm, task, None, options)
    assert len(ours.items) == 18
    assert ours.settings["shots"] == shots
    compare(*theirs, ours)


@pytest.mark.parametrize(("task", "yaml_file"), [("aime25", "aime/aime25.yaml")])
def test_numbers_of_math_tasks(tmp_path, lm, task, yaml_file):
    write_rows(tmp_path / task / "test.jsonl", MATH[task])
    files = {"test": str(tmp_path / task / "test.jsonl")}
    theirs = run_lm_eval(tmp_path, yaml_file, files, lm, {}, gen_kwargs="max_gen_toks=8")
    compare(*theirs, run_task(lm, task, None, TaskOptions(data_dirs=(str(tmp_path),), max_new_tokens=8)))


def test_svamp_and_its_prompt(tmp_path, lm):
    write_rows(tmp_path / "svamp" / "test.jsonl", MATH["svamp"])
    options = TaskOptions(data_dirs=(str(tmp_path / "svamp"),), max_new_tokens=4)
    result = run_task(lm, "svamp", None, options)
    assert result.items[1].prompt == "Question: Ann has 1 pens. How many?\nAnswer:"
    assert result.items[1].answer == "1.0"
    assert result.scores["math_verify"].items == 6


def test_a_task_of_lm_eval_that_has_no_record_here(tmp_path, lm, monkeypatch):
    """Rolling log-likelihoods, whose averages are no means of items."""
    texts = [{"page": f"Words of page {i}. " * (i + 1)} for i in range(5)]
    write_rows(tmp_path / "wikitext" / "test.jsonl", texts)
    index_wikitext(monkeypatch)
    files = {"test": str(tmp_path / "wikitext" / "test.jsonl")}
    changes = {"training_split": None, "validation_split": None}
    samples, results = run_lm_eval(tmp_path, "wikitext/wikitext.yaml", files, lm, changes)
    ours = run_task(lm, "wikitext", None, TaskOptions(data_dirs=(str(tmp_path),)))
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert ours.scores[name].value == results[f"{name},none"]
        assert not ours.scores[name].higher_is_better
    assert ours.scores["perplexity"].value == pytest.approx(results["word_perplexity,none"])
    assert [item.loglikelihoods for item in ours.items] == [(sample["resps"][0][0],) for sample in samples]


def test_calibration_of_choices(lm, choices):
    """The confidence is the softmax over the choices; by hand for every item, and ECE over all of them."""
    result = run_task(lm, "arc_easy", None, choices)
    bins = [[0.0, 0.0, 0.0] for _ in range(BINS)]
    assert len({item.loglikelihoods.index(max(item.loglikelihoods)) for item in result.items}) > 1
    for item, row in zip(result.items, CHOICES, strict=True):
        weights = [math.exp(x - max(item.loglikelihoods)) for x in item.loglikelihoods]
        confidence = max(weights) / sum(weights)
        best = item.loglikelihoods.index(max(item.loglikelihoods))
        hit = float("ABCD"[best] == row["answerKey"])
        assert item.outputs == (row["choices"]["text"][best],)
        assert item.answer == row["choices"]["text"]["ABCD".index(row["answerKey"])]
        assert item.correct == hit == item.metrics["acc"]
        filled = [(i, part) for i, part in enumerate(item.calibration) if part[0]]
        assert filled == [(min(int(confidence * BINS), BINS - 1), (1.0, pytest.approx(confidence), hit))]
        for j, number in enumerate((1.0, confidence, hit)):
            bins[filled[0][0]][j] += number
    assert result.scores["ece"].value == pytest.approx(sum(abs(r - c) for _, c, r in bins) / len(CHOICES))


def test_choices_that_are_surely_right(choices):
    """A confidence of exactly 1 falls into the last bin."""
    lm = make_text_lm()
    lm.loglikelihood = lambda requests, disable_tqdm=False: [(0.0 if r.idx == 2 else -1e9, True) for r in requests]
    items = run_task(lm, "arc_easy", None, choices).items
    assert all(item.calibration[-1] == (1.0, 1.0, float(item.index % 3 == 2)) for item in items)


def test_requests_are_counted_and_hooks_are_left_alone(lm, choices):
    finished, seen, hook = [], [], lm.cache_hook
    prepared = prepare_task("arc_easy", None, choices)
    assert prepared.requests == 4 * len(CHOICES)
    assert prepared.texts[1] == "Question: Which is 0?\nAnswer: a few of them"
    hook.add_partial = lambda kind, request, response: seen.append(request)
    run_prepared(lm, prepared, finished.append)
    assert sum(finished) == len(seen) == prepared.requests
    assert lm.cache_hook is hook
    del hook.add_partial


def test_a_prepared_task_runs_again(lm, choices):
    """Another model's numbers are not those of the first, and the first model's are the same again."""
    prepared = prepare_task("arc_easy", None, choices)
    first, other, again = (run_prepared(m, prepared) for m in (lm, make_text_lm(1), lm))
    assert first.items == again.items != other.items


def test_samples_are_reproducible_and_change_no_generator(tmp_path, lm):
    """avg@k and pass@k from what was right; the same seed gives the same outputs; torch's generator is untouched."""
    write_rows(tmp_path / "svamp" / "test.jsonl", MATH["svamp"])
    options = dict(data_dirs=(str(tmp_path),), max_new_tokens=3, repeats=4)
    state = torch.get_rng_state()
    first, again, other = (run_task(lm, "svamp", None, TaskOptions(seed=seed, **options)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.items == again.items != other.items
    assert first.settings["temperature"] == 1.0
    assert all(len(item.outputs) == 4 and len({*item.outputs}) > 1 for item in first.items)
    cold = run_task(lm, "svamp", None, TaskOptions(**options, temperature=1e-4))
    assert all(len({*item.outputs}) == 1 for item in cold.items)


def test_shares_of_right_samples(tmp_path):
    """By hand: outputs of each round are given, and which are right is known."""
    write_rows(tmp_path / "svamp" / "test.jsonl", MATH["svamp"][:2])
    lm = make_text_lm()
    answers = iter([["0", "5"], ["7", "5"], ["0", "5"]])
    lm.generate_until = lambda requests, disable_tqdm=False: next(answers)
    result = run_task(lm, "svamp", None, TaskOptions(data_dirs=(str(tmp_path),), repeats=3))
    assert [item.outputs for item in result.items] == [("0", "7", "0"), ("5", "5", "5")]
    assert [item.correct for item in result.items] == [pytest.approx(2 / 3), 0.0]
    assert [(i.metrics["avg@3"], i.metrics["pass@3"]) for i in result.items] == [
        (pytest.approx(2 / 3), 1.0),
        (0.0, 0.0),
    ]
    assert result.scores["avg@3"].value == pytest.approx(1 / 3)
    assert result.scores["pass@3"].value == 0.5


def test_a_model_that_takes_seeds_gets_one_for_each_sample(tmp_path):
    write_rows(tmp_path / "svamp" / "test.jsonl", MATH["svamp"])
    lm, seeds = make_text_lm(), []

    def generate(requests, disable_tqdm=False):
        seeds.extend(request.args[1]["seed"] for request in requests)
        return ["1"] * len(requests)

    lm.takes_seed, lm.generate_until = True, generate
    run_task(lm, "svamp", None, TaskOptions(data_dirs=(str(tmp_path),), repeats=3))
    assert len({*seeds}) == 18
    first = seeds[:]
    seeds.clear()
    run_task(lm, "svamp", None, TaskOptions(data_dirs=(str(tmp_path),), repeats=3))
    assert seeds == first
    lm.generate_until = lambda requests, disable_tqdm=False: [r.args[1].get("seed", "greedy") for r in requests]
    assert run_task(lm, "svamp", None, TaskOptions(data_dirs=(str(tmp_path),))).items[0].outputs == ("greedy",)


def test_few_shot_examples_are_no_evaluated_rows(tmp_path):
    """gsm8k's validation rows lie in the split of its few-shot examples."""
    rows = [{"question": f"question {i}?", "answer": f"#### {i}"} for i in range(20)]
    write_rows(tmp_path / "gsm8k" / "train.jsonl", rows)
    options = TaskOptions(data_dirs=(str(tmp_path),), shots=4)
    prepared = prepare_task("gsm8k", "train[12:]", options)
    assert prepared.settings["rows"] == 8
    for text in prepared.texts:
        *examples, question = (int(line.split()[2][:-1]) for line in text.split("\n") if "Question" in line)
        assert len({*examples}) == 4
        assert max(examples) < 12 <= question


def test_settings(tmp_path, choices):
    write_rows(tmp_path / "gsm8k" / "test.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}])
    greedy = prepare_task("gsm8k", None, TaskOptions(data_dirs=choices.data_dirs, seed=3)).settings
    kept = {k: v for k, v in greedy.items() if k not in ("data", "lm_eval", "version")}
    assert kept == {
        "split": "test",
        "shots": 0,
        "limit": None,
        "seed": 3,
        "chat_template": False,
        "rows": 1,
        "repeats": 1,
        "temperature": 0.0,
        "top_p": 1.0,
        "max_new_tokens": 256,
    }
    plain, few = (prepare_task("arc_easy", None, TaskOptions(data_dirs=choices.data_dirs, shots=n)) for n in (0, 2))
    assert few.settings["data"] == plain.settings["data"]
    assert few.settings["shots_data"]
    assert plain.max_new_tokens == 0


def test_nothing_is_printed(lm, choices, capfd):
    run_task(lm, "arc_easy", None, choices)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("lambada_openai", dict(shots=3), "lambada_openai: shots 3: this task has no few-shot examples"),
        ("arc_easy", dict(repeats=2), "arc_easy: repeats 2 is for generated outputs"),
    ],
)
def test_options_that_do_not_fit_the_task(task, options, message):
    with pytest.raises(ValueError, match=message):
        prepare_task(task, None, TaskOptions(**options))


@pytest.mark.parametrize(
    "options",
    [
        dict(limit=0),
        dict(shots=-1),
        dict(repeats=0),
        dict(repeats=2, temperature=0.0),
        dict(temperature=-1.0),
        dict(temperature=math.nan),
        dict(top_p=0.0),
        dict(top_p=1.5),
        dict(max_new_tokens=0),
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TaskOptions(**options)


def test_outputs_that_do_not_fit_the_context(tmp_path):
    write_rows(tmp_path / "aime25" / "test.jsonl", MATH["aime25"])
    message = "aime25: outputs of up to 32768 tokens do not fit the model's context of 64"
    with pytest.raises(EvaluationRefused, match=message):
        run_task(make_text_lm(context=64), "aime25", None, TaskOptions(data_dirs=(str(tmp_path),)))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "chat_template is not set"),
        ("{{ raise_exception('no\nsystem role') }}", "no system role"),
        ("{% for m in messages %}{{ m.content", "unexpected end of template"),
    ],
)
def test_chat_templates_that_cannot_be_applied(choices, template, message):
    lm = make_text_lm()
    lm.tokenizer.chat_template = template
    with pytest.raises(EvaluationRefused, match=rf"^arc_easy: chat_template: .*{message}"):
        run_task(lm, "arc_easy", None, TaskOptions(data_dirs=choices.data_dirs, chat_template=True))


@pytest.mark.parametrize("task", ["arc_easy", "lambada_openai", "wikitext"])
def test_a_model_without_finite_weights_has_no_score(tmp_path, choices, task, monkeypatch):
    """Of choices, of a target, and of whole texts."""
    write_rows(tmp_path / "lambada_openai" / "test.jsonl", [{"text": f"one two {i}"} for i in range(3)])
    write_rows(tmp_path / "wikitext" / "test.jsonl", [{"page": "Words of a page."}])
    if task == "wikitext":
        index_wikitext(monkeypatch)
    lm = make_text_lm()
    with torch.no_grad():
        lm.model.lm_head.weight[0].fill_(float("nan"))
    with pytest.raises(EvaluationRefused, match=rf"{task}: the model gives no log-likelihood \(nan\) for row 0"):
        run_task(lm, task, options=choices)
