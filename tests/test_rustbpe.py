"""The crate against its slow twin, against PyPI's rustbpe (merges) and against tiktoken (splits and ids)."""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import typing
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

import rustbpe
from nanochat.tokenizer import expand_merges
from scripts.tok_eval import load_reference_encoder
from tests.reference import bpe

ROOT = Path(__file__).parents[1]
PATTERNS = list(rustbpe.PATTERNS)

ENGLISH = (
    "It's the 2nd of May, 1984; they'll've paid $12,345.67 (or so) -- DON'T ask!\n\n"
    '  We\u2019re "fine".\t\r\n\r\n   \n'
    "The cat sat on the mat that the other cat had sat on before. "
) * 3
SCRIPTS = (
    "Привет, мир! 你好世界 안녕하세요 γειά σου नमस्ते שלום 🙂👩‍👩‍👧 e\u0301 "
    "x\u00a0y\u3000z ①②½ ٣٤٥ \u017fS'\u017f 'S'LL'Ve " * 3
)
SOURCE = "\n".join(Path(module.__file__ or "").read_text(encoding="utf-8") for module in (argparse, typing, textwrap))
TIES = " ".join(f"{a}{b}{c}" for a in "abcdefgh" for b in "abcdefgh" for c in "abcdefgh")
REPEATS = "aaaa aaaaaaa abababab aabaabaab " * 5 + "a" * 3000
CORPORA = {"english": ENGLISH, "scripts": SCRIPTS, "source": SOURCE, "ties": TIES, "repeats": REPEATS}


def train(texts: object, most: int, pattern: str = "nanochat", threads: int = 2) -> np.ndarray:
    trainer = rustbpe.Trainer(pattern, threads)
    trainer.feed(texts)
    return trainer.train(most)


@pytest.fixture(scope="module")
def vocabulary() -> list[bytes]:
    """A vocabulary that knows a little of everything the tests write."""
    return expand_merges(train(list(CORPORA.values()), 1500))


@pytest.fixture(scope="module")
def pairs(vocabulary: list[bytes]) -> dict[str, tuple[rustbpe.Encoder, tiktoken.Encoding]]:
    """{pattern: (ours, tiktoken's)}, both with the same ranks."""
    return {name: (rustbpe.Encoder(vocabulary, name), with_tiktoken(vocabulary, name)) for name in PATTERNS}


def with_tiktoken(tokens: list[bytes], pattern: str) -> tiktoken.Encoding:
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding(pattern, pat_str=rustbpe.PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={})


# -----------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("corpus", ["english", "ties", "repeats"])
@pytest.mark.parametrize("threads", [1, 3])
def test_merges_are_those_of_the_definition(corpus, threads):
    texts = [CORPORA[corpus][:400], CORPORA[corpus][400:900]]
    expected = bpe.train(bpe.pretokens(texts, rustbpe.PATTERNS["nanochat"]), 120)
    assert train(texts, 120, threads=threads).tolist() == [list(pair) for pair in expected]


SCRIPT = """
import json, sys
import rustbpe

answers = []
for texts, vocab_size, options in json.load(sys.stdin):
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, **options)
    mergeable_ranks = tokenizer.get_mergeable_ranks()
    tokens = {rank: bytes(token).hex() for token, rank in mergeable_ranks}
    ids = tokenizer.encode("".join(texts[:50]))
    answers.append([tokenizer.get_pattern(), tokenizer.vocab_size, [tokens[i] for i in range(len(mergeable_ranks))]])
    answers.append([ids, tokenizer.decode(ids), tokenizer.batch_encode(texts[:50])])
print(json.dumps(answers))
"""


def test_a_script_for_pypi_rustbpe_runs_and_gets_the_same_merges_and_ids():
    """Ties, overlaps and stale heap entries are where trainers differ: 1,500 merges of each corpus meet many."""
    folder = Path(os.environ.get("RUSTBPE_ORACLE") or ROOT / ".venv" / "oracle")
    if not (folder / "rustbpe").is_dir():
        pytest.skip(f"no rustbpe from PyPI in {folder}; bash dev/setup.sh dev installs it")
    jobs = [([text], 256 + 1500, {"pattern": rustbpe.PATTERNS["nanochat"]}) for text in CORPORA.values()]
    lines = ["", *(ENGLISH + SCRIPTS + SOURCE[:20_000] + "aaaa aaaaaaa").splitlines(keepends=True)]
    known = [{}, *({"pattern": pattern, "buffer_size": 7} for pattern in rustbpe.PATTERNS.values())]
    others = [{"pattern": pattern} for pattern in (r"\w+|\s+|[^\w\s]+", "'s| ?[a-zA-Z]+|(?i:Q)(u)", r"\p{L}{1,3}")]
    jobs += [(lines, 500, options) for options in known + others] + [([], 300, {}), (["a b"], 256, {})]
    answers = []
    for path in (
        folder,
        os.environ.get("PYTHONPATH", ""),
    ):  # the oracle's stands before site-packages, where ours lives
        answer = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            input=json.dumps(jobs),
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(path)},
        )
        assert answer.returncode == 0, answer.stderr
        answers.append(json.loads(answer.stdout))
    for job, theirs, ours in zip(itertools.chain(*zip(jobs, jobs, strict=True)), *answers, strict=True):
        assert ours == theirs, job[1:]


def test_mistakes_with_the_class_of_pypi_rustbpe_are_said():
    """Panics there, an empty answer, or an endless loop."""
    tokenizer = rustbpe.Tokenizer()
    assert (tokenizer.get_pattern(), tokenizer.vocab_size, len(tokenizer.get_mergeable_ranks())) == ("", 256, 256)
    with pytest.raises(ValueError, match="vocab_size 100: .* at least 256"):
        tokenizer.train_from_iterator(["text"], 100)
    with pytest.raises(ValueError, match=r"pattern '\(': missing \)"):
        tokenizer.train_from_iterator(["text"], 300, pattern="(")
    tokenizer.train_from_iterator(iter(["text text"]), 260, buffer_size=0)
    assert tokenizer.decode(tokenizer.encode("text")) == "text" and tokenizer.vocab_size == 260
    for ids, problem in (([-1], "Unknown token id: -1"), ([260], "Unknown token id: 260"), ([0xC3], "utf-8")):
        with pytest.raises(ValueError, match=problem):
            tokenizer.decode(ids)
    with pytest.raises(ZeroDivisionError):  # what was learnt before stays whole
        tokenizer.train_from_iterator((1 // 0 for _ in "x"), 300, pattern=r"\w")
    assert tokenizer.get_pattern() == rustbpe.PATTERNS["rustbpe"] and len(tokenizer.encode("text text")) == 2


def test_merges_do_not_depend_on_batches_threads_or_arrow_layout():
    texts = [ENGLISH, "", SCRIPTS, SOURCE[:50_000]]
    expected = train(texts, 300, threads=1).tolist()
    once = rustbpe.Trainer(threads=2)
    for text in reversed(texts):
        once.feed([text])
    assert once.train(300).tolist() == expected
    table = pa.chunked_array([pa.array(["cut off", *texts[:2]])[1:], pa.array(texts[2:], pa.string())])
    assert train(table, 300).tolist() == expected
    assert train(pa.array([*texts, "cut off"], pa.large_string())[:4], 300).tolist() == expected


def test_a_row_longer_than_a_work_unit_is_cut_without_a_trace():
    """Long rows are shared between threads; a cut inside a pretoken would show as other merges."""
    long = (ENGLISH + SCRIPTS) * 1000
    assert len(long.encode()) > 2 << 18
    short = [ENGLISH + SCRIPTS] * 1000
    assert long == "".join(short)
    assert train([long], 200).tolist() == train([long], 200, threads=1).tolist()
    encoder = rustbpe.Encoder(expand_merges(train([long], 200)))
    assert encoder.encode_batch([long], 2)[0].tolist() == encoder.encode(long).tolist()


@pytest.mark.parametrize("texts", [[], [""], ["a"], ["a b c"]])
def test_text_without_pairs_gives_no_merges(texts):
    assert train(texts, 5, "gpt4").tolist() == ([[32, 98], [32, 99]] if texts == ["a b c"] else [])


def test_an_interrupted_training_ends_and_says_so():
    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    trainer = rustbpe.Trainer()
    trainer.feed([SOURCE * 2])
    with pytest.raises(KeyboardInterrupt):
        trainer.train(100_000, progress=interrupt)


def test_an_interrupted_call_keeps_its_memory_until_it_has_ended(vocabulary):
    """An interrupted Thread.join takes the running thread for ended, so buffers were freed under Rust's hands
    (SIGSEGV).

    The interrupt is a real signal and comes while the main thread waits, which is where it broke.
    """

    def interrupt(count: int) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.01)

    def on_alarm(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    encoder = rustbpe.Encoder(vocabulary)
    long = "abcdefgh" * 1_000_000  # one pretoken: about a second of merging
    previous = signal.signal(signal.SIGALRM, on_alarm)
    try:
        with pytest.raises(KeyboardInterrupt):
            encoder.encode_batch([long], progress=interrupt)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert encoder.encode("the cat").tolist() == rustbpe.Encoder(vocabulary).encode("the cat").tolist()


# -----------------------------------------------------------------------------
# Splitting and encoding


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("joiner", ["", "a", "7", " ", " a", "\n ", "'"])
def test_every_code_point_between_its_neighbours(pattern, joiner):
    """The vocabulary has all pairs of bytes, so a boundary that has moved changes the ids."""
    tokens = [bytes([a]) for a in range(256)] + [bytes([a, b]) for a in range(256) for b in range(256)]
    ours, theirs = rustbpe.Encoder(tokens, pattern), with_tiktoken(tokens, pattern)
    # The planes that are left out have no letters, numbers or spaces.
    step = 1 if joiner == "" else 7  # all code points once; then every seventh, with a neighbour of each class
    codes = [*range(0, 0xD800, step), *range(0xE000, 0x34000, step), *range(0xE0000, 0xE0200, step)]
    text = joiner.join(map(chr, codes))
    assert ours.encode(text).tolist() == theirs.encode_ordinary(text)


# Everything that an alternative of a pattern looks at, and what is easily mistaken for it.
CHARACTERS = [
    *"aZsSdDmMtTlLvVeErRkK09 \t\r\n'.!_éßЖ中각ٱ٣½Ⅷ🙂\u2019\u017f\u212a\u0301\u200d",
    *"\u00a0\u0085\u2028\u3000\u001c\u180e\ufeff\x00",
    *["'s", "'LL", "'ve", "'\u017f", "  ", "\r\n", "aaaa", "123"],
]
fuzz = st.one_of(st.lists(st.sampled_from(CHARACTERS), max_size=40).map("".join), st.text(max_size=60))


@settings(max_examples=700, deadline=None, derandomize=True, database=None)
@given(text=fuzz)
def test_ids_are_those_of_tiktoken(pairs, text):
    for name, (ours, theirs) in pairs.items():
        ids = ours.encode(text).tolist()
        assert ids == theirs.encode_ordinary(text), name
        assert ours.decode_bytes(ids).decode() == text
        assert "".join(rustbpe.split(text, name)) == text


@pytest.mark.parametrize("ids", [[97, -1], np.array([-1]), [10**6]])
def test_an_id_that_is_none_is_refused(pairs, ids):
    """-1 gave the last token of the vocabulary."""
    with pytest.raises(IndexError):
        pairs["gpt4"][0].decode_bytes(ids)


@pytest.mark.soak
def test_a_million_random_strings(pairs):
    """What the fuzz above looks for, where it is rare."""
    random = Random(1)
    for _ in range(100):
        texts = ["".join(random.choices(CHARACTERS, k=random.randrange(40))) for _ in range(10_000)]
        for name, (ours, theirs) in pairs.items():
            ids, _ = ours.encode_batch(texts, 2)
            assert ids.tolist() == [token for text in texts for token in theirs.encode_ordinary(text)], name


@pytest.mark.parametrize(
    "text", [*CORPORA.values(), "a" * 200_000, "ab" * 500, " " * 5000 + "x", "\n" * 999, "é" * 400]
)
def test_long_pieces_are_those_of_tiktoken(pairs, text):
    """The cache, the scan and the heap take turns. 200,000 equal letters would take minutes at quadratic cost."""
    for name, (ours, theirs) in pairs.items():
        assert ours.encode(text).tolist() == theirs.encode_ordinary(text), name


def test_ids_are_those_of_the_definition(vocabulary):
    ranks = {token: rank for rank, token in enumerate(vocabulary)}
    words = bpe.pretokens([ENGLISH], rustbpe.PATTERNS["nanochat"])
    assert rustbpe.split(ENGLISH) == [word.decode() for word in words]
    expected = [token for word in words for token in bpe.encode(word, ranks)]
    assert rustbpe.Encoder(vocabulary).encode(ENGLISH).tolist() == expected


@pytest.mark.parametrize("name", ["gpt2", "gpt4"])
def test_published_vocabularies_encode_as_with_tiktoken(shared_data, name):
    ours = load_reference_encoder(shared_data / "gpt2_bpe", name)
    theirs = with_tiktoken(ours.tokens, name)
    for text in CORPORA.values():
        assert ours.encode(text).tolist() == theirs.encode_ordinary(text)


def test_tinyshakespeare_has_its_known_number_of_gpt2_tokens(shared_data):
    """301,966 + 36,059 for the first 90 % and the rest, as published with nanoGPT."""
    (path,) = (shared_data / "tinyshakespeare").glob("*.txt")
    text = path.read_text(encoding="utf-8")
    cut = int(len(text) * 0.9)
    encoder = load_reference_encoder(shared_data / "gpt2_bpe", "gpt2")
    assert [len(encoder.encode(part)) for part in (text[:cut], text[cut:])] == [301_966, 36_059]


def test_batches_keep_documents_apart(vocabulary):
    texts = ["", "the cat", "", SOURCE * 3, SCRIPTS, "x" * 100] + ["a"] * 1000
    encoder = rustbpe.Encoder(vocabulary)
    singles = [encoder.encode(text).tolist() for text in texts]
    array = pa.array(texts, pa.string())
    arrow = pa.chunked_array([array[:2], array[2:2], array[2:]])
    for batch in (texts, array, array.cast(pa.large_string()), arrow):
        for threads in (1, 4):
            ids, offsets = encoder.encode_batch(batch, threads)
            assert [ids[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)] == singles
            assert (ids.dtype, offsets.dtype) == (np.uint16, np.int64)
        lists = encoder.encode_lists(batch, 2)  # of plain ints, which json takes
        assert lists == singles and json.loads(json.dumps(lists)) == lists
    assert rustbpe.Encoder(vocabulary, vocab_size=70_000).encode("the cat").dtype == np.uint32


# -----------------------------------------------------------------------------
# Mistakes


def broken_text() -> pa.Array:
    """Three rows, the last of them two bytes that are no UTF-8."""
    return pa.Array.from_buffers(
        pa.string(), 3, [None, pa.array([0, 1, 1, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff\xff")]
    )


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        (pa.array(["a", None, "b"]), "row 1 is null"),
        (pa.chunked_array([["a", "b"], ["c", None]]), "row 3 is null"),
        (pa.array(["a"]).dictionary_encode(), "Arrow type dictionary"),
        (pa.array([1, 2]), "Arrow type int64"),
        (pa.chunked_array([pa.array(["x"]), broken_text()]), "row 3 is not valid UTF-8"),
        (["fine", "a\ud800"], r"row 1: lone surrogate U\+D800 at character 1"),
        ("one text", "give a list of texts"),
    ],
)
def test_what_is_no_text_is_refused_by_row(vocabulary, texts, problem):
    with pytest.raises(ValueError, match=problem):
        rustbpe.Trainer().feed(texts)
    with pytest.raises(ValueError, match=problem):
        rustbpe.Encoder(vocabulary).encode_batch(texts)


def test_impossible_vocabularies_and_patterns_are_refused():
    single = [bytes([value]) for value in range(256)]
    with pytest.raises(ValueError, match="no token for the single byte 255"):
        rustbpe.Encoder(single[:255])
    with pytest.raises(ValueError, match="tokens 256 and 257 have the same bytes"):
        rustbpe.Encoder([*single, b"ab", b"ab"])
    with pytest.raises(ValueError, match="known: nanochat, rustbpe, gpt4, gpt2, whole"):
        rustbpe.Trainer("gpt5")


def test_an_encoder_that_lives_until_exit_does_not_crash_the_interpreter():
    """A module's variable outlives the library: freeing it then was a segmentation fault, seen with torch imported."""
    program = "import torch, rustbpe; e = rustbpe.Encoder([bytes([b]) for b in range(256)]); t = rustbpe.Trainer()"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.soak
def test_one_huge_document_and_ten_million_tiny_ones(vocabulary):
    """500 MB in one row, then 10,000,000 rows of one byte: right answers, and two bytes of memory per byte."""
    encoder = rustbpe.Encoder(vocabulary)
    text = ENGLISH * (500_000_000 // len(ENGLISH))
    huge, tiny = pa.array([text], pa.large_string()), pa.array(["a"] * 10_000_000)
    del text
    lengths = np.array([len(token) for token in vocabulary])
    for rows, text_bytes in ((huge, 500_000_000), (tiny, 10_000_000)):
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_memory()
        ids, offsets = encoder.encode_batch(rows, 2)
        trainer = rustbpe.Trainer("nanochat", 2)
        trainer.feed(rows)
        merges = trainer.train(500)
        # Room for an id of two bytes per byte of text, offsets of eight per row (twice while they are counted), caches.
        assert peak_memory() - before < 2 * text_bytes + 16 * len(rows) + 300_000_000
        assert len(offsets) == len(rows) + 1 and (offsets[1:] > offsets[:-1]).all()
        assert lengths[ids].sum() == pc.sum(pc.binary_length(rows)).as_py()
        assert (len(merges) == 0) == (rows is tiny)


def peak_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
