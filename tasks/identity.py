"""Whether the model knows who it is: questions about its name, its maker and what it can do (made by
dev/gen_identity.py).

An answer is right when it says the expected things in any words around them. Does not: notice what else it says.
"""

import json
import re

from tasks.common import Conversation, Split, Task, check_split, load_rows


class Identity(Task):
    """Conversations about the assistant itself; dev and test hold wordings that train does not."""

    name = "Identity"
    eval_type = "generative"
    baseline = 0.0

    def __init__(self, split: Split = "test", start: int = 0, stop: int | None = None):
        super().__init__(start, stop)
        check_split(self.name, split)
        self.rows = load_rows("identity", "default", split, make="python -m dev.gen_identity")
        self.files = (self.rows.path,)

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[index]
        return {
            "messages": json.loads(row["messages"]),
            "intent": row["intent"],
            "expect": json.loads(row["expect"]),
        }

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        return says(answer, conversation["expect"])


def says(answer: str, expect: list[list[str]]) -> bool:
    """Whether, of every group, at least one string occurs in the answer, as whole words and in small or capital
    letters: "no" is not in "know", and "can" not in "can't".
    """
    text = answer.lower().replace("\u2019", "'")
    return all(any(re.search(rf"(?<!\w){re.escape(words)}(?!\w|'t\b)", text) for words in group) for group in expect)
