"""A server of a model with random weights, in a process of its own, and a client that a test or benchmark can spoil.

    python -m tests.served '{"depth": 0}'     # prints its port; 0 = a tiny model that reads bytes

Beside the application it answers GET /inside (tasks, threads, steps of the engine) and POST /direct (the engine's own
batch, without serving).
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DEFAULTS: dict[str, Any] = {
    "depth": 0, "vocab_size": 4096, "context": 256, "slots": 32, "max_waiting": 64, "max_tokens": 512,
    "compile": False,
}  # fmt: skip


def random_model(depth: int, vocab_size: int, context: int, **others: Any) -> tuple[Any, Any]:
    """A model and its tokenizer, the same every time. Its likeliest token is never a special one, so greedy replies end
    by their length.
    """
    import numpy as np
    import torch

    from dev.infer_arm import draw_weights
    from nanochat.gpt import GPTConfig, config_from_depth
    from nanochat.model import build_model
    from nanochat.tokenizer import Tokenizer

    if depth:
        sources = [path.read_text(encoding="utf-8") for path in sorted(Path(os.__file__).parent.glob("*.py"))]
        tokenizer = Tokenizer.train(sources, vocab_size)
        config = config_from_depth(depth, tokenizer.get_vocab_size(), context)
    else:
        tokenizer = Tokenizer(np.empty((0, 2)))
        config = GPTConfig(context, tokenizer.get_vocab_size(), n_layer=1, n_head=2, n_kv_head=2, n_embd=32)
    model = build_model(config, torch.device("cpu"))
    draw_weights(model.named_parameters(), seed=1)
    model.lm_head.weight.data[[tokenizer.encode_special(name) for name in tokenizer.get_special_tokens()]] = 0
    return model, tokenizer


def main() -> None:
    from nanochat.compute import keep_freed_memory
    from nanochat.engine import Batch, Engine, Sampling
    from nanochat.server import Defaults, create_app, listen, make_server
    from nanochat.serving import Serving

    asked = {**DEFAULTS, **json.loads(sys.argv[1])}
    keep_freed_memory()
    sys.setswitchinterval(0.001)  # as scripts.chat_web does
    model, tokenizer = random_model(**asked)
    engine = Engine(model, tokenizer)
    if asked["compile"]:
        from nanochat.decode_step import compile_decoding

        compile_decoding(engine, (asked["slots"],), wait=True)
    steps, step = 0, Batch.step

    def counted_step(batch: Batch) -> Any:
        nonlocal steps
        steps += 1
        return step(batch)

    Batch.step = counted_step  # type: ignore[method-assign]
    serving = Serving([engine], asked["slots"], asked["max_waiting"])
    app = create_app(serving, tokenizer, asked["context"], defaults=Defaults(max_tokens=asked["max_tokens"]))

    @app.get("/inside", include_in_schema=False)
    async def inside() -> dict[str, float]:
        seconds = time.process_time()
        return {"tasks": len(asyncio.all_tasks()), "threads": threading.active_count(), "steps": steps, "cpu": seconds}

    @app.post("/direct", include_in_schema=False)
    def direct(body: dict[str, Any]) -> dict[str, int]:
        prompts = [tokenizer.encode(text, prepend="<|bos|>") for text in body["prompts"]]
        sequences, _ = engine.generate_batch(prompts, Sampling(body["max_tokens"], 0), slots=asked["slots"])
        return {"tokens": sum(map(len, sequences))}

    listener = listen("127.0.0.1", 0)
    print(listener.getsockname()[1], flush=True)
    make_server(app).run(sockets=[listener])


@contextlib.contextmanager
def serve(**asked: Any) -> Iterator[int]:
    """The port of a server that runs meanwhile."""
    command = [sys.executable, "-m", "tests.served", json.dumps(asked)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield int(process.stdout.readline())
        finally:
            process.terminate()


async def stream(
    port: int, body: dict[str, Any], path: str = "/v1/chat/completions", leave_after: int | None = None
) -> list[tuple[float, dict[str, Any]]]:
    """The events of a streamed answer, with when they came; none for a client that leaves after so many bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    data = json.dumps({**body, "stream": True}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    events = []
    try:
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        if leave_after is not None:
            await reader.read(leave_after)  # some of them: a read gives what is there
            writer.transport.abort()
            return []
        status = await reader.readline()
        assert b" 200 " in status, status + await reader.read()
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                events.append((time.perf_counter(), json.loads(line[6:])))
    finally:
        writer.close()
    return events


def text_of(events: list[tuple[float, dict[str, Any]]]) -> str:
    """The text of a streamed chat completion."""
    choices = [choice for _, event in events for choice in event["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


async def get(port: int, path: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    return answer.partition(b"\r\n\r\n")[2].decode()


if __name__ == "__main__":
    main()
