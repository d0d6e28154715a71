"""Spelling: a model sees tokens and not letters, so it must learn what each token is made of.

SimpleSpelling writes a word letter by letter. SpellingBee counts a letter in a word twice, by hand and with the tool,
as nanochat's does: letters are hard for it, so it learns to work step by step and to check.

Words come from task_data/words (`python -m dev.gen_words`, or the large list through dev.import_task_data). A word
belongs to one split by its hash: no word that is tested was ever spelled in training.
"""

import re
from functools import cache
from pathlib import Path

from tasks.common import (
    Conversation,
    Split,
    Task,
    assistant,
    check_split,
    item_rng,
    load_rows,
    message_text,
    part,
    rows_path,
    split_of,
    user,
)
from tasks.gsm8k import extract_answer

MAKE = "python -m dev.gen_words"
SPELL = (
    "Spell the word: {}",
    "Spell: {}",
    "How do you spell {}?",
    "Please spell the word {}.",
    "What are the letters of the word {}?",
    "Write the word {} letter by letter.",
    "Which letters make up the word {}?",
    "Give me the letters of {}.",
)
COUNT = (
    "How many {c} are in {w}?",
    "How many {c} are in the word {w}?",
    "How many times does {c} appear in {w}?",
    "Count the letter {c} in {w}.",
    "How often does the letter {c} occur in the word {w}?",
    "What is the number of {c} in {w}?",
    "In the word {w}, how many {c} are there?",
    "Count how many times {c} is used in {w}.",
    "How many of the letters in {w} are {c}?",
    "Tell me how many {c} there are in {w}.",
)


@cache
def words_of(path: Path, split: str) -> tuple[str, ...]:
    """All words of a split, in alphabetical order."""
    words = load_rows("words", "default", "all", make=MAKE).table.column("word").to_pylist()
    return tuple(word for word in words if split_of(word) == split)


def letters(word: str) -> str:
    """A word spelled: letters with a space between, each of which is one token."""
    return " ".join(word)


class WordTask(Task):
    """Questions about words: `size` items go through the split's words, in a new order each time round."""

    def __init__(self, split: Split = "train", size: int = 1000, start: int = 0, stop: int | None = None):
        super().__init__(start, stop)
        check_split(self.name, split)
        self.split, self.size = split, size
        self.files = (rows_path("words", "default", "all"),)
        self.words = words_of(*self.files, split)

    def num_examples(self) -> int:
        return self.size

    def draw_word(self, index: int) -> str:
        """The word of item `index`."""
        turn, place = divmod(index, len(self.words))
        return self.words[shuffled(self.name, self.split, turn, len(self.words))[place]]


class SimpleSpelling(WordTask):
    """Write the letters of a word."""

    name, eval_type, baseline = "SimpleSpelling", "generative", 0.0

    def get_example(self, index: int) -> Conversation:
        rng = item_rng(self.name, self.split, index)
        word = self.draw_word(index)
        return {"messages": [user(rng.choice(SPELL).format(word)), assistant(letters(word))], "word": word}

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        """Every letter in order and apart from the next, by spaces, commas or dashes; case is free."""
        return re.split(r"[\s,\-]+", answer.strip(" .\n").lower()) == list(conversation["word"])


class SpellingBee(WordTask):
    """Count a letter in a word: by spelling it with a running count, then with the tool."""

    name, eval_type, baseline = "SpellingBee", "generative", 0.0

    def get_example(self, index: int) -> Conversation:
        rng = item_rng(self.name, self.split, index)
        word = self.draw_word(index)
        # Nine in ten ask for a letter that is there, as nanochat does: else 0 would nearly always be right.
        letter = rng.choice(word if rng.random() < 0.9 else "abcdefghijklmnopqrstuvwxyz")
        question = rng.choice(COUNT).format(c=letter, w=word)
        parts = [
            part("text", f"{letters(word)}\n{running_count(word, letter)}\n"),
            part("python", f"'{word}'.count('{letter}')"),
            part("python_output", str(word.count(letter))),
            part("text", f"\n#### {word.count(letter)}"),
        ]
        return {"messages": [user(question), assistant(parts)], "answer": str(word.count(letter))}

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        """The number after the last ####."""
        return extract_answer(answer) == extract_answer(message_text(conversation["messages"][-1]))


@cache
def shuffled(name: str, split: str, turn: int, count: int) -> tuple[int, ...]:
    order = list(range(count))
    item_rng(name, split, "order", turn).shuffle(order)
    return tuple(order)


def running_count(word: str, letter: str) -> str:
    """The hits one by one: "r 1 r 2 r 3" for strawberry; "none" where there is none."""
    hits = word.count(letter)
    return " ".join(f"{letter} {i}" for i in range(1, hits + 1)) or "none"
