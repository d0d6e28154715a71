"""Commands that bring data here: imported, written by a model, repackaged; nothing is lost or left out unsaid."""

import gzip
import json
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest

from dev import gen_synthetic_data, import_task_data, repackage_data
from nanochat.common import UserError
from tasks.common import rows_path
from tasks.customjson import CustomJSON
from tests.corpora import run_dataset
from tests.tiny import ROOT, environment


def run_command(monkeypatch: pytest.MonkeyPatch, module: ModuleType, settings: dict[str, Any]) -> None:
    """A command with some settings and otherwise the defaults, in this process."""
    for name, value in settings.items():
        monkeypatch.setattr(module, name, value)
    module.main()


# -----------------------------------------------------------------------------
# import_task_data


def table(dataset: str, subset: str, split: str) -> list[dict[str, Any]]:
    return pq.read_table(rows_path(dataset, subset, split)).to_pylist()


def import_folder(monkeypatch: pytest.MonkeyPatch, folder: Path, overwrite: bool = False) -> None:
    run_command(monkeypatch, import_task_data, {"folder": str(folder), "overwrite": overwrite})


def test_all_published_files_are_recognised(shared_data, base_dir, monkeypatch, capsys):
    import_folder(monkeypatch, shared_data)
    folder = base_dir / "task_data"
    files = folder.rglob("*.parquet")
    assert {file.relative_to(folder).as_posix(): pq.read_metadata(file).num_rows for file in files} == {
        "gsm8k/main/train.parquet": 7473,
        "gsm8k/main/test.parquet": 1319,
        "mmlu/all/dev.parquet": 285,
        "mmlu/all/test.parquet": 7658,
        "ai2_arc/ARC-Easy/train.parquet": 2251,
        "ai2_arc/ARC-Easy/validation.parquet": 570,
        "ai2_arc/ARC-Easy/test.parquet": 2376,
        "ai2_arc/ARC-Challenge/train.parquet": 1056,
        "openai_humaneval/openai_humaneval/test.parquet": 164,
        "words/default/all.parquet": 370099,
    }
    output = capsys.readouterr().out
    assert "7,658 rows, 6,384 fewer than published, from 29 files such as" in output
    assert "1,056 rows, 63 fewer than published" in output
    assert "7,473 rows, from" in output and "files with other names" in output
    assert table("words", "default", "all")[:3] == [{"word": "a"}, {"word": "aa"}, {"word": "aaa"}]


GSM8K_ROW = {"question": "How many?", "answer": "<<1+1=2>>2\n#### 2"}
ARC_ROW = {"id": "x", "question": "Which?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}
CHAT = [{"content": "Hi", "role": "user"}, {"content": "Hello", "role": "assistant"}]


def write_originals(folder: Path) -> None:
    """The forms in which the files were first published, and some that are nothing."""
    question = {"stem": "Which?", "choices": [{"text": "a", "label": "1"}, {"text": "b", "label": "2"}]}
    arc = {"id": "x", "question": question, "answerKey": "2"}
    humaneval = {name: name for name in ("task_id", "prompt", "canonical_solution", "test", "entry_point")}
    texts = {
        "a/train.jsonl": json.dumps(GSM8K_ROW) + "\n",
        "b/train.jsonl": json.dumps({"text": "no problem"}) + "\n",
        "OpenBookQA/ARC-Challenge-Dev.jsonl": json.dumps(arc) + "\n",
        "arc_easy_validation.json": json.dumps([ARC_ROW]),
        "mmlu/val/astronomy_val.csv": '"Why, say?",w,x,y,z,B\nHow?,w,x,y,z,D\n',
        "mmlu/val/anatomy_val.csv": "question,choice0,choice1,choice2,choice3,answer\nWhy?,w,x,y,z,3\n",
        "mmlu/auxiliary_train/race.csv": "Who?,w,x,y,z,A\n",
        "mmlu/dev/law_dev.csv": "only,three,columns\n",
        "smol-smoltalk/test.jsonl": json.dumps({"messages": CHAT, "source": "x"}) + "\n",
        "words/words_alpha.txt": "a\r\nab\r\n",
        "README.md": "x",
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    (folder / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(humaneval).encode()))
    with zipfile.ZipFile(folder / "words_alpha.zip", "w") as archive:
        archive.writestr("words_alpha.txt", "b\n")


def test_the_forms_of_first_publication_give_the_hubs_rows(tmp_path, base_dir, monkeypatch, capsys):
    write_originals(tmp_path / "in")
    import_folder(monkeypatch, tmp_path / "in")
    assert table("openai/gsm8k", "main", "train") == [GSM8K_ROW]
    assert table("allenai/ai2_arc", "ARC-Challenge", "validation") == [ARC_ROW]
    assert table("allenai/ai2_arc", "ARC-Easy", "validation") == [ARC_ROW]
    who = {"question": "Who?", "subject": "", "choices": ["w", "x", "y", "z"], "answer": 0}
    assert table("cais/mmlu", "auxiliary_train", "train") == [who]
    rows = [(row["subject"], row["question"], row["answer"]) for row in table("cais/mmlu", "all", "validation")]
    assert rows == [("anatomy", "Why?", 3), ("astronomy", "Why, say?", 1), ("astronomy", "How?", 3)]
    assert table("HuggingFaceTB/smol-smoltalk", "default", "test") == [{"messages": CHAT}]
    assert table("openai/openai_humaneval", "openai_humaneval", "test")[0]["entry_point"] == "entry_point"
    assert table("words", "default", "all") == [{"word": "a"}, {"word": "ab"}]
    assert not rows_path("cais/mmlu", "all", "dev").exists()
    said = capsys.readouterr().out
    assert f"left out {tmp_path}/in/b/train.jsonl: taken from {tmp_path}/in/a/train.jsonl" in said
    assert f"left out {tmp_path}/in/words_alpha.zip: taken from" in said
    law = f"left out {tmp_path}/in/mmlu/dev/law_dev.csv"
    assert f"{law}: not as mmlu/*_{{dev,val,test}}.csv (ValueError: a row of 3" in said
    assert "not looked at: 1 files with other names" in said


def test_splits_that_are_there_are_kept_unless_asked_otherwise(tmp_path, base_dir, monkeypatch, capsys):
    (tmp_path / "words_alpha.txt").write_text("one\n")
    import_folder(monkeypatch, tmp_path)
    (tmp_path / "words_alpha.txt").write_text("two\n")
    import_folder(monkeypatch, tmp_path)
    assert "kept, it is there already; replace it with --overwrite" in capsys.readouterr().out
    assert table("words", "default", "all") == [{"word": "one"}]
    import_folder(monkeypatch, tmp_path, overwrite=True)
    assert table("words", "default", "all") == [{"word": "two"}]


def test_damaged_files_are_left_out_and_said(tmp_path, base_dir, monkeypatch, capsys):
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(b"\x1f\x8b\x08 cut short")
    (tmp_path / "words_alpha.zip").write_bytes(b"no zip")
    (tmp_path / "train.jsonl").write_text('{"question": "x"')
    (tmp_path / "arc_easy_test.json").write_text("[]")
    with pytest.raises(UserError, match=r"none of the files known here: gsm8k/\{train,test\}.jsonl, mmlu"):
        import_folder(monkeypatch, tmp_path)
    assert capsys.readouterr().out.count("left out") == 4
    with pytest.raises(UserError, match="no such directory"):
        import_folder(monkeypatch, tmp_path / "nowhere")


# -----------------------------------------------------------------------------
# gen_synthetic_data


def conversation(number: int) -> str:
    """A right answer, as a model gives it."""
    messages = [{"role": "user", "content": f"Who? {number}"}, {"role": "assistant", "content": "A small model é"}]
    return json.dumps({"messages": messages})


class Endpoint:
    """An OpenAI-compatible endpoint on this machine that answers what a test says."""

    def __init__(self) -> None:
        # number of the request -> status, what the model says
        self.answer: Callable[[int], tuple[int, str]] = lambda number: (200, conversation(number))
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint.lock:
                    number = len(endpoint.requests)
                    endpoint.requests.append({**body, "path": self.path})
                    endpoint.headers.append(dict(self.headers))
                status, text = endpoint.answer(number)
                message = {"choices": [{"message": {"role": "assistant", "content": text}}]}
                data = json.dumps(message).encode() if status == 200 else text.encode()
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


@pytest.fixture
def endpoint():
    endpoint = Endpoint()
    with endpoint.server as server, ThreadPoolExecutor(1) as pool:
        pool.submit(server.serve_forever, poll_interval=0.01)
        yield endpoint
        server.shutdown()


@pytest.fixture
def generate(endpoint, tmp_path, base_dir, monkeypatch):
    """The command with some settings; returns the lines of its file."""

    def generate(**values: Any) -> list[Any]:
        file = tmp_path / "new" / "out.jsonl"
        usual = {"base_url": endpoint.url, "model": "large", "api_key_env": None, "num": 5, "out": str(file)}
        usual |= {"workers": 2, "RETRY_SECONDS": 0.01}
        run_command(monkeypatch, gen_synthetic_data, usual | values)
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    return generate


def test_conversations_are_asked_for_and_written(endpoint, generate, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "s3cret")
    (tmp_path / "about.txt").write_text("It is called Zippy.")
    lines = generate(api_key_env="MY_KEY", about=str(tmp_path / "about.txt"), temperature=0.7)
    assert Counter(line[0]["content"] for line in lines) == Counter(f"Who? {i}" for i in range(5))
    assert len(CustomJSON(tmp_path / "new" / "out.jsonl")) == 5
    request = endpoint.requests[0]
    assert (request["path"], request["model"], request["temperature"]) == ("/v1/chat/completions", "large", 0.7)
    assert endpoint.headers[0]["Authorization"] == "Bearer s3cret"
    prompts = {request["messages"][0]["content"] for request in endpoint.requests}
    assert len(prompts) == 5 and all("It is called Zippy." in prompt for prompt in prompts)


def test_the_prompts_are_varied_and_the_same_every_time():
    prompts = [gen_synthetic_data.make_prompt(i, "x") for i in range(300)]
    assert prompts == [gen_synthetic_data.make_prompt(i, "x") for i in range(300)]
    assert len(set(prompts)) > 290
    for axis, values in gen_synthetic_data.AXES.items():
        assert len(set(values)) == len(values) >= 10
        assert all(any(f"{axis}: {value}\n" in prompt for prompt in prompts) for value in values)


def test_it_goes_on_where_it_stopped(endpoint, generate, tmp_path, capsys):
    first = generate(num=3)
    file = tmp_path / "new" / "out.jsonl"
    file.write_text(file.read_text() + '[{"role": "us')  # a crash in the middle of a line
    lines = generate(num=5)
    assert lines[:3] == first and len(lines) == 5 == len(endpoint.requests)
    assert "took away the last line, which was cut short" in capsys.readouterr().out
    file.write_text(file.read_text().rstrip("\n"))  # but a whole one is kept
    assert generate(num=5) == lines
    assert generate(num=2) == lines and len(endpoint.requests) == 5
    file.write_text("hello\n")
    with pytest.raises(UserError, match=r"out.jsonl:1: not JSON"):
        generate()


BAD_ANSWERS = {
    "not JSON": "Sure! Here is a conversation.",
    "no messages": json.dumps({"text": "x"}),
    "message 1 has role": json.dumps([{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]),
    "message 2 has content": json.dumps([{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]),
    "does not begin with the user and end with the assistant": json.dumps([*CHAT, CHAT[0]]),
}


@pytest.mark.parametrize(("reason", "text"), BAD_ANSWERS.items())
def test_bad_answers_are_asked_for_again_and_counted(endpoint, generate, capsys, reason, text):
    endpoint.answer = lambda number: (200, text if number < 2 else f"```json\n{conversation(number)}\n```")
    assert len(generate(num=3, workers=1)) == 3
    assert f"2 times bad answer: {reason}" in capsys.readouterr().out


def test_a_model_that_never_answers_right_is_said_at_the_end(endpoint, generate, capsys):
    endpoint.answer = lambda number: (200, conversation(number) if number == 0 else "No.")
    with pytest.raises(UserError, match="num=3: 2 are missing, 5 bad answers to each"):
        generate(num=3, workers=1)
    assert "10 times bad answer: not JSON" in capsys.readouterr().out


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_endpoint_is_asked_again(endpoint, generate, capsys, status):
    endpoint.answer = lambda number: (status, "busy") if number in (0, 1, 3) else (200, conversation(number))
    assert len(generate(num=2, workers=1)) == 2
    assert f"3 times no answer: HTTP {status}" in capsys.readouterr().out


@pytest.mark.parametrize(("status", "attempts"), [(401, 1), (404, 1), (302, 1), (500, 5)])
def test_a_refusing_endpoint_ends_it_and_keeps_what_there_is(endpoint, generate, tmp_path, status, attempts):
    """A redirect is a refusal: the key goes nowhere but where the user said."""
    endpoint.answer = lambda number: (status, "wrong key\nsorry") if number else (200, conversation(number))
    with pytest.raises(UserError, match=r"what there is is kept, run the same command to go on") as error:
        generate(workers=1)
    assert f"HTTP {status}" in str(error.value) and "\n" not in str(error.value)
    assert len(endpoint.requests) == 1 + attempts
    assert len(CustomJSON(tmp_path / "new" / "out.jsonl")) == 1


def test_ctrl_c_keeps_what_is_done(endpoint, tmp_path, base_dir):
    release = threading.Event()

    def answer(number: int) -> tuple[int, str]:
        if number >= 3:
            release.wait(60)
        return 200, conversation(number)

    endpoint.answer = answer
    file = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "dev.gen_synthetic_data", f"--base-url={endpoint.url}", "--model=x"]
    command += ["--api-key-env=None", f"--out={file}", "--workers=2"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment(base_dir), **pipes) as process:
        try:
            for _ in range(500):
                if file.exists() and file.read_bytes().count(b"\n") == 3 and len(endpoint.requests) == 5:
                    break
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
            release.set()
    assert (process.returncode, stderr) == (130, "gen_synthetic_data: interrupted\n")
    assert f"{file}: 3 conversations" in stdout
    assert len(CustomJSON(file)) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base_url": None}, "base_url=None: expected one"),
        ({"model": None}, "model=None: expected one"),
        ({"base_url": "file:///etc"}, "expected http://... or https://..."),
        ({"api_key_env": "NO_SUCH_KEY"}, "api_key_env=NO_SUCH_KEY: not set"),
        ({"about": "/nowhere.txt"}, "about=/nowhere.txt"),
    ],
)
def test_wrong_settings_are_one_line(endpoint, generate, values, message):
    with pytest.raises(UserError, match=message):
        generate(**values)
    assert not endpoint.requests


# -----------------------------------------------------------------------------
# repackage_data


@pytest.fixture
def repackage(tmp_path, base_dir, monkeypatch):
    """The command with some settings; returns the directory that it made."""

    def repackage(out: str = "out", **values: Any) -> Path:
        usual = {"path": str(tmp_path / "in"), "out": str(tmp_path / out), "shard_chars": 30_000, "seed": 42}
        run_command(monkeypatch, repackage_data, usual | values)
        return tmp_path / out

    return repackage


def write_lines(file: Path, texts: list[str | None]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def test_text_becomes_shards_as_people_know_them(tmp_path, repackage, capsys):
    texts = [f"document é {i:05d}" for i in range(9000)]  # 16 characters each
    write_lines(tmp_path / "in" / "a.jsonl", [*texts[:4000], None, " "])
    write_lines(tmp_path / "in" / "b.jsonl", [*texts[4000:]])
    write_lines(tmp_path / "in" / "val.jsonl", ["to validate", "also"])
    out = repackage()
    files = sorted(file.name for file in out.iterdir())
    assert files == [*(f"shard_{i:05d}.parquet" for i in range(len(files) - 1)), "val_00000.parquet"]
    assert len(files) in (5, 6)  # 144,000 characters in shards of about 30,000
    read: list[str] = []
    for name in files[:-1]:
        with pq.ParquetFile(out / name) as file:
            column = file.metadata.row_group(0).column(0)
            assert (file.schema_arrow.names, column.compression) == (["text"], "ZSTD")
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            assert sizes[:-1] == [1024] * (len(sizes) - 1)
            assert name == files[-2] or sizes[-1] == 1024
            read += file.read()["text"].to_pylist()
    assert sorted(read) == texts
    for start in range(0, 8000, 1000):  # shuffled as a whole: every part has text from both ends
        numbers = [int(text.split()[-1]) for text in read[start : start + 1000]]
        assert min(numbers) < 500 and max(numbers) > 8500 and numbers != sorted(numbers)
    assert sorted(pq.read_table(out / "val_00000.parquet")["text"].to_pylist()) == ["also", "to validate"]
    said = capsys.readouterr().out
    assert "9,000 documents, 144,000 characters, 2 documents without text left out" in said
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_same_text_and_seed_give_the_same_bytes_whatever_the_buffer(tmp_path, repackage, monkeypatch):
    write_lines(tmp_path / "in" / "a.jsonl", [f"document {i}" for i in range(3000)])
    first = repackage("one", shard_chars=5000)
    monkeypatch.setattr(repackage_data, "BUFFER_BYTES", 100)
    second, other = repackage("two", shard_chars=5000), repackage("three", shard_chars=5000, seed=1)
    names = sorted(file.name for file in first.iterdir())
    assert len(names) > 1
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    assert (first / names[0]).read_bytes() != (other / names[0]).read_bytes()


def test_a_corpus_keeps_its_validation_apart(tmp_path, base_dir, repackage, monkeypatch):
    """And what is made is a folder from which the same corpus can be made again."""
    write_lines(tmp_path / "in" / "a.jsonl", [f"document {i}" for i in range(100)])
    write_lines(tmp_path / "in" / "val.jsonl", ["to validate"])
    first = run_dataset(monkeypatch, source="folder", path=str(tmp_path / "in"), name="first")
    out = repackage(path="first")
    assert sorted(file.name for file in out.iterdir()) == ["shard_00000.parquet", "val_00000.parquet"]
    second = run_dataset(monkeypatch, source="folder", path=str(out), name="second")
    assert first.manifest["totals"] == second.manifest["totals"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": None}, "expected --path=DIR"),
        ({"path": "nowhere"}, "nowhere: not a directory"),
        ({"out": ""}, "exists"),
    ],
)
def test_repackaging_mistakes_leave_nothing_behind(tmp_path, repackage, values, message):
    write_lines(tmp_path / "in" / "a.jsonl", ["x"])
    with pytest.raises(UserError, match=message):
        repackage(**values)
    write_lines(tmp_path / "in" / "a.jsonl", [" "])
    with pytest.raises(UserError, match="hold no text"):
        repackage()
    assert {path.name for path in tmp_path.iterdir()} <= {"in", "base"}


@pytest.mark.parametrize("module", ["import_task_data", "gen_synthetic_data", "repackage_data"])
def test_the_commands_run_as_modules_and_answer_mistakes_in_one_line(base_dir, module):
    command = [sys.executable, "-m", f"dev.{module}"]
    result = subprocess.run(command, cwd=ROOT, env=environment(base_dir), capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(f"{module}: ") and result.stderr.count("\n") == 1
    result = subprocess.run([*command, "--help"], cwd=ROOT, env=environment(base_dir), capture_output=True, text=True)
    assert result.returncode == 0 and f"dev.{module}" in result.stdout
