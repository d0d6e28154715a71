"""Time the loader into a loop that does nothing, beside the usual way: tiktoken on four threads and a packer in Python.

    python -m dev.bench_loader --corpus=../shared/data/pretrain

Both read the same text with the same vocabulary and give batches of 32 rows of 2,048 tokens. Every measurement is a
fresh process that has made its first batches before the clock starts; the arms take turns, and medians are compared.
The last line is one JSON object.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat.common import run_main
from nanochat.configurator import Amount, Positive, configure

# Text
corpus = "docs"  # a folder of parquet files with a text column, or a name in $NANOCHAT_BASE_DIR/data
vocab_size: Positive = 32768  # tokens, learnt from that text
# Measuring
repeats: Positive = 5  # runs of each arm
seconds: Amount = 8.0  # that a run lasts
settings = configure(__name__)

ROOT = Path(__file__).parents[1]
ROWS, SEQUENCE_LEN = 32, 2048


def main() -> None:
    from nanochat.corpus import load_corpus
    from nanochat.tokenizer import Tokenizer

    files = sorted(Path(corpus).glob("*.parquet")) if Path(corpus).is_dir() else list(load_corpus(corpus).train)
    with tempfile.TemporaryDirectory() as folder:
        chunks = (chunk for file in files for chunk in read_text(file).chunks)
        Tokenizer.train(chunks, vocab_size).save(folder)
        question = {"files": [str(file) for file in files], "tokenizer": folder, "seconds": seconds}
        rates: dict[str, list[float]] = {"ours": [], "usual": []}
        for _ in range(repeats):
            for arm, measured in rates.items():
                measured.append(measure({"arm": arm, **question}))
    for arm, measured in rates.items():
        print(f"{arm:6} {statistics.median(measured) / 1e6:8.2f} M tokens/s, from {min(measured) / 1e6:.2f} up")
    ratio = statistics.median(rates["ours"]) / statistics.median(rates["usual"])
    print(json.dumps({"loader_ratio": round(ratio, 2)}))


def read_text(file: Path | str) -> Any:
    import pyarrow.parquet as pq

    return pq.read_table(file, columns=["text"])["text"]


def measure(question: dict[str, Any]) -> float:
    """Tokens per second of one arm, in a process of its own."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "dev")])
    command = [sys.executable, "-c", "import bench_loader; bench_loader.child()"]
    environment = os.environ | {"PYTHONPATH": paths}
    answer = subprocess.run(
        command, input=json.dumps(question), stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    return float(answer.stdout)


def child() -> None:
    """Read a question, take batches for some seconds, answer with tokens per second."""
    question = json.load(sys.stdin)
    stream = ours(question) if question["arm"] == "ours" else usual(question)
    for _ in range(4):
        next(stream)
    batches, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < question["seconds"]:
        next(stream)
        batches += 1
    print(batches * ROWS * SEQUENCE_LEN / elapsed)


def ours(question: dict[str, Any]) -> Iterator[Any]:
    import torch

    from nanochat.compute import Compute
    from nanochat.corpus import Shards
    from nanochat.dataloader import training_stream
    from nanochat.schedule import BatchPlan
    from nanochat.tokenizer import Tokenizer

    shards = Shards(tuple(Path(file) for file in question["files"]))
    compute = Compute(torch.device("cpu"), torch.float32, 0, 1)
    return training_stream(shards, Tokenizer.load(question["tokenizer"]), BatchPlan(ROWS, SEQUENCE_LEN, 1, 1), compute)


def usual(question: dict[str, Any]) -> Iterator[Any]:
    import tiktoken

    import rustbpe
    from nanochat.tokenizer import Tokenizer
    from tests.reference.loader import batches

    tokenizer = Tokenizer.load(question["tokenizer"])
    specials = {name: tokenizer.encode_special(name) for name in tokenizer.get_special_tokens()}
    ranks = {tokenizer.decode_bytes([i]): i for i in range(tokenizer.get_vocab_size() - len(specials))}
    pattern = rustbpe.PATTERNS["nanochat"]
    encoding = tiktoken.Encoding("bench", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    texts = [text for file in question["files"] for text in read_text(file).to_pylist()]
    return batches(texts, encoding, tokenizer.get_bos_token_id(), ROWS, SEQUENCE_LEN)


if __name__ == "__main__":
    run_main(main)
