"""`sekd samples` chooses once."""

import json

import pytest

from sekd.cli import main


def test_samples_chooses_once_and_train_uses_the_choice(recipe, tmp_path, capsys, monkeypatch):
    flags = ["--sample_fraction", "0.25"]
    assert main(["samples", recipe, *flags]) == 0
    shown = capsys.readouterr().out
    assert "the choice is in" in shown
    assert "samples by student entropy" in shown
    before = (tmp_path / "run" / "samples.json").read_bytes()
    found = json.loads(before)
    assert (len(found["kept"]), len(found["scores"])) == (16, 64)

    def refuse(*args):
        raise AssertionError("scored again")

    monkeypatch.setattr("sekd.samples.score_samples", refuse)
    assert main(["train", recipe, *flags]) == 0
    assert (tmp_path / "run" / "samples.json").read_bytes() == before
    assert main(["samples", recipe, *flags]) == 0


def test_samples_loads_the_teacher_only_where_the_score_needs_it(recipe, tmp_path, capsys):
    flags = ["--sample_fraction", "0.25", "--teacher_model_name_or_path", str(tmp_path / "nowhere")]
    assert main(["samples", recipe, *flags]) == 0
    assert main(["samples", recipe, *flags, "--sample_score", "kl"]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["samples", "train"])
def test_samples_of_a_stream_without_a_pool_stop_at_parse(recipe, capsys, command):
    flags = ["--sample_fraction", "0.25", "--dataset_streaming", "true", "--dataset_name", "no/such-dataset"]
    assert main([command, recipe, *flags]) == 2
    assert (
        "sample_fraction 0.25 needs the number of samples, and a stream has no length; set sample_pool"
        in capsys.readouterr().err
    )


def test_samples_of_everything_are_no_choice(recipe, capsys):
    assert main(["samples", recipe]) == 2
    assert "sample_fraction is 1, which keeps every sample; set it" in capsys.readouterr().err
