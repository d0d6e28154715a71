"""Conversations of the user's own: a file with one JSON list of {role, content} per line.

    [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A small language model."}]

The whole file is read and checked at once; every mistake names the file and the line.
"""

import json
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from nanochat.conversation import check_messages
from tasks.common import Conversation, Task

Message = dict[str, Any]


class CustomJSON(Task):
    """For training only: there is no judging of answers."""

    name = "CustomJSON"

    def __init__(self, path: Path | str, start: int = 0, stop: int | None = None, step: int = 1):
        super().__init__(start, stop, step)
        self.files = (Path(path),)
        self.conversations = read_conversations(Path(path))

    def num_examples(self) -> int:
        return len(self.conversations)

    def get_example(self, index: int) -> Conversation:
        return {"messages": self.conversations[index]}


def read_conversations(path: Path) -> list[list[Message]]:
    """Every line of the file as messages; blank lines are none. Raises UserError with file and line."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a file with one JSON list of messages per line") from None
    conversations = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                conversations.append(parse_conversation(line))
            except ValueError as error:
                raise UserError(f"{path}:{number}: {error}") from None
    if not conversations:
        raise UserError(f"{path}: holds no conversations; write one JSON list of messages per line")
    return conversations


def parse_conversation(line: bytes | str) -> list[Message]:
    """The messages of one line: a conversation as nanochat.conversation checks it, with at least one answer and no
    blank text. A question at its end is only read past: 4 of 996 in the published identity file have one. Raises
    ValueError with what is wrong otherwise.
    """
    try:
        messages = json.loads(line if isinstance(line, str) else line.decode())
    except (ValueError, RecursionError):
        raise ValueError('expected a JSON list like [{"role": "user", "content": "..."}, ...] in UTF-8') from None
    check_messages(messages)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message is the assistant's: there is nothing to learn from it")
    for number, message in enumerate(messages, 1):
        content = message["content"]
        texts = [content] if isinstance(content, str) else [part["text"] for part in content]
        if not texts or not all(text.strip() for text in texts if isinstance(content, str)):
            raise ValueError(f"message {number} has content {content!r:.80}, expected a text that is not blank")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:  # an escaped half of a surrogate pair is valid JSON and not valid text
            raise ValueError(f"message {number} holds half a character (a lone surrogate)") from None
    return [{"role": message["role"], "content": message["content"]} for message in messages]
