"""Conversations of the user's own, in the forms in which the field passes them around:

    [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A small language model."}]
    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}    OpenAI and the hub
    {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}        ShareGPT
    {"instruction": ..., "input": ..., "output": ...}                                          Alpaca

One per line, or all in one JSON list, the file perhaps packed as .gz or .zst, or as the rows of a parquet file. A
"system" or "system_prompt" beside them is the system message; an answer with "weight": 0 or "train": false is read but
not learned. The whole file is read and checked at once;
every mistake names the file and the line (of a list or parquet the number). Tool calls, images, thoughts and earlier
turns kept apart are refused: what would be dropped is a mistake.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from nanochat.conversation import check_messages
from tasks.common import Conversation, Task

Message = dict[str, Any]
EXAMPLE = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}'
ROLES = {"human": "user", "gpt": "assistant"}  # as ShareGPT calls them
NOT_READ = (
    "tool_calls",
    "function_call",
    "tools",
    "functions",
    "history",
    "image",
    "images",
    "audio",
    "audios",
    "video",
    "videos",
    "reasoning",
    "reasoning_content",
    "thinking",
)


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


def read_conversations(path: Path, learned: bool = True) -> list[list[Message]]:
    """All conversations of the file, to be `learned` or only read. Raises UserError with file and line."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a file of conversations like {EXAMPLE}") from None
    conversations = []
    for number, record in read_records(data, path):
        try:
            conversations.append(parse_conversation(record, learned))
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}; a conversation is, say, {EXAMPLE}") from None
    if not conversations:
        raise UserError(f"{path}: holds no conversations; write one per line, like {EXAMPLE}")
    return conversations


def read_records(data: bytes, path: Path) -> Iterable[tuple[int, Any]]:
    """(number of its line, item or row, what is there) for all that a file holds: rows of parquet, items of one JSON
    list, or lines, as they are; blank ones are none.
    """
    if data.startswith(b"PAR1"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return enumerate(pq.read_table(pa.BufferReader(data)).to_pylist(), 1)
        except (OSError, ValueError):
            raise UserError(f"{path}: not a whole parquet file; get it again") from None
    data = unpack(data, path).removeprefix(b"\xef\xbb\xbf")
    try:
        whole = json.loads(data)
    except (ValueError, RecursionError):  # the usual case: one per line
        return [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    one = not isinstance(whole, list) or (whole and isinstance(whole[0], dict) and {"role", "from"} & whole[0].keys())
    return [(1, whole)] if one else enumerate(whole, 1)


def unpack(data: bytes, path: Path) -> bytes:
    """What gzip or zstd packed; anything else as it is."""
    for magic, codec in ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd")):
        if data.startswith(magic):
            import pyarrow as pa

            try:
                return bytes(pa.input_stream(pa.BufferReader(data), codec).read())
            except OSError:
                raise UserError(f"{path}: not a whole {codec} file; get it again") from None
    return data


def parse_conversation(record: Any, learned: bool = True) -> list[Message]:
    """The messages of one line of JSON, or of what it says: a conversation as nanochat.conversation checks it, with no
    blank text and, if it is to be `learned`, an answer to learn. A question at its end is only read past: 4 of 996 in
    the published identity file have one. Raises ValueError with what is wrong otherwise.
    """
    if isinstance(record, bytes | str):
        try:
            record = json.loads(record)
        except (ValueError, RecursionError):
            raise ValueError("not JSON in UTF-8") from None
    messages = messages_of(record) if isinstance(record, dict) else record
    if isinstance(messages, list):
        messages = [plain_message(message, number) for number, message in enumerate(messages, 1)]
    check_messages(messages)
    if learned and not any(message["role"] == "assistant" and "weight" not in message for message in messages):
        raise ValueError("no message is the assistant's, to be learned: there is nothing to learn from it")
    for number, message in enumerate(messages, 1):
        content = message["content"]
        texts = [content] if isinstance(content, str) else [part["text"] for part in content]
        if not texts or not all(text.strip() for text in texts if isinstance(content, str)):
            raise ValueError(f"message {number} has content {content!r:.80}, expected a text that is not blank")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:  # an escaped half of a surrogate pair is valid JSON and not valid text
            raise ValueError(f"message {number} holds half a character (a lone surrogate)") from None
    return messages


def messages_of(record: dict[str, Any]) -> Any:
    """The list of messages that an object of one of the known forms holds, after its system message, if it has one."""
    refuse(record, "the conversation")
    messages = record.get("messages") or record.get("conversations")
    if isinstance(messages, str):
        messages = json.loads(messages)  # as some parquet files have it
    if messages is None and {"instruction", "output"} <= record.keys():
        asked = [record[key] for key in ("instruction", "input") if record.get(key)]
        if not all(isinstance(text, str) for text in asked):
            raise ValueError(f"instruction and input are {asked!r:.80}, expected text")
        messages = [{"role": "user", "content": "\n\n".join(asked)}, {"role": "assistant", "content": record["output"]}]
    if messages is None:
        raise ValueError(f"no messages, conversations or instruction and output among {', '.join(record) or 'nothing'}")
    system_text = record.get("system") or record.get("system_prompt")
    system = [{"role": "system", "content": system_text}] if system_text else []
    return system + messages if isinstance(messages, list) else messages


def plain_message(message: Any, number: int) -> Any:
    """A message as {role, content}, with a weight where that is 0; what is no object is left to be refused."""
    if not isinstance(message, dict):
        return message
    refuse(message, f"message {number}")
    role, content = message.get("role"), message.get("content")
    if role is None:
        role, content = ROLES.get(str(message.get("from")), message.get("from")), message.get("value")
    if role != "assistant" and isinstance(content, list):
        texts = [part for part in content if isinstance(part, dict) and part.get("type", "text") == "text"]
        if len(texts) < len(content) or not all(isinstance(part.get("text"), str) for part in texts):
            raise ValueError(f"message {number} has parts that are not text: {content!r:.80}")
        content = "".join(part["text"] for part in content)
    weight = message.get("weight", message.get("train"))
    if weight not in (None, 0, 1):  # False is 0
        raise ValueError(f"message {number} has weight {weight!r}, expected 0 (not learned) or 1")
    return {"role": role, "content": content} | ({"weight": 0} if weight == 0 else {})


def refuse(record: dict[str, Any], what: str) -> None:
    """Raise ValueError for what a model of text cannot be taught, where it is not empty."""
    for key in NOT_READ:
        if record.get(key):
            raise ValueError(f"{what} has {key}, which cannot be read; rewrite it as text, or take the line away")
