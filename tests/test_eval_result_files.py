"""Results in files: what is saved comes back, survives a kill, and is found again only if it is the same."""

import dataclasses
import json
import logging
import math
import shutil
import signal
import subprocess
import sys

import datasets
import pandas
import pytest

from sekd.eval.records import Item, Score, TaskResult
from sekd.eval.result_files import (
    RESULTS,
    SAMPLES,
    find_done,
    fingerprint_model,
    load_results,
    name_folder,
    own_folder,
    save_result,
)
from sekd.eval.statistics import fill_bins, summarize
from sekd.files import DamagedFile

MODEL = {"name": "org/model", "fingerprint": "f1", "dtype": "float32"}
SETTINGS = {"split": "test", "shots": 0, "data": "abc", "stops": ("a", "b")}


def make_result(task="gsm8k", settings=SETTINGS, shift=0.0):
    items = [
        Item(
            index=i,
            prompt=f"Frage {i}\n\u2028é",
            answer="#### 18",
            outputs=("a", "", "\x00b") if i else (),
            correct=i / 2,
            loglikelihoods=(-1.5, -math.inf) if i == 1 else (),
            metrics={"acc": i + shift, **({"nll": 0.1 * i} if i else {})},
            weight=1.0 + i,
            calibration=fill_bins([0.3, 0.9], [True, False]) if i != 1 else None,
            skipped="why" if i == 2 else None,
        )
        for i in range(3)
    ]
    return TaskResult(task, "acc", summarize(items), items, dict(settings), 1.25)


def test_a_result_comes_back_as_it_was(tmp_path):
    result = make_result()
    assert save_result(str(tmp_path), MODEL, result) == "gsm8k"
    (back,) = load_results(str(tmp_path)).values()
    assert back == dataclasses.replace(result, settings={**SETTINGS, "stops": ["a", "b"]})
    assert load_results(str(tmp_path / "absent")) == {}


def test_numbers_that_are_not_finite_come_back(tmp_path):
    item = Item(0, "p", metrics={"nll": math.nan})
    result = TaskResult("t", "nll", {"nll": Score(math.nan, math.nan, 1), "acc": Score(1.0, None, 1)}, [item], {}, 0.0)
    save_result(str(tmp_path), MODEL, result)
    json.loads((tmp_path / RESULTS).read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    (back,) = load_results(str(tmp_path)).values()
    assert math.isnan(back.scores["nll"].value)
    assert math.isnan(back.items[0].metrics["nll"])
    assert back.scores["acc"] == Score(1.0, None, 1)


def test_results_of_other_settings_stand_beside_each_other(tmp_path):
    folder = str(tmp_path)
    others = [
        ({}, "gsm8k"),
        ({"shots": 5}, "gsm8k (5 shots)"),
        ({"split": "train[7000:]"}, "gsm8k (train[7000:])"),
        ({"shots": 5, "limit": 200, "chat_template": True}, "gsm8k (5 shots, limit 200, chat template)"),
        ({"repeats": 4, "temperature": 0.7}, "gsm8k (4 repeats, temperature 0.7)"),
        ({"repeats": 4, "temperature": 1.0}, "gsm8k (4 repeats)"),
        ({"temperature": 1.0}, "gsm8k (temperature 1.0)"),
        ({"data": "def"}, "gsm8k (data def)"),
        ({"data": "def", "backend": "hf"}, "gsm8k (data def, backend hf)"),
    ]
    for i, (changes, name) in enumerate(others):
        assert save_result(folder, MODEL, make_result(settings={**SETTINGS, **changes}, shift=i)) == name
    assert save_result(folder, MODEL, make_result("piqa", {"split": "validation"})) == "piqa"
    results = load_results(folder)
    assert list(results) == [*(name for _, name in others), "piqa"]
    for i, (changes, name) in enumerate(others):
        assert results[name].items[0].metrics["acc"] == i
        assert find_done(folder, "f1", "gsm8k", {**SETTINGS, **changes}) == results[name]


def test_a_repeated_result_replaces_the_first(tmp_path):
    save_result(str(tmp_path), MODEL, make_result("piqa"))
    save_result(str(tmp_path), MODEL, make_result())
    save_result(str(tmp_path), MODEL, make_result(shift=5.0))
    results = load_results(str(tmp_path))
    assert [result.items[0].metrics["acc"] for result in results.values()] == [0.0, 5.0]
    assert len(pandas.read_parquet(tmp_path / SAMPLES)) == 6


def test_only_the_same_model_task_and_settings_are_done(tmp_path):
    folder = str(tmp_path)
    assert find_done(folder, "f1", "gsm8k", SETTINGS) is None
    save_result(folder, MODEL, make_result())
    assert find_done(folder, "f1", "gsm8k", SETTINGS) is not None
    assert find_done(folder, "f2", "gsm8k", SETTINGS) is None
    assert find_done(folder, "f1", "piqa", SETTINGS) is None
    for change in ({"shots": 1}, {"data": "other"}, {"new": 1}):
        assert find_done(folder, "f1", "gsm8k", {**SETTINGS, **change}) is None
    assert find_done(folder, "f1", "gsm8k", {k: v for k, v in SETTINGS.items() if k != "shots"}) is None


def test_another_model_at_the_same_path_starts_anew(tmp_path, caplog):
    save_result(str(tmp_path), MODEL, make_result("piqa"))
    save_result(str(tmp_path), {**MODEL, "fingerprint": "f2"}, make_result())
    assert list(load_results(str(tmp_path))) == ["gsm8k"]
    assert set(pandas.read_parquet(tmp_path / SAMPLES)["task"]) == {"gsm8k"}
    assert "results of another model, 'org/model', or of older weights: they are replaced" in caplog.text


def damage_json(path):
    path.write_text(path.read_text()[:-20])


def damage_structure(path):
    path.write_text('{"model": {}, "results": {"gsm8k": {}}}')


def damage_bits(path):
    content = bytearray(path.read_bytes())
    content[100] ^= 0xFF
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-50])


def drop_rows(path):
    pandas.read_parquet(path).iloc[1:].to_parquet(path)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (RESULTS, damage_json),
        (RESULTS, damage_structure),
        (SAMPLES, damage_bits),
        (SAMPLES, cut),
        (SAMPLES, drop_rows),
        (SAMPLES, lambda path: path.unlink()),
        (SAMPLES, lambda path: pandas.DataFrame({"a": [1]}).to_parquet(path)),
    ],
)
def test_a_damaged_file_is_not_done_and_is_kept_aside(tmp_path, caplog, name, damage):
    folder = str(tmp_path)
    save_result(folder, MODEL, make_result())
    damage(tmp_path / name)
    with pytest.raises(DamagedFile, match=name):
        load_results(folder)
    with caplog.at_level(logging.WARNING):
        assert find_done(folder, "f1", "gsm8k", SETTINGS) is None
    assert f"{name}' is" in caplog.text
    assert "gsm8k is evaluated again" in caplog.text
    save_result(folder, MODEL, make_result())
    assert find_done(folder, "f1", "gsm8k", SETTINGS) is not None
    assert (tmp_path / (RESULTS + ".damaged")).exists()


def test_a_changed_byte_is_noticed_wherever_it_is(tmp_path):
    save_result(str(tmp_path), MODEL, make_result())
    before, content = load_results(str(tmp_path)), (tmp_path / SAMPLES).read_bytes()
    noticed = 0
    for place in range(4, len(content), len(content) // 60):
        changed = bytearray(content)
        changed[place] ^= 1
        (tmp_path / SAMPLES).write_bytes(changed)
        try:
            assert load_results(str(tmp_path)) == before  # a byte that nothing reads
        except DamagedFile:
            noticed += 1
    assert noticed > 5


def test_samples_that_pandas_wrote_again_are_as_good(tmp_path):
    save_result(str(tmp_path), MODEL, make_result())
    before = load_results(str(tmp_path))
    pandas.read_parquet(tmp_path / SAMPLES).assign(note="mine").to_parquet(tmp_path / SAMPLES)  # large strings
    assert load_results(str(tmp_path)) == before
    save_result(str(tmp_path), MODEL, make_result("piqa"))
    assert load_results(str(tmp_path))["gsm8k"] == before["gsm8k"]


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
import sekd.eval.result_files as files
from test_eval_result_files import MODEL, make_result

def kill(path, *_):
    if path.endswith(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, *_)

write, files.write_atomically = files.write_atomically, kill
move = os.replace
files.os.replace = lambda source, target: kill(target) if target.endswith(sys.argv[2]) else move(source, target)
files.save_result(sys.argv[1], MODEL, make_result(sys.argv[4], shift=5.0))
"""


@pytest.mark.parametrize("task", ["gsm8k", "piqa"])
@pytest.mark.parametrize("name", [SAMPLES, RESULTS])
def test_a_kill_between_the_files_leaves_what_was_there(tmp_path, name, task, request):
    folder = str(tmp_path)
    save_result(folder, MODEL, make_result())
    before = load_results(folder)
    arguments = [folder, name, str(request.path.parent), task]
    assert subprocess.run([sys.executable, "-c", KILLED, *arguments]).returncode == -signal.SIGKILL
    assert load_results(folder) == before
    save_result(folder, MODEL, make_result("piqa", shift=1.0))
    assert load_results(folder)["gsm8k"] == before["gsm8k"]
    assert len(pandas.read_parquet(tmp_path / SAMPLES)) == 6  # the rows of the killed process are gone


def test_one_process_has_a_folder(tmp_path):
    folder = str(tmp_path / "new")
    with own_folder(folder):
        with pytest.raises(ValueError, match=r"another process writes results into .*--output"), own_folder(folder):
            pass
        save_result(folder, MODEL, make_result())


def test_pandas_and_datasets_read_the_samples(tmp_path):
    save_result(str(tmp_path), MODEL, make_result())
    save_result(str(tmp_path), MODEL, make_result("piqa", {"split": "validation"}))
    frame = pandas.read_parquet(tmp_path / SAMPLES)
    assert frame.groupby("task")["metric_acc"].mean().to_dict() == {"gsm8k": 1.0, "piqa": 1.0}
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / SAMPLES), cache_dir=str(tmp_path / "cache"))[
        "train"
    ]
    assert rows[1]["outputs"] == ["a", "", "\x00b"]
    assert rows[1]["loglikelihoods"] == [-1.5, -math.inf]
    assert rows[0]["metric_nll"] is None


def test_no_two_models_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/model", "b/model", "runs/x/checkpoint-9", "runs/y/checkpoint-9", "a/Qwen--Qwen3"):
        (tmp_path / name).mkdir(parents=True)
    names = ["a/model", "b/model", "runs/x/checkpoint-9", "runs/y/checkpoint-9", "a/Qwen--Qwen3", "Qwen/Qwen3", "gpt2"]
    folders = [name_folder("out", name) for name in names]
    assert len(set(folders)) == len(names)
    assert folders[2].startswith("out/x--checkpoint-9-")
    assert folders[-2:] == ["out/Qwen--Qwen3", "out/gpt2"]
    assert name_folder(str(tmp_path / "out"), str(tmp_path / "a/model/")) == str(tmp_path / folders[0])
    shutil.copytree(tmp_path, tmp_path.parent / "moved")  # models and results together
    monkeypatch.chdir(tmp_path.parent / "moved")
    assert name_folder("out", "a/model") == folders[0]


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(40_000_000))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_fingerprint_tells_weights_and_tokenizers_apart(model_folder, tmp_path):
    first = fingerprint_model(str(model_folder))
    (model_folder / "trainer_state.json").write_text("{}")
    (model_folder / "optimizer.pt").write_text("x")
    assert fingerprint_model(str(model_folder)) == first
    shutil.copytree(model_folder, tmp_path / "copy")
    assert fingerprint_model(str(tmp_path / "copy")) == first
    codes = {first}
    for place in (0, 20_000_000, 39_999_999):  # a single byte of a weight
        with open(model_folder / "model.safetensors", "r+b") as file:
            file.seek(place)
            file.write(b"\x01")
        codes.add(fingerprint_model(str(model_folder)))
    (model_folder / "tokenizer.json").write_text("{ }")
    codes.add(fingerprint_model(str(model_folder)))
    (model_folder / "tokenizer.json").rename(model_folder / "tokenizer_config.json")
    codes.add(fingerprint_model(str(model_folder)))
    assert len(codes) == 6


def test_a_fingerprint_of_an_adapter_has_its_base(model_folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(model_folder), "r": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").write_bytes(b"1")
    first = fingerprint_model(str(adapter))
    assert first.endswith("+" + fingerprint_model(str(model_folder)))
    (model_folder / "config.json").write_text('{"a": 1}')
    second = fingerprint_model(str(adapter))
    (adapter / "adapter_model.safetensors").write_bytes(b"2")
    assert len({first, second, fingerprint_model(str(adapter))}) == 3


def test_a_fingerprint_of_a_hub_model_is_its_commit(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--org--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--org--model" / "refs").mkdir()
    (tmp_path / "models--org--model" / "refs" / "main").write_text(commit)
    script = "from sekd.eval.result_files import fingerprint_model; print(fingerprint_model('org/model'))"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == commit


@pytest.mark.parametrize("name", ["no/such-model", "./absent", "/absent", ""])
def test_a_model_that_is_absent_is_one_line(name):
    with pytest.raises(ValueError, match="no such folder") as error:
        fingerprint_model(name)
    assert "\n" not in str(error.value)
