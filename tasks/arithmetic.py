"""Word problems of one to four steps, solved with the calculator in GSM8K's answer form (Cobbe et al. 2021).

Made for a model of a few million parameters: short sentences, common words, whole numbers of 1 to 999 all the way. What
is to be learned is which numbers to take and what to do with them; the calculator computes. A question belongs to one
split by the hash of its text. Nothing is read from disk.
"""

import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from functools import cache
from random import Random
from string import Formatter
from typing import NamedTuple

from nanochat.common import UserError
from tasks.arithmetic_templates import GIRLS, TEMPLATES, WORDS
from tasks.common import Conversation, Split, Task, assistant, check_split, item_rng, part, split_of, user
from tasks.gsm8k import extract_answer

LARGEST = 999  # no result is larger, and none is smaller than 1
RANGES = {"abcdef": (2, 60), "mnopq": (2, 12), "x": (50, 200)}  # of the numbers, by the letter that names them
SHE = {"he": "she", "He": "She"}
HE = {"he": "he", "He": "He"}


class Step(NamedTuple):
    """One operation: what its result is called, and the names of the numbers that it takes."""

    label: str
    left: str
    operator: str
    right: str


class Template(NamedTuple):
    """A story with its steps, and what has to be drawn for it."""

    story: str
    steps: tuple[Step, ...]
    ranges: tuple[tuple[str, int, int], ...]  # of each number: name, smallest, largest
    words: tuple[tuple[str, int], ...]  # of each list in WORDS: how many different words


class Arithmetic(Task):
    """`size` word problems of as many steps as `steps` allows: 1, 2, 3 or 4, each template as often as any other."""

    name = "Arithmetic"

    def __init__(
        self,
        split: Split = "train",
        steps: Sequence[int] = (1, 2),
        size: int = 20000,
        start: int = 0,
        stop: int | None = None,
    ):
        super().__init__(start, stop)
        check_split(self.name, split)
        if not steps or not set(steps) <= {1, 2, 3, 4}:
            raise UserError(f"{self.name}: steps={steps}: expected some of 1, 2, 3, 4, such as (1, 2)")
        self.split, self.steps, self.size = split, tuple(sorted(set(steps))), size
        self.numbers = [number for number, (_, *parts) in enumerate(TEMPLATES) if len(parts) in self.steps]

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> Conversation:
        rng = item_rng(self.name, self.split, self.steps, index)
        while True:
            number = rng.choice(self.numbers)
            template = parse_template(number)
            values = draw_values(template, rng)
            words = draw_words(template, rng)
            question = template.story.format_map(values | words)
            if split_of(question) == self.split:
                return make_conversation(question, number, values, words)

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        """The number after the last ####."""
        return extract_answer(answer) == Decimal(conversation["answer"])


@cache
def parse_template(number: int) -> Template:
    """Template `number` of TEMPLATES, taken apart."""
    story, *lines = TEMPLATES[number]
    steps = []
    for line in lines:
        label, expression = line.split(": ")
        left, operator, right = re.split("([-+*/])", expression)
        steps.append(Step(label, left, operator, right))
    names = sorted({name for _, name, _, _ in Formatter().parse(story) if name})
    ranges = ((name, *limits) for name in names for letters, limits in RANGES.items() if name in letters)
    words = Counter(name.rstrip("23") for name in names if name.rstrip("23") in WORDS)
    return Template(story, tuple(steps), tuple(ranges), tuple(words.items()))


def draw_values(template: Template, rng: Random) -> dict[str, int]:
    """Numbers with which every division is exact and every result is 1 to LARGEST; the results too, as r1, r2, ..."""
    while True:
        values = {name: rng.randint(smallest, largest) for name, smallest, largest in template.ranges}
        if solve(template, values):
            return values


def solve(template: Template, values: dict[str, int]) -> bool:
    """Add the results r1, r2, ... to `values`; False at the first that is not whole or not within 1 to LARGEST."""
    for number, step in enumerate(template.steps, 1):
        result = compute(values[step.left], step.operator, values[step.right])
        if not 1 <= result <= LARGEST:
            return False
        values[f"r{number}"] = result
    return True


def compute(left: int, operator: str, right: int) -> int:
    """The result of one operation, or 0 for a division that leaves a remainder."""
    match operator:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
    return 0 if left % right else left // right


def draw_words(template: Template, rng: Random) -> dict[str, str]:
    """A word for every name in the story that is not a number: for {name} and {name2} two different ones."""
    words: dict[str, str] = {}
    for kind, count in template.words:
        drawn = rng.sample(WORDS[kind], count)
        words |= {f"{kind}{place}" if place > 1 else kind: word for place, word in enumerate(drawn, 1)}
    return words | (SHE if words.get("name") in GIRLS else HE)


def make_conversation(question: str, number: int, values: dict[str, int], words: dict[str, str]) -> Conversation:
    """A question and its answer: for each step its label, a call of the calculator and the result in the text."""
    parts, text = [], ""
    steps = parse_template(number).steps
    for place, step in enumerate(steps, 1):
        label = step.label.format_map(values | words)
        result = str(values[f"r{place}"])
        parts.append(part("text", f"{text}{label[0].upper()}{label[1:]}: "))
        parts.append(part("python", f"{values[step.left]}{step.operator}{values[step.right]}"))
        parts.append(part("python_output", result))
        text = f"{result}. "
    parts.append(part("text", f"{result}.\n#### {result}"))
    return {
        "messages": [user(question), assistant(parts)],
        "steps": len(steps),
        "template": number,
        "answer": result,
    }
