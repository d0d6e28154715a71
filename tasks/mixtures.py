"""What the chat stages train on and are measured by, by name.

`default` is nanochat's mixture of January 2026 and needs downloads; `offline` needs none: every item is generated here,
or taken from the documentation corpus. The sizes of `offline` are for a laptop that trains for minutes. Any other name
is a file of the user's own conversations (tasks/customjson.py), of which every 20th is held out for validation.
"""

from pathlib import Path

from nanochat.common import UserError, get_base_dir
from tasks.arc import ARC
from tasks.arithmetic import Arithmetic
from tasks.common import Conversation, Split, Task, TaskMixture
from tasks.customjson import CustomJSON
from tasks.docsqa import DocsQA
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.identity import Identity
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee

# Every task that chat_eval knows, on its test split.
EVALUATIONS = {
    "ARC-Easy": lambda: ARC("ARC-Easy", "test"),
    "ARC-Challenge": lambda: ARC("ARC-Challenge", "test"),
    "MMLU": lambda: MMLU("test"),
    "GSM8K": lambda: GSM8K("test"),
    "HumanEval": lambda: HumanEval("test"),
    "SpellingBee": lambda: SpellingBee("test", size=256),
    "SimpleSpelling": lambda: SimpleSpelling("test", size=500),
    "Identity": lambda: Identity("test"),
    "DocsQA": lambda: DocsQA("test", form="choice", stop=200),
    "Arithmetic": lambda: Arithmetic("test", steps=(1, 2), size=500),
    "Arithmetic-Hard": lambda: Arithmetic("test", steps=(3, 4), size=500),
}
CHATCORE = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")
CATEGORICAL = CHATCORE[:3]  # those with letters to choose from
OFFLINE = ("Identity", "SimpleSpelling", "SpellingBee", "DocsQA", "Arithmetic", "Arithmetic-Hard")

# Asked at the end of each stage, to read the answers.
SAMPLES = (
    "Who are you?",
    "Spell the word: dog",
    "How many r are in strawberry?",
    "Anna has 5 apples. She buys 7 more. How many apples does Anna have?",
    "What can you do?",
)


class Every(Task):
    """Each `step`-th conversation of a task, or with `others` all but those."""

    def __init__(self, task: Task, step: int, others: bool):
        super().__init__()
        self.files = task.files
        self.task, self.numbers = task, [i for i in range(len(task)) if (i % step > 0) == others]

    def num_examples(self) -> int:
        return len(self.numbers)

    def get_example(self, index: int) -> Conversation:
        return self.task[self.numbers[index]]


def file_mixture(name: str, split: Split) -> Task:
    """The user's own file; UserError where the name is neither that nor a mixture's."""
    if not Path(name).is_file():
        raise UserError(
            f"--mixture={name}: expected default, offline, or a file of conversations (tasks/customjson.py)"
        )
    conversations = CustomJSON(name)
    if len(conversations) < 2:
        raise UserError(f"--mixture={name}: one conversation; give two or more, because every 20th is held out")
    return TaskMixture([Every(conversations, step=20, others=split == "train")])


def published_identity() -> Task:
    """As many conversations about the model itself as nanochat's mixtures have: 1,000."""
    return CustomJSON(get_base_dir() / "identity_conversations.jsonl", stop=1000)


def mid_mixture(name: str, split: Split) -> Task:
    """Midtraining: the chat format, tools and a broad range of questions."""
    train = split == "train"
    if name == "offline":
        tasks: list[Task] = [
            SimpleSpelling(split, size=40000 if train else 100),
            SpellingBee(split, size=8000 if train else 40),
            Arithmetic(split, steps=(1, 2), size=20000 if train else 100),
            DocsQA(split, form="open", stop=4000 if train else 40),
            DocsQA(split, form="choice", stop=4000 if train else 40),
            Identity(split),
        ]
    elif name != "default":
        return file_mixture(name, split)
    else:
        tasks = [
            SmolTalk(split, stop=460000 if train else 500),  # general conversations
            MMLU(split, stop=100000 if train else 100),  # multiple choice
            GSM8K(split, stop=None if train else 100),  # arithmetic with the calculator
            SimpleSpelling(split, size=200000 if train else 100),
            SpellingBee(split, size=80000 if train else 100),
        ]
        tasks += [published_identity()] * 2 if train else []
    return TaskMixture(tasks)


def sft_mixture(name: str, split: Split) -> Task:
    """SFT: the questions that the assistant will be asked, in the form in which it will be asked them."""
    train = split == "train"
    if name == "offline":
        tasks: list[Task] = [
            SimpleSpelling(split, size=40000 if train else 100),
            SpellingBee(split, size=6000 if train else 40),
            Arithmetic(split, steps=(1, 2), size=10000 if train else 100),
            Arithmetic(split, steps=(3, 4), size=200 if train else 20),  # few: RL is to find out the rest
            DocsQA(split, form="choice", stop=3000 if train else 40),
            Identity(split),
        ]
    elif name != "default":
        return file_mixture(name, split)
    else:
        tasks = [
            ARC("ARC-Easy", split, stop=None if train else 100),
            ARC("ARC-Challenge", split, stop=None if train else 100),
            GSM8K(split, stop=None if train else 100),
            SmolTalk(split, stop=10000 if train else 200),
            SimpleSpelling(split, size=300 if train else 50),
            SpellingBee(split, size=300 if train else 50),
        ]
        tasks += [published_identity()] if train else []
    return TaskMixture(tasks)


def rl_task(name: str, split: Split) -> Task:
    """Problems with a known answer, for RL."""
    if name == "GSM8K":
        return GSM8K(split)
    return Arithmetic(
        split, steps=(3, 4) if name == "Arithmetic-Hard" else (1, 2), size=20000 if split == "train" else 500
    )
