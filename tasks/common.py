"""What every task is: a numbered list of conversations, and a judge of answers.

    class Capitals(Task):
        name, eval_type, baseline = "Capitals", "generative", 0.0
        def num_examples(self): ...                    # how many there are
        def get_example(self, index): ...              # conversation number `index`, the same every time
        def evaluate(self, conversation, answer): ...  # whether `answer` is right

A conversation is `{"messages": [...], ...}`, its last message the reference answer; a task may add keys of its own, and
a categorical one adds `letters`, the answers to choose from. Splits are train, dev and test and share no item: for
generated items `split_of` decides by the hash of what makes an item that item.
"""

import hashlib
import random
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from nanochat.common import UserError
from nanochat.conversation import parts_text
from nanochat.task_data import checked_path, download_rows, rows_path, write_rows  # noqa: F401  # write_rows: for dev/

Conversation = dict[str, Any]
Split = Literal["train", "dev", "test"]
SPLITS = ("train", "dev", "test")


class Task(ABC):
    """A sequence of conversations; `start`, `stop` and `step` take a part of them, as in range(). A `stop` beyond the
    end means the end. task[i] raises IndexError beyond the end.
    """

    name = "Task"
    eval_type: Literal["generative", "categorical"] = "generative"  # write an answer, or choose one of `letters`
    baseline = 0.0  # accuracy of guessing
    files: tuple[Path, ...] = ()  # that its conversations are read from: a run that resumes compares their bytes
    rows: "Rows | None" = None  # of a published task: what they are made of
    groups: tuple[str, ...] = ()  # those labels() whose accuracy is printed; the others are in the record

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1):
        if start < 0 or step < 1 or (stop is not None and stop < start):
            raise UserError(
                f"{self.name}: start={start} stop={stop} step={step}: expected 0 <= start <= stop, step >= 1"
            )
        self.start, self.stop, self.step = start, stop, step

    @abstractmethod
    def num_examples(self) -> int:
        """How many conversations there are before start, stop and step."""

    @abstractmethod
    def get_example(self, index: int) -> Conversation:
        """Conversation `index`, 0 <= index < num_examples(); the same on every call and machine."""

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        """Whether `answer` (the text an assistant wrote, without its tool calls) is right for this conversation."""
        raise NotImplementedError(f"{self.name} has no right answers; it is for training only")

    def flexible(self, conversation: Conversation, answer: str, right: bool) -> bool:
        """The same by a rule that forgives more, where the benchmark has two; `right` is what evaluate() says."""
        return right

    def labels(self, index: int) -> tuple[str, ...]:
        """The parts of the task that task[index] belongs to, such as its subject: each gets an accuracy of its own."""
        return ()

    @property
    def missing(self) -> int:
        """How many more rows than are at hand were published with what this is made of."""
        return max(0, self.rows.published - len(self.rows)) if self.rows else 0

    def __len__(self) -> int:
        return len(self.indices())

    def __getitem__(self, index: int) -> Conversation:
        return self.get_example(self.indices()[index])

    def __iter__(self) -> Iterator[Conversation]:
        return (self[index] for index in range(len(self)))

    def indices(self) -> range:
        count = self.num_examples()
        return range(self.start, count if self.stop is None else min(self.stop, count), self.step)


class TaskSequence(Task):
    """Several tasks one after the other: a curriculum. A task listed twice counts twice."""

    name = "TaskSequence"

    def __init__(self, tasks: Sequence[Task]):
        super().__init__()
        self.tasks = list(tasks)
        self.ends = list(accumulate(map(len, self.tasks)))
        self.files = tuple(sorted({file for task in self.tasks for file in task.files}))

    def num_examples(self) -> int:
        return self.ends[-1] if self.ends else 0

    def get_example(self, index: int) -> Conversation:
        which = bisect_right(self.ends, index)
        return self.tasks[which][index - (self.ends[which - 1] if which else 0)]


class TaskMixture(TaskSequence):
    """Several tasks shuffled together, the same way every time. A task listed twice counts twice."""

    name = "TaskMixture"

    def __init__(self, tasks: Sequence[Task], seed: int = 42):
        super().__init__(tasks)
        self.order = list(range(super().num_examples()))
        random.Random(seed).shuffle(self.order)

    def get_example(self, index: int) -> Conversation:
        return super().get_example(self.order[index])


# -----------------------------------------------------------------------------
# Messages


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(content: str | list[dict[str, str]]) -> dict[str, Any]:
    """What the assistant says: a text, or parts {"type": text | python | python_output, "text": ...}."""
    return {"role": "assistant", "content": content}


def part(kind: Literal["text", "python", "python_output"], text: str) -> dict[str, str]:
    return {"type": kind, "text": text}


def message_text(message: dict[str, Any]) -> str:
    """What a reader sees of a message: its text, without tool calls and their output."""
    content = message["content"]
    return content if isinstance(content, str) else parts_text(content)


def render_choices(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """A multiple-choice question as the user asks it. The letter stands after its choice and straight behind a sign, so
    that it is the very token that the assistant answers with (nanochat's finding).
    """
    lines = [f"- {choice}={letter}" for letter, choice in zip(letters, choices, strict=True)]
    return "\n".join([question, *lines, "", "Answer with the letter alone."])


# -----------------------------------------------------------------------------
# Splits of generated items


def check_split(name: str, split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"{name}: split={split}: expected {', '.join(SPLITS)}")


def split_of(key: str) -> Split:
    """The split that an item belongs to, by the hash of what identifies it: 10 % test, 5 % dev, the rest train."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100
    return "test" if place < 10 else "dev" if place < 15 else "train"


def item_rng(*identity: object) -> random.Random:
    """A generator that depends on nothing but the given values, such as ("SpellingBee", split, index)."""
    return random.Random("/".join(map(str, identity)))


# -----------------------------------------------------------------------------
# Rows on disk: $NANOCHAT_BASE_DIR/task_data/<dataset>/<subset>/<split>.parquet


# (dataset, subset, split) -> rows as published: fewer are a part, and what is measured on them is called partial.
PUBLISHED_ROWS = {
    ("openai/gsm8k", "main", "train"): 7473,
    ("openai/gsm8k", "main", "test"): 1319,
    ("cais/mmlu", "auxiliary_train", "train"): 99842,
    ("cais/mmlu", "all", "dev"): 285,
    ("cais/mmlu", "all", "validation"): 1531,
    ("cais/mmlu", "all", "test"): 14042,
    ("allenai/ai2_arc", "ARC-Easy", "train"): 2251,
    ("allenai/ai2_arc", "ARC-Easy", "validation"): 570,
    ("allenai/ai2_arc", "ARC-Easy", "test"): 2376,
    ("allenai/ai2_arc", "ARC-Challenge", "train"): 1119,
    ("allenai/ai2_arc", "ARC-Challenge", "validation"): 299,
    ("allenai/ai2_arc", "ARC-Challenge", "test"): 1172,
    ("openai/openai_humaneval", "openai_humaneval", "test"): 164,
    ("HuggingFaceTB/smol-smoltalk", "default", "train"): 460341,
}


class Rows(Sequence[dict[str, Any]]):
    """The rows of a parquet file, read as columns and handed out as dicts one at a time. `published` is how many there
    should be (0 = unknown).
    """

    def __init__(self, path: Path, published: int = 0):
        import pyarrow.parquet as pq

        self.path, self.published = path, published
        try:
            self.table = pq.read_table(path)
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise UserError(f"{path} cannot be read ({error}); delete it and get it again") from None

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: Any) -> Any:
        return {name: self.table.column(name)[index].as_py() for name in self.table.column_names}


def load_rows(dataset: str, subset: str, split: str, make: str | None = None) -> Rows:
    """A split from task_data, checked against its manifest. Where it is absent it is fetched from the Hugging Face hub
    as `dataset` (by one process, the others wait), or, when `make` names the command that makes it, that is said.
    Raises UserError with what to run where it cannot be had.
    """
    path = rows_path(dataset, subset, split)
    if not path.exists():
        if make:
            raise UserError(f"no {path}; make it with: {make}")
        download_rows(dataset, subset, split)
    checked = checked_path(dataset, subset, split, *([make] if make else []))
    return Rows(checked, PUBLISHED_ROWS.get((dataset, subset, split), 0))
