"""Whole files, exit codes, and records that survive a crash."""

import ctypes
import errno
import json
import os
import random
import signal
import subprocess
import sys

import pytest

from nanochat import common, files
from nanochat import record as record_of
from nanochat.common import Stopped, UserError
from nanochat.report import read_record
from tests import tiny


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.json"
    files.write_atomic(path, "old")

    def full_disk(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        files.write_atomic(path, "new and longer")
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_base_dir_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(SystemExit):
        common.run_main(common.get_base_dir)
    said = f"{tmp_path}/file/below: Not a directory; mend that, or choose another: export NANOCHAT_BASE_DIR=DIR\n"
    assert capsys.readouterr().err.endswith(said)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("depth=0: expected at least 1"), 2, "depth=0: expected at least 1"),
        (Stopped(signal.SIGTERM), 143, "stopped by SIGTERM"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/b"), 2, "/a/b: No space left on device; make room"),
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "/a/b"), 2, "/a/b: Permission denied; mend that"),
    ],
)
def test_ends_become_exit_codes(error, code, said, capsys):
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        common.run_main(main)
    message = capsys.readouterr().err
    assert end.value.code == code and said in message and message.count("\n") == 1


SPEAK = """
import sys
from nanochat.configurator import configure
word = ""  # to say
settings = configure(__name__)
from nanochat.common import run_main
def main():
    print("日本", word, sys.stdin and sys.stdin.read(), flush=True)
    print("and on")
run_main(main)
"""


def test_what_a_terminal_cannot_show_is_replaced_and_the_run_goes_on(tmp_path):
    """A sample with such a character ended training, unsaved; such a byte on stdin ended chat_cli."""
    (tmp_path / "speak.py").write_text(SPEAK, encoding="utf-8")
    environment = {**tiny.environment(tmp_path), "PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, tmp_path / "speak.py", "--word=é本"]
    result = subprocess.run(command, input=b"\xe9", env=environment, capture_output=True, timeout=60)
    assert result.returncode == 0 and result.stdout.splitlines()[1:] == [b"?? \xe9? \xe9", b"and on"], result
    environment["PYTHONIOENCODING"] = "utf-8"
    result = subprocess.run(command, input=b"a\xffb", env=environment, capture_output=True, timeout=60)
    assert result.returncode == 0 and "a\ufffdb\nand on" in result.stdout.decode(), result


@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        ("</dev/null >/dev/full", 2, "speak: standard output: No space left on device; make room, then start again\n"),
        ("</dev/null | true; exit ${PIPESTATUS[0]}", 141, ""),
        ("<&- >&-", 0, ""),
    ],
)
def test_streams_that_are_full_or_gone_end_in_an_exit_code_and_closed_ones_are_empty(tmp_path, redirected, code, said):
    (tmp_path / "speak.py").write_text(SPEAK, encoding="utf-8")
    line = f"{sys.executable} {tmp_path / 'speak.py'} {redirected}"
    result = subprocess.run(["bash", "-c", line], env=tiny.environment(tmp_path), capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (code, said)


def test_a_missing_temporary_directory_is_one_line(tmp_path):
    """A traceback from the middle of torch's import."""
    lost = "import tempfile\ntempfile._candidate_tempdir_list = lambda: ['/missing']\n"
    (tmp_path / "speak.py").write_text(lost + SPEAK, encoding="utf-8")
    command, environment = [sys.executable, tmp_path / "speak.py"], tiny.environment(tmp_path)
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    said = "speak: [Errno 2] No usable temporary directory found in ['/missing']; make room there, or name another"
    assert result.stderr == f"{said} one: export TMPDIR=DIR\n"


def without_rights() -> None:
    """For a child of root's: without CAP_DAC_OVERRIDE it may write only where others may."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP


def test_somebody_elses_models_are_evaluated_without_a_record_and_the_rest_says_so(tmp_path):
    code = "from nanochat import common, record\n"
    code += "common.run_main(lambda: print([record.open_record(s, 'x', {}).path for s in ('chat_eval', 'base')]))"
    tmp_path.chmod(0o555)
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=tiny.environment(tmp_path),
        capture_output=True,
        text=True,
        preexec_fn=without_rights,
    )
    tmp_path.chmod(0o755)
    assert result.stdout == f"{tmp_path}/records: Permission denied; this evaluation goes on without a record\n"
    assert result.stderr.startswith(f"-c: {tmp_path}/records: Permission denied; mend that, or choose another")
    assert result.returncode == 2 and result.stderr.count("\n") == 1


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
    start, step = read_record(first.path)
    assert (start["event"], start["stage"], start["settings"]) == ("start", "base", {"depth": 4})
    assert {"argv", "git", "python", "versions"} <= start.keys() and step["loss"] == 2.5


def test_a_record_cut_short_by_a_crash_is_read_up_to_there(tmp_path):
    path = tmp_path / "base-d4-1.jsonl"
    path.write_text(json.dumps({"event": "start"}) + "\n" + '{"event": "st')
    assert read_record(path) == [{"event": "start"}]
    path.write_text('{"event": "st\n' + json.dumps({"event": "end"}) + "\n")
    with pytest.raises(ValueError, match=r"d4-1\.jsonl:1"):
        read_record(path)


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
