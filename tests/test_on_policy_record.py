"""Rollouts are shown as text, recorded, and replayed."""

import json

from rollout_helpers import make_run, read_rollouts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rollouts import Rollout
from sekd.data.load import load_rows
from sekd.on_policy.record import show_completions


def test_completions_are_shown_as_text(tokenizer, capsys):
    show_completions(tokenizer, [Rollout([1, 2], [3, 120], 5, "stop")], 5)
    out = capsys.readouterr().out
    assert "rollouts at step 5" in out
    assert "w1 w2" in out
    assert "w3 <eos>" in out


def test_what_a_model_generates_cannot_steer_the_terminal(capsys):
    """Neither escape sequences nor rich's markup nor direction marks; line breaks stay."""

    text = "a\x1b]0;title\x07\x1b[31mred \x9b2J\r\u202eb\x00 [bold]c[/bold] [/nothing] :smile:\n日本é"
    letters = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(sorted({*text}))}))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    ids = letters.encode(text).ids
    show_completions(PreTrainedTokenizerFast(tokenizer_object=letters), [Rollout(ids, ids, 0, "stop")], 0)
    out = capsys.readouterr().out
    assert not {c for c in out if ord(c) < 32 or 127 <= ord(c) < 160 or c == "\u202e"} - {"\n"}
    assert out.count("[bold]c[/bold]") == 2
    for shown in ("\\x1b]0;title\\x07", "\\u202eb", "[/nothing]", ":smile:", "日本é"):
        assert shown in out.replace("\n", ""), shown


def test_recorded_rollouts_replay_as_they_were_trained_on(tmp_path, tokenizer, pairs):
    """The first step of a replay in the file's order has the loss of the run that recorded it."""
    options = dict(max_steps=1, divergence="reverse_kl", logging_steps=1)
    first = make_run(tmp_path / "first", tokenizer, pairs, **options)
    first.train()
    file = str(tmp_path / "first" / "rollouts.jsonl")
    again = make_run(
        tmp_path / "again", tokenizer, load_rows(file), **options, rollouts=file, train_sampling_strategy="sequential"
    )
    again.train()
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (first, again)]
    assert losses[0] == losses[1]
    assert again.engine.rounds == [], "nothing is generated"


def test_what_is_recorded_is_not_lost(tmp_path, tokenizer, pairs):
    """Neither a replay into the same folder nor a new run there overwrites it."""
    make_run(tmp_path, tokenizer, pairs, max_steps=1).train()
    first = read_rollouts(tmp_path)
    assert len(first) == 4
    file = str(tmp_path / "rollouts.jsonl")
    make_run(tmp_path, tokenizer, load_rows(file), max_steps=1, rollouts=file).train()
    assert read_rollouts(tmp_path) == first
    make_run(tmp_path, tokenizer, pairs, max_steps=1, seed=9).train()
    second = read_rollouts(tmp_path)
    assert second != first
    make_run(tmp_path, tokenizer, pairs, max_steps=1, seed=8).train()
    for name, rollouts in (("rollouts.old1.jsonl", first), ("rollouts.old2.jsonl", second)):
        assert [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] == rollouts
        assert len(load_rows(str(tmp_path / name))) == 4, "it can be trained on"
