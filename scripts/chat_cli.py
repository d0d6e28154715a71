"""Talk to a model in the terminal; a base model continues texts instead.

    python -m scripts.chat_cli -i rl
    python -m scripts.chat_cli -p "Summarise:" < notes.txt > summary.txt
    python -m scripts.chat_cli --json < questions.txt > answers.jsonl
    python -m scripts.chat_cli --source=base -p "Once upon a time"

At a terminal /help lists the commands; Alt-Enter, a backslash at the end of a line and pasted text make several lines;
what was typed is kept in $NANOCHAT_BASE_DIR/chat_history. Ctrl-C stops an answer: what was said stays, and training
will not learn it. At the prompt it clears the line, and again within a second it ends, as Ctrl-D does.
Elsewhere each line of stdin is a question, all of one conversation, or a command. With -p there is one question, and
what stdin holds stands behind it. stdout has the answers alone, with calls of the calculator in brackets; with --json
{"text", "parts", "tokens": {"prompt", "answer"}, "finish_reason": "stop" or "length", "left_out"}, or {"error"}.
Exit code: 0; 2 where a line was refused or a setting is wrong; 130 after Ctrl-C.
"""

import sys
from typing import Literal

from nanochat.configurator import Amount, Natural, Positive, Rate, Seed, Share, configure

SHORT = {"p": "prompt", "i": "source", "g": "model_tag", "s": "step", "t": "temperature", "k": "top_k"}

# Model
source: Literal["base", "mid", "sft", "rl"] = "sft"  # stage of the checkpoint
model_tag: str | None = None  # name of the checkpoint directory (None = the one saved last)
step: Natural | None = None  # checkpoint step (None = the last)
# Text
prompt: str | None = None  # answer this, and what stdin holds, and exit (None = a chat)
json: bool = False  # each answer as one line of JSON
num_samples: Positive = 1  # base only: continuations of each text
max_tokens: Positive = 256  # length of an answer; the end of the model's context may come first
temperature: Rate = 0.6  # 0 = always the most likely token
top_k: Natural = 50  # draw from the k most likely tokens only (0 = from all)
top_p: Share = 0.0  # draw from the most likely tokens that together reach this probability (0 = from all)
min_p: Share = 0.0  # draw from those that have this share of the most likely one's probability (0 = from all)
repetition_penalty: Amount = 1.0  # above 1 = what was said before becomes less likely (1 = not)
seed: Seed = 42  # of the drawing; every further answer takes the next one
# Machine
device_type: Literal["auto", "cuda", "mps", "xpu", "cpu"] = "auto"  # cuda also stands for AMD's ROCm
dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # what matmuls compute in
compile = True  # on a CPU, in a chat: a faster decoding step, which the first chat makes in the background in a minute
settings = configure(__name__, status=sys.stderr)

import contextlib
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from json import dumps
from pathlib import Path
from typing import TextIO

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, get_base_dir, run_main
from nanochat.compute import compute_init
from nanochat.configurator import read_block
from nanochat.conversation import Message, StreamDecoder, decode_parts, parts_text, render_within
from nanochat.decode_step import compile_decoding
from nanochat.engine import Engine, Sampling
from nanochat.tokenizer import Tokenizer
from tasks.customjson import read_conversations

COLOURS = {"assistant": "32", "python": "36", "python_output": "36", "status": "2"}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # would drive the terminal, and a model can say anything


def main() -> None:
    if num_samples > 1 and source != "base":
        raise UserError(f"--num-samples={num_samples}: only --source=base draws several; a chat has one answer")
    with contextlib.redirect_stdout(sys.stderr):
        compute = compute_init(device_type, dtype)
        model, tokenizer, _ = load_model(source, compute.device, "eval", model_tag, step)
    sampling = Sampling(max_tokens, temperature, top_k, top_p, seed, min_p, repetition_penalty)
    chat = Chat(Engine(model, tokenizer, compute.dtype), tokenizer, sampling)
    if compile and at_terminal():
        compile_decoding(chat.engine, [1], say=note)
    if prompt is None:
        converse(chat)
    else:
        behind = sys.stdin.read().rstrip() if sys.stdin and not sys.stdin.isatty() else ""
        chat.answer("\n\n".join(filter(None, (prompt, behind))))


def converse(chat: "Chat") -> None:
    """Lines in, answers out, until the input ends. Raises UserError then where lines of a pipe were refused."""
    lines, refused, interrupted = read_lines(), 0, -math.inf
    while True:
        line = ""
        try:
            line = next(lines, "/quit").encode(errors="replace").decode().rstrip()
            if line.startswith("/") or line in WORDS:
                note(run_command(chat, line))
            elif line:
                chat.answer(line.strip())
            interrupted = -math.inf
        except EOFError:
            break
        except KeyboardInterrupt:
            if not at_terminal():
                raise
            before, interrupted = interrupted, time.monotonic()
            if interrupted - before < 1:
                break
            note("Ctrl-C again at once, or Ctrl-D: end")
        except UserError as error:
            refused += 1
            note(str(error))
            if json and not line.startswith("/"):
                print(dumps({"error": str(error)}), flush=True)
    if refused and not at_terminal():
        raise UserError(f"lines that were refused: {refused}")


# -----------------------------------------------------------------------------
# Answers


@dataclass
class Chat:
    """A conversation, and how the next answer is drawn."""

    engine: Engine
    tokenizer: Tokenizer
    sampling: Sampling
    messages: list[Message] = field(default_factory=list)  # they end with an answer

    def answer(self, text: str) -> None:
        """A question; with a base model a text, which goes on in num_samples ways."""
        if source != "base":
            self.reply([*self.messages, {"role": "user", "content": text}])
            return
        tokens = self.tokenizer.encode(text, prepend="<|bos|>")
        several = num_samples > 1 and self.engine.generate_batch([tokens], self.sampling, num_samples)[0]
        for said in several or [self.engine.generate(tokens, self.sampling)]:
            self.say(said, text, len(tokens))

    def render(self, messages: list[Message]) -> tuple[list[int], int]:
        """The prompt, and how many of the first messages it leaves out to have room for an answer, which is said."""
        context = self.engine.model.config.sequence_len
        tokens, left_out = render_within(messages, self.tokenizer, context - min(max_tokens, context // 4))
        if left_out:
            note(f"the first {left_out} messages no longer fit into {context:,} tokens and are left out")
        return tokens, left_out

    def reply(self, messages: list[Message]) -> None:
        """Answer these and keep it all; without an answer all stays as it was. One that is not whole gets weight 0.
        Raises UserError for a last message that is too long.
        """
        tokens, left_out = self.render(messages)
        said = self.engine.generate(tokens, self.sampling)
        parts, reason = self.say(said, "assistant: " if at_terminal() else "", len(tokens), left_out)
        if parts:
            mark = {} if reason == "stop" else {"weight": 0}
            self.messages = [*messages, {"role": "assistant", "content": parts, **mark}]
        elif prompt is None:
            note("no answer: the question is taken back")

    def say(self, tokens: Iterable[int], label: str, prompt_tokens: int, left_out: int = 0) -> tuple[list, str]:
        """Show a continuation as it comes: its parts, and why it ends (stop, length or cancelled)."""
        said: list[int] = []
        decoder, kind, reason = StreamDecoder(self.tokenizer), "text", "length"
        write(label, "text" if source == "base" else "assistant")
        try:
            for token in tokens:
                said.append(token)
                if piece := decoder.feed(token):
                    kind = write_piece(piece.text, piece.kind, kind)
                reason = "stop" if token in self.engine.stop_tokens else "length"
        except KeyboardInterrupt:
            if not at_terminal():
                raise
            reason = "cancelled"
        piece, parts = decoder.finish(), decode_parts(said, self.tokenizer)
        write_piece((piece.text if piece else "") + "\n", "text", kind)
        count = {"prompt": prompt_tokens, "answer": len(said)}
        if json:
            answer = {"text": parts_text(parts), "parts": parts, "tokens": count, "finish_reason": reason}
            print(dumps({**answer, "left_out": left_out}), flush=True)
        elif at_terminal() and reason != "stop":
            note("stopped" if reason == "cancelled" else f"cut after {len(said)} tokens: see --max-tokens")
        self.sampling = replace(self.sampling, seed=(self.sampling.seed + 1) % 2**32)
        return parts, reason

    # Commands: given what stands behind their name, they return what there is to say. The docstring is the help, and
    # begins with what the command takes.

    def help(self, text: str) -> str:
        """This list."""
        return "\n".join(f"{name:9}{command.__doc__}" for name, command in COMMANDS.items())

    def new(self, text: str) -> str:
        """Forget what was said, but for the system message."""
        self.messages = [message for message in self.messages if message["role"] == "system"]
        return "forgotten" + ", but for the system message" * len(self.messages)

    def system(self, text: str) -> str:
        """[TEXT] The system message, which stands before the first question; without TEXT none."""
        rest = [message for message in self.messages if message["role"] != "system"]
        self.messages = [{"role": "system", "content": text}, *rest] if text else rest
        return "it stands before the first question" if text else "there is none any more"

    def temp(self, text: str, name: str = "temperature") -> str:
        """[X] The temperature: 0 = always the most likely token."""
        if text:
            value = read_block(Path(__file__)).settings[name].parse(text, f"{name}={text}")
            self.sampling = replace(self.sampling, **{name: value})
        return f"{name}={getattr(self.sampling, name)}"

    def topk(self, text: str) -> str:
        """[N] Draw from the N most likely tokens only; 0 = from all."""
        return self.temp(text, "top_k")

    def regen(self, text: str) -> str:
        """Another answer to the last question."""
        self.reply(self.messages[:-1])
        return "" if self.sampling.temperature else "at temperature 0 it is the same answer"

    def undo(self, text: str) -> str:
        """Take back the last question and its answer."""
        *self.messages, question, _ = self.messages
        return f"taken back: {question['content']:.60}"

    def save(self, text: str) -> str:
        """FILE Write the conversation as --mixture=FILE reads it; -f FILE replaces what is there."""
        name = text.removeprefix("-f ").strip()
        try:
            with Path(name).expanduser().open("x" if name == text else "w", encoding="utf-8") as file:
                file.write(dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            hint = f"; to replace it: /save -f {name}" if isinstance(error, FileExistsError) else ""
            raise UserError(f"{name}: {error.strerror}{hint}") from None
        return f"{len(self.messages)} messages written to {name}"

    def load(self, text: str) -> str:
        """FILE Go on with the conversation in a file; FILE:2 = the second one in it."""
        name, _, number = text.rpartition(":") if re.search(r":\d+$", text) else (text, "", "1")
        found = read_conversations(Path(name).expanduser(), learned=False)
        if not 1 <= int(number) <= len(found):
            raise UserError(f"/load {text}: it holds {len(found)}")
        messages = found[int(number) - 1]
        if messages[-1]["role"] == "user":
            self.reply(messages)
        else:
            self.messages = messages
        return f"{len(messages)} messages, conversation {number} of {len(found)}"

    def tokens(self, text: str) -> str:
        """How much of the context the conversation takes."""
        used = len(self.render([*self.messages, {"role": "user", "content": ""}])[0])
        return f"{used:,} of {self.engine.model.config.sequence_len:,} tokens"

    def quit(self, text: str) -> str:
        """End, as Ctrl-D does."""
        raise EOFError


NAMES = "help new system temp topk regen undo save load tokens quit".split()
COMMANDS = {f"/{name}": getattr(Chat, name) for name in NAMES}
WORDS = {"clear": "/new", "quit": "/quit", "exit": "/quit"}


def run_command(chat: Chat, line: str) -> str:
    """What there is to say then. UserError for what is no command, now or at all, and as the command itself does."""
    name, _, text = WORDS.get(line, line).partition(" ")
    if name not in COMMANDS:
        raise UserError(f"no command {name}: /help lists them; a space in front of a line makes it a question")
    takes = COMMANDS[name].__doc__.split()[0]
    if source == "base" and name not in ("/help", "/temp", "/topk", "/quit"):
        raise UserError(f"{name} is for chats; a base model only continues texts")
    if (text and not takes.strip("[]").isupper()) or (not text and takes == "FILE"):
        raise UserError(f"{name} takes {'a FILE' if takes == 'FILE' else 'nothing'} behind it")
    if name in ("/regen", "/undo", "/save") and len(chat.messages) < 2:
        raise UserError("nothing was asked yet")
    return COMMANDS[name](chat, text.strip())


# -----------------------------------------------------------------------------
# The terminal


def at_terminal() -> bool:
    """Whether somebody types: lines are edited, answers can be stopped, mistakes are mended."""
    return prompt is None and bool(sys.stdin and sys.stdin.isatty())


def read_lines() -> Iterator[str]:
    """Lines of stdin. At a terminal Ctrl-C and Ctrl-D raise, after which it can go on."""
    if not at_terminal():
        return iter(sys.stdin or ())
    note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends")
    read = input if os.environ.get("TERM") == "dumb" else line_editor()
    return iter(partial(read, "\n> " if source == "base" else "\nyou: "), None)


def line_editor() -> Callable[[str], str]:
    """Like input(), with a history, and with lines that Alt-Enter or a backslash goes on with."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    class History(FileHistory):
        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):  # somebody else's base directory, a full disk
                super().store_string(string)

    keys = KeyBindings()

    @keys.add("enter", filter=has_focus(DEFAULT_BUFFER))  # not in a search
    def accept(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor != "\\":
            buffer.validate_and_handle()
        elif buffer.delete_before_cursor():
            buffer.insert_text("\n")

    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    path = get_base_dir(create=False) / "chat_history"
    with contextlib.suppress(OSError):
        path.touch(0o600)  # nobody else's to read
    return PromptSession(history=History(path), key_bindings=keys, multiline=True, enable_suspend=True).prompt


def note(text: str) -> None:
    if text:
        print(paint(text if "\n" in text else f"({text})", "status", sys.stderr), file=sys.stderr, flush=True)


def write(text: str, style: str) -> None:
    if not json:
        print(paint(text, style, sys.stdout), end="", flush=True)


def write_piece(text: str, kind: str, before: str) -> str:
    """Write what comes after something of the kind `before`, with brackets around what a tool is asked; its kind."""
    if kind != before:
        answered = (before, kind) == ("python", "python_output")
        write(" = " if answered else "]" * (before != "text") + "[" * (kind != "text"), "python")
    write(text, kind)
    return kind


def paint(text: str, style: str, stream: TextIO) -> str:
    """As a terminal shows it, in colour unless it is dumb or NO_COLOR is set; as it is for any other stream."""
    if not (text and stream and stream.isatty()):
        return text
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or style not in COLOURS
    text = CONTROL.sub("\ufffd", text)
    return text if plain else f"\x1b[{COLOURS[style]}m{text}\x1b[0m"


if __name__ == "__main__":
    run_main(main)
