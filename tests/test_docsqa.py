"""Questions made from the documentation corpus: clean pairs, splits that share nothing, one right letter."""

from collections import Counter
from itertools import product
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dev.gen_docs import collect_docs
from nanochat.common import UserError
from nanochat.conversation import check_messages
from tasks.common import Split, message_text
from tasks.docsqa import LETTERS, DocsQA, first_sentence, read_items

SPLITS: tuple[Split, ...] = ("train", "dev", "test")
VERBS = "Adds Buys Cleans Draws Eats Finds Gives Hides Keeps Lists Makes Opens".split()
THINGS = "apples books chairs doors eggs flags grapes horses inks jars".split()
ODD = '''
class Shop:
    """A place that sells things. Open on weekdays."""
    def close(self):
        """Close the `Shop` for today."""
    def __enter__(self):
        """Open the shop for a while."""
def _private(a):
    """This one is nobody's business."""
def unfinished(a):
    """This sentence never ends"""
def example(a):
    """Return a dict such as {1: 2} here."""
class Twice:
    """Something else that is said."""
    def same(self):
        """First meaning of the name."""
class Twice:
    """Another meaning of the name."""
'''


@pytest.fixture
def corpus(base_dir: Path, tmp_path: Path) -> Path:
    """A corpus made by the same functions as the real one, of one module with 120 functions and odd cases."""
    functions = [
        f'def {verb.lower()}_{thing}(basket, *rest):\n    """{verb} all the {thing} in the basket.\n\n    More."""\n'
        for verb, thing in product(VERBS, THINGS)
    ]
    source = tmp_path / "shop.py"
    source.write_text('"""Everything for a shop."""\n' + "".join(functions) + ODD)
    documents = [text for _, text in collect_docs({"shop": source}, [], Counter(), Counter())]
    folder = base_dir / "data" / "docs"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"text": documents}), folder / "shard_00000.parquet")
    return folder


def test_names_come_with_the_first_sentence_of_what_is_said_about_them(corpus):
    items = {name: (kind, sentence) for kind, name, sentence in read_items(corpus)}
    assert items["shop"] == ("module", "Everything for a shop.")
    assert items["shop.Shop"] == ("class", "A place that sells things.")
    assert items["Shop.close"] == ("method", "Close the Shop for today.")
    assert items["shop.buys_books"] == ("function", "Buys all the books in the basket.")


def test_private_odd_and_ambiguous_names_are_left_out(corpus):
    names = {name for _, name, _ in read_items(corpus)}
    assert not names & {"shop._private", "Shop.__enter__", "shop.unfinished", "shop.example", "shop.Twice"}
    assert "Twice.same" in names
    assert len(names) == len(VERBS) * len(THINGS) + 4


@pytest.mark.parametrize(
    ("paragraph", "sentence"),
    [
        ("Return the `value` of it. And more.", "Return the value of it."),
        ("Return index.html, or 1.5 of it.  And more.", "Return index.html, or 1.5 of it."),
        ("Use this, e.g. for a test of it.", ""),  # the dot ends no sentence
        ("lower case at the start of it.", ""),
        ("Too short.", ""),
        ("Long " + "and long " * 20 + "sentence.", ""),
        ("Return caf\u00e9 or another place.", ""),
        ("A paragraph without an end", ""),
        (">>> print('This is an example.')", ""),
        ("See https://example.org for more of it.", ""),
    ],
)
def test_only_a_plain_first_sentence_is_taken(paragraph, sentence):
    assert first_sentence(paragraph) == sentence


def test_splits_share_no_name_and_no_sentence_and_lose_none(corpus):
    items = {split: DocsQA(split).items for split in SPLITS}
    for field in (1, 2):
        found = [{item[field] for item in items[split]} for split in SPLITS]
        assert len(set.union(*found)) == sum(map(len, found))
    assert sorted(sum(items.values(), [])) == sorted(read_items(corpus))


def test_an_open_answer_is_the_sentence_and_is_never_judged(corpus):
    task = DocsQA("train", "open")
    assert (task.eval_type, task.baseline) == ("generative", 0.0)
    for (_, name, sentence), conversation in zip(task.items, task, strict=True):
        check_messages(conversation["messages"])
        question, answer = map(message_text, conversation["messages"])
        assert name in question
        assert answer == sentence
    with pytest.raises(NotImplementedError, match="training only"):
        task.evaluate(task[0], task.items[0][2])


def test_exactly_one_letter_of_four_different_sentences_is_right(corpus):
    for split in SPLITS:
        task = DocsQA(split, "choice")
        assert (task.eval_type, task.baseline) == ("categorical", 0.25)
        for (_, name, sentence), conversation in zip(task.items, task, strict=True):
            question, letter = map(message_text, conversation["messages"])
            assert name in question
            assert f"- {sentence}={letter}\n" in question
            assert conversation["letters"] == list(LETTERS)
            assert [task.evaluate(conversation, other) for other in LETTERS] == [letter == other for other in LETTERS]
            choices = [line[2:-2] for line in question.splitlines() if line.startswith("- ")]
            assert len(set(choices)) == len(LETTERS)
            assert set(choices) <= {item[2] for item in task.items}


def test_the_right_letter_is_anywhere(corpus):
    letters = Counter(message_text(conversation["messages"][-1]) for conversation in DocsQA("train"))
    assert letters.keys() == set(LETTERS)
    assert max(letters.values()) < 0.4 * letters.total()


def test_items_are_the_same_every_time_and_a_part_is_a_part(corpus):
    whole = list(DocsQA("train"))
    read_items.cache_clear()
    assert list(DocsQA("train")) == whole
    assert list(DocsQA("train", start=3, stop=9)) == whole[3:9]
    assert DocsQA("train")[5] == whole[5]  # also when asked alone


def test_a_missing_or_other_corpus_names_the_command_that_makes_it(base_dir):
    with pytest.raises(UserError, match="python -m nanochat.dataset --source=docs"):
        DocsQA("test")
    folder = base_dir / "data" / "stories"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"text": ["Once upon a time."]}), folder / "shard_00000.parquet")
    with pytest.raises(UserError, match="no documentation in .*stories"):
        DocsQA("test", corpus="stories")


def test_a_damaged_shard_and_a_wrong_form_are_said(corpus):
    with pytest.raises(UserError, match="form=closed: expected open or choice"):
        DocsQA("test", "closed")  # type: ignore[arg-type]
    (corpus / "shard_00001.parquet").write_bytes(b"PAR1 not really")
    read_items.cache_clear()
    with pytest.raises(UserError, match="shard_00001.parquet cannot be read"):
        DocsQA("test")
