"""GSM8K: grade-school word problems with the steps written out (Cobbe et al. 2021, arXiv:2110.14168).

The published answers mark every computation as `<<48/2=24>>`; here those are calls of the calculator. Splits: the last
500 rows of the published training file are dev, the rest train; test is test.

Right is, as in lm-eval's strict-match, who has the right number after `####`; how it is written does not matter, only
that it is one number (see extract_answer): of "72 or 73" and "1 million" lm-eval takes 72 and 1, we take none.
flexible() also takes the last number anywhere, as lm-eval's flexible-extract does, whose patterns these are: 73 and 1;
chat_eval reports that as well where it differs.
"""

import re
from decimal import Decimal, InvalidOperation

from nanochat.calculator import use_calculator
from nanochat.common import UserError
from tasks.common import Conversation, Task, assistant, check_split, load_rows, message_text, part, user

DEV_ROWS = 500
ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>]*)>>")  # matches all 27,998 published; a single < is "less than"
COMMA = r"(?:,|\{,\}|\\,)"  # between thousands: plain, and two ways of LaTeX
MARK = r"[\s*_`\\$\u00a3\u20ac\u00a5]"  # what a number is written with: bold, mathematics, money
NUMBER = re.compile(
    rf"""
    (?:{MARK}|boxed\{{)* ([-+\u2212]?) {MARK}* ([-+\u2212]?)
    ((?:[1-9][0-9]{{0,2}}(?:{COMMA}[0-9]{{3}})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)
    (?![.,'\u2019_\u202f]?[0-9]|[eE][-+]?[0-9]|{COMMA}[0-9]|\\[dt]?frac)  # the rest of another number
    (?![\u00b2\u00b3\u00bc-\u00be\u2070-\u2079\u2150-\u215e])  # a power or a fraction that is one character
    (?![^\S\n]*[-+*x/:^\u00d7\u00f7\u2010-\u2015\u2212]*[^\S\n]*[0-9])  # a fraction, a range, a calculation
    (?![^\S\n]*(?:(?:or|to|and)[^\S\n]*\$?[0-9]|hundred|thousand|million|billion|dozen))  # 72 or 73, 1 million
    """,
    re.VERBOSE | re.IGNORECASE,
)
FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


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

    def flexible(self, conversation: Conversation, answer: str, right: bool) -> bool:
        number = last_number(answer)
        return right or (number is not None and number == extract_answer(message_text(conversation["messages"][-1])))


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
    """The number after the last `####`, or None where there is none: "#### **$1,000.** That is" gives 1000. A sign, a
    currency, bold, a box in LaTeX, commas between thousands and what follows the number are tolerated, except what
    makes it another one, or one of several: 3/4, 72 1/2, 72-73, 72 or 73, 1 million, 1e5, 3,14, 1'000.
    """
    _, marker, rest = text.rpartition("####")
    match = NUMBER.match(rest) if marker else None
    if not match or (match[1] and match[2]):
        return None
    number = Decimal(re.sub(COMMA, "", match[3]))
    return number if (match[1] or match[2]) in ("", "+") else -number


def last_number(text: str) -> Decimal | None:
    """The last number in a text, as lm-eval's flexible-extract finds it; None where that is none."""
    found = [match.group() for match in FLEXIBLE.finditer(text)]
    try:
        return Decimal(re.sub(r"[,$]|\.$", "", found[-1])) if found else None
    except InvalidOperation:
        return None
