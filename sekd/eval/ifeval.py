"""IFEval (Zhou et al., 2023): does an answer follow its instructions?"""

import contextlib
import functools
import io
import os
import random
import socket
from collections.abc import Iterator, Sequence
from typing import Any

SENTENCE_RULES = ("length_constraints:number_sentences", "change_case:capital_word_frequency")
"""The instructions whose rule needs nltk's sentence tokenizer, punkt."""
DOWNLOAD_SECONDS = 10.0
"""Time that a server may take to answer when punkt is downloaded."""


@functools.cache
def has_punkt() -> bool:
    """Whether nltk finds punkt on this machine. It is looked for once, and again after a download."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        return False
    return True


def load_rules() -> None:
    """Load lm-eval's rules, and punkt from the network unless it is here or ``HF_HUB_OFFLINE`` is set.

    lm-eval downloads punkt as it is imported, and waits and prints where there is no network. This neither prints nor
    waits longer than ``DOWNLOAD_SECONDS``. Without a network the sentence rules are skipped.

    Raises:
        ValueError: langdetect or nltk is not installed.
    """
    try:
        import langdetect
    except ModuleNotFoundError as error:
        raise ValueError(f"ifeval needs langdetect and nltk ({error}): pip install 'sekd[eval]'") from error
    langdetect.DetectorFactory.seed = 0  # else the language of a short text is found by chance
    if not has_punkt() and os.environ.get("HF_HUB_OFFLINE", "").lower() not in ("1", "true", "yes", "on"):
        _download_punkt()
    with _without_downloads():
        import lm_eval.tasks.ifeval.instructions_util  # noqa: F401


def _download_punkt() -> None:
    import nltk

    seconds = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_SECONDS)
    try:
        nltk.download("punkt_tab", quiet=True)  # False where it fails
    finally:
        socket.setdefaulttimeout(seconds)
        has_punkt.cache_clear()


@contextlib.contextmanager
def _without_downloads() -> Iterator[None]:
    """nltk downloads nothing, and nothing is printed."""
    import nltk

    download = nltk.download
    nltk.download = lambda *_, **__: False
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        nltk.download = download


def find_unknown_instruction(row: dict[str, Any]) -> str | None:
    """What is wrong with the instructions of a row, or None."""
    with _without_downloads():
        from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    ids = row["instruction_id_list"]
    if unknown := [name for name in ids if name not in INSTRUCTION_DICT]:
        return f"instruction_id_list has {unknown[0]!r}, which lm-eval does not know"
    return None if len(row["kwargs"]) == len(ids) else f"kwargs has {len(row['kwargs'])} entries for {len(ids)} ids"


def score_instructions(row: dict[str, Any], outputs: Sequence[str]) -> tuple[dict[str, Any], str | None]:
    """lm-eval's four scores of an output, and why the row is skipped, or None.

    The prompt-level scores are 0 or 1, the instruction-level ones a list with an entry for each instruction. A row is
    skipped if one of its instructions is of ``SENTENCE_RULES`` and punkt is not here: whether the output follows all
    its instructions is unknown. Rows are skipped by their instructions, never by the output, so the others are as fair
    a sample for one model as for another. The instruction-level lists still have the other instructions; without any,
    they are left out.
    """
    from lm_eval.tasks.ifeval import utils

    ids, arguments = row["instruction_id_list"], row["kwargs"]
    unknown = [] if has_punkt() else [rule for rule in SENTENCE_RULES if rule in ids]
    kept = [i for i, rule in enumerate(ids) if rule not in unknown]
    state = random.getstate()
    random.seed(0)  # rules draw what a row does not say
    try:
        checked = {**row, "instruction_id_list": [ids[i] for i in kept], "kwargs": [arguments[i] for i in kept]}
        scores = utils.process_results(checked, list(outputs))
    finally:
        random.setstate(state)
    if not unknown:
        return {name: value if isinstance(value, list) else float(value) for name, value in scores.items()}, None
    lists = {name: value for name, value in scores.items() if isinstance(value, list) and value}
    return lists, f"{', '.join(unknown)} needs nltk's punkt, which is not installed"
