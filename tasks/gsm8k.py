"""GSM8K: grade-school word problems with the steps written out (Cobbe et al. 2021, arXiv:2110.14168).

The published answers mark every computation as `<<48/2=24>>`; here those are calls of the calculator. Splits: the last
500 rows of the published training file are dev, the rest train; test is test. Only the number after `####` is judged.
"""

import re
from decimal import Decimal

from nanochat.calculator import use_calculator
from nanochat.common import UserError
from tasks.common import Conversation, Task, assistant, check_split, load_rows, message_text, part, user

DEV_ROWS = 500
ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>]*)>>")  # matches all 27,998 published; a single < is "less than"
NUMBER = re.compile(r"\s*([-\u2212]?)\$?([-\u2212]?)(\d[\d,]*(?:\.\d+)?|\.\d+)(?![\d/]|[.,]\d|[eE][-+]?\d)", re.ASCII)


class GSM8K(Task):
    """Splits train (6,973), dev (500) and test (1,319)."""

    name = "GSM8K"

    def __init__(self, split: str = "train", start: int = 0, stop: int | None = None, step: int = 1):
        super().__init__(start, stop, step)
        check_split(self.name, split)
        self.rows = load_rows("openai/gsm8k", "main", "test" if split == "test" else "train")
        self.files = (self.rows.path,)
        first_dev = max(0, len(self.rows) - DEV_ROWS)
        whole = range(len(self.rows))
        self.numbers = {"train": whole[:first_dev], "dev": whole[first_dev:], "test": whole}[split]
        if not self.numbers:
            held = f"{len(self.rows)} rows, the last {DEV_ROWS} of which are held out"
            again = f"rm {self.rows.path}; python -m nanochat.dataset --prefetch=all"
            raise UserError(f"{self.rows.path}: {held}; get it again: {again}")

    def num_examples(self) -> int:
        return len(self.numbers)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[self.numbers[index]]
        return {"messages": [user(row["question"]), assistant(answer_parts(row["answer"]))]}

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        expected = extract_answer(message_text(conversation["messages"][-1]))
        return expected is not None and extract_answer(answer) == expected


def answer_parts(answer: str) -> list[dict[str, str]]:
    """A published answer as parts: text, and each `<<expression=result>>` as a call of the calculator and its output.

    The output is what our calculator says, so that training shows what a chat will: .4 becomes 0.4, and 144.00 is 144.
    Two training rows divide with //, which it does not know and which leaves no remainder there; they say / here.
    """
    parts = []
    pieces = ANNOTATION.split(answer)
    for text, expression, result in zip(pieces[0::3], [*pieces[1::3], ""], [*pieces[2::3], ""], strict=True):
        if text:
            parts.append(part("text", text))
        if expression:
            expression = expression.replace("//", "/")
            parts.append(part("python", expression))
            parts.append(part("python_output", use_calculator(expression) or result))
    return parts


def extract_answer(text: str) -> Decimal | None:
    """The number after the last `####`, or None where there is none: "so #### $1,000." gives 1000. A minus, a dollar
    sign, commas between digits and what follows the number are tolerated, except what makes it another one: 3/4, 1e5.
    """
    _, marker, rest = text.rpartition("####")
    match = NUMBER.match(rest) if marker else None
    if not match or (match[1] and match[2]):
        return None
    number = Decimal(match[3].replace(",", ""))
    return -number if match[1] or match[2] else number
