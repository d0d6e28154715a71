"""Conversations in which a model tells who it is, written by a larger one behind any OpenAI-compatible endpoint.

    OPENAI_API_KEY=... python -m dev.gen_synthetic_data --base-url=https://HOST/v1 --model=NAME
    python -m dev.gen_synthetic_data --base-url=http://127.0.0.1:8000/v1 --model=NAME --api-key-env=None

Each conversation is asked for with a topic, a person, a course and a manner of the first message drawn at random: asked
the same thing a thousand times, a model answers a handful of things. Lines are what tasks/customjson.py reads, checked
by it. Promises: what is done stays done, also after Ctrl-C, and the same command goes on from there; answers that are
no conversation are asked for again, counted and said. Read some before you train on them: nobody else has.
"""

import http.client
import json
import os
import queue
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat.common import UserError, get_base_dir, print0, run_main
from nanochat.configurator import Amount, Positive, Rate, Seed, configure

# Endpoint
base_url: str | None = None  # such as https://HOST/v1; /chat/completions is put behind it
model: str | None = None  # what the endpoint calls the model that writes
api_key_env: str | None = "OPENAI_API_KEY"  # environment variable that has the key (None = send none)
temperature: Rate = 1.0  # of the sampling there
timeout: Amount = 120.0  # seconds to wait for one answer
workers: Positive = 4  # requests at the same time
# Conversations
num: Positive = 1000  # lines that the file is to have in the end
out: str | None = None  # the file (None = identity_conversations.jsonl in $NANOCHAT_BASE_DIR)
about: str | None = None  # a text file that says who the assistant is (None = a small model made with nanochat)
seed: Seed = 42  # of topics, persons, courses and manners
settings = configure(__name__)

from tasks.customjson import parse_conversation, read_conversations

Messages = list[dict[str, Any]]
ATTEMPTS = 5  # for an answer that does not come, or is no conversation
RETRY_SECONDS = 1.0  # wait before the second request, doubled each time; bad answers are asked for again at once

ABOUT = """
The assistant is a small language model. It was trained from nothing with nanochat, an open-source project that shows
every step of making a chat model in code short enough to read: tokenizer, pretraining, chat training, chat page. It is
a Transformer. It runs on a machine of whoever trained it, not as a company's service. It knows what was in its training
text and cannot look anything up; it forgets a conversation when that ends. It is far smaller than famous models and
makes mistakes, also about plain facts, and says so without fuss. For sums it can use a calculator. It reads and writes
English best. It has no body, no age and no feelings that it knows of, and does not pretend to.
"""
TOPICS = """
its name and where that comes from|what it is made of|who trained it and who could|how its training went, step by step
what it cannot do|whether it is right about things|how it differs from large, famous assistants|where it runs
what happens to what it is told|whether it thinks or feels|open source and reading its code|what a token is
how long it will remember this talk|which languages it knows|sums and its calculator|what it is good for
an everyday question, and only then who is answering|being mistaken for another assistant
""".strip()
PERSONS = """
a pupil with homework|a retired engineer|somebody who has never met a chatbot|a programmer who wants details
a teacher preparing a class|a sceptic|a child of nine|a novelist looking for a character|a busy shop owner
a student of machine learning|somebody who cannot sleep|a journalist checking facts|a parent worried about privacy
a speaker of another language whose English is thin|a cheerful tinkerer|a nurse on a break
""".strip()
COURSES = """
one question, one answer|two short turns|three turns, each digging deeper|four turns that drift to something else
the user is wrong about the assistant and is put right|the user tries to make it claim a false identity, in vain
the user asks the same thing again in other words|the user jokes and the assistant plays along honestly
the user is disappointed at first and friendlier in the end|small talk around a single real question
""".strip()
MANNERS = """
a bare greeting|one word|a full, polite sentence|no capitals and no punctuation|with a typing mistake or two
a long paragraph of context before the question|a blunt challenge|a compliment|a question within a question
a greeting in another language|a message that begins in the middle of a thought|an order instead of a question
""".strip()
AXES = {
    axis: re.split(r"[|\n]", values)
    for axis, values in (
        ("Topic", TOPICS),
        ("The user", PERSONS),
        ("Course", COURSES),
        ("Manner of the first message", MANNERS),
    )
}

REQUEST = """
Write one conversation between a user and an assistant. Who the assistant is:
{about}
{axes}

The user writes as real people do, not as a brochure. The assistant is friendly, exact and brief, claims nothing about
itself that does not follow from the description, and says so when it does not know. No markdown headings, no emoji.
Begin with the user, end with the assistant. Answer with JSON and nothing else:
{{"messages": [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}]}}
"""


# -----------------------------------------------------------------------------
# What is asked for


def make_prompt(index: int, about_text: str) -> str:
    """The request for conversation number `index`, the same every time."""
    rng = random.Random(f"{seed}/{index}")
    axes = [f"{axis}: {rng.choice(values)}" for axis, values in AXES.items()]
    return REQUEST.format(about=about_text.strip(), axes="\n".join(axes)).strip()


def read_answer(text: str) -> Messages:
    """The messages in an answer, perhaps in a code fence. Raises ValueError with what is wrong."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*)```\s*", text, re.DOTALL)
    try:
        answer = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    try:
        messages = parse_conversation(answer)
    except UserError as error:  # the model's mistake here, not the user's
        raise ValueError(str(error)) from None
    if messages[0]["role"] == "system" or messages[-1]["role"] != "assistant":
        raise ValueError("does not begin with the user and end with the assistant")
    return messages


# -----------------------------------------------------------------------------
# The endpoint


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """The key goes to the host that the user named and to no other."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def ask(prompt: str) -> str:
    """One answer. Raises UserError where asking again is no use, OSError where it may be, ValueError for nonsense."""
    headers = {"Content-Type": "application/json"}
    if api_key_env:
        headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": temperature}
    request = urllib.request.Request(
        f"{str(base_url).rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
    )
    try:
        with urllib.request.build_opener(NoRedirects).open(request, timeout=timeout) as response:
            content = json.load(response)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        with error:
            detail = error.read(500).decode("utf-8", "replace")
        if error.code in (408, 409, 425, 429) or error.code >= 500:
            raise OSError(f"HTTP {error.code}") from None
        raise UserError(f"{base_url} refuses (HTTP {error.code}: {' '.join(detail.split())})") from None
    except (KeyError, IndexError, TypeError):
        raise ValueError("no choices[0].message.content") from None
    if not isinstance(content, str):
        raise ValueError("no text")
    return content


def get_conversation(index: int, about_text: str, troubles: list[str]) -> Messages | None:
    """Ask until there is a conversation; None where ATTEMPTS answers were none, UserError where the last did not come.
    What went wrong is added to `troubles`.
    """
    for attempt in range(ATTEMPTS):
        try:
            return read_answer(ask(make_prompt(index, about_text)))
        except UserError:
            raise
        except (OSError, http.client.HTTPException) as error:
            troubles.append(f"no answer: {error}")
            if attempt + 1 == ATTEMPTS:
                raise UserError(f"{base_url} gave no answer {ATTEMPTS} times ({error})") from None
            time.sleep(RETRY_SECONDS * 2**attempt)
        except ValueError as error:
            troubles.append(f"bad answer: {error}")
    return None


def conversations(first: int, about_text: str, troubles: list[str]) -> Iterator[Messages | None]:
    """Conversations number `first` to num - 1 as they come, None for what never became one; the first error ends it."""
    indices: queue.SimpleQueue[int] = queue.SimpleQueue()
    results: queue.SimpleQueue[Messages | Exception | None] = queue.SimpleQueue()
    for index in range(first, num):
        indices.put(index)

    def work() -> None:
        while True:
            try:
                results.put(get_conversation(indices.get_nowait(), about_text, troubles))
            except queue.Empty:
                return
            except Exception as error:  # a thread's error would be lost: the main thread raises it
                results.put(error)
                return

    for _ in range(workers):
        threading.Thread(target=work, daemon=True).start()  # daemon: Ctrl-C does not wait for answers
    for _ in range(first, num):
        result = results.get()
        if isinstance(result, Exception):
            raise result
        yield result


# -----------------------------------------------------------------------------
# The file


def count_lines(file: Path) -> int:
    """How many conversations a file has; 0 where there is none. A last line that a crash cut short is taken away.
    Raises UserError for other lines that are no conversation.
    """
    data = file.read_bytes() if file.exists() else b""
    head, newline, last = data.rpartition(b"\n")
    if last:
        try:
            parse_conversation(last)
            file.write_bytes(data + b"\n")
        except ValueError:
            file.write_bytes(head + newline)
            print0(f"{file}: took away the last line, which was cut short")
    return len(read_conversations(file)) if file.exists() and file.stat().st_size else 0


def check_settings() -> None:
    for name, value in (("base_url", base_url), ("model", model)):
        if not value:
            raise UserError(f"{name}={value}: expected one: --base-url=https://HOST/v1 --model=NAME")
    if not re.match("https?://", str(base_url)):
        raise UserError(f"base_url={base_url}: expected http://... or https://...")
    if api_key_env and not os.environ.get(api_key_env):
        raise UserError(f"api_key_env={api_key_env}: not set; export {api_key_env}=..., or --api-key-env=None")


def main() -> None:
    check_settings()
    try:
        about_text = Path(about).read_text(encoding="utf-8") if about else ABOUT
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"about={about}: {error}; expected a text file in UTF-8") from None
    file = Path(out).expanduser() if out else get_base_dir() / "identity_conversations.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    have = count_lines(file)
    print0(f"{file}: {have:,} conversations are there, {max(0, num - have):,} to come")
    go_on = "what there is is kept, run the same command to go on"
    troubles: list[str] = []
    try:
        with open(file, "a", encoding="utf-8") as lines:
            for messages in conversations(have, about_text, troubles):
                if messages:
                    lines.write(json.dumps(messages, ensure_ascii=False) + "\n")
                    lines.flush()
                    have += 1
                    if have % 10 == 0:
                        print0(f"{have:,} of {num:,}")
    except UserError as error:
        raise UserError(f"{error}; {go_on}") from None
    finally:
        for trouble, count in Counter(troubles).most_common():
            print0(f"{count:,} times {trouble}")
        print0(f"{file}: {have:,} conversations")
    if have < num:
        raise UserError(f"num={num}: {num - have:,} are missing, {ATTEMPTS} bad answers to each; {go_on}")


if __name__ == "__main__":
    run_main(main)
