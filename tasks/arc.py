"""ARC: multiple-choice science questions from schools, easy and challenging (Clark et al. 2018, arXiv:1803.05457).

Splits are the published ones; dev is their validation. Most questions have four choices, a few three or five; some
number them 1 to 4, which become A to D here.
"""

from nanochat.common import UserError
from tasks.common import Conversation, Task, assistant, check_split, load_rows, render_choices, user

SUBSETS = ("ARC-Easy", "ARC-Challenge")
PUBLISHED = {"train": "train", "dev": "validation", "test": "test"}
LETTERS = {"1": "A", "2": "B", "3": "C", "4": "D", "5": "E"}


class ARC(Task):
    """`subset` is ARC-Easy or ARC-Challenge, and is the name of the task."""

    eval_type = "categorical"
    baseline = 0.25

    def __init__(
        self,
        subset: str = "ARC-Easy",
        split: str = "train",
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ):
        if subset not in SUBSETS:
            raise UserError(f"ARC: subset={subset}: expected {' or '.join(SUBSETS)}")
        self.name = subset
        super().__init__(start, stop, step)
        check_split(self.name, split)
        self.rows = load_rows("allenai/ai2_arc", subset, PUBLISHED[split])
        self.files = (self.rows.path,)

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[index]
        letters = [LETTERS.get(label, label) for label in row["choices"]["label"]]
        answer = LETTERS.get(row["answerKey"], row["answerKey"])
        question = render_choices(row["question"], letters, row["choices"]["text"])
        return {"messages": [user(question), assistant(answer)], "letters": letters, "id": row["id"]}

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        return bool(answer.strip() == conversation["messages"][-1]["content"])
