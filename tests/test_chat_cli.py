"""The terminal chat: one question, several turns, a text to continue."""

import pytest

from nanochat.common import UserError
from nanochat.gpt import GPTConfig
from scripts import chat_cli
from tests.test_conversation import BYTES
from tests.test_gpt import small_model


@pytest.fixture
def chat(monkeypatch, capsys):
    """Run the script on a small model that knows nothing, with settings by name and lines typed; returns the screen."""
    config = GPTConfig(sequence_len=96, vocab_size=BYTES.get_vocab_size(), n_layer=2, n_head=2, n_kv_head=2, n_embd=64)
    monkeypatch.setattr(chat_cli, "load_model", lambda *_: (small_model(config), BYTES, {}))

    def run(*typed: str, **changes: object) -> str:
        values = {**chat_cli.settings, "max_tokens": 8, "device_type": "cpu", "dtype": "float32", **changes}
        for name, value in values.items():
            monkeypatch.setattr(chat_cli, name, value)
        lines = iter(typed)

        def read(sign: str) -> str:
            try:
                return next(lines)
            except StopIteration:
                raise EOFError from None

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


def test_a_base_model_continues_a_text(chat):
    screen = chat(prompt="Once", source="base", num_samples=2)
    assert screen.count("Once") == 2
