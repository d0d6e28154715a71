"""Sessions of scripts.chat_cli on a real pseudo-terminal, with an engine that says what it was asked.

    with server.session(TERM="dumb") as person:
        person.types("Hi\\r")
        person.sees("'Hi'")

A server process imports the script once, which takes seconds, and forks for every session.
"""

import contextlib
import importlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests import tiny

SECONDS = 120  # to wait for what must come; a busy machine may take many


class Person:
    """At the terminal. What was seen once is not looked at again."""

    def __init__(self, terminal: int):
        self.terminal, self.screen, self.seen = terminal, "", 0

    def types(self, text: str) -> None:
        """At the next prompt: before, the terminal is the kernel's, which treats Ctrl-D otherwise."""
        self.sees("you:")
        self.presses(text)

    def presses(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def sees(self, text: str) -> None:
        """Wait for it."""
        while (place := self.screen.find(text, self.seen)) < 0:
            assert self.reads(), f"it ended before {text!r}: {self.screen!r}"
        self.seen = place + len(text)

    def reads(self) -> bool:
        """Whether there is more, of which some is on the screen then."""
        ready, _, _ = select.select([self.terminal], [], [], SECONDS)
        assert ready, f"nothing more came: {self.screen!r}"
        with contextlib.suppress(OSError):  # EIO: the session has ended
            self.screen += os.read(self.terminal, 10_000).decode(errors="replace")
            return True
        return False


class Sessions:
    """The test's side of the server."""

    def __init__(self, server: "subprocess.Popen[str]", base_dir: Path):
        self.server, self.base_dir = server, base_dir

    @contextlib.contextmanager
    def session(self, settings: dict[str, Any] | None = None, code: int = 0, **environment: str) -> Iterator[Person]:
        """A session, which must have ended with that exit code a while after the block."""
        assert self.server.stdin and self.server.stdout
        ours, theirs = pty.openpty()
        variables = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "NANOCHAT_BASE_DIR": str(self.base_dir)}
        job = {"tty": os.ttyname(theirs), "settings": settings or {}, "environment": variables | environment}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        person, pid = Person(ours), int(self.server.stdout.readline())
        try:
            person.sees("/help lists the commands")
            os.close(theirs)
            yield person
            while person.reads():
                pass
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            raise
        finally:
            os.close(ours)
            ended = int(self.server.stdout.readline())
        assert ended == code, person.screen


@contextlib.contextmanager
def serve(base_dir: Path) -> Iterator[Sessions]:
    words, pipe = [sys.executable, "-m", "tests.terminal"], subprocess.PIPE
    environment = {name: value for name, value in tiny.environment(base_dir).items() if name != "NO_COLOR"}
    with subprocess.Popen(words, env=environment, cwd=tiny.ROOT, stdin=pipe, stdout=pipe, text=True) as server:
        yield Sessions(server, base_dir)


# -----------------------------------------------------------------------------
# The server's side


class Echo:
    """An engine that says the last question as Python writes it; "for ever" it says for ever."""

    def __init__(self, model: object, tokenizer: Any, *rest: Any, **more: Any):
        self.tokenizer, self.stop_tokens = tokenizer, {tokenizer.encode_special("<|assistant_end|>")}
        self.model = SimpleNamespace(config=SimpleNamespace(sequence_len=1000))

    def generate(self, prompt: list[int], sampling: Any) -> Iterator[int]:
        question = self.tokenizer.decode(prompt).split("<|user_start|>")[-1].split("<|user_end|>")[0]
        answer = {"for ever": "and on ", "escape": "\x1b]0;title\x07"}.get(question, repr(question))
        yield from self.tokenizer.encode(answer)
        while question == "for ever":
            time.sleep(0.01)
            yield from self.tokenizer.encode(answer)
        yield from self.stop_tokens


def run(job: dict[str, Any]) -> None:
    os.setsid()
    terminal = os.open(job["tty"], os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(terminal, descriptor)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    signal.alarm(2 * SECONDS)
    os.environ.update(job["environment"])
    from nanochat.common import run_main
    from scripts import chat_cli
    from tests.test_conversation import BYTES

    fakes = {
        "compute_init": lambda *_: SimpleNamespace(device=None, dtype=None),
        "load_model": lambda *_: (None, BYTES, {}),
        "Engine": Echo,
        "compile": False,
    }
    for name, value in (chat_cli.settings | fakes | job["settings"]).items():
        setattr(chat_cli, name, value)
    run_main(chat_cli.main)


def main() -> None:
    for module in ("scripts.chat_cli", "tests.test_conversation", "prompt_toolkit.shortcuts"):
        importlib.import_module(module)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            code = 1
            try:
                run(json.loads(line))
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
