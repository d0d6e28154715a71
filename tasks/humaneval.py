"""HumanEval: 164 Python functions to write from their signature and docstring (Chen et al. 2021, arXiv:2107.03374).

An answer is right when the item's own tests pass. The answer runs in a jail and the tests in another: what a program is
kept from, and what not, is said in nanochat/execution.py. It has the standard library and no other packages.
"""

import re

from nanochat.common import UserError
from nanochat.execution import check_program
from tasks.common import Conversation, Task, assistant, load_rows, user

FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)  # one that is cut off at the end counts too
TIMEOUT = 5.0  # seconds; the slowest of the reference solutions takes 0.15 s


class HumanEval(Task):
    """There is only a test split. A conversation also has the item's `prompt`, `entry_point` and `test`. `unsafe`: run
    answers even where the machine cannot lock them in, which otherwise is a UserError.
    """

    name = "HumanEval"

    def __init__(
        self, split: str = "test", start: int = 0, stop: int | None = None, step: int = 1, unsafe: bool = False
    ):
        super().__init__(start, stop, step)
        self.unsafe = unsafe
        if split != "test":
            raise UserError(f"{self.name}: split={split}: there is only test")
        self.rows = load_rows("openai/openai_humaneval", "openai_humaneval", "test")
        self.files = (self.rows.path,)

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[index]
        question = f"Complete this Python function, and write all of it in one code block.\n\n{row['prompt'].strip()}"
        answer = f"```python\n{(row['prompt'] + row['canonical_solution']).strip()}\n```"
        item = {key: row[key] for key in ("task_id", "prompt", "entry_point", "test")}
        return {"messages": [user(question), assistant(answer)], **item}

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        program, tests = answer_program(conversation, extract_code(answer)), checker_program(conversation)
        return check_program(program, tests, conversation["entry_point"], TIMEOUT, unsafe=self.unsafe).success


def extract_code(answer: str) -> str:
    """The last fenced block of an answer, or all of it where there is none."""
    blocks = FENCE.findall(answer)
    return str(blocks[-1] if blocks else answer)


def answer_program(item: Conversation, code: str) -> str:
    """What comes before the function in the prompt, and the code. Code that does not define the function is taken as
    the continuation of the prompt.
    """
    function = re.escape(item["entry_point"])
    defined = re.search(rf"^(?:async )?def {function}\b|^{function}\s*=", code, re.MULTILINE)
    return f"{before_function(item) if defined else item['prompt']}{code}"


def checker_program(item: Conversation) -> str:
    """What comes before the function, because the tests of three items use it, and the tests."""
    return f"{before_function(item)}\n\n{item['test']}\n\ncheck({item['entry_point']})\n"


def before_function(item: Conversation) -> str:
    """The imports of the prompt, and in four items a helper."""
    function = re.escape(item["entry_point"])
    return re.split(rf"^def {function}\b", item["prompt"], maxsplit=1, flags=re.MULTILINE)[0]
