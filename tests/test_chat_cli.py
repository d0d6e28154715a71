"""The terminal chat: one question, several turns, a text to continue."""

import io
import sys
from types import SimpleNamespace

import pytest

from nanochat.common import UserError
from nanochat.gpt import GPTConfig
from scripts import chat_cli
from tests.test_conversation import BYTES
from tests.test_gpt import small_model


@pytest.fixture
def chat(monkeypatch, capsys):
    """Run the script on a small model that knows nothing, with settings by name and lines typed, of which an exception
    is raised; returns stdout. Nothing is on stdin.
    """
    config = GPTConfig(sequence_len=96, vocab_size=BYTES.get_vocab_size(), n_layer=2, n_head=2, n_kv_head=2, n_embd=64)
    monkeypatch.setattr(chat_cli, "load_model", lambda *_: print("status") or (small_model(config), BYTES, {}))

    monkeypatch.setattr(sys, "stdin", io.StringIO())

    def run(*typed: str | type[BaseException], **changes: object) -> str:
        values = {**chat_cli.settings, "max_tokens": 8, "device_type": "cpu", "dtype": "float32", **changes}
        for name, value in values.items():
            monkeypatch.setattr(chat_cli, name, value)
        lines = iter(typed)

        def read(sign: str) -> str:
            line = next(lines, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        chat_cli.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def asked(monkeypatch):
    """The conversations that the engine was asked to continue."""
    seen: list[list[dict]] = []
    render = chat_cli.render_within

    def note(messages: list[dict], *rest):
        seen.append(messages)
        return render(messages, *rest)

    monkeypatch.setattr(chat_cli, "render_within", note)
    return seen


def test_one_question_one_answer(chat, asked):
    """Same seed, same answer; and no special token in it: nanochat's printed <|assistant_end|>."""
    first = chat(prompt="Who are you?")
    assert first == chat(prompt="Who are you?") != chat(prompt="Who are you?", seed=1)
    assert "<|" not in first and asked[0] == [{"role": "user", "content": "Who are you?"}]


def test_turns_are_remembered_until_clear(chat, asked):
    screen = chat("one", "two", "clear", "three", "quit", "never")
    assert [len(messages) for messages in asked] == [1, 3, 1]
    assert asked[1][0]["content"] == "one" and asked[1][1]["role"] == "assistant"
    assert "(forgotten)" in screen


def test_a_long_chat_leaves_out_its_beginning_and_says_so(chat, asked):
    """nanochat's cache overflows without a word."""
    screen = chat(*["x" * 20] * 6)
    assert "messages no longer fit into 96 tokens" in screen and len(asked) == 6


def test_a_question_that_is_too_long_is_taken_back(chat, asked):
    screen = chat("short", "x" * 200, "short")
    assert "has 204 tokens, and there is room for 88: shorten it" in screen and len(asked[2]) == 3
    with pytest.raises(UserError, match="shorten it"):
        chat(prompt="x" * 200)


def test_ctrl_c_ends_an_answer_and_not_the_chat(chat, monkeypatch, asked):
    generate = chat_cli.Engine.generate

    def interrupted(*values):
        yield from [next(steps := generate(*values)), next(steps)]
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_cli.Engine, "generate", interrupted)
    chat("one", "two")
    assert len(asked) == 2 and len(asked[1]) == 3


def test_ctrl_c_before_the_first_word_takes_the_question_back_and_says_so(chat, monkeypatch, asked):
    def interrupted(*values):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_cli.Engine, "generate", interrupted)
    screen = chat("one", "two")
    assert screen.count("the question is taken back") == 2 and len(asked[1]) == 1
    with pytest.raises(KeyboardInterrupt):  # exit code 130, and not an answer that looks whole
        chat(prompt="one")
    monkeypatch.setattr(chat_cli.Engine, "generate_batch", interrupted)
    assert chat("one", "two", source="base").count("(stopped)") == 2


@pytest.mark.parametrize("source", ["sft", "base"])
def test_ctrl_c_at_the_prompt_clears_the_line_and_a_second_one_ends(chat, monkeypatch, asked, source):
    """A single one, which was meant for the answer before, ended the chat and lost what had been said."""
    seconds = iter((10.0, 10.0, 15.0, 15.0, 15.5, 15.5, 16.0))
    monkeypatch.setattr(chat_cli, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    stop = KeyboardInterrupt
    screen = chat("one", stop, stop, "two", stop, stop, "never", source=source)  # "two" within a second of a stop
    assert screen.count("(line cleared") == 3
    if source == "sft":
        assert [len(messages) for messages in asked] == [1, 3]


def test_a_base_model_continues_a_text(chat):
    screen = chat(prompt="Once", source="base", num_samples=2)
    assert screen.count("Once") == 2


def test_the_answer_to_p_stands_alone_on_stdout_and_stdin_behind_the_prompt(chat, monkeypatch, asked):
    alone = chat(prompt="Sum up:")
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert chat(prompt="Sum up:") != alone and "status" not in alone
    assert [messages[0]["content"] for messages in asked] == ["Sum up:", "Sum up:\n\none\ntwo"]
