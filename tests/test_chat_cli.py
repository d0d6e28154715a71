"""The terminal chat: one question, pipes, a text to continue; and a person at a pseudo-terminal."""

import io
import json
import sys
from types import SimpleNamespace

import pytest

from nanochat.common import UserError
from nanochat.gpt import GPTConfig
from scripts import chat_cli
from tasks.customjson import read_conversations
from tests import terminal
from tests.test_conversation import BYTES
from tests.test_gpt import small_model


@pytest.fixture
def chat(monkeypatch, capsys):
    """Run the script on a small model that knows nothing, with settings by name and lines on stdin; returns stdout, and
    what was on stderr is chat.err. With exceptions among the lines, which are raised, somebody types them.
    """
    config = GPTConfig(sequence_len=96, vocab_size=BYTES.get_vocab_size(), n_layer=2, n_head=2, n_kv_head=2, n_embd=64)
    monkeypatch.setattr(chat_cli, "load_model", lambda *_: print("status") or (small_model(config), BYTES, {}))

    def run(*lines: str | type[BaseException], **changes: object) -> str:
        values = {
            **chat_cli.settings,
            "max_tokens": 8,
            "device_type": "cpu",
            "dtype": "float32",
            "compile": False,
            **changes,
        }
        for name, value in values.items():
            monkeypatch.setattr(chat_cli, name, value)
        typed = iter(lines)

        def read() -> str:
            line = next(typed, EOFError)
            if isinstance(line, str):
                return line
            raise line

        if not all(isinstance(line, str) for line in lines):
            monkeypatch.setattr(chat_cli, "at_terminal", lambda: chat_cli.prompt is None)
            monkeypatch.setattr(chat_cli, "read_lines", lambda: iter(read, None))
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        try:
            chat_cli.main()
        finally:
            screen = capsys.readouterr()
            run.out, run.err = screen.out, screen.err
        return run.out

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


@pytest.fixture
def engine_says(monkeypatch):
    """Let the engine say these tokens, or raise."""

    def say(*steps: int | type[BaseException]) -> None:
        def generate(*_):
            for step in steps:
                if not isinstance(step, int):
                    raise step
                yield step

        monkeypatch.setattr(chat_cli.Engine, "generate", generate)

    return say


END = BYTES.encode_special("<|assistant_end|>")


def test_one_question_one_answer(chat, asked):
    """Same seed, same answer; and no special token in it: nanochat's printed <|assistant_end|>."""
    first = chat(prompt="Who are you?")
    assert first == chat(prompt="Who are you?") != chat(prompt="Who are you?", seed=1)
    assert "<|" not in first and asked[0] == [{"role": "user", "content": "Who are you?"}]


def test_the_answer_to_p_stands_alone_on_stdout_and_stdin_behind_the_prompt(chat, asked):
    alone = chat(prompt="Sum up:")
    assert chat("one", "two", prompt="Sum up:") != alone and "status" not in alone
    assert [messages[0]["content"] for messages in asked] == ["Sum up:", "Sum up:\n\none\ntwo"]


def test_a_pipe_of_questions_gives_the_answers_alone_and_is_one_conversation(chat, asked):
    """They stood between prompts; and a Ctrl-C that ends a pipeline must not pass for an answer."""
    answers = chat("one", "", "two")
    assert [len(messages) for messages in asked] == [1, 3] and asked[1][1]["role"] == "assistant"
    assert "you:" not in answers and "assistant:" not in answers and answers.count("\n") >= 2


def test_commands_work_in_a_pipe(chat, asked):
    chat("/system Be brief.", "one", "clear", "/temp 0", "two", "/undo", " /three", "quit", "never")
    system = {"role": "system", "content": "Be brief."}
    assert [messages[0] for messages in asked] == [system] * 3
    assert [messages[-1]["content"] for messages in asked] == ["one", "two", "/three"]
    assert [len(messages) for messages in asked] == [2, 2, 2]


def test_a_line_that_is_refused_is_answered_in_one_line_and_the_exit_code_says_so(chat):
    lines = ["/temp -1", "/topk 1.5", "/undo", "/regen", "/save x", "/nothing", "/save", "/load", "/new chat"]
    with pytest.raises(UserError, match="^lines that were refused: 11$"):
        chat(*lines, "/load /none/such", "/load /tmp", "/temp", "/topk 3")
    said = [line for line in chat.err.splitlines() if line.startswith("(")]
    expected = [
        "temperature=-1: expected 0 <= float < 1e9",
        "top_k=1.5: expected int >= 0",
        *["nothing was asked yet"] * 3,
    ]
    assert said[:5] == [f"({line})" for line in expected]
    assert "no command /nothing: /help" in said[5] and said[6] == "(/save takes a FILE behind it)"
    assert said[8] == "(/new takes nothing behind it)" and "No such file" in said[9]
    assert said[-2:] == ["(temperature=0.6)", "(top_k=3)"]


def test_json_is_one_object_for_each_question(chat, engine_says):
    engine_says(
        *b"Six ", BYTES.encode_special("<|python_start|>"), *b"2*3", BYTES.encode_special("<|python_end|>"), END
    )
    answer = json.loads(chat(prompt="2*3?", json=True))
    parts = [{"type": "text", "text": "Six "}, {"type": "python", "text": "2*3"}]
    assert answer == {
        **{"text": "Six ", "parts": parts, "tokens": {"prompt": 8, "answer": 10}},
        **{"finish_reason": "stop", "left_out": 0},
    }
    assert chat(prompt="2*3?") == "Six [2*3]\n"
    with pytest.raises(UserError):
        chat("one", "/temp 1", "x" * 200, "two", json=True)


def test_json_says_what_was_left_out_and_what_went_wrong(chat):
    with pytest.raises(UserError, match="refused: 1"):
        chat(*["x" * 20] * 5, "/temp 0", "x" * 200, json=True)
    objects = [json.loads(line) for line in chat.out.splitlines()]
    assert len(objects) == 6 and [one["left_out"] for one in objects[:2]] == [0, 0] and objects[4]["left_out"] > 0
    assert objects[0]["finish_reason"] == "length" and objects[0]["tokens"]["answer"] == 8
    assert objects[5].keys() == {"error"} and "shorten it" in objects[5]["error"]


def test_a_long_chat_leaves_out_its_beginning_and_says_so(chat, asked):
    """nanochat's cache overflows without a word."""
    chat(*["x" * 20] * 6)
    assert "the first 2 messages no longer fit into 96 tokens" in chat.err and len(asked) == 6


def test_a_question_that_is_too_long_is_taken_back(chat, asked):
    with pytest.raises(UserError, match="refused"):
        chat("short", "x" * 200, "short")
    assert "has 204 tokens, and there is room for 88: shorten it" in chat.err and len(asked[2]) == 3
    with pytest.raises(UserError, match="shorten it"):
        chat(prompt="x" * 200)


def test_another_answer_is_drawn_with_another_seed(chat, asked):
    """And it stands in the place of the one before; the same seed would say the same."""
    again = chat("one", "/regen", "two").splitlines()
    plain = chat("one", "two").splitlines()
    assert again[0] == plain[0] and again[1] != plain[0]
    assert [len(messages) for messages in asked[:3]] == [1, 1, 3]


def test_a_saved_chat_is_what_mixture_reads_and_is_never_overwritten_without_a_word(chat, asked, engine_says, tmp_path):
    engine_says(*b"yes", END)
    file = tmp_path / "chat.jsonl"
    chat("/system S", "one", f"/save {file}")
    with pytest.raises(UserError, match="refused: 1"):
        chat("two", f"/save {file}")
    assert json.loads(file.read_text())["messages"][1]["content"] == "one"
    (messages,) = read_conversations(file)
    chat(f"/load {file}", "three", f"/save -f {file}")
    assert asked[-1][:-1] == messages and len(read_conversations(file)[0]) == 5


def test_an_answer_that_was_cut_is_saved_as_one_that_is_never_trained(chat, engine_says, tmp_path):
    """Trained, it would teach to stop in the middle of a sentence."""
    engine_says(*b"and on")
    file = tmp_path / "chat.jsonl"
    chat("one", f"/save {file}", f"/load {file}", "two")
    with pytest.raises(UserError, match="nothing to learn"):
        read_conversations(file)


def test_a_file_of_chats_is_loaded_as_people_have_them(chat, asked, tmp_path):
    file = tmp_path / "chats.json"
    alpaca = {"instruction": "Say", "input": "it", "output": "It."}
    file.write_text(json.dumps([alpaca, {"conversations": [{"from": "human", "value": "open"}]}]))
    with pytest.raises(UserError, match="refused: 1"):
        chat(f"/load {file}", "next", f"/load {file}:2", "after", f"/load {file}:3")
    assert [message["content"] for message in asked[0]] == ["Say\n\nit", "It.", "next"]
    assert [messages[0]["content"] for messages in asked[1:]] == ["open", "open"] and len(asked[2]) == 3


def test_ctrl_c_ends_an_answer_and_not_the_chat(chat, asked, engine_says):
    engine_says(*b"no", KeyboardInterrupt)
    chat("one", "two", EOFError)
    assert len(asked) == 2 and asked[1][1] == {
        **{"role": "assistant", "content": [{"type": "text", "text": "no"}], "weight": 0}
    }
    with pytest.raises(KeyboardInterrupt):  # exit code 130, and not an answer that looks whole
        chat(prompt="one")


def test_ctrl_c_before_the_first_word_takes_the_question_back_and_says_so(chat, asked, engine_says):
    engine_says(KeyboardInterrupt)
    chat_cli.note("")
    chat("one", "two", EOFError)
    assert len(asked[1]) == 1
    chat("one", "two", EOFError, source="base")


@pytest.mark.parametrize("source", ["sft", "base"])
def test_ctrl_c_at_the_prompt_clears_the_line_and_a_second_one_ends(chat, monkeypatch, asked, source):
    """A single one, which was meant for the answer before, ended the chat and lost what had been said."""
    seconds = iter((10.0, 15.0, 15.5, 16.0))
    monkeypatch.setattr(chat_cli, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    stop = KeyboardInterrupt
    chat("one", stop, stop, "two", stop, stop, "never", source=source)  # "two" within a second of a stop
    assert next(seconds, None) is None
    if source == "sft":
        assert [len(messages) for messages in asked] == [1, 3]


def test_a_base_model_continues_texts_and_has_no_chat(chat):
    assert chat(prompt="Once", source="base", num_samples=2).count("Once") == 2
    assert chat("Once", "Twice", source="base").count("ce") >= 2
    lines = chat(prompt="Once", source="base", num_samples=2, json=True).splitlines()
    assert [json.loads(line)["tokens"] for line in lines] == [{"prompt": 5, "answer": 8}] * 2
    with pytest.raises(UserError, match="refused: 1"):
        chat("/regen", source="base")
    with pytest.raises(UserError, match="^--num-samples=2: only --source=base"):
        chat(prompt="Once", num_samples=2)


# -----------------------------------------------------------------------------
# At a terminal


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    with terminal.serve(tmp_path_factory.mktemp("base")) as started:
        yield started


def test_what_was_typed_is_there_in_the_next_session(sessions):
    with sessions.session() as person:
        person.types("remember me\r")
        person.sees("'remember me'")
        person.types("/quit\r")
    with sessions.session() as person:
        person.types("\x1b[A\x1b[A\r")
        person.sees("'remember me'")
        person.types("\x04")
    assert (sessions.base_dir / "chat_history").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("typed", ["a\x1b\rb\r", "a\\\rb\r", "\x1b[200~a\nb\x1b[201~\r"])
def test_a_question_has_several_lines(sessions, typed):
    """By Alt-Enter, by a backslash, pasted: each line of what was pasted became a question."""
    with sessions.session() as person:
        person.types(typed)
        person.sees("'a\\nb'")
        person.types("\x04")


def test_a_dumb_terminal_gets_plain_text(sessions):
    with sessions.session(TERM="dumb") as person:
        person.types("Hi\r")
        person.sees("'Hi'")
        person.types("/quit\r")
    assert "\x1b" not in person.screen


def test_colours_are_left_out_where_they_are_not_wanted(sessions):
    screens = []
    for wanted in ({}, {"NO_COLOR": "1"}):
        with sessions.session(**wanted) as person:
            person.types("Hi\r")
            person.sees("'Hi'")
            person.types("\x04")
        screens.append(person.screen)
    assert "\x1b[32massistant: \x1b[0m" in screens[0] and "\x1b[2m(" in screens[0]
    assert "\x1b[32m" not in screens[1] and "\x1b[2m(" not in screens[1]


def test_what_a_model_says_does_not_drive_the_terminal(sessions):
    with sessions.session() as person:
        person.types("escape\r")
        person.sees("\ufffd]0;title\ufffd")
        person.types("\x04")


def test_ctrl_c_stops_the_reply_and_the_chat_goes_on(sessions, tmp_path):
    file = tmp_path / "chat.jsonl"
    with sessions.session() as person:
        person.types("for ever\r")
        person.sees("and on and on")
        person.presses("\x03")
        person.sees("(stopped)")
        person.types("never sent\x03")
        person.sees("Ctrl-C again at once")
        person.types("sent\r")
        person.sees("'sent'")
        person.types(f"/save {file}\r")
        person.sees("4 messages written")
        person.types("\x04")
    messages = json.loads(file.read_text())["messages"]
    assert [message.get("weight") for message in messages] == [None, 0, None, None]
    assert messages[2]["content"] == "sent"


def test_help_lists_every_command(sessions):
    with sessions.session() as person:
        person.types("/help\r")
        for name in chat_cli.COMMANDS:
            person.sees(name)
        person.types("/tokens\r")
        person.sees(" of 1,000 tokens")
        person.types("\x04")
