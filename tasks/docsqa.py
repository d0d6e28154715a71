"""Questions about the documentation corpus: what a class, function or module of Python's library and of others is for.

An answer is the first sentence of its documentation string. In the form "open" the sentence is written (for training
only: there are too many right ways to say it), in the form "choice" it is found among four. Promises: the same corpus
gives the same items; no name and no sentence is in two splits. Does not: ask about private names, or about those that
mean several things, or whose first sentence is not one plain English sentence.
"""

import random
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

from nanochat.common import UserError, get_base_dir
from tasks.common import (
    Conversation,
    Split,
    Task,
    assistant,
    check_split,
    item_rng,
    message_text,
    render_choices,
    split_of,
    user,
)

LETTERS = "ABCD"
NAME_LENGTH = 40  # characters at most
SENTENCE_LENGTH = range(15, 121)  # characters
# How sections of the corpus begin: "function json.dumps(obj, *, ...)", an empty line, the text.
SECTION = re.compile(rf"^(module|class|function|method) ([\w.]{{1,{NAME_LENGTH}}})(?:\([^\n]*\))?\n\n([^\n]+)", re.M)
SENTENCE = re.compile(r"[A-Z].*?[a-z0-9)]\.(?=\s|$)")
NOT_PLAIN = re.compile(r">>>|::|://|[\\*|{}<>_=~^$#]|\b(?:e\.g|i\.e|cf|vs|al)\.$")
ACTS = ("function", "method")  # these do something; classes and modules are something
ASK_ACTS = [
    "What does {} do?",
    "What is {} for?",
    "What does the {kind} {} do?",
    "In one sentence, what does {} do?",
    "Tell me what {} does.",
    "Describe the {kind} {}.",
]
ASK_THINGS = [
    "What is {}?",
    "What is {} for?",
    "What is the {kind} {} for?",
    "In one sentence, what is {}?",
    "Tell me what {} is.",
    "Describe the {kind} {}.",
]


class DocsQA(Task):
    """Names of the documentation corpus with the first sentence of what is said about them."""

    name = "DocsQA"

    def __init__(
        self,
        split: Split = "test",
        form: Literal["open", "choice"] = "choice",
        corpus: str = "docs",
        start: int = 0,
        stop: int | None = None,
    ):
        super().__init__(start, stop)
        check_split(self.name, split)
        if form not in ("open", "choice"):
            raise UserError(f"DocsQA: form={form}: expected open or choice")
        self.form = form
        self.eval_type = "categorical" if form == "choice" else "generative"
        self.baseline = 1 / len(LETTERS) if form == "choice" else 0.0
        folder = get_base_dir() / "data" / corpus
        self.files = tuple(sorted(folder.glob("shard_*.parquet")))
        items = read_items(folder)
        self.items = [item for item in items if split_of(item[2]) == split]  # by sentence: many methods share one
        if form == "choice" and len({sentence for *_, sentence in self.items}) < len(LETTERS):
            raise UserError(f"DocsQA: {corpus} has too few names in {split}; {MAKE}")
        item_rng(self.name, split).shuffle(self.items)  # so that the first hundred are of every package

    def num_examples(self) -> int:
        return len(self.items)

    def get_example(self, index: int) -> Conversation:
        kind, name, sentence = self.items[index]
        rng = item_rng(self.name, self.form, name)
        question = rng.choice(ASK_ACTS if kind in ACTS else ASK_THINGS).format(name, kind=kind)
        if self.form == "open":
            return {"messages": [user(question), assistant(sentence)]}
        choices = [sentence, *self.others(sentence, rng)]
        rng.shuffle(choices)
        letter = LETTERS[choices.index(sentence)]
        return {
            "messages": [user(render_choices(question, LETTERS, choices)), assistant(letter)],
            "letters": list(LETTERS),
        }

    def others(self, sentence: str, rng: random.Random) -> list[str]:
        """Three sentences about other names of the split, all different."""
        chosen = [sentence]
        while len(chosen) < len(LETTERS):
            other = rng.choice(self.items)[2]
            if other not in chosen:
                chosen.append(other)
        return chosen[1:]

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        if self.form == "open":
            return super().evaluate(conversation, answer)
        return answer.strip() == message_text(conversation["messages"][-1])


# -----------------------------------------------------------------------------
# From the corpus to questions

MAKE = "make the corpus with: python -m nanochat.dataset --source=docs"


@lru_cache(maxsize=1)  # a training mixture takes the same corpus in both forms
def read_items(folder: Path) -> list[tuple[str, str, str]]:
    """(kind, name, sentence) of everything in the corpus that can be asked, sorted by name; names with several
    sentences are left out. Raises UserError where there is no such corpus.
    """
    found = defaultdict(set)
    for text in read_texts(folder):
        for kind, name, paragraph in SECTION.findall(text):
            if sentence := first_sentence(paragraph):
                found[name].add((kind, sentence))
    items = [(*next(iter(about)), name) for name, about in sorted(found.items()) if len(about) == 1]
    if not items:
        raise UserError(f"no documentation in {folder}; {MAKE}")
    return [(kind, name, sentence) for kind, sentence, name in items if not re.search(r"(^|\.)_", name)]


def read_texts(folder: Path) -> Iterator[str]:
    """The documents of a corpus, training and validation, a thousand in memory at a time."""
    import pyarrow.parquet as pq

    for path in sorted(folder.glob("*.parquet")):
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(1000, columns=["text"]):
                    yield from batch.column(0).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise UserError(f"{path} cannot be read ({error}); {MAKE}") from None


def first_sentence(paragraph: str) -> str:
    """The first sentence without backquotes, or "" where it is not a plain one of a fitting length."""
    match = SENTENCE.match(paragraph.replace("`", ""))
    sentence = match[0] if match else ""
    plain = sentence.isascii() and not NOT_PLAIN.search(sentence)
    return sentence if plain and len(sentence) in SENTENCE_LENGTH else ""
