"""The command that gets corpora: from docs and folders, by shard from a hub; every mistake is one line."""

import gzip
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dev import gen_docs
from nanochat import corpus_writer, dataset
from nanochat.common import UserError
from nanochat.corpus import Corpus, Shards, load_corpus
from nanochat.files import sha256_file
from tests.corpora import run_dataset, texts_of, words, write_parquet
from tests.hub import Fault, Hub, serve_hub, use_hub
from tests.tiny import environment


@pytest.fixture
def run(base_dir, monkeypatch):
    """The command with the given settings; returns the corpus it made."""
    return partial(run_dataset, monkeypatch, workers=2)


def hashes_on_disk(corpus: Corpus) -> dict[str, str]:
    return {file.name: sha256_file(file) for file in corpus.path.iterdir()}


def command(base_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own."""
    environ = environment(base_dir)
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, env=environ)


# -----------------------------------------------------------------------------
# Folder


def test_folder_takes_every_kind_of_file(run, base_dir, tmp_path, capsys):
    folder = tmp_path / "in"
    write_parquet(folder / "a.parquet", ["one", None, "  ", "two"])
    write_parquet(folder / "val_00000.parquet", ["three"])
    (folder / "b.jsonl").write_text('{"text": "four", "id": 1}\n\n{"text": null}\n{"text": "fünf"}\n', encoding="utf-8")
    (folder / "deep" / "validation").mkdir(parents=True)
    (folder / "deep" / "c.txt").write_text("six\nlines\r\n", newline="")
    (folder / "deep" / "validation" / "d.txt").write_text("seven")
    (folder / "values.txt").write_text("eight")
    (folder / "README.md").write_text("not read")
    (folder / ".hidden.txt").write_text("not read")
    corpus = run(source="folder", path=str(folder))
    assert sorted(texts_of(corpus.train)) == ["eight", "four", "fünf", "one", "six\nlines\r\n", "two"]
    assert sorted(texts_of(corpus.val)) == ["seven", "three"]
    assert corpus.name == "in"
    assert corpus.manifest["left_out"] == {"empty": 3}
    assert corpus.manifest["left_out_files"] == {"of another kind, .md": 1, "hidden": 1}
    printed = capsys.readouterr().out
    assert "documents, empty: 3" in printed and "1 of another kind, .md: README.md" in printed
    record = [json.loads(line) for line in next((base_dir / "records").iterdir()).read_text().splitlines()]
    assert [event["event"] for event in record] == ["start", "corpus"]
    assert record[1]["totals"]["train"] == {"files": 1, "documents": 6, "text_bytes": 31}


def test_folder_split_by_hash_is_exact_and_stable(run, base_dir, tmp_path):
    """The same text on both sides of the split makes the validation loss a lie."""
    folder = tmp_path / "in"
    write_parquet(folder / "a.parquet", [*words("a", 200), *words("a", 200)])
    first = run(source="folder", path=str(folder), val_fraction=0.1)
    train, validation = texts_of(first.train), texts_of(first.val)
    assert len(train) + len(validation) == 400 and 38 <= len(validation) <= 42
    assert not set(train) & set(validation)
    hashes = hashes_on_disk(first)
    (folder / "a.parquet").rename(folder / "z.parquet")
    write_parquet(folder / "b.parquet", ["something new"])
    second = run(source="folder", path=str(folder), val_fraction=0.1)
    assert set(texts_of(second.val)) - set(validation) <= {"something new"}
    (folder / "b.parquet").unlink()
    (folder / "z.parquet").rename(folder / "a.parquet")
    third = run(source="folder", path=str(folder), val_fraction=0.1)
    assert hashes_on_disk(third) == hashes and third.fingerprint == first.fingerprint != second.fingerprint
    assert [file.name for file in (base_dir / "data").iterdir()] == ["in"], "leftovers"


def test_a_folder_follows_links_and_says_what_it_leaves_out(run, tmp_path, monkeypatch, capsys):
    """A linked folder of books was dropped without a word, and so was a whole download of .jsonl.gz."""
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    texts = {"in/a.TXT": "one", "in/empty.txt": "", "in/c.json": "[]", "elsewhere/e.txt": "two", "in/locked.txt": "x"}
    texts |= {"in/test-00000.txt": "for tests", "in/test/t.txt": "for tests", "in/books_valid.txt": "held out"}
    texts |= {"in/twin.txt": "held out", "in/locked/x.txt": "x", "in/bom.jsonl": '\ufeff{"text": "four"}\n'}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    lines = b'{"text": "three"}\n'
    (folder / "b.jsonl.GZ").write_bytes(gzip.compress(lines) + gzip.compress(lines))
    for name, data in (("d.txt.zst", b"five"), ("e.jsonl.zst", lines)):
        with pa.output_stream(str(folder / name), "zstd") as stream:
            stream.write(data)
    (folder / os.fsdecode(b"caf\xe9.parquet")).write_bytes(b"x")  # as Windows packs it
    (folder / "gone.txt").symlink_to("nowhere")
    (folder / "more").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    (folder / "same.txt").symlink_to("a.TXT")
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in path.name and allowed(path, mode))
    corpus = run(source="folder", path=str(folder))
    assert sorted(texts_of(corpus.train)) == ["five", "four", "one", "three", "three", "three", "two"]
    assert texts_of(corpus.val) == ["held out"]
    assert corpus.manifest["left_out"] == {"in the validation text, too": 1}
    said = capsys.readouterr().out
    for reason in (
        "2 read already under another name: same.txt, more/back\n",
        "2 without the right to read: locked, locked.txt\n",
        "2 named test*, kept for tests: test, test-00000.txt\n",
        "1 links to nothing: gone.txt\n",
        "1 with a name that is not UTF-8: ",
        "1 of another kind, .json: c.json\n",
        "1 empty files: empty.txt\n",
        "documents, in the validation text, too: 1\n",  # it said "1 documents"
    ):
        assert f"left out   {reason}" in said


def test_names_say_which_split_a_file_is():
    for name in ("valid", "my-val.txt", "x_valid_0.jsonl", "VALIDATION", "val2.txt", "wiki.valid.txt"):
        assert corpus_writer.split_named("x", name) == "validation", name
    for name in ("values.txt", "interval.txt", "latest.txt", "tests", "validate.txt", "train", "dev"):
        assert corpus_writer.split_named(name) == "train", name


def test_folder_is_shuffled(run, tmp_path):
    """Files sorted by name are sorted by kind: the model ends its training on the last kind."""
    write_parquet(tmp_path / "in" / "a.parquet", [f"{number:04d}" for number in range(1000)])
    texts = texts_of(run(source="folder", path=str(tmp_path / "in")).train)
    assert sum(int(text) for text in texts[:300]) / 300 == pytest.approx(500, abs=100)


PACKED = gzip.compress(random.Random(1).randbytes(1000).hex().encode())
MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty folder": (lambda folder: None, "no file to read, ending in .parquet, .jsonl or .txt"),
    "other files": (lambda folder: (folder / "a.md").write_text("x"), "no file to read"),
    "only tests": (lambda folder: (folder / "test.txt").write_text("x"), "no file to read"),
    "cut short": (lambda folder: (folder / "a.txt.gz").write_bytes(PACKED[:-9]), "a.txt.gz: cannot be read"),
    "damaged": (lambda folder: (folder / "a.jsonl.gz").write_bytes(b"\x1f\x8bno"), "a.jsonl.gz: cannot be read"),
    "not JSON": (lambda folder: (folder / "a.jsonl").write_text('{"text": "x"}\n{"text"\n'), "a.jsonl:2: expected"),
    "no field": (lambda folder: (folder / "a.jsonl").write_text('{"content": "x"}\n'), "a.jsonl:1: expected"),
    "list": (lambda folder: (folder / "a.jsonl").write_text("[1]\n"), "a.jsonl:1: expected"),
    "number": (lambda folder: (folder / "a.jsonl").write_text('{"text": 0}\n'), "a.jsonl:1: expected"),
    "surrogate": (lambda folder: (folder / "a.jsonl").write_text('{"text": "\\ud800"}\n'), "a.jsonl:1: expected"),
    "latin-1": (lambda folder: (folder / "a.txt").write_bytes(b"caf\xe9"), "a.txt: text is not UTF-8 at byte 3"),
    "one document": (lambda folder: (folder / "a.txt").write_text("x"), "1 documents are too few"),
    "one text": (lambda folder: write_parquet(folder / "a.parquet", ["x"] * 9), "no document is left for training"),
    "only validation": (lambda folder: (folder / "val.txt").write_text("x"), "no document is left for training"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_folder_mistakes_are_one_line(run, base_dir, tmp_path, mistake):
    make, message = MISTAKES[mistake]
    (tmp_path / "in").mkdir()
    make(tmp_path / "in")
    with pytest.raises(UserError) as caught:
        run(source="folder", path=str(tmp_path / "in"))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert list((base_dir / "data").iterdir()) == [], "a failed build left something behind"


def test_corpus_of_another_folder_is_not_replaced(run, tmp_path):
    for folder in ("a", "b", "docs"):
        write_parquet(tmp_path / folder / "a.parquet", words(folder, 50))
    run(source="folder", path=str(tmp_path / "a"), name="mine")
    with pytest.raises(UserError, match=r"name=mine: .* was made from .*/a; choose another name"):
        run(source="folder", path=str(tmp_path / "b"), name="mine")
    with pytest.raises(UserError, match="name=docs: the name of another source"):
        run(source="folder", path=str(tmp_path / "docs"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "folder"}, "--path=DIR"),
        ({"source": "folder", "path": "/nowhere"}, "path=/nowhere: not a directory"),
        ({"source": "folder", "path": ".", "name": "a/b"}, "name=a/b: expected letters"),
        ({"source": "folder", "path": ".", "num_files": 8}, "num_files=8: means nothing to source=folder"),
        ({"source": "docs", "path": "."}, "path=.: means nothing to source=docs"),
        ({"val_fraction": 0.1}, "val_fraction=0.1: means nothing to source=climbmix"),
        ({"prefetch": "tasks", "num_files": 8}, "num_files=8: means nothing to prefetch=tasks"),
        ({"prefetch": "tasks", "path": "x"}, "path=x: means nothing"),
        ({"prefetch": "all", "source": "folder", "path": "x"}, "not together with source=folder"),
        ({"source": "fineweb-edu", "num_files": 1823}, "num_files=1823: fineweb-edu has 1 to 1,822 training files"),
    ],
)
def test_settings_without_meaning_are_refused(run, values, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        run(**values)


def test_folder_reads_real_text(run, shared_data):
    corpus = run(source="folder", path=str(shared_data / "pretrain"))
    named = pq.read_table(shared_data / "pretrain" / "val_00000.parquet", columns=["text"])["text"].to_pylist()
    assert sorted(texts_of(corpus.val)) == sorted(named)
    totals = corpus.manifest["totals"]
    assert totals["train"]["documents"] + totals["validation"]["documents"] == 4171
    sizes = [size.stat().st_size for size in corpus.train]
    assert sizes == [entry["file_bytes"] for entry in corpus.manifest["train"]]


def test_own_shards_have_small_row_groups(tmp_path):
    """A row group is decoded whole: one of books in hundreds would take gigabytes."""
    texts = [f"document {number} " * 500 for number in range(1500)]
    manifest = corpus_writer.write_corpus(tmp_path / "c", ((i > 1000, text) for i, text in enumerate(texts)), {})
    about = pq.ParquetFile(tmp_path / "c" / "shard_00000.parquet").metadata
    groups = [about.row_group(number) for number in range(about.num_row_groups)]
    assert groups[0].column(0).compression == "ZSTD" and sum(group.num_rows for group in groups) == 1001
    assert len(groups) == 2 and all(group.total_byte_size < 4.5 * (1 << 20) for group in groups)
    (entry,) = manifest["train"]
    assert (entry["documents"], entry["text_bytes"]) == (1001, sum(map(len, texts[:1001])))


# -----------------------------------------------------------------------------
# Hub


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with four training shards and the validation shard of both corpora."""
    with serve_hub() as hub:
        use_hub(hub, tmp_path_factory.mktemp("cache"), monkeypatch)
        for repository, last in dataset.HUBS.values():
            for number in (0, 1, 2, 3, last):
                file = f"shard_{number:05d}.parquet"
                path = write_parquet(tmp_path_factory.mktemp("hub") / file, words(f"{repository} {file}", 20))
                hub.files[repository][file] = path.read_bytes()
        yield hub


def test_hub_validates_on_the_last_file_of_the_repository(run, hub):
    """Taking the last file present turns a training shard into the validation set when one download fails."""
    corpus = run(num_files=3)
    assert corpus.name == "climbmix"
    assert [file.name for file in corpus.train] == [f"shard_0000{number}.parquet" for number in range(3)]
    assert [file.name for file in corpus.val] == ["shard_06542.parquet"]
    assert corpus.manifest["revision"] == "a" * 40
    assert corpus.manifest["totals"]["train"]["documents"] == 60
    size = sum(len(text.encode()) for text in texts_of(Shards(corpus.train.paths[1:2])))
    assert corpus.manifest["train"][1]["text_bytes"] == size
    assert run(source="fineweb-edu", num_files=1).val.paths[0].name == "shard_01822.parquet"


def test_hub_continues_from_its_commit_and_never_shrinks(run, hub, capsys):
    first = run(num_files=1)
    hub.commit = "b" * 40
    hub.requests.clear()
    second = run(num_files=3)
    assert [len(hub.gets(f"shard_0000{number}.parquet")) for number in range(4)] == [0, 1, 1, 0]
    assert hub.lists() == [f"/api/datasets/karpathy/climbmix-400b-shuffle/revision/{'a' * 40}?blobs=true"]
    assert second.fingerprint != first.fingerprint
    hub.requests.clear()
    assert run(num_files=2) == second and hub.requests == []
    assert "already has 3 training files" in capsys.readouterr().out
    second.train.paths[1].unlink()
    assert run(num_files=3).fingerprint == second.fingerprint
    assert [len(hub.gets(f"shard_0000{number}.parquet")) for number in range(4)] == [0, 1, 0, 0]


def test_hub_failure_leaves_no_manifest_and_the_rerun_goes_on(run, hub):
    """After failed downloads that ended with 0, the next stage trained on what happened to be there."""
    hub.faults["shard_00001.parquet"] = [Fault(status=500)] * 4
    with pytest.raises(UserError, match=r"cannot get shard_00001.parquet .*500.*run the same command to go on"):
        run(num_files=3, workers=1)
    with pytest.raises(UserError, match="no corpus"):
        load_corpus()
    hub.requests.clear()
    assert len(run(num_files=3).train) == 3
    assert hub.gets("shard_00000.parquet") == [], "what was there is not fetched again"


def test_hub_file_that_is_published_damaged_is_one_line(run, hub):
    hub.files["karpathy/climbmix-400b-shuffle"]["shard_00001.parquet"] = b"PAR1 and no more"
    with pytest.raises(UserError, match=r"shard_00001.parquet"):
        run(num_files=2)
    del hub.files["karpathy/climbmix-400b-shuffle"]["shard_00001.parquet"]
    with pytest.raises(UserError, match=r"has no shard_00001.parquet \(1 missing\)"):
        run(num_files=2)
    with pytest.raises(UserError, match="no corpus"):
        load_corpus()


# -----------------------------------------------------------------------------
# Docs

ALPHA = '''"""
Tools for counting sheep at night.

They work best when the room is dark and the sheep are calm, because a nervous sheep is counted twice.
"""
from torch import add_docstr

class Flock:
    """A number of :class:`~alpha.Sheep` that stay together, and the ``fence`` around them::"""

    def grow(self, by, *others, slowly=True, **rest):
        """
        Let the flock grow.

        Drawings
        --------
        +----+----+
        | 12 | 34 |
        +----+----+

        Parameters
        ----------
        by : int
            How many sheep are born, which happens mostly in spring.

        Examples
        --------
        +----+----+
        | 12 | 34 |
        +----+----+
        """

common = parse_kwargs("""
    sheep (Sheep): the animal that is counted.
    out (list): where it goes.
""")
add_docstr(alpha.shear, r"""
shear(sheep) -> wool

.. math::
    \\text{sheep}_{i} is the wool of this sheep before the shearing of it

Where {sheep} is a set of one.
""" + r"""
Takes the wool from one sheep, in the way that {sheep} is known to like.

Args:
    {sheep}

Example: {{sheep}} is a set with one element in it.
""".format(**common))
add_newdoc("alpha.core", "Flock", ("size", """The number of sheep in the whole flock at this moment."""))
raise SystemExit("documentation must be read without importing")
'''
SHARED = '"""A sentence that two packages share word for word, and long enough to be a document of its own."""\n'
CYTHON = '''
cdef class Barn(Base):
    """
    A house for animals and for what they eat in winter, when nothing grows outside and the days are short and cold.
    """
    def open(self, doors=None,
             slowly=True):
        """Open the doors of the barn, one after another, and wait until each of them is open."""
'''


@pytest.fixture
def packages(tmp_path: Path) -> dict[str, Path]:
    """Three made-up packages."""
    files = {
        "alpha/__init__.py": ALPHA,
        "alpha/tests/test_sheep.py": '"""Never read, however long what a test module says about itself may be."""',
        "alpha/broken.py": '"""unfinished',
        "alpha/german.py": '"""' + "Größe, Straße, Bücher, Gemüse, schön, süß. " * 20 + '"""',
        "alpha/barn.pyx": CYTHON,
        "alpha/shared.py": SHARED + f'def a():\n    """{"Only alpha says this. " * 12}"""\n',
        "beta/__init__.py": SHARED + f'def b():\n    """{"Only beta says that. " * 12}"""\n',
        "beta/long.py": "".join(f'def f{n}():\n    """{n}. {"It does nothing at all. " * 900}"""\n' for n in range(9)),
    }
    for name, text in files.items():
        file = tmp_path / "packages" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return {name: tmp_path / "packages" / name for name in ("alpha", "beta")}


def collect(packages: dict[str, Path], validation: list[str]) -> tuple[list[str], list[str], Counter[str]]:
    """Documents to train on, those to validate on, and what was left out."""
    left_out: Counter[str] = Counter()
    documents = list(gen_docs.collect_docs(packages, validation, Counter(), left_out))
    return [text for held, text in documents if not held], [text for held, text in documents if held], left_out


def test_docs_become_prose_under_headings(packages):
    train, validation, left_out = collect(packages, ["beta"])
    (document,) = [text for text in train if "module alpha\n" in text]
    assert document.startswith("module alpha\n\nTools for counting sheep at night.\n\nThey work best")
    for text in (
        "class alpha.Flock\n\nA number of `alpha.Sheep` that stay together, and the `fence` around them:",
        "method Flock.grow(by, *others, slowly, **rest)\n\nLet the flock grow.\n\nParameters:\n\nby : int",
        "function alpha.shear\n\nshear(sheep) -> wool\n\nWhere {sheep} is a set of one.\n\nTakes the wool",
        "Args:\n    sheep (Sheep): the animal that is counted.",
        "{sheep} is a set with",
        "function alpha.core.Flock.size\n\nThe number of sheep in the whole flock",
    ):
        assert text in document
    assert not any(word in document for word in ("Drawings", "Examples", "12"))
    assert any("class alpha.barn.Barn\n\nA house for animals" in text for text in train)
    assert any("function alpha.barn.open\n\nOpen the doors of the barn" in text for text in train)
    assert not any("Never read" in text or "Straße" in text for text in train)
    assert left_out["files that do not parse"] == 1 and left_out["documents not in ASCII"] == 1
    assert all(len(text) < 105_000 for text in validation) and sum("beta.long.f" in text for text in validation) > 1


def test_docs_of_validation_packages_are_not_in_training(packages):
    """A sentence that both packages have belongs to validation, whichever package comes first."""
    for held in ("alpha", "beta"):
        train, validation, left_out = collect(packages, [held])
        assert sum("share word for word" in text for text in validation) == 1
        assert not any("share word for word" in text for text in train)
        assert left_out["repeated documentation strings"] == 1


def test_docs_are_the_same_every_time_and_kept(run, packages, monkeypatch, capsys):
    monkeypatch.setattr(gen_docs, "find_packages", lambda: packages)
    monkeypatch.setattr(gen_docs, "package_versions", lambda places: dict.fromkeys(places, "1.0"))
    monkeypatch.setattr(gen_docs, "VALIDATION", ["beta"])
    first = run(source="docs")
    hashes = hashes_on_disk(first)
    assert run(source="docs") == first
    assert "already made from these versions" in capsys.readouterr().out
    (first.path / "manifest.json").unlink()
    assert hashes_on_disk(run(source="docs")) == hashes
    first.val.paths[0].unlink()
    assert hashes_on_disk(run(source="docs")) == hashes, "a damaged corpus must be made again"
    monkeypatch.setattr(gen_docs, "package_versions", lambda places: dict.fromkeys(places, "2.0"))
    (packages["beta"] / "__init__.py").write_text(SHARED + f'def b():\n    """{"Beta changed its mind. " * 12}"""\n')
    second = run(source="docs")
    assert second.fingerprint != first.fingerprint
    assert second.manifest["versions"]["beta"] == "2.0" and "not installed: mpmath" in capsys.readouterr().out


def test_docs_finds_this_machines_packages_without_importing_them(tmp_path):
    code = (
        "import sys; from dev.gen_docs import *; places = find_packages(); versions = package_versions(places);"
        "assert not {'torch', 'sympy', 'networkx', 'pandas'} & set(sys.modules), 'imported';"
        "assert {'numpy', 'torch', 'python', *VALIDATION} <= set(places), places; assert versions['numpy'];"
        "print(sum(1 for _ in collect_docs({'python': places['python'] / 'json'}, [], Counter(), Counter())))"
    )
    done = command(tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1


# -----------------------------------------------------------------------------
# The command line


def test_command_answers_mistakes_in_one_line(tmp_path):
    done = command(tmp_path, "-m", "nanochat.dataset", "--source=folder")
    assert done.returncode == 2 and "--path=DIR" in done.stderr and done.stderr.count("\n") == 1, done.stderr
