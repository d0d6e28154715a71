"""
MMLU: multiple-choice questions on 57 subjects (Hendrycks et al. 2021, arXiv:2009.03300).

Splits: train is the published auxiliary_train (99,842 questions from other benchmarks), dev is validation (1,531), test
is test (14,042). The published "dev", five examples per subject to show in a prompt, is not used.
"""

from typing import Any

from nanochat.common import UserError
from tasks.common import (
    Conversation,
    Rows,
    Task,
    assistant,
    check_split,
    load_rows,
    render_choices,
    rows_path,
    user,
)

DATASET = "cais/mmlu"
PUBLISHED = {"train": ("auxiliary_train", "train"), "dev": ("all", "validation"), "test": ("all", "test")}
LETTERS = ("A", "B", "C", "D")


class MMLU(Task):
    """A conversation also has its `subject`, such as "astronomy" ("" in train)."""

    name = "MMLU"
    eval_type = "categorical"
    baseline = 0.25

    def __init__(self, split: str = "train", start: int = 0, stop: int | None = None, step: int = 1):
        super().__init__(start, stop, step)
        check_split(self.name, split)
        self.rows = load_questions(split)
        self.files = (self.rows.path,)

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        row: dict[str, Any] = self.rows[index]
        row = row.get("train", row)  # the hub wraps the rows of auxiliary_train in a column of that name
        messages = [user(render_choices(row["question"], LETTERS, row["choices"])), assistant(LETTERS[row["answer"]])]
        return {"messages": messages, "letters": list(LETTERS), "subject": row["subject"]}

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        return bool(answer.strip() == conversation["messages"][-1]["content"])


def load_questions(split: str) -> Rows:
    """The rows of one of our splits. Raises UserError, which says so where only the few-shot rows are at hand."""
    try:
        return load_rows(DATASET, *PUBLISHED[split])
    except UserError as error:
        if split == "dev" and rows_path(DATASET, "all", "dev").exists():
            fewshot = "the few-shot rows that are here (*_dev.csv) are another split; the files *_val.csv are needed"
            raise UserError(f"{error} ({fewshot})") from None
        raise
