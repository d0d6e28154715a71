"""Whole files, exit codes, and records that survive a crash."""

import json
import random
import signal
import subprocess
import sys

import pytest

from nanochat import common, files
from nanochat import record as record_of
from nanochat.common import Stopped, UserError


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.json"
    files.write_atomic(path, "old")

    def full_disk(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        files.write_atomic(path, "new and longer")
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_base_dir_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match="export NANOCHAT_BASE_DIR"):
        common.get_base_dir()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("depth=0: expected at least 1"), 2, "depth=0: expected at least 1"),
        (Stopped(signal.SIGTERM), 143, "stopped by SIGTERM"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_ends_become_exit_codes(error, code, said, capsys):
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        common.run_main(main)
    message = capsys.readouterr().err
    assert end.value.code == code and said in message and message.count("\n") == 1


def test_our_own_errors_keep_their_traceback():
    code = "from nanochat.common import run_main\ndef main(): assert 1 == 2, 'ours'\nrun_main(main)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "Traceback" in result.stderr and "ours" in result.stderr


def test_records_are_whole_lines_and_say_where_they_come_from(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    first, second = (record_of.open_record("base", "d4", {"depth": 4}) for _ in range(2))
    first.write("step", step=1, loss=2.5)
    assert first.path != second.path  # two runs within one second
    first.close()
    second.close()
    start, step = record_of.read_record(first.path)
    assert (start["event"], start["stage"], start["settings"]) == ("start", "base", {"depth": 4})
    assert {"argv", "git", "python", "versions"} <= start.keys() and step["loss"] == 2.5


def test_a_record_cut_short_by_a_crash_is_read_up_to_there(tmp_path):
    path = tmp_path / "base-d4-1.jsonl"
    path.write_text(json.dumps({"event": "start"}) + "\n" + '{"event": "st')
    assert record_of.read_record(path) == [{"event": "start"}]
    path.write_text('{"event": "st\n' + json.dumps({"event": "end"}) + "\n")
    with pytest.raises(ValueError, match=r"d4-1\.jsonl:1"):
        record_of.read_record(path)


def test_other_ranks_are_silent(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    record = record_of.open_record("base", "d4", {})
    record.write("step", step=1)
    record.close()
    common.print0("hello")
    assert capsys.readouterr().out == "" and not list((tmp_path).rglob("*.jsonl"))


@pytest.mark.parametrize("alive", [False, True])
def test_what_a_killed_writer_left_goes_with_the_next_one(tmp_path, alive):
    """kill -9 while a corpus of 24 GB was built left .NAME.PID.building for ever."""
    program = """import sys, time; from pathlib import Path; from nanochat.files import whole
with whole(Path(sys.argv[1])) as building:
    building.mkdir()
    (building / "half").touch()
    print(building, flush=True), time.sleep(60)"""
    path = tmp_path / "corpus.a"
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as process:
        try:
            left = process.stdout.readline().strip()
            if alive:
                files.write_atomic(path, "new")
            process.kill()
            process.wait()
            files.write_atomic(tmp_path / "corpus", "another name")
            assert len(list(tmp_path.iterdir())) == 2 + alive and (tmp_path / left / "half").exists()
        finally:
            process.kill()
    files.write_atomic(path, "newer")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["corpus", "corpus.a"]


def test_a_sealed_file_is_read_as_it_was_written_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    for value in ({"a": [1, {"b": None}]}, {"sha": "}"}, {"é": '\n"sha256":"'}):
        for indent in (None, 1):
            path.write_text(files.seal(json.dumps(value, indent=indent)), encoding="utf-8")
            assert files.read_sealed(path) == value
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b" ", b"", whole.replace(b"sha", b"shb", 1), b"{}", b'{"sha256":""}'):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not as it was written"):
            files.read_sealed(path)


def test_mutated_sealed_json_is_refused(tmp_path):
    """Bits flipped, the end cut off, pages zeroed, pieces repeated: whatever is changed, also in the seal."""
    content = {"step": 5, "files": {"x": {"bytes": 3, "sha256": "ab" * 32}}, "deep": [[[1, 2.5, None]]] * 20}
    original = files.seal(json.dumps(content, indent=1)).encode()
    for trial in range(200):
        rng = random.Random(trial)
        at, length = rng.randrange(len(original)), rng.choice((1, 8, 64, 512))
        piece, rest = original[at : at + length], original[at + length :]
        flipped = bytes([piece[0] ^ 1 << rng.randrange(8)]) + piece[1:]
        mutated = original[:at] + rng.choice((flipped + rest, b"", bytes(len(piece)) + rest, 2 * piece + rest, rest))
        (tmp_path / "x.json").write_bytes(mutated)
        with pytest.raises(ValueError, match="not as it was written"):
            files.read_sealed(tmp_path / "x.json")
