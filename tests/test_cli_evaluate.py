"""`sekd evaluate`, from a command line to a table."""

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from evaluation_helpers import save_model, write_tasks

from sekd.cli import main
from sekd.cli.evaluate import read_arguments

HF = ["--backend", "hf", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def _stay_in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model")


@pytest.fixture
def data(tmp_path):
    return write_tasks(tmp_path / "data")


def test_models_are_compared_in_a_table_and_in_files(tmp_path, model, data, capsys):
    other = save_model(tmp_path / "other", seed=1)
    command = ["evaluate", model, other, "--tasks", "arc_easy,piqa", "lambada_openai", "--data-dir", data, *HF]
    assert main(command) == 0
    shown = capsys.readouterr().out
    for text in ("arc_easy", "piqa", "lambada_openai", "perplexity", "difference", "the results are in evaluations"):
        assert text in shown
    rows = list(csv.DictReader((tmp_path / "evaluations" / "comparison.csv").open()))
    assert {row["model"] for row in rows} == {model, other}
    assert (tmp_path / "evaluations" / "comparison.md").read_text().startswith("| task ")
    assert main(command) == 0
    again = capsys.readouterr().out
    assert "arc_easy, piqa, lambada_openai done before" in again
    assert "loading" not in again


def test_sampled_answers_have_avg_and_pass_at_k(tmp_path, model, data, capsys):
    flags = ["--tasks", "gsm8k@test[:4]", "--repeats", "3", "--temperature", "0.8", "--max-new-tokens", "5"]
    assert main(["evaluate", model, *flags, "--data-dir", data, *HF]) == 0
    assert "pass@3" in capsys.readouterr().out
    (file,) = (tmp_path / "evaluations").glob("*/results.json")
    ((name, entry),) = json.loads(file.read_text())["results"].items()
    assert "3 repeats, temperature 0.8" in name
    assert {"avg@3", "pass@3", "math_verify"} <= entry["scores"].keys()
    assert entry["items"] == 4


def test_the_distance_from_a_teacher(tmp_path, model, data, capsys):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"w{i} w2 w3 w4"}) + "\n" for i in range(5)))
    rows = [{"prompt": f"w{i} w2", "answer": "w1"} for i in range(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = save_model(tmp_path / "teacher", seed=1)
    files = ["--text", "texts.jsonl", "--prompts", "prompts.jsonl", "--answer-column", "answer", "--limit", "4"]
    command = ["evaluate", model, "--suite", "distillation", *files, "--max-new-tokens", "4", *HF]
    assert main([*command, "--teacher", teacher]) == 0
    shown = capsys.readouterr().out
    for text in ("forward_kl", "reverse_kl", "top1_agreement", "math_verify", "length"):
        assert text in shown
    assert main(command) == 2
    assert "the suite distillation needs --teacher MODEL" in capsys.readouterr().err


def test_the_distance_from_a_quantized_teacher(tmp_path, model, capsys):
    pytest.importorskip("bitsandbytes")
    (tmp_path / "texts.jsonl").write_text('{"text": "w1 w2 w3 w4"}\n')
    command = ["evaluate", model, "--suite", "distillation", "--teacher", model, "--text", "texts.jsonl"]
    assert main([*command, "--dtype", "float32", "--teacher-load-in-8bit"]) == 0
    assert "teacher in 8 bits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--suite", "papre"], "unknown suite or task 'papre'; nearest are paper"),
        (["--tasks", "gsm8"], "unknown suite or task 'gsm8'; nearest are gsm8k"),
        ([], "no task is named; the suites are paper, validation"),
        (
            ["--tasks", "hellaswag"],
            "hellaswag/validation.jsonl (or .json, .csv, .parquet); each row has activity_label (text)",
        ),
        (["--tasks", "piqa", "--limit", "0"], "limit 0 must be at least 1"),
        (["--tasks", "piqa", "--repeats", "2"], "piqa: repeats 2 is for generated outputs"),
        (["--tasks", "gsm8k", "--repeats", "2", "--temperature", "0"], "repeats 2 at temperature 0"),
        (["--tasks", "piqa", "--teacher", "x"], "--teacher is for the suite distillation: add --suite distillation"),
        (["--tasks", "piqa", "--teacher-load-in-4bit"], "--teacher-load-in-4bit is for the suite distillation"),
        (["--tasks", "piqa", "--prompt-template", "x {prompt}"], "--prompt-template is for the suite distillation"),
        (["--tasks", "piqa", "--max-length", "9"], "--max-length is for the suite distillation"),
        (["--suite", "distillation", "--teacher", "x"], "--data-dir is for benchmarks: add --tasks or another suite"),
        (
            ["--suite", "distillation", "--tasks", "piqa", "--teacher", "x"],
            "the suite distillation needs --text FILE, --prompts FILE, or",
        ),
        (["--tasks", "piqa", "--model-args", "dtype=float32"], "--model-args dtype: use --dtype"),
        (["--tasks", "piqa", "--model-args", "tokenizer=x"], "--model-args tokenizer: sekd sets it itself"),
        (["--tasks", "piqa", "--model-args", "foo=1"], "unexpected keyword argument 'foo'; is an argument of --model"),
        (["--tasks", "piqa", "--model-args", "x"], "--model-args 'x' is not KEY=VALUE"),
        (
            ["--tasks", "gsm8k", "--max-new-tokens", "90000"],
            "gsm8k generates up to 90000: set --max-new-tokens to less",
        ),
    ],
)
def test_invalid_input_is_one_line(model, data, capsys, flags, message):
    assert main(["evaluate", model, "--data-dir", data, *HF, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("sekd: ")
    assert error.count("\n") == 1
    assert not Path("evaluations").exists() or not list(Path("evaluations").glob("*/*.json"))


TEXT, PROMPTS = ["--text", "texts.jsonl"], ["--prompts", "prompts.jsonl"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*TEXT, "--shots", "2"], "--shots is for benchmarks: add --tasks"),
        ([*TEXT, "--model-args", "x=1"], "--model-args is for benchmarks: add --tasks"),
        ([*TEXT, "--answer-column", "answer"], "--answer-column is for --prompts: add it, or leave this out"),
        ([*TEXT, "--repeats", "2"], "--repeats is for completions: add --prompts, or leave this out"),
        ([*TEXT, "--temperature", "0"], "--temperature is for completions: add --prompts"),
        ([*PROMPTS, "--max-length", "9"], "--max-length is for --text: add it"),
        ([*PROMPTS, "--text-split", "test"], "--text-split is for --text: add it"),
    ],
)
def test_an_option_without_effect_on_a_distillation_is_refused(model, capsys, flags, message):
    assert main(["evaluate", model, "--suite", "distillation", "--teacher", model, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"sekd: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("size", ["0", "many", "-1"])
def test_a_batch_size_that_is_none(model, data, capsys, size):
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", model, "--tasks", "piqa", "--data-dir", data, "--batch-size", size])
    assert ended.value.code == 2
    assert "neither auto nor a number of at least 1" in capsys.readouterr().err


def test_a_model_without_a_tokenizer(tmp_path, data, capsys):
    bare = save_model(tmp_path / "bare", with_tokenizer=False)
    assert main(["evaluate", bare, "--tasks", "piqa", "--data-dir", data, *HF]) == 2
    assert f"sekd: MODEL {bare!r}: the folder has no tokenizer; save the model's tokenizer" in capsys.readouterr().err


def test_a_damaged_data_file_is_named(model, data, capsys):
    path = Path(data) / "piqa" / "validation.jsonl"
    for content in ('{"goal": "w1", "sol1": "w', '{"goal": "w1"}\n', ""):
        path.write_text(content)
        assert main(["evaluate", model, "--tasks", "piqa", "--data-dir", data, *HF]) == 2
        error = capsys.readouterr().err
        assert "piqa" in error
        assert "baber/piqa" in error, "where the rows come from"
        assert error.count("\n") == 1


def test_without_lm_eval_the_package_is_named(model, data, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    assert main(["evaluate", model, "--tasks", "piqa", "--data-dir", data]) == 2
    assert "evaluation needs lm-eval, which is not installed: pip install 'sekd[eval]'" in capsys.readouterr().err


def test_arguments_of_a_backend_are_yaml():
    assert read_arguments(["a=2,b=true", "c=eager"]) == {"a": 2, "b": True, "c": "eager"}


def start(*arguments, limit=None):
    """The command in a process of its own."""
    code = "import sys; from sekd.cli import main; sys.exit(main())"
    if limit is not None:
        code = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit})); " + code
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code, "evaluate", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def count_answers():
    return sum(len(path.read_text().splitlines()) - 1 for path in Path("evaluations").glob("*/answers-*.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_what_was_answered_survives_a_signal(tmp_path, model, number):
    data = write_tasks(tmp_path / "many", count=100)
    command = [model, "--tasks", "arc_easy", "lambada_openai", "--data-dir", data, *HF, "--batch-size", "1"]
    process = start(*command)
    while count_answers() < 20:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate()
    assert count_answers() >= 20
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert f"sekd: stopped while evaluating {model}: " in error.splitlines()[-1]
        assert "the same command resumes" in error
        assert "Traceback" not in error
    assert main(["evaluate", *command]) == 0
    assert count_answers() == 0
    assert main(["evaluate", *command, "--output", "whole"]) == 0
    results = [json.loads(next(Path(folder).glob("*/results.json")).read_text()) for folder in ("evaluations", "whole")]
    resumed, whole = ({task: entry["scores"] for task, entry in result["results"].items()} for result in results)
    assert resumed == whole


@pytest.mark.slow
def test_a_model_that_does_not_fit_is_one_line(tmp_path, data):
    """13 GB of weights, of which the file has only holes, under a limit of 6 GB."""
    import struct

    folder = Path(save_model(tmp_path / "big"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 50_000_000}))
    shapes = {}
    with (folder / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    place = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape = [50_000_000, 32] if entry["shape"] == [128, 32] else entry["shape"]
        size = 4
        for side in shape:
            size *= side
        shapes[name] = {"dtype": "F32", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(shapes | {"__metadata__": {"format": "pt"}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + place)
    process = start(str(folder), "--tasks", "piqa", "--data-dir", data, *HF, limit=6 * 10**9)
    _, error = process.communicate()
    assert process.returncode == 2, error
    (line,) = [line for line in error.splitlines() if line.startswith("sekd: ")]
    assert f"MODEL {str(folder)!r} does not fit into memory: lower --batch-size, use --dtype bfloat16" in line
    assert "Traceback" not in error


@pytest.mark.slow
def test_vllm_is_the_default_and_its_refusal_is_one_line(tmp_path, data, capsys):
    folder = save_model(tmp_path / "vllm_model", kind="vllm")
    command = ["evaluate", folder, "--data-dir", data, "--dtype", "float32"]
    assert main([*command, "--tasks", "piqa", "gsm8k", "--max-new-tokens", "6"]) == 0
    assert "loading with vllm in float32" in capsys.readouterr().out
    assert main([*command, "--tasks", "piqa", "--model-args", "block_size=7"]) == 2
    assert f"sekd: MODEL {folder!r} cannot be loaded with vllm: " in capsys.readouterr().err


def test_ctrl_c_before_anything_is_done(model, data, capsys, monkeypatch):
    def send():
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    def wait(*arguments):
        threading.Thread(target=send).start()
        time.sleep(30)

    monkeypatch.setattr("sekd.eval.benchmark.load_lm", wait)
    assert main(["evaluate", model, "--tasks", "piqa", "--data-dir", data, *HF]) == 130
    assert "all finished answers are kept in evaluations/model-" in capsys.readouterr().err
