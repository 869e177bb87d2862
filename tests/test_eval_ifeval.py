"""IFEval: lm-eval's rules, and what happens where nltk's punkt is missing."""

import functools
import random
import subprocess
import sys

import pytest
from harness_helpers import SHARED, make_text_lm, read_rows, run_task, write_rows

from sekd.eval import ifeval
from sekd.eval.ifeval import SENTENCE_RULES, has_punkt, load_rules, score_instructions
from sekd.eval.prepared import TaskOptions

pytest.importorskip("lm_eval.tasks")
pytest.importorskip("langdetect")

NO_COMMA, WORDS = "punctuation:no_comma", "length_constraints:number_words"
SENTENCES = "length_constraints:number_sentences"
ARGUMENTS = {
    NO_COMMA: {},
    WORDS: {"relation": "at least", "num_words": 3},
    SENTENCES: {"relation": "at least", "num_sentences": 2},
}


def make_row(*rules, key=0):
    kwargs = [ARGUMENTS[rule] for rule in rules]
    return {"key": key, "prompt": f"Prompt {key}", "instruction_id_list": [*rules], "kwargs": kwargs}


@pytest.fixture
def without_punkt(monkeypatch):
    load_rules()
    monkeypatch.setattr(ifeval, "has_punkt", lambda: False)


def test_scores_of_rules_by_hand(without_punkt):
    row = make_row(NO_COMMA, WORDS)
    for output, followed in (("one two three", [1, 1]), ("one, two", [0, 0]), ("one two", [1, 0]), ("", [0, 0])):
        scores, skipped = score_instructions(row, [output])
        assert skipped is None
        assert scores["inst_level_strict_acc"] == followed
        assert scores["prompt_level_strict_acc"] == float(all(followed))


def test_rows_with_a_sentence_rule_are_skipped_whatever_the_output(without_punkt):
    for output in ("one two three", "one, two", ""):
        scores, skipped = score_instructions(make_row(NO_COMMA, SENTENCES), [output])
        assert skipped == f"{SENTENCES} needs nltk's punkt, which is not installed"
        assert scores == {
            "inst_level_strict_acc": ["," not in output and output != ""],
            "inst_level_loose_acc": ["," not in output and output != ""],
        }


def test_rows_with_sentence_rules_alone_have_no_score(without_punkt):
    assert score_instructions(make_row(SENTENCES), ["one two three"])[0] == {}


def test_scores_of_a_task_leave_skipped_rows_out(tmp_path, without_punkt):
    """Prompt-level scores are over the other rows, instruction-level ones over all instructions that are known."""
    rows = [make_row(NO_COMMA), make_row(SENTENCES), make_row(WORDS, NO_COMMA), make_row(NO_COMMA, SENTENCES, key=3)]
    outputs = ["no comma", "", "one, two", "no comma"]
    write_rows(tmp_path / "ifeval" / "train.jsonl", rows)
    lm = make_text_lm()
    lm.generate_until = lambda requests, disable_tqdm=False: outputs
    result = run_task(lm, "ifeval", None, TaskOptions(data_dirs=(str(tmp_path),)))
    strict = result.scores["prompt_level_strict_acc"]
    assert (strict.value, strict.items) == (0.5, 2)
    assert result.scores["inst_level_strict_acc"].value == 2 / 4
    assert [item.correct for item in result.items] == [1.0, None, 0.0, None]
    assert [item.skipped is None for item in result.items] == [True, False, True, False]
    assert all(item.answer == "" for item in result.items)


def test_all_rounds_of_samples_count(tmp_path, without_punkt):
    """By hand: three outputs of each of two prompts."""
    write_rows(tmp_path / "ifeval" / "train.jsonl", [make_row(NO_COMMA), make_row(WORDS, NO_COMMA)])
    rounds = iter([["no comma", "one two three"], ["a, comma", "one, two"], ["a, comma", "one two"]])
    lm = make_text_lm()
    lm.generate_until = lambda requests, disable_tqdm=False: next(rounds)
    result = run_task(lm, "ifeval", None, TaskOptions(data_dirs=(str(tmp_path),), repeats=3))
    instructions = result.scores["inst_level_strict_acc"]
    assert instructions.value == pytest.approx((1 + 2 + 0 + 0 + 0 + 1) / 9)
    assert (instructions.items, instructions.stderr) == (2, None)
    assert result.scores["prompt_level_strict_acc"].value == pytest.approx((1 / 3 + 1 / 3) / 2)


def test_punkt_is_looked_for_once(monkeypatch):
    """And again after a download."""
    import nltk

    looked = []

    def find(name):
        looked.append(name)
        raise LookupError

    load_rules()
    has_punkt.cache_clear()
    monkeypatch.setattr(nltk.data, "find", find)
    monkeypatch.setattr(nltk, "download", lambda *names, **kwargs: False)
    for _ in range(3):
        score_instructions(make_row(NO_COMMA), ["one two three"])
    assert len(looked) == 1
    ifeval._download_punkt()
    assert not has_punkt()
    assert len(looked) == 2
    has_punkt.cache_clear()


@pytest.mark.skipif(has_punkt(), reason="punkt is installed here")
def test_only_these_rules_need_punkt():
    """Each of lm-eval's rules on a text: the sentence rules raise, and no other."""
    load_rules()
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    failed = set()
    for name, rule in INSTRUCTION_DICT.items():
        checker = rule(name)
        options = {"combination:repeat_prompt": {"prompt_to_repeat": "Say it."}}.get(name, {})
        checker.build_description(**options)
        for text in ("Some words. More words!", "SOME WORDS\n\nP.S. more", '{"a": 1}', "* one\n* two"):
            try:
                checker.check_following(text)
            except LookupError:
                failed.add(name)
    assert failed == {*SENTENCE_RULES}


@pytest.mark.slow
def test_rules_neither_print_nor_reach_the_network_nor_change_a_generator():
    """In a fresh process, with a network that would fail the test; beartype, which draws too, is not there."""
    code = """
import random, socket
def refuse(*args, **kwargs):
    raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from sekd.eval.ifeval import load_rules, score_instructions
load_rules()
row = {"key": 0, "prompt": "p", "instruction_id_list": ["keywords:forbidden_words"], "kwargs": [{}]}
state = random.getstate()
score_instructions(row, ["Words."])  # the rule draws words that the row does not name
assert random.getstate() == state
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_punkt_is_downloaded_where_there_is_a_network(monkeypatch):
    import nltk

    asked = []
    monkeypatch.setattr(nltk, "download", lambda *names, **kwargs: asked.append((names, kwargs)))
    monkeypatch.setattr(ifeval, "has_punkt", functools.cache(lambda: False))
    load_rules()
    assert asked == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    load_rules()
    assert asked == [(("punkt_tab",), {"quiet": True})]


def test_scores_do_not_depend_on_chance(without_punkt):
    """A rule draws what its row does not say: here whether 3 words are too few or few enough."""
    row = {"key": 0, "prompt": "p", "instruction_id_list": [WORDS], "kwargs": [{}]}
    scores = []
    for seed in range(12):
        random.seed(seed)
        scores.append(score_instructions(row, ["one two three"]))
    assert all(score == scores[0] for score in scores)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_every_shared_row_has_scores():
    load_rules()
    rows = read_rows("ifeval", 541)
    skipped = [score_instructions(row, ["Some words, and more of them."])[1] is not None for row in rows]
    expected = [not has_punkt() and bool({*row["instruction_id_list"]} & {*SENTENCE_RULES}) for row in rows]
    assert skipped == expected
