"""The demo's task: arithmetic word problems in GSM8K's answer format, and a tokenizer that makes them easy to learn."""

import random
import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LARGEST = 40  # no number in a problem, given or computed, is larger
NAMES = ("Tom", "Mia", "Ben", "Ana", "Leo", "Zoe", "Sam", "Ivy", "Max", "Eva")
ITEMS = ("apples", "pens", "shells", "coins", "stamps", "cards", "books", "marbles", "beads", "nuts")
BOXES = ("boxes", "bags", "jars", "packs")
GAINS = ("buys {k} more", "finds {k} more", "wins {k} more", "gets {k} more from {other}")
LOSSES = ("loses {k}", "sells {k}", "gives {k} to {other}", "uses {k}")

# A token is a whole number, a word with the space before it (and the space after it if a number follows), or a
# piece of the `<<3+4=7>>7` notation. A number is therefore the same single token wherever it stands.
TOKEN_PATTERN = r"\d+|#### | = <<|>>| [+\-*] |[+\-*=]|\.\n| ?[A-Za-z]+(?: (?=\d))?|[.?,\n]|."
ANSWER_PATTERN = re.compile(r"#### (-?\d+)")


class _Story:
    """An unfinished problem: the sentences of the question and the worked lines of the answer."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.name, self.other = rng.sample(NAMES, 2)
        self.items = rng.choice(ITEMS)
        self.sentences: list[str] = []
        self.lines: list[str] = []
        self.total = 0

    def calculate(self, subject: str, left: int, sign: str, right: int, unit: str) -> int:
        """Add a worked line to the answer and return its result."""
        result = {"+": left + right, "-": left - right, "*": left * right}[sign]
        self.lines.append(f"{subject} {left} {sign} {right} = <<{left}{sign}{right}={result}>>{result} {unit}.")
        return result

    def begin(self) -> None:
        """Say what the person has at first: a plain number, two kinds, or some full boxes."""
        rng, kind = self.rng, self.rng.randrange(3)
        if kind == 0:
            self.total = rng.randint(5, 15)
            self.sentences.append(f"{self.name} has {self.total} {self.items}.")
        elif kind == 1:
            red, blue = rng.randint(2, 9), rng.randint(2, 6)
            self.sentences.append(f"{self.name} has {red} red and {blue} blue {self.items}.")
            self.total = self.calculate(f"{self.name} has", red, "+", blue, self.items)
        else:
            boxes, each = rng.randint(2, 5), rng.randint(2, 5)
            self.sentences.append(f"{self.name} has {boxes} {rng.choice(BOXES)} of {each} {self.items}.")
            self.total = self.calculate(f"{self.name} has", boxes, "*", each, self.items)

    def add_event(self) -> None:
        """Let the person gain or lose a few."""
        gain, k = self.rng.random() < 0.5, self.rng.randint(2, 6)
        event = self.rng.choice(GAINS if gain else LOSSES).format(k=k, other=self.other)
        self.sentences.append(f"{self.name} {event}.")
        self.total = self.calculate(f"{self.name} has", self.total, "+" if gain else "-", k, self.items)

    def finish(self) -> None:
        """Ask for the total, for another person's share compared with it, or for what a sale of it brings."""
        rng, kind = self.rng, self.rng.randrange(4)
        if kind == 0:
            more, k = rng.random() < 0.5, rng.randint(2, 6)
            self.sentences.append(f"{self.other} has {k} {'more' if more else 'fewer'} than {self.name}.")
            self.sentences.append(f"How many {self.items} does {self.other} have?")
            self.total = self.calculate(f"{self.other} has", self.total, "+" if more else "-", k, self.items)
        elif kind == 1:
            price = rng.randint(2, 3)
            self.sentences.append(f"{self.name} sells all for {price} dollars each.")
            self.sentences.append(f"How many dollars does {self.name} get?")
            self.total = self.calculate(f"{self.name} gets", self.total, "*", price, "dollars")
        else:
            self.sentences.append(f"How many {self.items} does {self.name} have?")


def _make_problem(rng: random.Random) -> dict[str, str] | None:
    """Make one problem; None if it has the wrong number of steps or its numbers leave 0..LARGEST."""
    story = _Story(rng)
    story.begin()
    for _ in range(rng.randint(1, 2)):
        story.add_event()
    story.finish()
    results = [int(line.split(">>")[1].split()[0]) for line in story.lines]
    if not 2 <= len(results) <= 4 or min(results) < 0 or max(results) > LARGEST:
        return None
    return {"question": " ".join(story.sentences), "answer": "\n".join([*story.lines, f"#### {story.total}"])}


def make_problems(n: int, seed: int) -> list[dict[str, str]]:
    """Return n problems, no two with the same question, so that any two slices of the list are disjoint."""
    rng = random.Random(seed)
    problems: dict[str, dict[str, str]] = {}
    while len(problems) < n:
        problem = _make_problem(rng)
        if problem is not None:
            problems.setdefault(problem["question"], problem)
    return list(problems.values())


def build_tokenizer(problems: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer over the problems' text, in which every number up to LARGEST is one token."""
    split = pre_tokenizers.Split(Regex(TOKEN_PATTERN), behavior="isolated")
    texts = (f"{problem['question']}\n{problem['answer']}" for problem in problems)
    pieces = {piece for text in texts for piece, _ in split.pre_tokenize_str(text)}
    specials = ["<pad>", "<eos>", "<unk>"]
    numbers = [str(number) for number in range(LARGEST + 1)]
    words = sorted(pieces.difference(specials, numbers))
    vocab = {piece: index for index, piece in enumerate([*specials, *numbers, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def extract_answer(text: str) -> str | None:
    """Return the number on the last `#### N` line, or None if there is no such line."""
    numbers = ANSWER_PATTERN.findall(text)
    return numbers[-1] if numbers else None
