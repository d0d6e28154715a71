"""Downloads from a hub on this machine, with the hub's real client: whole or not at all, every failure one line."""

import email.utils
import errno
import io
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants, hf_hub_download

from nanochat import download, task_data
from nanochat.common import UserError
from nanochat.download import RemoteFile, fetch_files, list_repository
from nanochat.eval_bundle import fetch_bundle, find_bundle
from nanochat.files import read_sealed
from tasks.arc import ARC
from tasks.common import load_rows, rows_path, write_rows
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tests.hub import COMMIT, Fault, Hub, serve_hub, use_hub

REPOSITORY = "owner/data"
CONTENT = random.Random(1).randbytes(400_000)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process asks, too; failed attempts are repeated at once."""
    with serve_hub() as hub:
        use_hub(hub, monkeypatch)
        hub.files[REPOSITORY] = {"a.parquet": CONTENT, "small.txt": b"hello\n"}
        yield hub


def fetch(folder: Path, *names: str) -> list[Path]:
    """Files of the repository, as the corpora are fetched."""
    listing = list_repository(REPOSITORY)
    with closing(fetch_files([(listing.files[name], folder / name) for name in names], workers=2)) as fetched:
        return list(fetched)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# -----------------------------------------------------------------------------
# One file


def test_files_come_whole_from_one_commit(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {path.name for path in fetch(tmp_path, "a.parquet", "small.txt")} == {"a.parquet", "small.txt"}
    assert (tmp_path / "a.parquet").read_bytes() == CONTENT and (tmp_path / "small.txt").read_bytes() == b"hello\n"
    assert names_in(tmp_path) == ["a.parquet", "small.txt"]
    assert f"/datasets/{REPOSITORY}/resolve/{COMMIT}/a.parquet" in [path for _, path, _ in hub.requests]
    assert "2 of 2 files, 0.4 MB at" in capsys.readouterr().out
    hub.requests.clear()
    fetch(tmp_path, "a.parquet", "small.txt")
    assert len(hub.requests) == len(hub.lists()) == 1, "what is there is not fetched again"


def test_a_transfer_that_is_cut_goes_on_where_it_ended(hub: Hub, tmp_path: Path) -> None:
    hub.faults["a.parquet"] = [Fault(cut=100_000), Fault(cut=150_000), Fault(cut=1)]
    fetch(tmp_path, "a.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == CONTENT
    assert hub.gets("a.parquet") == [None, "bytes=100000-", "bytes=250000-", "bytes=250001-"]


def test_any_number_of_cuts_is_survived_while_bytes_arrive(hub: Hub, tmp_path: Path) -> None:
    hub.faults["a.parquet"] = [Fault(cut=20_000) for _ in range(3 * download.ATTEMPTS)]
    fetch(tmp_path, "a.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == CONTENT


def test_what_arrived_is_kept_for_the_next_run(hub: Hub, tmp_path: Path) -> None:
    """The hub's client (2.4) throws it away: a 100 MB shard began anew with every attempt."""
    hub.faults["a.parquet"] = [Fault(cut=123_456)] + [Fault(status=500)] * (download.ATTEMPTS - 1)
    with pytest.raises(UserError, match=r"cannot get a\.parquet of owner/data .*500.*run the same command to go on"):
        fetch(tmp_path, "a.parquet")
    assert not (tmp_path / "a.parquet").exists()
    hub.requests.clear()
    fetch(tmp_path, "a.parquet")
    assert hub.gets("a.parquet") == ["bytes=123456-"]
    assert (tmp_path / "a.parquet").read_bytes() == CONTENT and names_in(tmp_path) == ["a.parquet"]


def test_a_partial_file_of_another_version_is_not_continued(hub: Hub, tmp_path: Path) -> None:
    hub.faults["a.parquet"] = [Fault(cut=100_000)] + [Fault(status=500)] * (download.ATTEMPTS - 1)
    with pytest.raises(UserError):
        fetch(tmp_path, "a.parquet")
    hub.files[REPOSITORY]["a.parquet"] = CONTENT[::-1]
    hub.requests.clear()
    fetch(tmp_path, "a.parquet")
    assert hub.gets("a.parquet") == [None] and (tmp_path / "a.parquet").read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("length", [0, 399_999, 400_000, 400_001])
def test_damaged_partial_files_are_replaced(hub: Hub, tmp_path: Path, length: int) -> None:
    """Zeros at the end are what a power cut leaves of a file that was being written."""
    file = list_repository(REPOSITORY).files["a.parquet"]
    download.partial_path(file, tmp_path / "a.parquet").write_bytes(bytes(length))
    fetch(tmp_path, "a.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == CONTENT and names_in(tmp_path) == ["a.parquet"]


def test_a_server_that_says_when_to_come_back_is_obeyed(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = email.utils.formatdate(time.time() + 3, usegmt=True)
    hub.faults["a.parquet"] = [
        Fault(status=429, headers={"Retry-After": "1"}),
        Fault(status=503, headers={"Retry-After": later}),
    ]
    started = time.perf_counter()
    fetch(tmp_path, "a.parquet")
    assert time.perf_counter() - started > 1.5
    printed = capsys.readouterr().out
    assert (
        "a.parquet of owner/data: attempt 1 of 4 failed (HfHubHTTPError: 429" in printed and "again in 1 s" in printed
    )


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"ratelimit": '"resolvers";r=0;t=55'}, 55),
        ({"ratelimit": '"resolvers";r=12;t=55'}, None),
        ({}, None),
    ],
)
def test_waits_are_read_in_every_form(headers: dict[str, str], seconds: float | None) -> None:
    error = Exception("Too Many Requests")
    error.response = type("Response", (), {"status_code": 429, "headers": headers})  # type: ignore[attr-defined]
    assert download.asked_to_wait(error) == seconds


def test_an_hour_of_waiting_is_left_to_the_user(hub: Hub, tmp_path: Path) -> None:
    hub.faults["a.parquet"] = [Fault(status=429, headers={"Retry-After": "3600"})]
    with pytest.raises(UserError, match="asks to wait 3,600 s; then run the same command"):
        fetch(tmp_path, "a.parquet")


def test_errors_that_pass_are_tried_again(hub: Hub, tmp_path: Path) -> None:
    hub.faults["list"] = [Fault(status=503), Fault(cut=10)]
    hub.faults["a.parquet"] = [Fault(status=500), Fault(status=502), Fault(cut=0)]
    fetch(tmp_path, "a.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == CONTENT


@pytest.mark.parametrize("status", [401, 403, 404, 410, 451])
def test_final_answers_are_not_asked_for_again(hub: Hub, tmp_path: Path, status: int) -> None:
    hub.faults["a.parquet"] = [Fault(status=status)]
    with pytest.raises(UserError, match=f"cannot get a.parquet of owner/data .*{status}") as error:
        fetch(tmp_path, "a.parquet")
    assert len(hub.gets("a.parquet")) == 1 and "\n" not in str(error.value)


def test_a_transfer_that_stalls_is_begun_again_at_its_end(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.faults["a.parquet"] = [Fault(seconds_per_chunk=2)]
    fetch(tmp_path, "a.parquet")
    assert hub.gets("a.parquet") == [None, "bytes=65536-"] and (tmp_path / "a.parquet").read_bytes() == CONTENT


def test_whatever_goes_wrong_a_file_is_right_or_absent(hub: Hub, tmp_path: Path) -> None:
    """Runs with random faults, each going on with what the one before left."""
    rng = random.Random(3)
    outcomes = set()
    for number in range(60):
        hub.faults["a.parquet"] = [random_fault(rng) for _ in range(rng.randrange(8))]
        try:
            fetch(tmp_path, "a.parquet")
        except UserError as error:
            assert "\n" not in str(error) and not (tmp_path / "a.parquet").exists()
            outcomes.add("absent")
        else:
            assert (tmp_path / "a.parquet").read_bytes() == CONTENT, number
            assert names_in(tmp_path) == ["a.parquet"]
            (tmp_path / "a.parquet").unlink()
            outcomes.add("right")
    assert outcomes == {"right", "absent"}


def random_fault(rng: random.Random) -> Fault:
    content = bytearray(CONTENT)
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    other = [bytes(content), CONTENT[: rng.randrange(len(CONTENT))], CONTENT + b"more", b"<html>Sign in</html>"]
    return rng.choice(
        [
            Fault(status=rng.choice([408, 429, 500, 503, 504])),
            Fault(status=rng.choice([403, 404])),
            Fault(cut=rng.randrange(len(CONTENT))),
            Fault(cut=rng.randrange(len(CONTENT)), whole=True),
            Fault(whole=True),
            Fault(content=rng.choice(other)),
            Fault(content=rng.choice(other), whole=True, cut=rng.randrange(len(CONTENT))),
        ]
    )


def test_wrong_bytes_never_get_the_name(hub: Hub, tmp_path: Path) -> None:
    """One flipped bit, as a broken proxy makes it: tried again, then refused."""
    flipped = bytearray(CONTENT)
    flipped[200_000] ^= 1
    hub.faults["a.parquet"] = [Fault(content=bytes(flipped))]
    fetch(tmp_path, "a.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == CONTENT
    (tmp_path / "a.parquet").unlink()
    hub.faults["a.parquet"] = [Fault(content=bytes(flipped))] * download.ATTEMPTS
    with pytest.raises(UserError, match="its sha256 is not the one that is listed"):
        fetch(tmp_path, "a.parquet")
    hub.faults["small.txt"] = [Fault(content=b"hullo\n")] * download.ATTEMPTS
    with pytest.raises(UserError, match="its git hash is not the one that is listed"):
        fetch(tmp_path, "small.txt")
    assert names_in(tmp_path) == []


def test_a_damaged_file_in_place_is_replaced(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(bytes(len(CONTENT)))
    fetch(tmp_path, "a.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == CONTENT


@pytest.mark.parametrize("size", [399_000, 401_000])
def test_a_file_of_another_size_than_listed_is_refused(hub: Hub, tmp_path: Path, size: int) -> None:
    hub.listed["a.parquet"] = {"size": size}
    with pytest.raises(UserError, match=f"400,000 bytes are sent, not the {size:,} that are listed"):
        fetch(tmp_path, "a.parquet")
    assert not (tmp_path / "a.parquet").exists()


def test_files_without_a_published_hash_are_named(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.listed["a.parquet"] = {"size": None, "lfs": None, "blobId": None}
    hub.faults["a.parquet"] = [Fault(cut=1000)]
    fetch(tmp_path, "a.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == CONTENT
    assert "no hash is published for 1 files, such as a.parquet of owner/data" in capsys.readouterr().out


def test_one_file_that_fails_ends_all_and_keeps_the_rest(hub: Hub, tmp_path: Path) -> None:
    names = [f"{number}.parquet" for number in range(6)]
    hub.files[REPOSITORY] = {name: CONTENT + name.encode() for name in names}
    done = {"0.parquet", "1.parquet"}
    hub.faults["3.parquet"] = [Fault(status=404, when=lambda: done <= set(names_in(tmp_path)))]
    for name in ("4.parquet", "5.parquet"):
        hub.faults[name] = [Fault(seconds_per_chunk=0.05)] * 3
    with pytest.raises(UserError, match=r"cannot get 3\.parquet"):
        fetch(tmp_path, *names)
    assert done <= set(names_in(tmp_path))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPool")]
    hub.faults.clear()
    assert len(fetch(tmp_path, *names)) == 6 and names_in(tmp_path) == names


def test_a_copy_in_the_clients_cache_is_used(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.file_download.xet_get", None)
    hub.files[REPOSITORY]["b.txt"] = b"cached"
    commit = tmp_path / "cache" / "datasets--owner--data" / "snapshots" / COMMIT
    commit.mkdir(parents=True)
    (commit / "b.txt").write_bytes(b"cached")
    assert hf_hub_download(
        REPOSITORY, "b.txt", repo_type="dataset", revision=COMMIT, cache_dir=tmp_path / "cache", local_files_only=True
    )
    fetch(tmp_path / "here", "b.txt")
    assert (tmp_path / "here" / "b.txt").read_bytes() == b"cached" and hub.gets("b.txt") == []


def test_too_little_room_is_said_before_the_first_byte(hub: Hub, tmp_path: Path) -> None:
    hub.listed["a.parquet"] = {"size": 10**18}
    with pytest.raises(UserError, match=r"1,000,000,000,000,000,000 bytes to fetch and [\d,]+ bytes free; make room"):
        fetch(tmp_path, "a.parquet")
    assert hub.gets("a.parquet") == []


def test_rate_and_time_left_are_printed_while_a_file_grows(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(download, "PROGRESS_SECONDS", 0.05)
    hub.faults["a.parquet"] = [Fault(seconds_per_chunk=0.05)]
    fetch(tmp_path, "a.parquet")
    lines = [line for line in capsys.readouterr().out.splitlines() if "0 of 1 files" in line]
    assert any("MB/s, 0 min left" in line for line in lines)


# -----------------------------------------------------------------------------
# Task data


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


ARC_SPLITS = [(subset, split) for subset in ("ARC-Easy", "ARC-Challenge") for split in ("train", "dev", "test")]


def arc_rows(count: int) -> list[dict[str, Any]]:
    choices = {"text": ["a", "b"], "label": ["A", "B"]}
    return [{"id": str(i), "question": f"q{i}", "choices": choices, "answerKey": "B"} for i in range(count)]


def publish_tasks(hub: Hub) -> None:
    """Every data set in the layout in which it is published, with few rows."""
    gsm8k = [{"question": f"q{i}", "answer": f"<<{i}+0={i}>>{i}\n#### {i}"} for i in range(510)]
    mmlu = {"question": "Which?", "subject": "x", "choices": ["a", "b", "c", "d"], "answer": 2}
    task = {"task_id": "0", "test": "def check(f): pass"}
    program = task | {"prompt": "def f():\n", "canonical_solution": "    return 1\n", "entry_point": "f"}
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    hub.files["openai/gsm8k"] = {
        "README.md": b"words",
        "main/train-00000-of-00001.parquet": parquet(gsm8k),
        "main/test-00000-of-00001.parquet": parquet(gsm8k[:5]),
        "socratic/test-00000-of-00001.parquet": parquet(gsm8k[5:6]),
    }
    hub.files["cais/mmlu"] = {
        "auxiliary_train/train-00000-of-00001.parquet": parquet([{"train": mmlu}]),
        "all/auxiliary_train-00000-of-00001.parquet": parquet([mmlu]),
        "all/validation-00000-of-00001.parquet": parquet([mmlu] * 2),
        "all/test-00000-of-00001.parquet": parquet([mmlu] * 3),
    }
    hub.files["allenai/ai2_arc"] = {
        f"{subset}/{split}-00000-of-00001.parquet": parquet(arc_rows(count))
        for subset in ("ARC-Easy", "ARC-Challenge")
        for split, count in (("train", 2), ("validation", 3), ("test", 4))
    }
    hub.files["openai/openai_humaneval"] = {
        "openai_humaneval/test-00000-of-00001.parquet": parquet(
            [program | {"task_id": "0", "test": "def check(f): pass"}]
        )
    }
    hub.files["HuggingFaceTB/smol-smoltalk"] = {
        f"data/train-0000{part}-of-00004.parquet": parquet([{"messages": chat, "source": f"part {part}"}] * (part + 1))
        for part in range(4)
    } | {"data/test-00000-of-00001.parquet": parquet([{"messages": chat, "source": "test"}])}


LENGTHS = """
from tasks.arc import ARC; from tasks.gsm8k import GSM8K; from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU; from tasks.smoltalk import SmolTalk; from nanochat.corpus import load_corpus
from nanochat.eval_bundle import find_bundle
tasks = [ARC(subset, split) for subset in ("ARC-Easy", "ARC-Challenge") for split in ("train", "dev", "test")]
tasks += [task(split) for task in (GSM8K, MMLU) for split in ("train", "dev", "test")]
tasks += [HumanEval(), SmolTalk("train"), SmolTalk("dev")]
print(*[len(task) for task in tasks])
load_corpus("climbmix"), find_bundle()
"""
EXPECTED = "2 3 4 2 3 4 10 500 5 1 2 3 1 10 1"


def test_every_task_loads_from_the_published_files(hub: Hub, base_dir: Path) -> None:
    publish_tasks(hub)
    tasks: list[Any] = [
        ARC(subset, split) for subset in ("ARC-Easy", "ARC-Challenge") for split in ("train", "dev", "test")
    ]
    tasks += [task(split) for task in (GSM8K, MMLU) for split in ("train", "dev", "test")]
    tasks += [HumanEval(), SmolTalk("train"), SmolTalk("dev")]
    assert " ".join(str(len(task)) for task in tasks) == EXPECTED
    assert all(task[0]["messages"][-1]["role"] == "assistant" for task in tasks)
    published = hub.files["openai/gsm8k"]["main/test-00000-of-00001.parquet"]
    assert rows_path("openai/gsm8k", "main", "test").read_bytes() == published, "one part stays as it was published"
    rows = load_rows("HuggingFaceTB/smol-smoltalk", "default", "train")
    assert [row["source"][-1] for row in rows] == list("0112223333")
    assert sorted(path.name for path in (base_dir / "task_data" / "smol-smoltalk").iterdir()) == [
        ".lock",
        "default",
        "manifest.json",
    ]
    everything = {(name, *split) for name in task_data.DATA_SETS for split in task_data.splits_of(name)}
    assert {place for place in everything if not rows_path(*place).exists()} == set(), "a split that no task reads"


def test_one_commit_per_data_set_is_recorded_and_used_again(hub: Hub, base_dir: Path) -> None:
    publish_tasks(hub)
    load_rows("openai/gsm8k", "main", "train")
    hub.commit = "b" * 40
    assert len(load_rows("openai/gsm8k", "main", "test")) == 5
    assert hub.lists()[-1].startswith(f"/api/datasets/openai/gsm8k/revision/{COMMIT}")
    hub.requests.clear()
    load_rows("openai/gsm8k", "main", "train"), load_rows("openai/gsm8k", "main", "test")
    assert hub.requests == []
    entry = read_sealed(base_dir / "task_data" / "gsm8k" / "manifest.json")["splits"]["main/train"]
    assert entry["rows"] == 510 and entry["source"] == "hub openai/gsm8k"


def test_a_flipped_bit_in_a_task_file_is_noticed(hub: Hub, base_dir: Path) -> None:
    publish_tasks(hub)
    load_rows("openai/gsm8k", "main", "test")
    write_rows("words", "default", "all", [{"word": "dog"}], "test")
    for dataset, subset, split, command in (
        ("openai/gsm8k", "main", "test", "rm .*--prefetch=tasks"),
        ("words", "default", "all", "rm .*; make it so"),
    ):
        path = rows_path(dataset, subset, split)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"sha256 differs\); get it again: {command}") as error:
            load_rows(dataset, subset, split, make="make it so" if dataset == "words" else None)
        assert "\n" not in str(error.value)
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


@pytest.mark.parametrize("lost", ["data/train-00002-of-00004.parquet", "data/train-00003-of-00004.parquet"])
def test_a_split_with_a_part_missing_is_refused(hub: Hub, base_dir: Path, lost: str) -> None:
    publish_tasks(hub)
    del hub.files["HuggingFaceTB/smol-smoltalk"][lost]
    with pytest.raises(UserError, match=r"has not all parquet files of default/train .*import_task_data FOLDER"):
        SmolTalk("train")


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


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_bundle_is_fetched_unpacked_and_checked(hub: Hub, base_dir: Path) -> None:
    hub.files["plain"]["eval_bundle.zip"] = zipped(BUNDLE | {"__MACOSX/._core.yaml": b"litter"})
    hub.faults["eval_bundle.zip"] = [Fault(cut=100), Fault(status=503)]
    fetch_bundle(f"{hub.url}/plain/eval_bundle.zip")
    assert contents(find_bundle()) == BUNDLE
    assert hub.gets("eval_bundle.zip") == [None, "bytes=100-", "bytes=100-"]
    assert not any("authorization" in headers for _, _, headers in hub.requests)
    hub.requests.clear()
    fetch_bundle(None)
    assert hub.requests == [] and names_in(base_dir / ".eval_bundle") == [".lock"]
    (base_dir / "eval_bundle" / "core.yaml").write_bytes(b"tasks: [x]\n")
    with pytest.raises(UserError, match=r"core.yaml: not as it was; get it again: rm -r .*--prefetch=eval"):
        find_bundle()


@pytest.mark.parametrize("prefix", ["", "eval_bundle/"])
def test_the_bundle_is_taken_from_a_zip_or_a_folder(base_dir: Path, tmp_path: Path, prefix: str) -> None:
    (tmp_path / "bundle.zip").write_bytes(zipped(BUNDLE, prefix))
    fetch_bundle(str(tmp_path / "bundle.zip"))
    assert contents(find_bundle()) == BUNDLE
    find_bundle().rename(tmp_path / "copy")
    fetch_bundle(str(tmp_path / "copy"))
    assert contents(find_bundle()) == BUNDLE
    (tmp_path / "again.zip").write_bytes(zipped(BUNDLE | {"manifest.json": b"{}"}))
    find_bundle().rename(tmp_path / "another copy")
    fetch_bundle(str(tmp_path / "again.zip"))
    assert contents(find_bundle()) == BUNDLE


def test_a_bundle_without_a_manifest_is_sealed_where_it_lies(base_dir: Path, tmp_path: Path) -> None:
    """A folder that somebody unpacked there must not be thrown away."""
    for name, content in BUNDLE.items():
        (base_dir / "eval_bundle" / name).parent.mkdir(parents=True, exist_ok=True)
        (base_dir / "eval_bundle" / name).write_bytes(content)
    with pytest.raises(UserError, match=r"there without a manifest.json; to take it as it is: .* --path="):
        fetch_bundle(None)
    fetch_bundle(str(base_dir / "eval_bundle"))
    assert contents(find_bundle()) == BUNDLE


def test_the_shared_bundle_is_taken(shared_data: Path, base_dir: Path) -> None:
    fetch_bundle(str(shared_data / "eval_bundle"))
    assert contents(find_bundle()) == contents(shared_data / "eval_bundle")


def link(name: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        member = zipfile.ZipInfo(name)
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(member, "/etc/passwd")
    return sink.getvalue()


def twice() -> bytes:
    """The same path with and without the folder's name."""
    sink = io.BytesIO(zipped(BUNDLE))
    with zipfile.ZipFile(sink, "a") as archive:
        archive.writestr("core.yaml", b"another")
    return sink.getvalue()


def damaged() -> bytes:
    content = bytearray(zipped(BUNDLE))
    content[150:180] = bytes(30)
    return bytes(content)


BAD_ZIPS: dict[str, tuple[Callable[[], bytes], str]] = {
    "parent": (lambda: zipped(BUNDLE | {"../../evil.jsonl": b"x"}), "points out of the folder; nothing was unpacked"),
    "absolute": (lambda: zipped(BUNDLE | {"/tmp/evil.jsonl": b"x"}, ""), "points out of the folder"),
    "backslash": (lambda: zipped(BUNDLE | {"..\\evil.jsonl": b"x"}), "points out of the folder"),
    "link": (lambda: link("eval_bundle/core.yaml"), "points out of the folder"),
    "too large": (lambda: zipped(BUNDLE | {"eval_data/big.jsonl": bytes(1 << 20)}), "more than 1,000,000 bytes in all"),
    "twice": (twice, "holds files of the same name"),
    "half": (lambda: zipped(BUNDLE)[:500], "not a whole zip file"),
    "damaged": (damaged, "not a whole zip file"),
    "no zip": (lambda: b"<html>Sign in to the airport's network</html>", "not a whole zip file"),
    "another": (lambda: zipped({"readme.txt": b"x"}), "no evaluation bundle, it has no core.yaml, eval_meta_data.csv"),
    "no data": (lambda: zipped({**BUNDLE, "eval_data/x/a.jsonl": b""}, "x/"), "no evaluation bundle"),
}


@pytest.mark.parametrize("bad", BAD_ZIPS)
def test_bad_zips_leave_nothing(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str, hub: Hub
) -> None:
    make, message = BAD_ZIPS[bad]
    monkeypatch.setattr("nanochat.eval_bundle.LARGEST", 1_000_000)
    (tmp_path / "b.zip").write_bytes(make())
    hub.files["plain"]["b.zip"] = make()
    for source in (str(tmp_path / "b.zip"), f"{hub.url}/plain/b.zip"):
        with pytest.raises(UserError, match=message) as error:
            fetch_bundle(source)
        assert "\n" not in str(error.value)
        assert names_in(base_dir) == [".lock"]
    assert not list(tmp_path.rglob("evil*")) and not Path("/tmp/evil.jsonl").exists()


# -----------------------------------------------------------------------------
# The command, in processes of its own

SHARDS = {f"shard_{number:05d}.parquet": [{"text": f"text {number} " * 50}] * 20 for number in (0, 1, 6542)}


@pytest.fixture
def published(hub: Hub) -> Hub:
    """Everything that --prefetch=all -n 2 asks for."""
    publish_tasks(hub)
    hub.files["karpathy/climbmix-400b-shuffle"] = {name: parquet(rows) for name, rows in SHARDS.items()}
    hub.files["plain"]["eval_bundle.zip"] = zipped(BUNDLE)
    return hub


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
    elsewhere = published.url.replace("127.0.0.1", "localhost")  # no business of the hub's token
    words = ("--prefetch=all", "-n", "2", f"--path={elsewhere}/plain/eval_bundle.zip")
    code, out, err = command(base, published.url, *words, HF_TOKEN="hf_secret")
    assert code == 0, err
    tokens = {path.split("/")[1]: headers.get("authorization") for _, path, headers in published.requests}
    assert tokens["api"] == "Bearer hf_secret" and tokens["plain"] is None
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
    process = start(base, published.url, "-c", LENGTHS, before=alone)
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
    assert len(published.gets(train)) == 1 and len(published.lists()) == 1


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_goes_on(published: Hub, tmp_path: Path, signum: int) -> None:
    shard = "shard_00000.parquet"
    published.files["karpathy/climbmix-400b-shuffle"][shard] = content = parquet(
        [{"text": random.Random(2).randbytes(2_500_000).hex()}]
    )
    published.faults[shard] = [Fault(seconds_per_chunk=0.05)]
    process = start(tmp_path, published.url, "-m", "nanochat.dataset", "-n", "1")
    folder = tmp_path / "data" / "climbmix"
    deadline = time.perf_counter() + 60
    while sum(path.stat().st_size for path in folder.glob(f".{shard}.*.partial")) < 1 << 20:
        assert time.perf_counter() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if signum == signal.SIGINT else -signal.SIGKILL), err
    assert not (folder / shard).exists() and not (folder / "manifest.json").exists()
    published.requests.clear()
    code, _, err = command(tmp_path, published.url, "-n", "1")
    assert code == 0, err
    (wanted,) = published.gets(shard)
    assert wanted is not None and int(wanted.removeprefix("bytes=").rstrip("-")) >= 1 << 20
    assert (folder / shard).read_bytes() == content


@pytest.fixture
def shard(published: Hub) -> str:
    """A training shard of 2 MB or more."""
    rows = [{"text": random.Random(2).randbytes(2_000_000).hex()}]
    published.files["karpathy/climbmix-400b-shuffle"]["shard_00000.parquet"] = parquet(rows)
    return "shard_00000.parquet"


def test_a_disk_that_fills_up_is_one_line(published: Hub, tmp_path: Path, shard: str) -> None:
    """A limit on the size of files ends a write as a full disk does, also where no disk may be mounted."""
    limited = ("sh", "-c", 'ulimit -f 1000; exec "$@"', "sh")  # half a MB, or one: the unit is the shell's
    code, _, err = command(tmp_path, published.url, "-n", "1", before=limited)
    assert code == 2 and err.count("\n") == 1 and f"no room for {shard}" in err and "make room" in err, err
    code, _, err = command(tmp_path, published.url, "-n", "1")
    assert code == 0 and published.gets(shard)[-1] in ("bytes=512000-", "bytes=1024000-"), err


def test_a_full_disk_is_one_line(published: Hub, tmp_path: Path, shard: str) -> None:
    """A real one, of 1 MB: refused before where sizes are listed, one line in the middle where not."""
    mount = f'mount -t tmpfs -o size=1m none {tmp_path} && exec "$@"'
    inside = ("unshare", "-rm", "sh", "-c", mount, "sh")
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("unshare and mount are not permitted here")
    for listed, message in (({}, "bytes to fetch and 1,0"), ({"size": None}, os.strerror(errno.ENOSPC))):
        published.listed[shard] = listed
        code, _, err = command(tmp_path, published.url, "-n", "1", before=inside)
        assert code == 2 and err.count("\n") == 1 and message in err, err


def test_prefetch_settings_without_meaning_are_refused(tmp_path: Path) -> None:
    for words, message in (
        (["--prefetch=tasks", "-n", "8"], "num_files=8: means nothing to prefetch=tasks"),
        (["--prefetch=tasks", "--path=x"], "path=x: means nothing"),
        (["--prefetch=all", "--source=folder", "--path=x"], "not together with source=folder"),
        (["--prefetch=everything"], "prefetch=everything: expected one of"),
    ):
        code, _, err = command(tmp_path, "http://127.0.0.1:9", *words)
        assert code == 2 and message in err and err.count("\n") == 1, err


def test_a_url_is_described_by_its_headers(hub: Hub) -> None:
    hub.files["plain"]["x"] = b"12345"
    file = download.describe_url(f"{hub.url}/plain/x")
    assert isinstance(file, RemoteFile) and file.size == 5 and json.loads(file.etag or "") != ""
