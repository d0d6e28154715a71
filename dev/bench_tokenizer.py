"""Time our tokenizer beside PyPI's rustbpe, tiktoken and Hugging Face tokenizers: training and encoding of the same
text.

    python -m dev.bench_tokenizer --corpus=../shared/data/pretrain --megabytes=100

Every measurement is a fresh process that loads the text first; the arms take turns, and medians are compared. Answers
are checked before a time is printed: merges equal to rustbpe's, ids equal to tiktoken's (HF's trainer breaks ties in
its own way, so only its ids count). Ours reads Arrow arrays, as the loader gives them; the others read a list of str.
The last line is one JSON object of ratios; those of encoding are warm, against tiktoken's encode_ordinary, unless they
say cold. Needs Linux, whose /proc tells the peak of memory.
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nanochat.common import UserError, run_main
from nanochat.configurator import Positive, configure

# Text
corpus = "docs"  # a folder of parquet files with a text column, or a name in $NANOCHAT_BASE_DIR/data
megabytes: Positive = 100  # the text is repeated, or cut, to this size
# Measuring
repeats: Positive = 5  # runs of each arm
hf = True  # also Hugging Face tokenizers
oracle = ".venv/oracle"  # where PyPI's rustbpe is (pip install --target)
settings = configure(__name__)

ROOT = Path(__file__).parents[1]
VOCABULARIES = (8192, 32768)  # tokens without specials
Task = dict[str, Any]


def main() -> None:
    if not (Path(oracle) / "rustbpe").is_dir():
        raise UserError(f"--oracle={oracle} has no rustbpe; fill it with: pip install --target={oracle} rustbpe==0.1.0")
    with tempfile.TemporaryDirectory() as folder:
        documents = write_text(Path(folder))
        print(f"{megabytes} MB, {documents:,} documents, medians of {repeats}")
        trainers = ["ours", "rustbpe"] + ["hf"] * hf
        train_tasks = [
            {"kind": "train", "arm": arm, "vocab": vocab, "threads": threads, "folder": folder, "oracle": oracle}
            for vocab in VOCABULARIES
            for threads in (1, 2)
            for arm in trainers
        ]
        encoders = [("ours", "numpy", 1), ("ours", "numpy", 2), ("ours", "list", 1)]
        encoders += [("tiktoken", "list", 1), ("tiktoken", "list", 2)] + [("hf", "list", 1)] * hf
        encode_tasks = [
            {"kind": "encode", "arm": arm, "output": output, "threads": threads, "folder": folder}
            for arm, output, threads in encoders
        ]
        trained, encoded = measure(train_tasks), measure(encode_tasks)
    check_answers(trained, encoded)
    show(trained + encoded)
    print(json.dumps(summary(trained, encoded)))


def write_text(folder: Path) -> int:
    """Write text.arrow and tokens.json (32,768 tokens learnt from it, and their merges); count the documents."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    import rustbpe
    from nanochat.corpus import load_corpus
    from nanochat.tokenizer import expand_merges

    files = sorted(Path(corpus).glob("*.parquet")) if Path(corpus).is_dir() else list(load_corpus(corpus).train)
    rows = pa.concat_tables([pq.read_table(file, columns=["text"]) for file in files])["text"]
    once = [text for text in rows.cast(pa.large_string()).to_pylist() if text]
    texts: list[str] = []
    left = megabytes * 10**6
    while left > 0:
        texts.append(once[len(texts) % len(once)])
        left -= len(texts[-1].encode())
    table = pa.table({"text": pa.array(texts, pa.large_string())})
    with pa.OSFile(str(folder / "text.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1024)
    trainer = rustbpe.Trainer("nanochat")
    trainer.feed(table["text"])
    merges = trainer.train(VOCABULARIES[-1] - 256)
    tokens = [token.hex() for token in expand_merges(merges)]
    (folder / "tokens.json").write_text(json.dumps([tokens, merges.tolist()]))
    return len(texts)


def measure(tasks: list[Task]) -> list[Task]:
    """Each task with the results of its runs; the tasks take turns."""
    for round_number in range(repeats):
        for number, task in enumerate(tasks):
            print(f"\r\033[Krun {round_number + 1}, {number + 1} of {len(tasks)}", end="", file=sys.stderr, flush=True)
            question = json.dumps({key: value for key, value in task.items() if key != "runs"})
            paths = [str(ROOT), str(ROOT / "dev"), os.environ.get("PYTHONPATH", "")]
            paths = [task["oracle"], *paths] if task["arm"] == "rustbpe" else paths
            threads = {"RAYON_NUM_THREADS": str(task["threads"]), "TOKENIZERS_PARALLELISM": "true"}
            answer = subprocess.run(
                [sys.executable, "-c", "import bench_tokenizer; bench_tokenizer.child()"],
                input=question,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env=os.environ | threads | {"PYTHONPATH": os.pathsep.join(paths)},
            )
            task.setdefault("runs", []).append(json.loads(answer.stdout))
    print("\r\033[K", end="", file=sys.stderr)
    return tasks


def check_answers(trained: list[Task], encoded: list[Task]) -> None:
    """Stop where an arm gave another answer than the one it is compared with."""
    for vocab in VOCABULARIES:
        digests = {t["arm"]: {run["digest"] for run in t["runs"]} for t in trained if t["vocab"] == vocab}
        assert len(digests["ours"] | digests["rustbpe"]) == 1, f"merges differ at {vocab}: {digests}"
    digests = {run["digest"] for task in encoded for run in task["runs"]}
    assert len(digests) == 1, f"ids differ: {[(t['arm'], t['output'], t['runs'][0]['digest']) for t in encoded]}"


def median(task: Task, key: str) -> float:
    return statistics.median(run[key] for run in task["runs"])


def show(tasks: list[Task]) -> None:
    """One line per arm: seconds of the first pass, of the second (encoding), speed, memory on top of the text."""
    print(f"{'':34}{'seconds':>9}{'warm':>9}{'MB/s':>9}{'MB RSS':>9}")
    for task in tasks:
        what = f"V {task['vocab']:,}" if task["kind"] == "train" else task["output"]
        name = f"{task['kind']:7}{task['arm']:10}{what:10}{task['threads']} threads"
        speed = megabytes / median(task, "warm")
        numbers = f"{median(task, 'cold'):9.3f}{median(task, 'warm'):9.3f}{speed:9.1f}{median(task, 'rss') / 1e6:9.0f}"
        print(f"{name:34}{numbers}")


def summary(trained: list[Task], encoded: list[Task]) -> dict[str, float]:
    """How many times faster, or smaller, we are."""
    times = {(t["arm"], t["vocab"], t["threads"]): median(t, "cold") for t in trained}
    memory = {(t["arm"], t["vocab"], t["threads"]): median(t, "rss") for t in trained}
    warm = {(t["arm"], t["output"], t["threads"]): median(t, "warm") for t in encoded}
    cold = {(t["arm"], t["output"], t["threads"]): median(t, "cold") for t in encoded}
    result = {
        f"train_ratio_v{vocab}_t{threads}": times["rustbpe", vocab, threads] / times["ours", vocab, threads]
        for vocab in VOCABULARIES
        for threads in (1, 2)
    }
    largest = VOCABULARIES[-1]
    result |= {
        "encode_numpy_ratio_t1": warm["tiktoken", "list", 1] / warm["ours", "numpy", 1],
        "encode_numpy_cold_ratio_t1": cold["tiktoken", "list", 1] / cold["ours", "numpy", 1],
        "encode_list_ratio_t1": warm["tiktoken", "list", 1] / warm["ours", "list", 1],
        "encode_scaling_t2": warm["ours", "numpy", 1] / warm["ours", "numpy", 2],
        "train_rss_ratio": memory["ours", largest, 2] / memory["rustbpe", largest, 2],
    }
    return {name: round(value, 2) for name, value in result.items()}


# -----------------------------------------------------------------------------
# One measurement, in a process of its own


def child() -> None:
    """Read a task, do it, answer with its seconds, peak memory and a digest of what came out."""
    task = json.load(sys.stdin)
    work = prepare_training(task) if task["kind"] == "train" else prepare_encoding(task)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory_peak()
    start = time.perf_counter()
    first = work()
    cold = time.perf_counter() - start
    rss = memory_peak() - before
    warm = cold
    if task["kind"] == "encode":
        first = None  # giving the memory back is not part of the second pass
        start = time.perf_counter()
        first = work()
        warm = time.perf_counter() - start
    json.dump({"cold": cold, "warm": warm, "rss": rss, "digest": digest(first)}, sys.stdout)


def memory_peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def digest(parts: Iterable[Any]) -> str:
    """sha256 of token bytes, or of ids however they come."""
    import numpy as np

    total = hashlib.sha256()
    for part in parts:
        total.update(part if isinstance(part, bytes) else np.asarray(part, dtype=np.uint32).tobytes())
    return total.hexdigest()[:16]


def load_text(task: Task) -> Any:
    import pyarrow as pa

    with pa.OSFile(task["folder"] + "/text.arrow") as source:
        return pa.ipc.open_file(source).read_all()["text"]


def hf_byte_level(pattern: str) -> Any:
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    to_characters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, to_characters])
    return tokenizer


# rustbpe's own module is not importable where PyPI's has the name, so its pattern stands here too.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


def prepare_training(task: Task) -> Callable[[], Iterable[Any]]:
    """A function that trains and gives the bytes of the tokens, in order."""
    text, vocab = load_text(task), task["vocab"]
    if task["arm"] == "ours":
        import rustbpe
        from nanochat.tokenizer import expand_merges

        def ours() -> Iterable[bytes]:
            trainer = rustbpe.Trainer("nanochat", task["threads"])
            trainer.feed(text)
            return expand_merges(trainer.train(vocab - 256))

        return ours
    texts = text.to_pylist()
    if task["arm"] == "rustbpe":
        import rustbpe as oracle_module

        def pypi() -> Iterable[bytes]:
            tokenizer = oracle_module.Tokenizer()
            tokenizer.train_from_iterator(iter(texts), vocab, pattern=PATTERN)
            return [bytes(token) for token, _ in tokenizer.get_mergeable_ranks()]

        return pypi

    def hugging_face() -> Iterable[bytes]:
        import tokenizers

        tokenizer = hf_byte_level(PATTERN)
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(iter(texts), trainer)
        return [tokenizer.to_str().encode()]

    return hugging_face


def prepare_encoding(task: Task) -> Callable[[], Iterable[Any]]:
    """A function that encodes everything and gives the ids, document by document or all at once."""
    text, threads = load_text(task), task["threads"]
    names, merges = json.loads(Path(task["folder"], "tokens.json").read_text())
    tokens = [bytes.fromhex(name) for name in names]
    if task["arm"] == "ours":
        import rustbpe

        encoder = rustbpe.Encoder(tokens)
        if task["output"] == "numpy":
            return lambda: [encoder.encode_batch(text, threads)[0]]
        return lambda: encoder.encode_lists(text, threads)
    texts = text.to_pylist()
    if task["arm"] == "tiktoken":
        import tiktoken

        ranks = {token: rank for rank, token in enumerate(tokens)}
        theirs = tiktoken.Encoding("bench", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
        if threads == 1:
            return lambda: [theirs.encode_ordinary(one) for one in texts]
        return lambda: theirs.encode_ordinary_batch(texts, num_threads=threads)
    return prepare_hf_encoding(texts, tokens, merges)


def prepare_hf_encoding(texts: list[str], tokens: list[bytes], merges: list[list[int]]) -> Callable[[], Iterable[Any]]:
    import tokenizers

    from nanochat.hf_tokenizer import bytes_by_character

    character = {byte: character for character, byte in bytes_by_character().items()}
    names = ["".join(character[byte] for byte in token) for token in tokens]
    hugging_face = hf_byte_level(PATTERN)
    pairs = [(names[left], names[right]) for left, right in merges]
    hugging_face.model = tokenizers.models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=pairs)
    return lambda: [one.ids for one in hugging_face.encode_batch_fast(texts, add_special_tokens=False)]


if __name__ == "__main__":
    run_main(main)
