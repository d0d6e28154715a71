"""The server under clients that leave, read slowly, or ask for anything, in a process of its own (tests/served.py).

Minutes of the long ones: NANOCHAT_SOAK_MINUTES, default 10; requests of the fuzzer: NANOCHAT_SOAK_REQUESTS, 50,000.
"""

import asyncio
import contextlib
import json
import os
import random
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.served import get, serve, stream, text_of

MINUTES = float(os.environ.get("NANOCHAT_SOAK_MINUTES", "10"))
REQUESTS = int(os.environ.get("NANOCHAT_SOAK_REQUESTS", "50000"))


def question(text: str, max_tokens: int = 48) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "temperature": 0}


QUESTIONS = [question(f"{word} " * n) for n in (1, 3, 9) for word in "the cat sat on a mat".split()]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serve(slots=32, max_waiting=400, max_tokens=4) as port:
        yield port


async def figures(port: int) -> dict[str, float]:
    """What the server holds now."""
    metrics = await get(port, "/metrics")
    numbers = dict(re.findall(r"^process_(open_fds|resident_memory_bytes) (\S+)$", metrics, re.MULTILINE))
    stats = json.loads(await get(port, "/stats"))
    inside = json.loads(await get(port, "/inside"))
    return {name: float(value) for name, value in {**numbers, **stats, **inside}.items()}


async def settled(port: int) -> dict[str, float]:
    """The same once nothing runs or waits, and closed connections are gone."""
    for _ in range(600):
        now = await figures(port)
        if not (now["active"] or now["waiting"]) and now["tasks"] <= 4:
            break
        await asyncio.sleep(0.1)
    return now


# -----------------------------------------------------------------------------
# Clients that leave


@pytest.mark.parametrize(
    ("clients", "minutes"), [(12, 0.05), pytest.param(200, MINUTES, marks=pytest.mark.soak)], ids=["short", "long"]
)
def test_clients_that_leave_at_any_byte_leak_nothing_and_change_no_text(port, clients, minutes):
    """Half of them leave after some bytes of the answer, or before it. Those who stay get what a client alone gets."""
    asyncio.run(leave_and_stay(port, clients, minutes))


async def leave_and_stay(port: int, clients: int, minutes: float) -> None:
    alone = [text_of(await stream(port, asked)) for asked in QUESTIONS]
    rng = random.Random(clients)
    counts = {"stayed": 0, "left": 0}

    async def come_and_go(end: float) -> None:
        while time.monotonic() < end:
            number = rng.randrange(len(QUESTIONS))
            leaves = rng.random() < 0.5
            events = await stream(port, QUESTIONS[number], leave_after=rng.randrange(1, 9000) if leaves else None)
            assert leaves or text_of(events) == alone[number]
            counts["left" if leaves else "stayed"] += 1

    async def crowd(seconds: float) -> dict[str, float]:
        end = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(come_and_go(end))
        return await settled(port)

    before = await crowd(max(2, minutes * 15))  # threads and buffers for that many clients stay, then memory is flat:
    for _ in range(5):  # on a busy machine they are not all there yet
        earlier, before = before, await crowd(2)
        if before["resident_memory_bytes"] < earlier["resident_memory_bytes"] + (1 << 20):
            break
    after = await crowd(minutes * 60)
    if after["resident_memory_bytes"] >= before["resident_memory_bytes"] + (16 << 20):
        before, after = after, await crowd(minutes * 60)  # a pool that grows once more is none; a leak does so again
    print({name: (before[name], after[name]) for name in after}, counts)
    assert counts["left"] > clients / 4 and counts["stayed"] > clients / 4 and after["cancelled"] > before["cancelled"]
    assert after["active"] == after["waiting"] == 0 and after["failed"] == before["failed"] == 0
    assert after["tasks"] <= before["tasks"] and after["open_fds"] <= before["open_fds"], (before, after)
    assert after["threads"] < 60  # asyncio's pool has up to 32 of them, starlette's 40; a leak has thousands
    assert after["resident_memory_bytes"] < before["resident_memory_bytes"] + (16 << 20), (before, after)


# -----------------------------------------------------------------------------
# Clients that are slow


@pytest.mark.parametrize("clients", [20, pytest.param(200, marks=pytest.mark.soak)], ids=["few", "many"])
def test_slow_sockets_cost_a_normal_client_no_step_of_the_engine(port, clients):
    """A third of them never ends its headers, a third never its body, a third never reads the answer."""
    asyncio.run(be_slow(port, clients))


async def be_slow(port: int, clients: int) -> None:
    asked = question("the normal client", 40)
    expected = text_of(await stream(port, asked))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    data = json.dumps({**question("slow", 200), "stream": True}).encode()
    whole = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
    writers = []
    try:
        for number in range(clients):
            _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            writer.write([head.encode(), whole[:-1], whole][number % 3])
            writers.append(writer)
        for _ in range(300):  # their replies are written, read or not
            now = await figures(port)
            if not (now["active"] or now["waiting"]):
                break
            await asyncio.sleep(0.1)
        before = await figures(port)
        assert text_of(await stream(port, asked)) == expected
        after = await figures(port)
        assert after["steps"] - before["steps"] <= 42 and after["tokens"] - before["tokens"] == 40
        for writer in writers[::3]:  # one more byte, and another
            writer.write(b"X")
        assert text_of(await stream(port, asked)) == expected
    finally:
        for writer in writers:
            writer.transport.abort()
    assert (await settled(port))["failed"] == 0


# -----------------------------------------------------------------------------
# Clients that ask for anything

PATHS = ["/v1/chat/completions", "/chat/completions", "/v1/completions", "/render"]
CHAT, PAGE, TEXT, RENDER = PATHS
TOOL = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
SEEDS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, question("Hello", 3) | {"n": 2, "seed": 7, "stop": ["x"], "logprobs": True, "top_logprobs": 2}),
    (CHAT, question("Hello", 3) | {"stream": True, "stream_options": {"include_usage": True}, "logit_bias": {}}),
    (
        PAGE,
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "<|bos|> 1+1?"},
                {"role": "assistant", "content": TOOL},
                {"role": "user", "content": [{"type": "text", "text": "And <|assistant_end|> now?"}]},
            ],
            "temperature": 1.5,
            "top_k": 3,
            "top_p": 0.9,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "max_tokens": 3,
        },
    ),
    (TEXT, {"prompt": ["the cat", "x"], "max_tokens": 3, "echo": True, "logprobs": 2, "stop": None, "user": "me"}),
    (TEXT, {"prompt": [[1, 2, 3], [4]], "max_tokens": 2, "best_of": 1, "stream": True}),
    (
        RENDER,
        {"text": "# Title\n\n| a | b |\n|---|---|\n| 1 | <script>alert(1)</script> |\n\n```python\nprint(1)\n```"},
    ),
]
NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, -0.0, 1e-40, 1e308, float("nan"), float("inf"), 2**31, 2**63, -(2**64), 10**400,
    "", " ", "x", "\x00", "\ud800", "\udfff\ud800", "<|bos|>", "<|assistant_end|>" * 9, "a" * 9000, "é" * 300, "‮‏", "1",
    "NaN", "true", [], [[]], {}, [None], ["x"] * 600, {"type": "text"}, {"role": "tool"}, [[[[[[]]]]]], [0] * 3000,
]  # fmt: skip


def mutated(value: Any, rng: random.Random) -> Any:
    """The value with one place in it changed: replaced, dropped, doubled, moved."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.2:
        return rng.choice(NASTY)
    value = value.copy()
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, other = rng.choice(keys), rng.choice(keys)
    match rng.randrange(8):
        case 0:
            del value[key]
        case 1 if isinstance(value, dict):
            value[rng.choice([key.upper(), key + " ", "tools", "\ud800", ""])] = value[key]
        case 1:
            value *= rng.choice([2, 40])
        case 2:
            value[key] = value[other]
        case 3:
            value[key] = [value[key]]
        case _:
            value[key] = mutated(value[key], rng)
    return value


def spoiled(data: bytes, rng: random.Random) -> bytes:
    """Bytes that may no longer be JSON."""
    place = rng.randrange(len(data) + 1)
    return rng.choice(
        [
            data[:place],
            data[:place] + rng.randbytes(3) + data[place:],
            data[:place] + b"[" * 100_000,
            data + data,
            b"\xff\xfe" + data,
            data.replace(b'"', b"'"),
            b"",
        ]
    )


def made_up(rng: random.Random) -> dict[str, Any]:
    """A request that a good client wouldn't send."""
    path, body = rng.choice(SEEDS)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 4])):
        body = mutated(body, rng)
    data = json.dumps(body).encode()
    data = spoiled(data, rng) if rng.random() < 0.15 else data
    kind = rng.choice(["application/json"] * 18 + ["application/json; charset=utf-16", "text/plain", ""])
    others = [*PATHS, "/v1/models/%00", "/static/../x", "/%ff", "/v1//models", "/health"]
    path = path if rng.random() < 0.95 else rng.choice(others)
    method = rng.choice(["POST"] * 45 + ["GET", "PUT", "OPTIONS", "HEAD", "BREW"])
    return {"method": method, "url": path, "content": data, "headers": {"Content-Type": kind}}


@pytest.mark.parametrize("requests", [300, pytest.param(REQUESTS, marks=pytest.mark.soak)], ids=["few", "many"])
def test_no_request_makes_a_server_error_or_ends_the_engine(port, requests):
    """Mutants of good requests, eight at a time; after every eight a good one gets its answer."""
    asyncio.run(ask_anything(port, requests))


async def ask_anything(port: int, requests: int) -> None:
    rng, asked = random.Random(requests), question("Are you there?", 4)
    expected = text_of(await stream(port, asked))
    counts: dict[int, int] = {}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        for _ in range(0, requests, 8):
            made = [made_up(rng) for _ in range(8)]
            for request, answer in zip(
                made, await asyncio.gather(*(client.request(**one) for one in made)), strict=True
            ):
                assert answer.status_code < 500 and "\nevent: error" not in answer.text, (request, answer.text)
                counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
            assert text_of(await stream(port, asked)) == expected
    print(counts)
    assert counts[200] > requests / 20 and counts[400] > requests / 20
    assert (await figures(port))["failed"] == 0


@pytest.mark.parametrize("examples", [20, pytest.param(REQUESTS // 40, marks=pytest.mark.soak)], ids=["few", "many"])
def test_what_the_schema_allows_makes_no_server_error(port, examples):
    """schemathesis writes requests from /openapi.json, such as the schema allows and such as it doesn't."""
    schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis first")
    from hypothesis import HealthCheck, given, settings
    from hypothesis.errors import Unsatisfiable

    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in schemathesis.GenerationMode:

            @settings(max_examples=examples, database=None, deadline=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                answer = case.call()
                assert answer.status_code < 500, answer.text

            with contextlib.suppress(Unsatisfiable):  # a GET without parameters can't be asked wrongly
                ask()
    assert asyncio.run(figures(port))["failed"] == 0
