"""HumanEval: 164 Python functions to write from their signature and docstring (Chen et al. 2021, arXiv:2107.03374).

An answer is right when the item's own tests pass. The answer runs in a jail and the tests in another: what a program is
kept from, and what not, is said in nanochat/execution.py. It has the standard library and no other packages, and is not
__main__, as in the official harness.
"""

import ast
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator

from nanochat.common import UserError
from nanochat.execution import check_program
from tasks.common import Conversation, Task, assistant, load_rows, user

FUTURE = re.compile(r"^from __future__ import .*\n?", re.MULTILINE)  # must stand first in a program
FENCE = re.compile(r"(?:`{3,}|~{3,})(?:[^\n`~]*\n)?")  # with what stands behind it: the name of the language
NAMED = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
MOST_FENCES = 20  # of an answer are looked at: the pieces between them are tried out in pairs
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
        program, tests = answer_program(conversation, answer), checker_program(conversation)
        return check_program(program, tests, conversation["entry_point"], TIMEOUT, unsafe=self.unsafe).success


def answer_program(item: Conversation, answer: str) -> str:
    """What comes before the function in the prompt, and the code that defines it: the last piece of the answer between
    two fences, or between one and an end of the answer, that is a program with such a function; in front of that the
    imports, functions and classes of earlier pieces without one. Where there is none, the prompt and its continuation:
    the last piece that begins with a space, or all of the answer.
    """
    fences = [match.span() for match in FENCE.finditer(answer)][:MOST_FENCES]
    starts, ends = [0, *(end for _, end in fences)], [*(start for start, _ in fences), len(answer)]
    pieces = [answer[start:end] for start, end in zip(starts, ends, strict=True)]
    for i in reversed(range(len(starts))):
        for end in ends[i:]:  # beyond the next one where a docstring has fences
            code = textwrap.dedent(answer[starts[i] : end])
            if defines(code, item["entry_point"]):
                program = before_function(item) + helpers(pieces[:i], item["entry_point"]) + code
                return "".join(FUTURE.findall(program)) + FUTURE.sub("", program)
    indented = [piece for piece in pieces if piece.strip() and piece.lstrip("\n")[0].isspace()]
    return str(item["prompt"] + (indented or [answer])[-1])


def helpers(pieces: list[str], function: str) -> str:
    """The imports, functions and classes of those pieces that are programs and do not define the function."""
    programs = [code for code in map(textwrap.dedent, pieces) if not defines(code, function)]
    kept = [node for code in programs for node in parse(code) if isinstance(node, ast.Import | ast.ImportFrom | NAMED)]
    return "".join(f"{ast.unparse(node)}\n" for node in kept)


def parse(code: str) -> list[ast.stmt]:
    """The statements of a program; none where it is not one."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def outside(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """These and what stands in them, as under an if or a try, but not in functions and classes."""
    for node in nodes:
        yield node
        if not isinstance(node, NAMED | ast.expr):
            yield from outside(ast.iter_child_nodes(node))


def defines(code: str, function: str) -> bool:
    """Whether this is a program that gives the name `function` to something."""
    if function not in code:
        return False
    body = list(outside(parse(code)))
    named = [node.name for node in body if isinstance(node, NAMED)]
    assigned = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    return function in named + [target.id for target in assigned if isinstance(target, ast.Name)]


def checker_program(item: Conversation) -> str:
    """What comes before the function, because the tests of three items use it, and the tests."""
    return f"{before_function(item)}\n\n{item['test']}\n\ncheck({item['entry_point']})\n"


def before_function(item: Conversation) -> str:
    """The imports of the prompt, and in four items a helper."""
    function = re.escape(item["entry_point"])
    return re.split(rf"^def {function}\b", item["prompt"], maxsplit=1, flags=re.MULTILINE)[0]
