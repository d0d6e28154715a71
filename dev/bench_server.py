"""Time the server: clients that stream at once, beside the engine alone with the same prompts.

    python -m dev.bench_server

A process serves a model of random weights; the clients share the rest of the machine with it. They and the engine's own
batch (in the same process, without them) take turns. Every prompt is new. Tokens per second count from the first
request to the last token, and also per CPU second of the server; a gap is the time between two pieces of one reply.
The last line is one JSON object.
"""

import asyncio
import json
import os
import random
import statistics
import time
import urllib.request
from itertools import pairwise
from pathlib import Path

from nanochat.common import run_main
from nanochat.configurator import Positive, Several, configure

# Model
depth: Positive = 4  # layers; the width follows
vocab_size: Several = 4096  # tokens
context: Several = 1024  # tokens that the model takes
# Work
clients: Positive = 32  # that stream at once
prompt_characters: Positive = 400  # of each question
max_tokens: Positive = 128  # of each reply
# Measuring
compile = True  # the decoding step
repeats: Positive = 3  # rounds of both
settings = configure(__name__)


def main() -> None:
    from tests.served import serve

    text = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(os.__file__).parent.glob("*.py")))
    rng = random.Random(0)
    model = {"depth": depth, "vocab_size": vocab_size, "context": context, "slots": clients, "compile": compile}
    rates: dict[str, list[tuple[float, float]]] = {"direct": [], "served": []}
    gaps: list[float] = []
    with serve(**model) as port:
        for number in range(2 * repeats + 1):  # the first is not counted
            for arm in ("direct", "served") if number % 2 else ("served", "direct"):
                starts = [rng.randrange(len(text) - prompt_characters) for _ in range(clients)]
                prompts = [text[start : start + prompt_characters] for start in starts]
                used, start = cpu_seconds(port), time.perf_counter()
                tokens, gaps_now = ask_engine(port, prompts) if arm == "direct" else asyncio.run(ask_all(port, prompts))
                seconds, used = time.perf_counter() - start, cpu_seconds(port) - used
                rates[arm] += [(tokens / seconds, tokens / used)] if number else []
                gaps += gaps_now if number else []
    result = {}
    for arm, measured in rates.items():
        rate, per_cpu = (statistics.median(values) for values in zip(*measured, strict=True))
        print(f"{arm:7} {rate:8,.0f} tokens/s {per_cpu:8,.0f} per CPU second")
        result |= {arm: rate, f"{arm}_cpu": per_cpu}
    median, p99 = statistics.median(gaps), statistics.quantiles(gaps, n=100)[98]
    print(f"between two pieces of a reply: median {median * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms ({p99 / median:.1f}x)")
    result |= {"served_ratio": result["served"] / result["direct"]}
    result |= {"served_cpu_ratio": result["served_cpu"] / result["direct_cpu"]}
    result |= {"gap_ms": median * 1e3, "gap_p99_ratio": p99 / median}
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


def cpu_seconds(port: int) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/inside") as answer:
        return json.load(answer)["cpu"]


def ask_engine(port: int, prompts: list[str]) -> tuple[int, list[float]]:
    """How many tokens a batch said."""
    body = json.dumps({"prompts": prompts, "max_tokens": max_tokens}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/direct", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["tokens"], []


async def ask_all(port: int, prompts: list[str]) -> tuple[int, list[float]]:
    """How many tokens all replies have together, and the gaps in each."""
    from tests.served import stream

    fields = {"max_tokens": max_tokens, "temperature": 0, "stream_options": {"include_usage": True}}
    bodies = [{"messages": [{"role": "user", "content": prompt}], **fields} for prompt in prompts]
    answers = await asyncio.gather(*(stream(port, body) for body in bodies))
    tokens = sum(events[-1][1]["usage"]["completion_tokens"] for events in answers)
    pieces = [
        [when for when, event in events if any(choice["delta"].get("content") for choice in event["choices"])]
        for events in answers
    ]
    return tokens, [after - before for times in pieces for before, after in pairwise(times)]


if __name__ == "__main__":
    run_main(main)
