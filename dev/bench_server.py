"""Time the server: clients that stream at once, beside the engine alone with the same prompts.

    python -m dev.bench_server

A process serves a model of random weights; the clients share the rest of the machine with it. They and the engine's own
batch (in the same process, without them) take turns. Every prompt is new. Tokens per second count from the first
request to the last token; a gap is the time between two pieces of one reply. The last line is one JSON object.
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
    served, direct, gaps = [], [], []
    with serve(**model) as port:
        for number in range(2 * repeats + 1):  # the first is not counted
            for arm in ("direct", "served") if number % 2 else ("served", "direct"):
                starts = [rng.randrange(len(text) - prompt_characters) for _ in range(clients)]
                prompts = [text[start : start + prompt_characters] for start in starts]
                if arm == "direct":
                    direct.append(ask_engine(port, prompts))
                else:
                    rate, gaps_now = asyncio.run(ask_all(port, prompts))
                    served.append(rate)
                    gaps += gaps_now if number else []
    own, over_http = (statistics.median(rates[1:]) for rates in (direct, served))
    median, p99 = statistics.median(gaps), statistics.quantiles(gaps, n=100)[98]
    print(f"engine {own:,.0f} tokens/s, {clients} clients {over_http:,.0f} ({over_http / own:.2f} of it)")
    print(f"between two pieces of a reply: median {median * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms ({p99 / median:.1f}x)")
    result = {"served": round(over_http), "engine": round(own), "served_ratio": round(over_http / own, 3)}
    print(json.dumps(result | {"gap_ms": round(median * 1e3, 2), "gap_p99_ratio": round(p99 / median, 2)}))


def ask_engine(port: int, prompts: list[str]) -> float:
    """Tokens per second of a batch."""
    body = json.dumps({"prompts": prompts, "max_tokens": max_tokens}).encode()
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/direct", body, kind)
    with urllib.request.urlopen(request) as answer:
        told = json.load(answer)
    return told["tokens"] / told["seconds"]


async def ask_all(port: int, prompts: list[str]) -> tuple[float, list[float]]:
    """Tokens per second of all replies together, and the gaps in each."""
    from tests.served import stream

    fields = {"max_tokens": max_tokens, "temperature": 0, "stream_options": {"include_usage": True}}
    bodies = [{"messages": [{"role": "user", "content": prompt}], **fields} for prompt in prompts]
    start = time.perf_counter()
    answers = await asyncio.gather(*(stream(port, body) for body in bodies))
    seconds = time.perf_counter() - start
    tokens = sum(events[-1][1]["usage"]["completion_tokens"] for events in answers)
    pieces = [
        [when for when, event in events if any(c["delta"].get("content") for c in event["choices"])]
        for events in answers
    ]
    return tokens / seconds, [after - before for times in pieces for before, after in pairwise(times)]


if __name__ == "__main__":
    run_main(main)
