"""Models on tasks: checked first, nothing twice, nothing lost."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from evaluation_helpers import save_adapter, save_model, write_tasks
from harness_helpers import run_task
from helpers import make_model

from sekd.eval import benchmark
from sekd.eval.backends import BackendOptions, load_lm
from sekd.eval.benchmark import EvaluationOptions, evaluate_models
from sekd.eval.prepared import TaskOptions
from sekd.eval.records import EvaluationRefused
from sekd.eval.result_files import load_results

TASKS = [("arc_easy", "test"), ("lambada_openai", "test"), ("gsm8k", "test")]


@pytest.fixture
def options(tmp_path):
    task = TaskOptions(data_dirs=(write_tasks(tmp_path / "data"),), max_new_tokens=8)
    return EvaluationOptions(task, str(tmp_path / "out"), backend="hf", dtype="float32")


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model")


def values(results):
    return {task: {name: score.value for name, score in result.scores.items()} for task, result in results.items()}


def refuse_loading(monkeypatch):
    def refuse(*args):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(benchmark, "load_lm", refuse)


def find_folder(options):
    (folder,) = Path(options.output).iterdir()
    return folder


def test_results_are_those_of_the_tasks_alone(model, options):
    results = evaluate_models([model], TASKS, options)[model]
    assert [*results] == ["arc_easy", "lambada_openai", "gsm8k"]
    lm = load_lm(model, "hf", BackendOptions(dtype="float32"))
    for task, split in TASKS:
        own = run_task(lm, task, split, options.task)
        assert results[task].items == own.items
        assert results[task].scores == own.scores
        assert results[task].settings == own.settings | {"backend": "hf", "dtype": "float32"}
    assert load_results(str(find_folder(options))).keys() == results.keys()
    assert sorted(os.listdir(find_folder(options))) == ["results.json", "samples.parquet"], "no answers are left"


def test_what_is_done_is_not_done_again(model, options, monkeypatch, capsys):
    results = evaluate_models([model], TASKS[:2], options)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        refuse_loading(patch)
        again = evaluate_models([model, model], TASKS[:2], options)
        assert values(again[model]) == values(results[model])
        assert capsys.readouterr().out == f"{model}: arc_easy, lambada_openai done before\n"
        with pytest.raises(AssertionError, match="a model was loaded"):
            evaluate_models([model], TASKS[:2], replace(options, force=True))
        with pytest.raises(AssertionError, match="a model was loaded"):
            evaluate_models([model], TASKS[:2], replace(options, task=replace(options.task, limit=3)))
    more = evaluate_models([model], TASKS, options)[model]
    assert values(more) == values(results[model]) | {"gsm8k": values(more)["gsm8k"]}
    save_model(Path(model), seed=5)
    other = evaluate_models([model], TASKS[:2], options)[model]
    assert values(other) != values(results[model])


def test_two_splits_of_a_task_are_two_results(model, options):
    results = evaluate_models([model], [("gsm8k", "test"), ("gsm8k", "train[:4]")], options)[model]
    assert {name: len(result.items) for name, result in results.items()} == {"gsm8k": 12, "gsm8k@train[:4]": 4}


def test_models_and_adapters_are_evaluated_each_in_its_folder(tmp_path, model, options):
    adapter = save_adapter(tmp_path / "adapter", model, make_model("untied"))
    results = evaluate_models([model, adapter], TASKS[:1], options)
    assert [*results] == [model, adapter]
    assert len({*os.listdir(options.output)}) == 2
    first, second = (r["arc_easy"].items for r in results.values())
    assert [i.prompt for i in first] == [i.prompt for i in second]
    assert [i.loglikelihoods for i in first] != [i.loglikelihoods for i in second]


def interrupt_after(monkeypatch, answers):
    """Send Ctrl-C to this process once a number of answers is in a file."""
    original, count = benchmark.AnswerFile.put, [0]

    def put(file, key, answer):
        original(file, key, answer)
        count[0] += 1
        if count[0] == answers:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(benchmark.AnswerFile, "put", put)


def test_ctrl_c_keeps_what_is_done_and_the_answers_so_far(model, options, monkeypatch, tmp_path):
    options = replace(options, batch_size=4)
    whole = evaluate_models([model], TASKS, replace(options, output=str(tmp_path / "whole")))[model]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 48 + 5)  # ARC-Easy has 12 x 4 choices
        with pytest.raises(
            KeyboardInterrupt, match=r"arc_easy done, and all other finished answers are kept in .*the same"
        ):
            evaluate_models([model], TASKS, options)
    folder = find_folder(options)
    assert [*load_results(str(folder))] == ["arc_easy"]
    (answers,) = folder.glob("answers-*.jsonl")
    kept = len(answers.read_text().splitlines()) - 1
    assert kept >= 5
    counts = []
    original = benchmark.run_prepared
    monkeypatch.setattr(
        benchmark, "run_prepared", lambda lm, task: (counts.append(len(lm.file.answers)), original(lm, task))[1]
    )
    bars = []
    show = benchmark.show_bar
    monkeypatch.setattr(
        benchmark,
        "show_bar",
        lambda name, total, initial: (bars.append(initial), show(name, total, initial=initial))[1],
    )
    resumed = evaluate_models([model], TASKS, options)[model]
    assert counts == [kept, 0], "LAMBADA goes on, GSM8K starts"
    assert bars == counts, "the remaining time is that of the rest"
    assert values(resumed) == {task: pytest.approx(scores) for task, scores in values(whole).items()}
    assert [i.outputs for i in resumed["gsm8k"].items] == [i.outputs for i in whole["gsm8k"].items]


def test_another_process_in_the_folder_is_named(model, options, monkeypatch):
    evaluate_models([model], TASKS[:1], options)
    with benchmark.own_folder(str(find_folder(options))), pytest.raises(EvaluationRefused, match="another process"):
        evaluate_models([model], TASKS[:2], options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(models=["nowhere/"]), "MODEL 'nowhere/': no such folder"),
        (dict(tasks=[("hellaswag", "validation")]), "hellaswag: no file .*hellaswag/validation.jsonl"),
        (
            dict(max_new_tokens=40_000),
            "reads 2048 tokens, and gsm8k generates up to 40000: set --max-new-tokens to less",
        ),
        (dict(output="/proc/evaluations"), "output '/proc/evaluations': the folder .* cannot be made"),
    ],
)
def test_everything_is_checked_before_a_model_is_loaded(model, options, monkeypatch, change, message):
    refuse_loading(monkeypatch)
    changed = replace(options, output=change.get("output", options.output))
    if "max_new_tokens" in change:
        changed = replace(changed, task=replace(options.task, max_new_tokens=change["max_new_tokens"]))
    with pytest.raises(EvaluationRefused, match=message):
        evaluate_models([model, *change.get("models", [])], [*TASKS, *change.get("tasks", [])], changed)


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path, model, options, monkeypatch):
    refuse_loading(monkeypatch)
    chat = replace(options, task=replace(options.task, chat_template=True))
    (Path(model) / "chat_template.jinja").unlink()
    with pytest.raises(EvaluationRefused, match="no chat template; leave --chat-template out"):
        evaluate_models([model], TASKS, chat)


def test_chats_are_evaluated(model, options):
    chat = replace(options, task=replace(options.task, chat_template=True, limit=2))
    results = evaluate_models([model], TASKS[2:], chat)[model]
    assert results["gsm8k"].items[0].prompt.startswith("<user> ")


def test_prompts_that_are_cut_are_told(tmp_path, model, options, caplog):
    path = Path(model) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 12}))
    evaluate_models([model], TASKS[1:2], options)
    assert "reads 12 tokens, and the longest prompt of lambada_openai has 15 with its output" in caplog.text


def test_the_distance_from_a_teacher_is_saved_beside_the_tasks(tmp_path, model, options, monkeypatch):
    from sekd.eval.distillation_data import DistillationOptions

    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"w{i} w{i + 1} w3 w4"}) + "\n" for i in range(6)))
    teacher = save_model(tmp_path / "teacher", seed=1)
    distillation = DistillationOptions(teacher, text=str(texts), engine="hf", dtype="float32")
    options = replace(options, distillation=distillation)
    results = evaluate_models([model], TASKS[:1], options)[model]
    assert [*results] == ["arc_easy", "text"]
    assert results["text"].scores["forward_kl"].value > 0
    refuse_loading(monkeypatch)
    monkeypatch.setattr(benchmark, "measure_distillation", None)
    assert values(evaluate_models([model], TASKS[:1], options)[model]) == values(results)


@pytest.mark.slow
def test_vllm_and_hf_agree_on_the_items(tmp_path, options):
    model = save_model(tmp_path / "vllm_model", kind="vllm")
    by_hf = evaluate_models([model], TASKS, options)[model]
    by_vllm = evaluate_models([model], TASKS, replace(options, backend="vllm"))[model]
    for task in by_hf:
        for one, other in zip(by_hf[task].items, by_vllm[task].items, strict=True):
            # of lm-eval's classes, that for transformers leaves special tokens out of its outputs
            texts = [[t.replace("<unk>", "").split() for t in item.outputs] for item in (one, other)]
            assert texts[0] == texts[1]
            assert one.loglikelihoods == pytest.approx(other.loglikelihoods, abs=1e-3)


def test_the_bar_counts_all_requests(model, options, capfd):
    evaluate_models([model], TASKS[:1], options)
    assert "48/48" in capfd.readouterr().err


@pytest.mark.slow
def test_a_forced_evaluation_goes_on_without_force(tmp_path, model, options, monkeypatch, capsys):
    """With the tasks that it had not begun, and the models."""
    options, other = replace(options, batch_size=4), save_model(tmp_path / "other", seed=1)
    whole = evaluate_models([model, other], TASKS, options)[model]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 48 + 5)
        with pytest.raises(
            KeyboardInterrupt, match=r"arc_easy done, .* kept in .*; to resume, run it again without --fo"
        ):
            evaluate_models([model, other], TASKS, replace(options, force=True))
    counts, original = {}, benchmark.run_prepared
    monkeypatch.setattr(
        benchmark,
        "run_prepared",
        lambda lm, task: (counts.update({task.name: len(lm.file.answers)}), original(lm, task))[1],
    )
    capsys.readouterr()
    resumed = evaluate_models([model], TASKS, options)[model]
    assert values(resumed) == {task: pytest.approx(scores) for task, scores in values(whole).items()}
    assert "arc_easy done before" in capsys.readouterr().out
    assert counts.keys() == {"lambada_openai", "gsm8k"}, "although both have results of before"
    assert counts["lambada_openai"] >= 5
    evaluate_models([other], TASKS, options)
    assert counts == {"arc_easy": 0, "lambada_openai": 0, "gsm8k": 0}
    for folder in Path(options.output).iterdir():
        assert sorted(os.listdir(folder)) == ["results.json", "samples.parquet"]


def distil(tmp_path, options):
    from sekd.eval.distillation_data import DistillationOptions

    for name, column in (("texts", "text"), ("prompts", "prompt")):
        rows = [json.dumps({column: f"w{i} w{i + 1} w3 w4"}) + "\n" for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    files = dict(text=str(tmp_path / "texts.jsonl"), prompts=str(tmp_path / "prompts.jsonl"))
    teacher = save_model(tmp_path / "teacher", seed=1)
    own = DistillationOptions(teacher, **files, engine="hf", dtype="float32", max_new_tokens=3)
    return replace(options, distillation=own)


@pytest.mark.parametrize("force", [False, True])
def test_ctrl_c_in_a_distillation_keeps_whole_tasks(tmp_path, model, options, monkeypatch, force):
    options = distil(tmp_path, options)
    if force:
        evaluate_models([model], [], options)
    original, measured = benchmark.measure_distillation, []

    def stop_after_the_first(prepared, tasks):
        yield next(iter(original(prepared, tasks)))
        raise KeyboardInterrupt

    again = "to resume, run it again without --force" if force else "the same command resumes"
    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "measure_distillation", stop_after_the_first)
        with pytest.raises(KeyboardInterrupt, match=rf": text done and kept in .*, and the present .* anew; {again}$"):
            evaluate_models([model], [], replace(options, force=force))
        patch.setattr(benchmark, "measure_distillation", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        other = replace(options, output=str(tmp_path / "other"))
        with pytest.raises(KeyboardInterrupt, match="no task is done, and the present task begins anew"):
            evaluate_models([model], [], other)
    monkeypatch.setattr(
        benchmark, "measure_distillation", lambda one, tasks: (measured.extend(tasks), original(one, tasks))[1]
    )
    assert [*evaluate_models([model], [], options)[model]] == ["text", "rollouts"]
    assert measured == ["rollouts"]


def test_an_error_of_the_evaluation_itself_names_the_model(model, options, monkeypatch):
    def fail(lm, task):
        raise ValueError("row 3:\nno log-likelihood")

    monkeypatch.setattr(benchmark, "run_prepared", fail)
    with pytest.raises(EvaluationRefused, match=f"^MODEL {model!r}: row 3: no log-likelihood$"):
        evaluate_models([model], TASKS[:1], options)


def test_no_folder_is_made_before_all_models_are_checked(tmp_path, model, options):
    bare = save_model(tmp_path / "bare", with_tokenizer=False)
    with pytest.raises(EvaluationRefused, match="has no tokenizer"):
        evaluate_models([model, bare], TASKS[:1], options)
    assert not Path(options.output).exists()


def test_old_answers_of_a_task_are_deleted_with_its_result(model, options):
    evaluate_models([model], TASKS[:1], options)
    folder = find_folder(options)
    old, other = folder / "answers-gsm8k-0123abcd.jsonl", folder / "answers-gsm8k_cot-0123abcd.jsonl"
    for path in (old, other):
        path.touch()
    evaluate_models([model], [("gsm8k", "test")], options)
    assert (old.exists(), other.exists()) == (False, True)
