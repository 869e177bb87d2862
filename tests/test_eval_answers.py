"""Which outputs state the right answer?"""

import threading
import time

import pytest

from sekd.eval import answers
from sekd.eval.answers import grade_math
from sekd.eval.prepared import prepare_task

pytest.importorskip("math_verify")

CASES = [  # output, answer, right
    ("The answer is 18.", "9 * 2 = $<<9*2=18>>18.\n#### 18", True),
    ("#### 18", "#### 18", True),
    ("so 16 - 7 = 9 and 9 * 2 = 18 dollars", "#### 18", True),
    ("10 - 3 = 7 apples are left", "#### 7", True),
    ("She makes $18 every day.", "#### 18", True),
    ("It costs $5 at first, and then $10", "#### 10", True),  # no LaTeX between the dollars
    ("It costs $5 at first, and then $10", "#### 5", False),
    ("$5, $10", "#### 10", True),
    ("It is \\$18.", "#### 18", True),
    ("18 or 20", "#### 18", False),  # the last of several numbers counts
    ("17\n#### 18\n\nQuestion: What else?\n#### 20", "#### 18", True),  # what comes after the answer does not
    ("#### 17 of 18", "#### 17", False),
    ("\\boxed{18}. Check: 3 + 4 = 7", "#### 18", True),
    ("\\boxed{17} is wrong, so \\boxed{18}", "18", True),
    ("$70,000", "#### 70,000", True),
    ("70000 dollars", "#### 70,000", True),
    ("1 000", "#### 1,000", True),
    ("-5", "#### -5", True),
    ("5", "#### -5", False),
    ("\\boxed{\\frac{1}{2}}", "0.5", True),
    ("The answer is $\\frac{3}{4}$.", "\\frac{3}{4}", True),
    ("1/2", "0.5", True),
    ("145", "145.0", True),
    ("#### $18.00", "#### 18", True),
    ("50%", "#### 50", True),
    ("**18**", "#### 18", True),
    ("<think>First 12.</think> 18", "#### 18", True),
    ("$2\\sqrt{3}$", "\\sqrt{12}", True),
    ("$x + 1$", "1 + x", True),
    ("Paris", "Paris", True),
    ("London", "Paris", False),
    ("four", "#### 4", False),
    ("3.001", "#### 3", False),
    ("答案是18元", "#### 18", True),  # numbers that touch letters, quotes or brackets
    ("答えは17です。", "#### 18", False),
    ("１８", "#### 18", True),
    ('The answer is "18"', "#### 18", True),
    ("`18`", "#### 18", True),
    ("(18)", "#### 18", True),
    ("<b>1,800</b>", "#### 1,800", True),
    ("", "#### 18", False),
    ("18", "", False),
    ("#### ", "#### 18", False),
    ("I do not know", "#### 18", False),
    ("9" * 500_000, "#### 9", False),
    ("word " * 200_000 + "18", "#### 18", True),
    ("10000000000!", "#### 3", False),
]


@pytest.mark.parametrize(("output", "answer", "right"), CASES, ids=range(len(CASES)))
def test_right_and_wrong_answers(output, answer, right):
    assert grade_math(output, answer) is right


def test_a_number_too_large_to_compute_is_wrong_after_a_while(monkeypatch):
    """It does not stop the process that asks, in a thread either, and the next output is graded as ever."""
    assert grade_math("The answer is 18", "#### 18")  # the process runs
    monkeypatch.setattr(answers, "SECONDS", 1.0)
    started, results = time.perf_counter(), []

    def grade():
        results.append(grade_math("\\boxed{10^{10^{10^{10}}}}", "#### 18"))

    thread = threading.Thread(target=grade)
    thread.start()
    thread.join()
    assert results == [False]
    assert time.perf_counter() - started < 5
    monkeypatch.undo()
    assert grade_math("The answer is 18", "#### 18")


def test_threads_share_one_process():
    results = {}

    def grade(number):
        results[number] = [grade_math(f"It is {number}", f"#### {other}") for other in range(6)]

    threads = [threading.Thread(target=grade, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [i == other for other in range(6)] for i in range(6)}


def test_a_grader_that_ended_starts_again():
    assert grade_math("It is 18", "#### 18")
    answers._WORKER._process.kill()
    answers._WORKER._process.wait()
    assert grade_math("It is 18", "#### 18")


def break_grader(monkeypatch, tmp_path, code):
    """A worker whose process runs with this code in the place of math-verify."""
    (tmp_path / "math_verify.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return answers._Worker()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_module", "No module named 'no_such_module'"),
        ("def parse(*args, **kwargs): return [1]\ndef verify(*args, **kwargs): return False", "it replies 'false'"),
        ("import time\ntime.sleep(60)", "no reply in 1 seconds"),
    ],
)
def test_a_grader_that_does_not_work_is_noticed(monkeypatch, tmp_path, code, message):
    """With what its process wrote, and the remedy, in one line."""
    worker = break_grader(monkeypatch, tmp_path, code)
    monkeypatch.setattr(answers, "START_SECONDS", 1.0 if "sleep" in code else 60.0)
    for call in (worker.check, lambda: worker.grade("The answer is 18.", "18")):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "pip install 'sekd[eval]'" in str(error.value)
        assert "\n" not in str(error.value)


ENDS = """
import os
def parse(text, **kwargs):
    if "18" in text:
        {end}
    print("what a library prints is no reply")
    return [text]
def verify(*args, **kwargs):
    return True
"""


@pytest.mark.parametrize("end", ["raise SystemExit('worse')", "os.kill(os.getpid(), 9)", "raise MemoryError"])
def test_an_output_that_ends_the_process(monkeypatch, tmp_path, end):
    """An error ends the evaluation; a signal or a lack of memory comes from the output, which is wrong."""
    worker = break_grader(monkeypatch, tmp_path, ENDS.format(end=end))
    if "worse" in end:
        with pytest.raises(ValueError, match=r"does not work \(it ends with 'worse'\); pip install"):
            worker.grade("It is 18", "17")
    else:
        assert not worker.grade("It is 18", "17")
    assert worker.grade("It is 17", "17")


def test_math_verify_is_not_installed(monkeypatch):
    monkeypatch.setattr(answers.importlib.util, "find_spec", lambda name: None)
    for call in (answers._Worker().check, lambda: answers._Worker().grade("1", "2")):
        with pytest.raises(ValueError, match="math-verify, which is not installed: pip install"):
            call()


@pytest.mark.parametrize("task", ["gsm8k", "svamp", "aime25"])
def test_the_grader_is_checked_before_a_model_is_loaded(monkeypatch, task):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(answers, "_WORKER", answers._Worker())
    find = answers.importlib.util.find_spec
    monkeypatch.setattr(answers.importlib.util, "find_spec", lambda name: None if name == "math_verify" else find(name))
    with pytest.raises(ValueError, match="math-verify, which is not installed"):
        prepare_task(task)
