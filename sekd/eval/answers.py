"""Is the answer to a mathematical question right?"""

import importlib.util
import json
import re
import resource
import select
import signal
import subprocess
import sys
import threading

SECONDS = 5.0
"""Time that math-verify may take for one output. Then the output counts as wrong."""
START_SECONDS = 120.0
"""Time that the grader's process may take to start: it imports sympy."""
MEMORY = 4 * 2**30
"""Bytes of address space that it may use."""
LENGTH = 2000
"""Characters of an output that are searched, from its end, unless a \\boxed answer or "####" says where it is."""

_MATH = re.compile(r"\$(?=\S)[^$\n]*?\S\$(?!\d)|\$\$.*?\$\$", re.DOTALL)


def grade_math(output: str, answer: str) -> bool:
    r"""Whether ``output`` states the number or expression that ``answer`` is, in the judgement of math-verify.

    The answer is what follows the last ``####``, if there is one (as in GSM8K), without thousands separators and dollar
    signs. In the output, the line after the first ``####`` counts, else the last ``\boxed{}``, else what math-verify
    finds: the last expression. What precedes ``</think>`` does not count. An output that takes longer than ``SECONDS``
    is wrong. The work is done in a process of its own, so this works in any thread, and a number too large to compute
    ends nothing but that process.
    """
    answer = answer.rsplit("####", 1)[-1].strip()
    output = _find_answer(output)
    if not output or not answer:
        return False
    return output == answer or _WORKER.grade(output, answer)


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
    """math-verify's judgement, without a limit of time."""
    from math_verify import parse, verify

    if re.fullmatch(r"[-+]?[$€£]?[\d,]*\.?\d+%?", answer):
        answer = re.sub(r"[$€£,]", "", answer)
    gold = answer if "$" in answer or "\\boxed" in answer or "\\(" in answer else f"${answer}$"
    golds, outputs = (parse(text, parsing_timeout=None) for text in (gold, _remove_currency(output)))
    return bool(golds) and bool(outputs) and bool(verify(golds, outputs, timeout_seconds=None))


class _Worker:
    """The process that runs math-verify. It starts with the first output, and again after one that took too long."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def grade(self, output: str, answer: str) -> bool:
        """math-verify's judgement; False where it takes too long or ends the process.

        Raises:
            ValueError: math-verify is not installed.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            reply = self._ask(json.dumps([output, answer]), SECONDS)
            if not reply:
                self._stop()
            return reply == "true"

    def _start(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("grading mathematical answers needs math-verify: pip install 'sekd[eval]'")
        # -P: the folder of this file, which has a module named statistics, is no place to import from.
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._ask(json.dumps(["0", "0"]), START_SECONDS)

    def _ask(self, line: str, seconds: float) -> str:
        """The process's reply to a line; empty if it gives none in this time."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return ""
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        return process.stdout.readline().strip() if ready else ""

    def _stop(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.communicate()
        self._process = None


_WORKER = _Worker()


def _serve() -> None:
    """Reply to each line [output, answer] of the standard input with true or false."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; its end ends this process too
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        print(json.dumps(_verify(*json.loads(line))), flush=True)


if __name__ == "__main__":
    _serve()
