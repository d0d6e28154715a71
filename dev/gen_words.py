"""A word list for the spelling tasks, taken from a corpus that is already here: no download.

    python -m dev.gen_words
    python -m dev.gen_words --corpus=climbmix --min-count=10

Writes task_data/words/default/all.parquet, one row {word} each, in alphabetical order. The larger list that nanochat
uses (words_alpha, 370,000 words) is imported with: python -m dev.import_task_data FOLDER
"""

from nanochat.configurator import Positive, configure

# Words
corpus: str | None = None  # directory name in $NANOCHAT_BASE_DIR/data (None = the only one there)
min_count: Positive = 2  # how often a word must occur: typing mistakes and names of variables rarely do
max_words: Positive = 50000  # the most frequent ones are kept
max_chars: Positive = 200_000_000  # how much text to look at
overwrite = False  # replace a word list that is there
settings = configure(__name__)

import re
from collections import Counter
from collections.abc import Iterable

from nanochat.common import UserError, run_main
from nanochat.corpus import iter_text, load_corpus
from tasks.common import rows_path, write_rows

WORD = re.compile(r"(?<![\w'.\-])[a-z]{3,12}(?![\w'(=\-]|\.\w)")  # lower case, no part of a name, a path or a call


def main() -> None:
    path = rows_path("words", "default", "all")
    if path.exists() and not overwrite:
        print(f"words: {path} is there already (--overwrite replaces it)")
        return
    text = load_corpus(corpus)
    words = frequent_words(iter_text(text.train), min_count, max_words, max_chars)
    if not words:
        raise UserError(f"no word occurs {min_count} times in {text.path}; lower --min-count or take a larger corpus")
    write_rows("words", "default", "all", [{"word": word} for word in words], f"corpus {text.name}")
    print(f"words: {len(words):,} that occur at least {min_count} times in {text.name}, written to {path}")


def frequent_words(texts: Iterable[Iterable[object]], at_least: int, at_most: int, max_chars: int) -> list[str]:
    """The most frequent lower-case words of 3 to 12 letters in the first max_chars of text, in alphabetical order."""
    counts: Counter[str] = Counter()
    seen = 0
    for text in (str(value) for batch in texts for value in batch):
        if seen >= max_chars:
            break
        seen += len(text)
        counts.update(WORD.findall(text))
    frequent = sorted((word for word in counts if counts[word] >= at_least), key=lambda word: (-counts[word], word))
    return sorted(frequent[:at_most])


if __name__ == "__main__":
    run_main(main)
