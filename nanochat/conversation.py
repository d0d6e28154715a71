"""The chat format: the only place that knows how a conversation becomes tokens, and which of them are trained.

    {"messages": [{"role": "user", "content": "How many r are in strawberry?"},
                  {"role": "assistant", "content": [{"type": "python", "text": "'strawberry'.count('r')"},
                                                    {"type": "python_output", "text": "3"},
                                                    {"type": "text", "text": "Three."}]}]}

    <|bos|><|user_start|>How ...?<|user_end|><|assistant_start|>                          mask 0
    <|python_start|>'strawberry'.count('r')<|python_end|>                                 mask 1: what the model asks
    <|output_start|>3<|output_end|>                                                       mask 0: what it is told
    Three.<|assistant_end|>                                                               mask 1: text, and to stop

A system message is put in front of the first user message; an answer with "weight": 0 is never trained. Training, CLI,
web and RL all render and read here.
Promises: text never becomes a special token, whatever it says; what is cut is counted.
"""

import codecs
import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import numpy as np

from nanochat.common import UserError
from nanochat.files import sha256_file
from nanochat.tokenizer import Tokenizer

Message = dict[str, Any]
KINDS = ("text", "python", "python_output")
FENCES = {"python": ("<|python_start|>", "<|python_end|>"), "python_output": ("<|output_start|>", "<|output_end|>")}


class Conversations(Protocol):
    """Numbered conversations {"messages": [...]}: a list of them, or a task."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


def check_messages(messages: object) -> None:
    """Raise UserError unless `messages` is a conversation: perhaps one system message, then user and assistant in turn,
    the user first; contents are text, or for the assistant a list of parts. It is called where messages come in that
    others wrote (a request, a file of chats, a published data set); rendering trusts what it is given.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError("expected a list of at least one {role, content}")
    system = isinstance(messages[0], dict) and messages[0].get("role") == "system"
    if system and len(messages) == 1:
        raise UserError("a system message alone; expected a user message after it")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f"message {number + 1} is not an object with role and content")
        expected = "system" if system and number == 0 else ("user", "assistant")[(number - system) % 2]
        if message["role"] != expected:
            raise UserError(f"message {number + 1} has role {message['role']!r}, expected {expected!r}")
        check_content(message["content"], f"message {number + 1}", expected)


def check_content(content: object, where: str, role: str) -> None:
    if role == "assistant" and isinstance(content, list):
        for part in content:
            if not (isinstance(part, dict) and part.get("type") in KINDS and isinstance(part.get("text"), str)):
                raise UserError(f'{where}: a part is {{"type": {" | ".join(KINDS)}, "text": "..."}}, not {part!r:.80}')
    elif not isinstance(content, str):
        kind = "text or a list of parts" if role == "assistant" else "text"
        raise UserError(f"{where}: the {role}'s content is {type(content).__name__}, expected {kind}")


# -----------------------------------------------------------------------------
# Conversation -> tokens


@dataclass
class Rendered:
    """A conversation as tokens."""

    ids: np.ndarray  # (n,) the tokenizer's dtype
    mask: np.ndarray  # (n,) bool: the tokens that the model is trained to produce
    never: np.ndarray  # (n,) bool: those that it is not, even where all tokens are trained: answers with weight 0
    tokens_cut: int = 0  # left off at the end, because of max_tokens

    @property
    def has_target(self) -> bool:
        """Whether any token is supervised; a cut that leaves only the question leaves nothing to learn."""
        return bool(self.mask[1:].any())


def segments(messages: Sequence[Message]) -> Iterator[tuple[str, bool, bool | None]]:
    """(text or special token's name, whether it is a special token, whether it is trained; None = never), in order."""
    yield "<|bos|>", True, False
    system = ""
    for message in messages:
        content = message["content"]
        if message["role"] == "system":
            system = f"{content}\n\n"
        elif message["role"] == "user":
            yield "<|user_start|>", True, False
            yield system + content, False, False
            yield "<|user_end|>", True, False
            system = ""
        else:
            yield "<|assistant_start|>", True, False
            whole = None if message.get("weight") == 0 else True
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                trained = whole and part["type"] != "python_output"
                fence = FENCES.get(part["type"])
                if fence:
                    yield fence[0], True, trained
                yield part["text"], False, trained
                if fence:
                    yield fence[1], True, trained
            yield "<|assistant_end|>", True, whole


def render_conversations(
    conversations: Sequence[Sequence[Message]], tokenizer: Tokenizer, max_tokens: int | None = None
) -> list[Rendered]:
    """The tokens of many lists of messages, their text encoded in one call; what is beyond max_tokens is cut off."""
    pieces = [list(segments(messages)) for messages in conversations]
    texts = [text for piece in pieces for text, special, _ in piece if not special]
    ids, offsets = tokenizer.encode_arrow(texts)
    encoded = iter(np.split(ids, offsets[1:-1]) if texts else [])
    names = {text for piece in pieces for text, special, _ in piece if special}
    special_ids = {name: np.array([tokenizer.encode_special(name)], ids.dtype) for name in names}
    rendered = []
    for piece in pieces:
        parts = [special_ids[text] if special else next(encoded) for text, special, _ in piece]
        row = np.concatenate(parts)
        lengths = [len(part) for part in parts]
        mask, never = (np.repeat([trained is kind for _, _, trained in piece], lengths) for kind in (True, None))
        limit = len(row) if max_tokens is None else max_tokens
        rendered.append(Rendered(row[:limit], mask[:limit], never[:limit], max(0, len(row) - limit)))
    return rendered


def render_conversation(messages: Sequence[Message], tokenizer: Tokenizer, max_tokens: int | None = None) -> Rendered:
    return render_conversations([messages], tokenizer, max_tokens)[0]


def render_for_completion(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """What the assistant is to continue, up to <|assistant_start|>. A reference answer at the end is left off."""
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    ids: list[int] = render_conversation(messages, tokenizer).ids.tolist()
    return [*ids, tokenizer.encode_special("<|assistant_start|>")]


def fingerprint(conversations: Conversations) -> str:
    """sha256 (hex) over their number, about 64 of them, evenly spaced, and the bytes of the files that they were read
    from: tells data sets apart without making all of a million conversations.
    """
    count = len(conversations)
    picked = [conversations[i]["messages"] for i in range(0, count, max(1, count // 64))]
    files = [sha256_file(file) for file in getattr(conversations, "files", ())]
    return hashlib.sha256(json.dumps([count, picked, files]).encode()).hexdigest()


def render_within(messages: Sequence[Message], tokenizer: Tokenizer, limit: int) -> tuple[list[int], int]:
    """render_for_completion of the latest turns that fit into `limit` tokens, and how many messages were left out,
    whole turns from the front; a system message stays. Raises UserError when the last message alone is too long.
    """
    system = list(messages[:1]) if messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    rendered: dict[int, list[int]] = {}

    def fits(start: int) -> bool:
        rendered[start] = render_for_completion([*system, *turns[start:]], tokenizer)
        return len(rendered[start]) <= limit

    starts = range(0, len(turns), 2)  # of the user's messages: they alternate with the assistant's
    start = 0 if fits(0) else 2 * bisect_left(starts, True, lo=1, key=fits)
    if start >= len(turns):
        tokens = len(render_for_completion([*system, turns[-1]], tokenizer))
        raise UserError(f"the last message has {tokens:,} tokens, and there is room for {limit:,}: shorten it")
    return rendered[start], start


# -----------------------------------------------------------------------------
# Tokens -> conversation


@dataclass(frozen=True)
class Piece:
    """A stretch of what the assistant says, as whole characters."""

    kind: str  # text, python or python_output
    text: str


class StreamDecoder:
    """Tokens in, pieces of text out, one token at a time. A character split over tokens is held back until it is whole;
    special tokens switch the kind of what follows and are never text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.kind = tokenizer, "text"
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.switches = {tokenizer.encode_special(name): "text" for name in tokenizer.get_special_tokens()}
        self.switches |= {tokenizer.encode_special(start): kind for kind, (start, _) in FENCES.items()}

    def feed(self, token: int) -> Piece | None:
        """What `token` adds, if anything yet."""
        if token not in self.switches:
            return self.piece(self.utf8.decode(self.tokenizer.decode_bytes([token])))
        piece = self.finish()
        self.kind = self.switches[token]
        return piece

    def finish(self) -> Piece | None:
        """What is still held back: the beginning of a character that never came, as U+FFFD."""
        return self.piece(self.utf8.decode(b"", final=True))

    def piece(self, text: str) -> Piece | None:
        return Piece(self.kind, text) if text else None


def decode_parts(tokens: Iterable[int], tokenizer: Tokenizer) -> list[dict[str, str]]:
    """The parts of an assistant message from the tokens that were generated: the inverse of rendering it."""
    decoder = StreamDecoder(tokenizer)
    pieces = [piece for piece in [*map(decoder.feed, tokens), decoder.finish()] if piece]
    stretches = groupby(pieces, key=lambda piece: piece.kind)
    return [{"type": kind, "text": "".join(piece.text for piece in stretch)} for kind, stretch in stretches]


def parts_text(parts: Iterable[dict[str, str]]) -> str:
    """What a reader sees of an answer: its text, without tool calls and their output."""
    return "".join(part["text"] for part in parts if part["type"] == "text")
