"""What may be asked of the server and what it answers, in OpenAI's shapes: pydantic models in, dictionaries out.

Fields that OpenAI has and this server does not do are refused by name (tools, response_format=json_schema, logit_bias)
unless their value asks for nothing (null, 0, [], {"type": "text"}); those that change no text (user, metadata) are
ignored. Additions: top_k, min_p, repetition_penalty, and a calculator's use, which stands beside the text and not in
it, as {"nanochat": {"kind": "python" | "python_output", "text": ...}} in a stream's delta and as
{"nanochat": {"parts": [...]}} in a whole message; such parts may be sent back as an assistant's content.
"""

import json
import secrets
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException
from starlette.responses import Response

from nanochat.common import UserError
from nanochat.conversation import check_messages
from nanochat.engine import Said, Sampling
from nanochat.serving import Part
from nanochat.tokenizer import Tokenizer

LIMITS = {"messages": 500, "message_characters": 8_000, "characters": 32_000, "max_tokens": 4_096, "choices": 32}
HARMLESS = frozenset(
    """include_obfuscation metadata name parallel_tool_calls prompt_cache_key safety_identifier service_tier store
    user""".split()
)
NEUTRAL: dict[str, Sequence[object]] = {
    "best_of": [1],
    "function_call": ["none", "auto"],
    "modalities": [["text"]],
    "response_format": [{"type": "text"}],
    "tool_choice": ["none", "auto"],
}
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """An answer other than 200, with OpenAI's `param` and `code`."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(status, message, {name.replace("_", "-"): value for name, value in headers.items()})
        self.param, self.code = param, code


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """ASCII JSON: text from a request may hold what UTF-8 can't, a lone surrogate."""
    return Response(json.dumps(content) + "\n", status, headers, "application/json")


def problem(error: HTTPException) -> Response:
    about = (getattr(error, "param", None), getattr(error, "code", None))
    body = error_body(error.status_code, error.detail, *about)
    return json_response(body, error.status_code, error.headers)


def shorten(value: object) -> str:
    """A value as an error line shows it: printable ASCII, 60 characters at most."""
    try:
        text = ascii(value[:80] if isinstance(value, str) else value)
    except RecursionError:
        text = "..."
    return text if len(text) <= 60 else text[:57] + "..."


# -----------------------------------------------------------------------------
# Requests


class Strict(BaseModel):
    """An object whose values are of their types: no NaN, no true for 1, no "1" for 1."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @model_validator(mode="after")
    def refuse_what_is_not_done(self) -> "Strict":
        for name, value in (self.model_extra or {}).items():
            if value and name not in HARMLESS and value not in NEUTRAL.get(name, ()):
                raise ApiError(
                    400, f"{shorten(name)} is not supported here", shorten(name)[1:-1], "unsupported_parameter"
                )
        return self


class ContentPart(Strict):
    type: Literal["text", "python", "python_output"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]

    def parts(self) -> list[dict[str, str]]:
        if isinstance(self.content, str):
            return [{"type": "text", "text": self.content}]
        return [{"type": part.type, "text": part.text} for part in self.content]


class StreamOptions(Strict):
    include_usage: bool | None = None


Stop = Annotated[str, Field(min_length=1, max_length=200)]


class Drawing(Strict):
    """How a reply is drawn. What is left open comes from the server's command line."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Annotated[int, Field(ge=0, le=200)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=LIMITS["max_tokens"])] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None

    def sampling(self, defaults: dict[str, Any], logprobs: int | None = None) -> Sampling:
        """For the engine; without a seed it gets a random one."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        seed = secrets.randbits(32) if self.seed is None else self.seed % 2**64
        return Sampling(**{**defaults, **given, "seed": seed, "logprobs": logprobs})

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Conversation(Drawing):
    """What nanochat's own page asks."""

    messages: Annotated[list[Message], Field(min_length=1)]

    def rendered(self) -> list[dict[str, Any]]:
        """The messages as conversation.py has them: user and assistant in turn. Neighbours of one role are joined by an
        empty line, and a system message further down counts as the user's. Raises UserError beyond LIMITS.
        """
        check_sizes(self.messages)
        told = [(role_of(number, message.role), message.parts()) for number, message in enumerate(self.messages)]
        messages = []
        for role, group in groupby(told, key=lambda pair: pair[0]):
            parts = [part for _, parts in group for part in [{"type": "text", "text": "\n\n"}, *parts]][1:]
            plain = all(part["type"] == "text" for part in parts)
            messages.append({"role": role, "content": "".join(part["text"] for part in parts) if plain else parts})
        check_messages(messages)
        if messages[-1]["role"] != "user":
            raise UserError(f"the last message is the {messages[-1]['role']}'s; expected the user's")
        if not messages[-1]["content"].strip():
            raise UserError("the last message is empty; expected something to reply to")
        return messages


def role_of(number: int, role: str) -> str:
    return ("user" if number else "system") if role in ("system", "developer") else role


def check_sizes(messages: Sequence[Message]) -> None:
    """Raise UserError for messages beyond LIMITS."""
    if len(messages) > LIMITS["messages"]:
        raise UserError(f"{len(messages):,} messages; at most {LIMITS['messages']:,} are taken")
    sizes = [sum(len(part["text"]) for part in message.parts()) for message in messages]
    for number, size in enumerate(sizes, 1):
        if size > LIMITS["message_characters"]:
            raise UserError(f"message {number} has {size:,} characters; at most {LIMITS['message_characters']:,} each")
    if sum(sizes) > LIMITS["characters"]:
        raise UserError(f"the messages have {sum(sizes):,} characters; at most {LIMITS['characters']:,} in all")


class OpenAI(Strict):
    """What chat and plain completions have in common."""

    n: Annotated[int, Field(ge=1, le=LIMITS["choices"])] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Conversation, OpenAI):
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=LIMITS["max_tokens"])] | None = None

    @model_validator(mode="after")
    def use_the_newer_name(self) -> "ChatRequest":
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        return self

    def top(self) -> int | None:
        """How many tokens' log-probabilities beside its own a token has; None = not even that."""
        return (self.top_logprobs or 0) if self.logprobs or self.top_logprobs else None


Tokens = Annotated[list[int], Field(min_length=1)]


class TextRequest(Drawing, OpenAI):
    prompt: str | Tokens | Annotated[list[str | Tokens], Field(min_length=1, max_length=LIMITS["choices"])]
    max_tokens: Annotated[int, Field(ge=0, le=LIMITS["max_tokens"])] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None

    def prompts(self, tokenizer: Tokenizer, context: int) -> list[tuple[list[int], int]]:
        """(tokens, where those begin that were asked for) of each prompt: BOS stands before text, and ids are taken as
        they are. Raises UserError for ids that the tokenizer doesn't have, and for a prompt without room behind it.
        """
        asked = self.prompt if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int) else [self.prompt]
        if len(asked) * (self.n or 1) > LIMITS["choices"]:
            raise UserError(f"n={self.n} for {len(asked)} prompts; at most {LIMITS['choices']} texts in one request")
        if sum(len(prompt) for prompt in asked) > LIMITS["characters"]:
            raise UserError(f"the prompts are longer than {LIMITS['characters']:,} characters or tokens in all")
        prompts = []
        for prompt in asked:
            bos = [tokenizer.get_bos_token_id()] if isinstance(prompt, str) else []
            tokens = [*bos, *(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)]
            if not all(0 <= token < tokenizer.get_vocab_size() for token in tokens):
                raise UserError(f"the prompt has a token id beyond 0 to {tokenizer.get_vocab_size() - 1:,}")
            if len(tokens) + (self.max_tokens != 0) > context:
                why = f"the prompt has {len(tokens):,} tokens; the context is {context:,}, the reply included"
                raise ApiError(400, why, "prompt", "context_length_exceeded")
            prompts.append((tokens, len(bos)))
        return prompts


# -----------------------------------------------------------------------------
# Answers


class Answer:
    """Chunks, or the whole, of one answer."""

    def __init__(self, chat: bool, model: str, tokenizer: Tokenizer, logprobs: int | None):
        self.chat, self.model, self.tokenizer, self.top = chat, model, tokenizer, logprobs
        self.id = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        self.created = int(time.time())
        self.lengths: Counter[int] = Counter()  # characters of each choice so far

    def body(self, choices: list[dict[str, Any]], chunk: bool, usage: Any = ()) -> dict[str, Any]:
        kind = f"chat.completion{'.chunk' if chunk else ''}" if self.chat else "text_completion"
        body = {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
        return body if usage == () else {**body, "usage": usage}

    def opening(self, index: int) -> dict[str, Any]:
        """The first choice of a chat's stream."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, part: Part) -> dict[str, Any]:
        """A choice of a stream that adds a part."""
        text = {"content" if self.chat else "text": part.text} if part.kind == "text" else tool(part)
        rest = {"logprobs": self.logprobs(index, [part]), "finish_reason": None}
        return {"index": index, **({"delta": text} if self.chat else {"text": "", **text}), **rest}

    def closing(self, index: int, reason: str) -> dict[str, Any]:
        text: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        return {"index": index, **text, "logprobs": None, "finish_reason": reason}

    def whole(self, index: int, parts: Sequence[Part], reason: str) -> dict[str, Any]:
        """A choice with everything."""
        text = "".join(part.text for part in parts if part.kind == "text")
        use = {} if all(part.kind == "text" for part in parts) else {"nanochat": {"parts": as_content(parts)}}
        said = {"message": {"role": "assistant", "content": text, **use}} if self.chat else {"text": text, **use}
        return {"index": index, **said, "logprobs": self.logprobs(index, parts), "finish_reason": reason}

    def logprobs(self, index: int, parts: Sequence[Part]) -> dict[str, Any] | None:
        said = [one for part in parts if part.kind == "text" for one in part.said]
        if self.top is None:
            return None
        if self.chat:
            return {"content": [self.scored(one) for one in said], "refusal": None}
        texts = [self.text_of(one.token) for one in said]
        starts = [self.lengths[index]]
        for one in said:
            starts.append(starts[-1] + len(self.tokenizer.decode([one.token])))
        self.lengths[index] = starts[-1]
        top = [{self.text_of(token): value for token, value in self.likeliest(one)} or None for one in said]
        scores = [one.logprob for one in said]
        return {"tokens": texts, "token_logprobs": scores, "top_logprobs": top, "text_offset": starts[:-1]}

    def scored(self, said: Said) -> dict[str, Any]:
        top = [self.token(token, value) for token, value in said.top]
        return {**self.token(said.token, said.logprob), "top_logprobs": top}

    def token(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self.text_of(token), "logprob": logprob, "bytes": list(self.tokenizer.decode_bytes([token]))}

    def likeliest(self, said: Said) -> list[tuple[int, float]]:
        """The tokens to name beside one, itself among them as OpenAI has it."""
        return [] if said.logprob is None else [*said.top, (said.token, said.logprob)]

    def text_of(self, token: int) -> str:
        """A token's text, or as OpenAI has it "bytes:\\xe2" for one that is no whole characters."""
        raw = self.tokenizer.decode_bytes([token])
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def tool(part: Part) -> dict[str, Any]:
    return {"nanochat": {"kind": part.kind, "text": part.text}}


def as_content(parts: Sequence[Part]) -> list[dict[str, str]]:
    """Parts as an assistant's content; see conversation.py."""
    stretches = groupby(parts, key=lambda part: part.kind)
    return [{"type": kind, "text": "".join(part.text for part in stretch)} for kind, stretch in stretches]


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The completion's are what max_tokens counts: with what the tool said and the token that ends a reply."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}
