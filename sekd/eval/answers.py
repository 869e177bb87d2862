"""Is the answer to a mathematical question right?"""

import importlib.util
import json
import logging
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import unicodedata

SECONDS = 5.0
"""Time that math-verify may take for one output. Then the output counts as wrong."""
START_SECONDS = 120.0
"""Time that the grader's process may take to start: it imports sympy."""
MEMORY = 4 * 2**30
"""Bytes of address space that it may use."""
LENGTH = 2000
"""Characters of an output that are searched, from its end, unless a \\boxed answer or "####" says where it is."""

PROBE = ("\\boxed{\\frac{1}{2}}", "0.5")
"""An output and its answer that a grader which works finds right; reading it takes all of math-verify's parts."""

BROKEN = "grading mathematical answers with math-verify does not work"
REMEDY = "pip install 'sekd[eval]'"

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_MATH = re.compile(r"\$(?=\S)[^$\n]*?\S\$(?!\d)|\$\$.*?\$\$", re.DOTALL)


def grade_math(output: str, answer: str) -> bool:
    r"""Whether ``output`` states the number or expression that ``answer`` is, in the judgement of math-verify.

    The answer is what follows the last ``####``, if there is one (as in GSM8K), without thousands separators and dollar
    signs. In the output, the line after the first ``####`` counts, else the last ``\boxed{}``, else what math-verify
    finds: the last expression. What precedes ``</think>`` does not count. An output that takes longer than ``SECONDS``
    is wrong. The work is done in a process of its own, so this works in any thread, and a number too large to compute
    ends nothing but that process.

    Raises:
        ValueError: math-verify is not installed, or does not work (see ``check_grader``).
    """
    answer = answer.rsplit("####", 1)[-1].strip()
    output = _find_answer(output)
    if not output or not answer:
        return False
    return output == answer or _WORKER.grade(output, answer)


def check_grader() -> None:
    """Start the process that ``grade_math`` asks, unless it runs, and let it grade a right output.

    Raises:
        ValueError: math-verify is not installed, or does not work. The message has what its process wrote.
    """
    _WORKER.check()


def _find_answer(output: str) -> str:
    """The part of an output that holds its answer."""
    output = output.rsplit("</think>", 1)[-1]
    if "####" in output:
        return output.split("####", 1)[1].strip().split("\n")[0].strip()[:LENGTH]
    boxed = output.rfind("\\boxed")
    return (output[boxed : boxed + LENGTH] if boxed >= 0 else output[-LENGTH:]).strip()


def _remove_currency(text: str) -> str:
    """The text without dollar signs that are money: they begin no LaTeX, by pandoc's rule for ``$``."""
    text = text.replace("\\$", "")
    kept, end = [], 0
    for span in _MATH.finditer(text):
        kept += [text[end : span.start()].replace("$", ""), span.group()]
        end = span.end()
    return "".join(kept) + text[end:].replace("$", "")


def _verify(output: str, answer: str) -> bool:
    """math-verify's judgement, without a limit of time.

    It misses a number that touches other letters, quotes or brackets, as in "答案是18元". If it finds nothing and the
    answer is a number, the last number counts.
    """
    from math_verify import parse, verify

    output = unicodedata.normalize("NFKC", output)

    if re.fullmatch(r"[-+]?[$€£]?[\d,]*\.?\d+%?", answer):
        answer = re.sub(r"[$€£,]", "", answer)
    gold = answer if "$" in answer or "\\boxed" in answer or "\\(" in answer else f"${answer}$"
    golds, outputs = (parse(text, parsing_timeout=None) for text in (gold, _remove_currency(output)))
    if not outputs and _NUMBER.fullmatch(answer) and (numbers := _NUMBER.findall(output)):
        outputs = parse(numbers[-1], parsing_timeout=None)
    return bool(golds) and bool(outputs) and bool(verify(golds, outputs, timeout_seconds=None))


class _Worker:
    """The process that runs math-verify. It starts with the first output, and again after one that took too long."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def check(self) -> None:
        """Start the process unless it runs.

        Raises:
            ValueError: it does not grade ``PROBE`` as right.
        """
        with self._lock:
            self._start()

    def grade(self, output: str, answer: str) -> bool:
        """math-verify's judgement; False where it takes too long, or where a signal ends the process twice.

        If the process ends, it starts again, and is asked again once.

        Raises:
            ValueError: math-verify is not installed, does not work, or twice ends with an error.
        """
        line = json.dumps([output, answer])
        with self._lock:
            for is_last in (False, True):
                self._start()
                reply = self._ask(line, SECONDS)
                if reply:
                    return reply == "true"
                code, said = self._stop(is_ending=reply is not None)
                if reply is None:
                    return False
                # A signal ends it where C code recurses too deeply or gets no memory: the output is the cause.
                if is_last and code >= 0:
                    raise ValueError(f"{BROKEN} (it ends with {said!r}); {REMEDY}")
        return False

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError(f"grading mathematical answers needs math-verify, which is not installed: {REMEDY}")
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # a pipe would fill up
        # -P: the folder of this file, which has a module named statistics, is no place to import from.
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        reply = self._ask(json.dumps(PROBE), START_SECONDS)
        if reply != "true":
            _, said = self._stop(is_ending=reply == "")
            problem = f"no reply in {START_SECONDS:g} seconds" if reply is None else f"it replies {reply!r}, not 'true'"
            raise ValueError(f"{BROKEN} ({said or problem}); {REMEDY}")

    def _ask(self, line: str, seconds: float) -> str | None:
        """The process's reply to a line; empty if the process has ended, None if there is no reply in this time."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        self._errors.seek(0)  # for the process too: what it wrote about earlier outputs goes
        self._errors.truncate()
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return ""
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        return process.stdout.readline().strip() if ready else None

    def _stop(self, is_ending: bool) -> tuple[int, str]:
        """End the process. Returns its exit status, and the last line that it wrote to its standard error."""
        process, self._process = self._process, None
        assert process is not None
        if not is_ending:
            process.kill()
        process.communicate()
        self._errors.seek(0)
        lines = self._errors.read().split("\n")
        self._errors.close()
        return process.returncode, next((line.strip() for line in reversed(lines) if line.strip()), "")


_WORKER = _Worker()


def _serve() -> None:
    """Reply to each line [output, answer] of the standard input with true or false."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; its end ends this process too
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable()
    replies, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no reply
    for line in sys.stdin:
        try:
            is_right = _verify(*json.loads(line))
        except (MemoryError, RecursionError):  # the output is the cause
            is_right = False
        print(json.dumps(is_right), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
