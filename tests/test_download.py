"""Downloads from a hub on this machine, with the hub's real clients: whole or not at all, every failure one line."""

import errno
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import hf_hub_download

from nanochat import corpus_writer, task_data
from nanochat.common import UserError
from nanochat.core_eval import find_bundle
from nanochat.corpus import Corpus, load_corpus
from nanochat.corpus_writer import hash_of
from nanochat.download import ARRIVING, PAUSES, fetch_files, list_repository
from nanochat.files import read_sealed
from nanochat.task_data import MANIFEST, fetch_bundle
from tasks.arc import ARC
from tasks.common import load_rows, rows_path, write_rows
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tests.corpora import flip_bit, run_dataset, texts_of
from tests.hub import COMMIT, Fault, Hub, serve_hub, use_hub

REPOSITORY = "owner/data"
CONTENT = random.Random(1).randbytes(400_000)
FLIPPED = CONTENT[:200_000] + bytes([CONTENT[200_000] ^ 1]) + CONTENT[200_001:]
FILES = {"a.parquet": CONTENT, "small.txt": b"hello\n"}
WHOLE = {"a.parquet": CONTENT}


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process asks, too; nobody waits before another attempt."""
    with serve_hub() as hub:
        use_hub(hub, tmp_path_factory.mktemp("cache"), monkeypatch)
        hub.files[REPOSITORY] = dict(FILES)
        yield hub


@contextmanager
def refused(message: str) -> Iterator[None]:
    """The block ends with a UserError of one line."""
    with pytest.raises(UserError, match=message) as error:
        yield
    assert "\n" not in str(error.value)


def fetch(folder: Path, *names: str) -> list[Path]:
    """Files of the repository, as the corpora are fetched."""
    with closing(fetch_files(list_repository(REPOSITORY), names or ["a.parquet"], folder, workers=2)) as fetched:
        return list(fetched)


def contents(folder: Path, *but: str) -> dict[str, bytes]:
    """{path: bytes} of all files in a folder, but for locks and those of these names."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", *but))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# -----------------------------------------------------------------------------
# Files


def test_files_come_whole_from_one_commit(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {path.name for path in fetch(tmp_path, *FILES)} == set(FILES) and contents(tmp_path) == FILES
    assert f"/datasets/{REPOSITORY}/resolve/{COMMIT}/a.parquet" in [path for _, path, _ in hub.requests]
    assert "2 of 2 files, 0.4 MB at" in capsys.readouterr().out
    hub.requests.clear()
    fetch(tmp_path, *FILES)
    assert len(hub.requests) == len(hub.lists()) == 1, "what is there is not fetched again"


def test_what_passes_is_tried_again(hub: Hub, tmp_path: Path) -> None:
    hub.faults["list"] = [Fault(status=503), Fault(cut=10)]
    hub.faults["HEAD a.parquet"] = [Fault(status=500), Fault(status=502)]
    hub.faults["a.parquet"] = [Fault(cut=100_000), Fault(status=500), Fault(cut=0), Fault(content=FLIPPED)]
    fetch(tmp_path)
    assert contents(tmp_path) == WHOLE


@pytest.mark.parametrize("path", ["list", "HEAD a.parquet", "a.parquet"])
def test_a_server_that_says_when_to_come_back_is_obeyed(hub: Hub, tmp_path: Path, path: str) -> None:
    hub.faults[path] = [Fault(status=429, headers={"Retry-After": "77"})] * 2  # the client asks once more at once
    fetch(tmp_path)
    assert any(77 <= seconds <= 78 for seconds in hub.waits)


@pytest.mark.parametrize("status", [401, 403, 404, 410, 451, 500])
@pytest.mark.parametrize("path", ["list", "HEAD a.parquet", "a.parquet"])
def test_what_does_not_pass_is_one_line(hub: Hub, tmp_path: Path, status: int, path: str) -> None:
    hub.faults[path] = [Fault(status=status)] * 20
    what = "the list of owner/data" if path == "list" else "a.parquet of"
    with refused(f"cannot get {what}.*{status}.* run the same command"):
        fetch(tmp_path)
    if status != 500 and "HEAD" not in path:
        assert len(hub.faults[path]) == 19, "a final answer is not asked for again"
    assert contents(tmp_path) == {}


def test_wrong_bytes_never_get_the_name(hub: Hub, tmp_path: Path) -> None:
    """One flipped bit, as a broken proxy makes it."""
    hub.faults["a.parquet"] = [Fault(content=FLIPPED)] * (len(PAUSES) + 1)
    with refused("its sha256 is not the one that is listed"):
        fetch(tmp_path)
    assert contents(tmp_path) == {} and not hub.faults["a.parquet"]
    (tmp_path / "a.parquet").write_bytes(FLIPPED)
    fetch(tmp_path)
    assert contents(tmp_path) == WHOLE, "a damaged file in place is replaced"


@pytest.mark.parametrize("size", [399_000, 401_000])
def test_a_file_of_another_size_than_listed_is_refused(hub: Hub, tmp_path: Path, size: int) -> None:
    hub.listed["a.parquet"] = {"size": size, "lfs": None}
    with refused(f"400,000 bytes arrived, not the {size:,} that are listed"):
        fetch(tmp_path)
    assert contents(tmp_path) == {}


def test_whatever_goes_wrong_a_file_is_right_or_absent(hub: Hub, tmp_path: Path) -> None:
    """Runs with random faults, each going on with what the one before left."""
    rng = random.Random(3)
    outcomes = set()
    for _ in range(40):
        hub.faults["a.parquet"] = [random_fault(rng) for _ in range(rng.randrange(8))]
        try:
            fetch(tmp_path)
        except UserError as error:
            assert "\n" not in str(error) and contents(tmp_path) == {}
            outcomes.add("absent")
        else:
            assert contents(tmp_path) == WHOLE
            (tmp_path / "a.parquet").unlink()
            outcomes.add("right")
    assert outcomes == {"right", "absent"}


def random_fault(rng: random.Random) -> Fault:
    other = rng.choice([FLIPPED, CONTENT[: rng.randrange(len(CONTENT))], CONTENT + b"more", b"<html>Sign in</html>"])
    status, cut = rng.choice([403, 404, 408, 429, 500, 503, 504]), rng.randrange(len(CONTENT))
    return rng.choice([Fault(status=status), Fault(cut=cut), Fault(content=other), Fault(content=other, cut=cut)])


def test_one_file_that_fails_ends_all_and_whole_files_stay(hub: Hub, tmp_path: Path) -> None:
    files = hub.files[REPOSITORY] = {f"{number}.parquet": CONTENT + bytes([number]) for number in range(6)}
    done = {"0.parquet", "1.parquet"}
    hub.faults["3.parquet"] = [Fault(status=404, when=lambda: done <= set(os.listdir(tmp_path)))]
    with refused(r"cannot get 3\.parquet"):
        fetch(tmp_path, *files)
    assert done <= set(os.listdir(tmp_path)) and "3.parquet" not in os.listdir(tmp_path)
    assert len(fetch(tmp_path, *files)) == 6 and contents(tmp_path) == files
    assert [len(hub.gets(name)) for name in ("0.parquet", "1.parquet", "3.parquet")] == [1, 1, 2]


def test_a_copy_in_the_clients_cache_is_used(hub: Hub, tmp_path: Path) -> None:
    hf_hub_download(REPOSITORY, "a.parquet", repo_type="dataset", revision=COMMIT)
    fetch(tmp_path)
    assert contents(tmp_path) == WHOLE and len(hub.gets("a.parquet")) == 1


def test_too_little_room_is_said_before_the_first_byte(hub: Hub, tmp_path: Path) -> None:
    hub.listed["a.parquet"] = {"size": 10**18}
    with refused(r"1,000,000,000,000,000,000 bytes to fetch and [\d,]+ bytes free; make room"):
        fetch(tmp_path)
    assert hub.gets("a.parquet") == []


# -----------------------------------------------------------------------------
# Task data


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def publish(hub: Hub, repository: str, subsets: dict[str, dict[str, list[list[dict[str, Any]]]]]) -> None:
    """A data set as they are published: for each split its parts, and a README that names them."""
    files = hub.files[repository] = {}
    lines = ["---", "configs:"]
    for subset, splits in subsets.items():
        folder = "data" if subset == "default" else subset
        lines += [f"- config_name: {subset}", "  data_files:"]
        for split, parts in splits.items():
            lines += [f"  - split: {split}", f"    path: {folder}/{split}-*"]
            for number, rows in enumerate(parts):
                files[f"{folder}/{split}-{number:05d}-of-{len(parts):05d}.parquet"] = parquet(rows)
    files["README.md"] = "\n".join([*lines, "---", "words"]).encode()


@pytest.fixture
def tasks_hub(hub: Hub) -> Hub:
    """Every data set in the layout in which it is published, with few rows."""
    gsm8k = [{"question": f"q{i}", "answer": f"<<{i}+0={i}>>{i}\n#### {i}"} for i in range(510)]
    choices = {"text": ["a", "b"], "label": ["A", "B"]}
    arc = [{"id": str(i), "question": f"q{i}", "choices": choices, "answerKey": "B"} for i in range(4)]
    mmlu = {"question": "Which?", "subject": "x", "choices": ["a", "b", "c", "d"], "answer": 2}
    program = {"task_id": "0", "prompt": "def f():\n", "canonical_solution": "    return 1\n", "entry_point": "f"}
    program |= {"test": "def check(f): pass"}
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    publish(hub, "openai/gsm8k", {"main": {"train": [gsm8k], "test": [gsm8k[:5]]}, "socratic": {"test": [gsm8k[5:6]]}})
    everything = {"auxiliary_train": [[mmlu]], "validation": [[mmlu] * 2], "test": [[mmlu] * 3]}
    publish(hub, "cais/mmlu", {"auxiliary_train": {"train": [[{"train": mmlu}]]}, "all": everything})
    splits = {"train": [arc[:2]], "validation": [arc[:3]], "test": [arc]}
    publish(hub, "allenai/ai2_arc", {"ARC-Easy": splits, "ARC-Challenge": splits})
    publish(hub, "openai/openai_humaneval", {"openai_humaneval": {"test": [[program]]}})
    parts = [[{"messages": chat, "source": f"part {part}"}] * (part + 1) for part in range(4)]
    publish(hub, "HuggingFaceTB/smol-smoltalk", {"default": {"train": parts, "test": [parts[0]]}})
    return hub


def every_task() -> list[Any]:
    tasks: list[Any] = [ARC(f"ARC-{level}", split) for level in ("Easy", "Challenge") for split in SPLITS]
    tasks += [task(split) for task in (GSM8K, MMLU) for split in SPLITS]
    return [*tasks, HumanEval(), SmolTalk("train"), SmolTalk("dev")]


SPLITS = ("train", "dev", "test")
EXPECTED = "2 3 4 2 3 4 10 500 5 1 2 3 1 10 1"


def test_every_task_loads_from_the_published_files(tasks_hub: Hub, base_dir: Path) -> None:
    tasks = every_task()
    assert " ".join(str(len(task)) for task in tasks) == EXPECTED
    assert all(task[0]["messages"][-1]["role"] == "assistant" for task in tasks)
    published = pq.read_table(io.BytesIO(tasks_hub.files["openai/gsm8k"]["main/test-00000-of-00001.parquet"]))
    assert pq.read_table(rows_path("openai/gsm8k", "main", "test")).equals(published)
    rows = load_rows("HuggingFaceTB/smol-smoltalk", "default", "train")
    assert [row["source"][-1] for row in rows] == list("0112223333")
    folder = base_dir / "task_data" / "smol-smoltalk"
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "default", "manifest.json"]
    everything = {(name, *split) for name in task_data.DATA_SETS for split in task_data.splits_of(name)}
    assert {place for place in everything if not rows_path(*place).exists()} == set(), "a split that no task reads"


def test_one_commit_per_data_set_is_recorded_and_used_again(tasks_hub: Hub, base_dir: Path) -> None:
    load_rows("openai/gsm8k", "main", "train")
    tasks_hub.commit = "b" * 40
    tasks_hub.requests.clear()
    assert len(load_rows("openai/gsm8k", "main", "test")) == 5
    assert tasks_hub.lists() and all(COMMIT in path for path in tasks_hub.lists() if "gsm8k" in path)
    tasks_hub.requests.clear()
    load_rows("openai/gsm8k", "main", "train"), load_rows("openai/gsm8k", "main", "test")
    assert tasks_hub.requests == []
    manifest = read_sealed(base_dir / "task_data" / "gsm8k" / "manifest.json")
    assert manifest["revision"] == COMMIT
    entry = manifest["splits"]["main/train"]
    assert entry["rows"] == 510 and entry["source"] == "hub openai/gsm8k"


def test_a_flipped_bit_in_a_task_file_is_noticed(tasks_hub: Hub, base_dir: Path) -> None:
    load_rows("openai/gsm8k", "main", "test")
    write_rows("words", "default", "all", [{"word": "dog"}], "test")
    for place, make in ((("openai/gsm8k", "main", "test"), None), (("words", "default", "all"), "make it so")):
        flip_bit(rows_path(*place), 0.5)
        with refused(rf"sha256 differs\); get it again: rm .*{make or '--prefetch=tasks'}"):
            load_rows(*place, make=make)
    rows_path("openai/gsm8k", "main", "test").unlink()
    assert len(load_rows("openai/gsm8k", "main", "test")) == 5


def test_a_file_put_there_by_hand_is_used_and_said(base_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = rows_path("openai/gsm8k", "main", "test")
    path.parent.mkdir(parents=True)
    path.write_bytes(parquet([{"question": "q", "answer": "#### 1"}]))
    assert len(load_rows("openai/gsm8k", "main", "test")) == 1
    assert f"{path}: not in manifest.json, taken as it is" in capsys.readouterr().out
    write_rows("openai/gsm8k", "main", "test", [{"question": "q", "answer": "#### 1"}] * 2, "test")
    assert len(load_rows("openai/gsm8k", "main", "test")) == 2 and capsys.readouterr().out == ""


def test_a_damaged_manifest_is_one_line(base_dir: Path) -> None:
    path = write_rows("words", "default", "all", [{"word": "dog"}], "test").parents[1] / "manifest.json"
    path.write_text(path.read_text().replace("words", "wards").replace("dog", "cat").replace("1", "2"))
    with pytest.raises(UserError, match=r"manifest.json: damaged; .*rm -r"):
        load_rows("words", "default", "all")


@pytest.mark.parametrize("gone", ["data/train-", "", "README.md"])
def test_a_split_that_is_not_published_is_one_line(tasks_hub: Hub, base_dir: Path, gone: str) -> None:
    files = tasks_hub.files["HuggingFaceTB/smol-smoltalk"]
    for path in [path for path in files if path.startswith(gone)]:
        del files[path]
    if gone == "README.md":
        files |= {"data/train-00000-of-00001.parquet": b"no parquet file"}
    with refused(r"default/train.*import_task_data FOLDER"):
        SmolTalk("train")
    assert not rows_path("smol-smoltalk", "default", "train").exists()


# -----------------------------------------------------------------------------
# The evaluation bundle

BUNDLE = {
    "core.yaml": b"tasks: []\n",
    "eval_meta_data.csv": b"name\n",
    "eval_data/x/a.jsonl": b'{"a": 1}\n' * 9000,
}


def zipped(files: dict[str, bytes], prefix: str = "eval_bundle/") -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(prefix + name, content)
    return sink.getvalue()


def test_the_bundle_is_fetched_unpacked_and_checked(hub: Hub, base_dir: Path) -> None:
    hub.files["plain"]["eval_bundle.zip"] = zipped(BUNDLE)
    hub.faults["eval_bundle.zip"] = [Fault(cut=100), Fault(status=503)]
    fetch_bundle(f"{hub.url}/plain/eval_bundle.zip")
    assert contents(find_bundle(), MANIFEST) == BUNDLE and len(hub.gets("eval_bundle.zip")) == 3
    hub.requests.clear()
    fetch_bundle(None)
    assert hub.requests == [] and contents(base_dir / ".eval_bundle") == {}
    (base_dir / "eval_bundle" / "core.yaml").write_bytes(b"tasks: [x]\n")
    with pytest.raises(UserError, match=r"core.yaml: not as it was; get it again: rm -r .*--prefetch=eval"):
        find_bundle()


@pytest.mark.parametrize("prefix", ["", "eval_bundle/"])
def test_the_bundle_is_taken_from_a_zip_or_a_folder(base_dir: Path, tmp_path: Path, prefix: str) -> None:
    (tmp_path / "bundle.zip").write_bytes(zipped(BUNDLE | {"manifest.json": b"{}"}, prefix))
    fetch_bundle(str(tmp_path / "bundle.zip"))
    assert contents(find_bundle(), MANIFEST) == BUNDLE
    find_bundle().rename(tmp_path / "copy")
    fetch_bundle(str(tmp_path / "copy"))
    assert contents(find_bundle(), MANIFEST) == BUNDLE


def test_a_bundle_without_a_manifest_is_sealed_where_it_lies(
    base_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that somebody unpacked there must not be thrown away."""
    (tmp_path / "bundle.zip").write_bytes(zipped(BUNDLE, ""))
    shutil.unpack_archive(tmp_path / "bundle.zip", base_dir / "eval_bundle")
    fetch_bundle(None)
    assert contents(find_bundle(), MANIFEST) == BUNDLE
    assert "there without a manifest.json, taken as it is" in capsys.readouterr().out


def test_the_shared_bundle_is_taken(shared_data: Path, base_dir: Path) -> None:
    fetch_bundle(str(shared_data / "eval_bundle"))
    assert contents(find_bundle(), MANIFEST) == contents(shared_data / "eval_bundle", MANIFEST)


BAD_ZIPS: dict[str, tuple[Callable[[], bytes], str]] = {
    "half": (lambda: zipped(BUNDLE)[:500], "not a whole zip file"),
    "damaged": (lambda: zipped(BUNDLE)[:150] + bytes(30) + zipped(BUNDLE)[180:], "not a whole zip file"),
    "no zip": (lambda: b"<html>Sign in to the airport's network</html>", "not a whole zip file"),
    "another": (lambda: zipped({"readme.txt": b"x"}), "no evaluation bundle, it has no core.yaml, eval_meta_data.csv"),
    "no data": (lambda: zipped({**BUNDLE, "eval_data/x/a.jsonl": b""}, "x/"), "no evaluation bundle"),
    "outside": (lambda: zipped({"../../evil.jsonl": b"x", "/tmp/evil.jsonl": b"x"}, ""), "no evaluation bundle"),
}


@pytest.mark.parametrize("bad", BAD_ZIPS)
def test_bad_zips_leave_nothing(base_dir: Path, tmp_path: Path, bad: str, hub: Hub) -> None:
    make, message = BAD_ZIPS[bad]
    (tmp_path / "b.zip").write_bytes(make())
    hub.files["plain"]["b.zip"] = make()
    for source in (str(tmp_path / "b.zip"), f"{hub.url}/plain/b.zip"):
        with refused(message):
            fetch_bundle(source)
        assert contents(base_dir) == {}
    assert not list(tmp_path.rglob("evil*")) and not Path("/tmp/evil.jsonl").exists()


# -----------------------------------------------------------------------------
# A data set as a corpus

Make = Callable[..., Corpus]
STORIES = [[{"story": f"story {part} {i} " * 20, "id": i} for i in range(100)] for part in range(2)]


@pytest.fixture
def make(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """The command, for a data set with text in a column `story` if it is not told otherwise."""
    return partial(run_dataset, monkeypatch, **{"source": "hf", "path": "owner/stories", "column": "story"})


def test_a_data_set_becomes_a_corpus(hub: Hub, make: Make) -> None:
    publish(hub, "owner/stories", {"small": {"train": [*STORIES, [{"story": " ", "id": 0}, {"story": None, "id": 0}]]}})
    corpus = make(subset="small")
    assert corpus.name == "stories"
    assert corpus.manifest["revision"] == COMMIT and corpus.manifest["left_out"] == {"empty": 2}
    train, validation = texts_of(corpus.train), texts_of(corpus.val)
    assert sorted(train + validation) == sorted(row["story"] for part in STORIES for row in part)
    limit = 2**64 // 100
    assert all(hash_of(text) < limit for text in validation) and all(hash_of(text) >= limit for text in train)
    hub.requests.clear()
    make(subset="small")
    assert hub.requests == [], "what was made with the same arguments is not fetched again"
    corpus.train.paths[0].unlink()
    command = "--source=hf --path=owner/stories --subset=small --column=story --num_files=8 --name=stories"
    with refused(f"missing; mend it with: python -m nanochat.dataset {command}"):
        load_corpus("stories")
    assert make(subset="small") == corpus


def test_a_data_sets_own_validation_split_is_taken(hub: Hub, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_writer, "SHARD_BYTES", 10_000)
    publish(hub, "owner/stories", {"default": {"train": STORIES, "validation": [STORIES[1]], "test": [STORIES[0]]}})
    corpus = make(num_files=3, name="mine")
    assert [len(corpus.train), len(corpus.val)] == [3, 1]
    assert set(texts_of(corpus.val)) < {row["story"] for row in STORIES[1]}
    assert not set(texts_of(corpus.val)) & set(texts_of(corpus.train)), "the same text on both sides"
    assert corpus.manifest["left_out"] == {"in the validation text, too": 39}
    with refused("val_fraction=0.1: owner/stories has a split validation"):
        make(name="other", val_fraction=0.1)
    with refused("name=mine: .* was made from owner/stories; choose another name"):
        make(name="mine", path="owner/other")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"column": "text"}, "column=text: not in owner/stories, which has story, id"),
        ({"column": "id"}, "column=id: holds int in owner/stories, expected text"),
        ({"subset": "large"}, "'large' not found"),
        ({"path": "owner/none"}, "cannot get the list of owner/none"),
        ({"path": "a/b/c"}, "a/b/c"),
        ({"path": None}, "--path=OWNER/NAME"),
        ({"prefetch": "all"}, "not together with source=hf"),
    ],
)
def test_a_data_set_that_is_no_corpus_is_one_line(
    hub: Hub, base_dir: Path, make: Make, settings: dict[str, Any], message: str
) -> None:
    publish(hub, "owner/stories", {"small": {"train": STORIES}})
    with refused(message):
        make(**settings)
    assert not list((base_dir / "data").glob("*"))


def test_a_stream_that_breaks_leaves_the_corpus_that_was_there(hub: Hub, make: Make) -> None:
    publish(hub, "owner/stories", {"small": {"train": STORIES}})
    before = make()
    hub.faults["small/train-00001-of-00002.parquet"] = [Fault(status=403)] * 200
    with refused("cannot read owner/stories .*; run the same command again"):
        make(num_files=3)
    assert load_corpus("stories") == before


# -----------------------------------------------------------------------------
# The command, in processes of its own

CLIMBMIX = "karpathy/climbmix-400b-shuffle"
SHARDS = {f"shard_{number:05d}.parquet": [{"text": f"text {number} " * 50}] * 20 for number in (0, 1, 6542)}
SHARD = "shard_00001.parquet"  # one of 2 MB or more


@pytest.fixture
def published(tasks_hub: Hub) -> Hub:
    """Everything that --prefetch=all -n 2 asks for."""
    tasks_hub.files[CLIMBMIX] = {name: parquet(rows) for name, rows in SHARDS.items()}
    tasks_hub.files[CLIMBMIX][SHARD] = parquet([{"text": random.Random(2).randbytes(2_000_000).hex()}])
    tasks_hub.files["plain"]["eval_bundle.zip"] = zipped(BUNDLE)
    return tasks_hub


def start(base: Path, url: str, *words: str, before: tuple[str, ...] = (), **variables: str) -> subprocess.Popen[str]:
    """Python with these words, on a base directory and with that hub."""
    foreign = [name for name in os.environ if name.startswith("HF_") or "proxy" in name.lower()]
    variables = {"HF_ENDPOINT": url, "NANOCHAT_BASE_DIR": str(base), "HF_HOME": f"{base}/hf"} | variables
    environment = {name: value for name, value in os.environ.items() if name not in foreign} | variables
    command = [*before, sys.executable, *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def command(base_dir: Path, url: str, *words: str, **options: Any) -> tuple[int, str, str]:
    process = start(base_dir, url, "-m", "nanochat.dataset", *words, **options)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_after_a_prefetch_nothing_needs_a_network(published: Hub, tmp_path: Path) -> None:
    base = tmp_path / "base"
    code, out, err = command(base, published.url, "--prefetch=list", "-n", "2")
    assert code == 2 and "16 of 16 are missing" in err and "--prefetch=all --source=climbmix -n 2" in err
    assert published.requests == []
    words = ("--prefetch=all", "-n", "2", f"--path={published.url}/plain/eval_bundle.zip")
    code, out, err = command(base, published.url, *words, HF_TOKEN="hf_secret")
    assert code == 0, err
    tokens = {path.split("/")[1]: headers.get("authorization") for _, path, headers in published.requests}
    assert (tokens["datasets"], tokens["lfs"], tokens["plain"]) == ("Bearer hf_secret", None, None)
    published.requests.clear()
    for variables in ({}, {"HF_HUB_OFFLINE": "1"}):
        code, out, err = command(base, "http://127.0.0.1:9", *words, **variables)
        assert code == 0 and "nothing to fetch" in out, err
    code, out, err = command(base, published.url, "--prefetch=list", "-n", "2")
    assert code == 0 and "missing" not in out, err
    assert published.requests == []
    alone = ("unshare", "-rn") if subprocess.run(["unshare", "-rn", "true"]).returncode == 0 else None
    if alone is None:
        pytest.skip("unshare -n is not permitted here")
    program = """from tests.test_download import every_task, find_bundle, load_corpus
load_corpus("climbmix"), find_bundle(), print(*map(len, every_task()))"""
    process = start(base, published.url, "-c", program, before=alone)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out.strip() == EXPECTED, err


@pytest.mark.parametrize("what", ["nobody there", "offline", "not a hub"])
def test_no_hub_is_one_line_in_seconds(published: Hub, tmp_path: Path, what: str) -> None:
    started = time.perf_counter()
    url = published.url + "/plain" if what == "not a hub" else "http://127.0.0.1:9"
    code, out, err = command(tmp_path, url, "-n", "2", **({"HF_HUB_OFFLINE": "1"} if what == "offline" else {}))
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err + out
    assert "cannot get the list of karpathy/climbmix-400b-shuffle" in err
    assert ("HF_HUB_OFFLINE is set" in err) == (what == "offline")
    assert time.perf_counter() - started < 30


def test_two_processes_download_once(published: Hub, tmp_path: Path) -> None:
    train = "main/train-00000-of-00001.parquet"
    published.faults[train] = [Fault(seconds_per_chunk=0.5)]
    program = "from tasks.gsm8k import GSM8K\nprint(len(GSM8K('train')))"
    running = [start(tmp_path, published.url, "-c", program, RANK=str(rank)) for rank in range(2)]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and out.splitlines()[-1] == "10", err
    assert len(published.gets(train)) == 1


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_goes_on(published: Hub, tmp_path: Path, signum: int) -> None:
    """Files that are whole stay, what was in the middle begins again; an interrupt waits for nothing."""
    folder = tmp_path / "data" / "climbmix"
    published.faults[SHARD] = [Fault(seconds_per_chunk=1)]
    process = start(tmp_path, published.url, "-m", "nanochat.dataset", "-n", "2")
    deadline = time.perf_counter() + 60
    others = [folder / "shard_00000.parquet", folder / "shard_06542.parquet"]
    while not all(map(Path.exists, others)) or not list((folder / ARRIVING).rglob("*.incomplete")):
        assert time.perf_counter() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signum)
    started = time.perf_counter()
    _, err = process.communicate(timeout=60)
    assert time.perf_counter() - started < 10
    assert process.returncode == (130 if signum == signal.SIGINT else -signal.SIGKILL), err
    assert not (folder / SHARD).exists() and not (folder / MANIFEST).exists()
    code, _, err = command(tmp_path, published.url, "-n", "2")
    assert code == 0, err
    assert [len(published.gets(name)) for name in (SHARD, "shard_06542.parquet")] == [2, 1]
    assert contents(folder, MANIFEST) == published.files[CLIMBMIX] and (folder / MANIFEST).exists()


def test_a_disk_that_fills_up_is_one_line(published: Hub, tmp_path: Path) -> None:
    """A limit on the size of files ends a write as a full disk does, also where no disk may be mounted."""
    limited = ("sh", "-c", 'ulimit -f 1000; exec "$@"', "sh")  # half a MB, or one: the unit is the shell's
    code, _, err = command(tmp_path, published.url, "-n", "2", before=limited)
    assert code == 2 and err.count("\n") == 1 and f"no room for {SHARD}" in err and "make room" in err, err
    code, _, err = command(tmp_path, published.url, "-n", "2")
    assert code == 0 and len(published.gets("shard_06542.parquet")) == 1, err


def test_a_full_disk_is_one_line(published: Hub, tmp_path: Path) -> None:
    """A real one, of 1 MB: refused before where sizes are listed, one line in the middle where not."""
    mount = f'mount -t tmpfs -o size=1m none {tmp_path} && exec "$@"'
    inside = ("unshare", "-rm", "sh", "-c", mount, "sh")
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("unshare and mount are not permitted here")
    for listed, message in (({}, "bytes to fetch and 1,0"), ({"size": None}, os.strerror(errno.ENOSPC))):
        published.listed[SHARD] = listed
        code, _, err = command(tmp_path, published.url, "-n", "2", before=inside)
        assert code == 2 and message in err.splitlines()[-1] and "Traceback" not in err, err
