"""Keep each answer of a model as it comes, so that a stopped evaluation resumes where it was."""

import hashlib
import json
import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any


class AnswerFile:
    """Answers in a file of JSON lines: a header, then one line for each answer.

    A line is written at once, so ``kill -9`` loses no answer. A line that is cut off ends what can be read.

    Args:
        path: the file; a file with another header, or without one, is replaced.
        header: all that the answers depend on beside the request.
    """

    def __init__(self, path: str, header: dict[str, Any]) -> None:
        self.path, self.answers = path, dict[str, Any]()
        first = _write_header(header)
        size = self._read(first)
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        self.file = open(path, "r+" if size else "w", encoding="utf-8")  # noqa: SIM115  # close() closes it
        self.file.truncate(size)
        self.file.seek(0, os.SEEK_END)
        if not size:
            self.file.write(first)
            self.file.flush()

    def _read(self, first: str) -> int:
        """Read the answers, and return the number of bytes of the whole lines."""
        if not os.path.isfile(self.path):
            return 0
        size = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file):
                try:
                    entry = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    entry = None
                if number == 0:
                    if line.decode("utf-8", "replace") != first:
                        return 0
                elif not isinstance(entry, list) or len(entry) != 2:
                    break
                else:
                    self.answers[entry[0]] = entry[1]
                size += len(line)
        return size

    def put(self, key: str, answer: Any) -> None:
        self.answers[key] = answer
        self.file.write(json.dumps([key, answer]) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def is_begun(path: str, header: dict[str, Any]) -> bool:
    """Whether there is a file of answers with this header: an evaluation that has not ended."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.readline() == _write_header(header).encode()


def _write_header(header: dict[str, Any]) -> str:
    return json.dumps(header, sort_keys=True) + "\n"


class KeepingLM:
    """An lm-eval model whose answers are kept in a file, and read from it where they are there.

    A request is identified by its kind, its arguments and its ``idx``: the round of a sampled prompt. Equal requests
    of one call have one answer each.

    Args:
        lm: the model. Everything but its answers is read from it.
        file: where the answers are.
        on_answer: called with the number of new answers, for a progress bar.
        shrink: called when a batch does not fit into memory. It makes the batches smaller, or raises an error.
        is_out_of_memory: whether an exception means that.
    """

    def __init__(
        self,
        lm: Any,
        file: AnswerFile,
        on_answer: Callable[[int], None],
        shrink: Callable[[Any, Exception], None],
        is_out_of_memory: Callable[[Exception], bool],
    ) -> None:
        self.lm, self.file, self.on_answer = lm, file, on_answer
        self.shrink, self.is_out_of_memory = shrink, is_out_of_memory

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lm, name)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[Any]:
        return [tuple(answer) for answer in self._answer("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[Any]:
        return self._answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[Any]:
        return self._answer("generate_until", requests)

    def _answer(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        keys, counts = [], Counter[str]()
        for request in requests:
            arguments = json.dumps([kind, request.idx, *request.args], sort_keys=True, default=str)
            counts[arguments] += 1
            keys.append(hashlib.sha256(f"{counts[arguments]} {arguments}".encode()).hexdigest())
        while missing := [i for i, key in enumerate(keys) if key not in self.file.answers]:
            hook = _Hook(self, kind, [(keys[i], requests[i]) for i in missing])
            self.lm.set_cache_hook(hook)
            too_large: Exception | None = None
            try:
                answers = getattr(self.lm, kind)([requests[i] for i in missing], disable_tqdm=True)
            except (RuntimeError, MemoryError) as error:
                if not self.is_out_of_memory(error):
                    raise
                too_large = error.with_traceback(None)  # its frames hold the tensors of the batch
            if too_large is not None:
                self.shrink(self.lm, too_large)
                continue
            for i, answer in zip(missing, answers, strict=True):  # those that the hook was not told
                if keys[i] not in self.file.answers:
                    self.file.put(keys[i], answer)
                    self.on_answer(1)
        return [self.file.answers[key] for key in keys]


class _Hook:
    """What an lm-eval model calls for each finished request (``lm_eval.api.model.CacheHook``)."""

    def __init__(self, keeper: KeepingLM, kind: str, requests: Sequence[tuple[str, Any]]) -> None:
        self.keeper, self.kind = keeper, kind
        self.waiting = defaultdict[Any, deque[str]](deque)
        for key, request in requests:
            self.waiting[self._name(request.args)].append(key)

    def _name(self, arguments: Sequence[Any]) -> Any:
        # vLLM's class reports other generation options than it was given; those of a task are all the same.
        return arguments[0] if self.kind == "generate_until" else tuple(arguments)

    def add_partial(self, kind: str, arguments: Sequence[Any], answer: Any) -> None:
        if kind == self.kind and self.waiting[self._name(arguments)]:
            self.keeper.file.put(self.waiting[self._name(arguments)].popleft(), answer)
            self.keeper.on_answer(1)
