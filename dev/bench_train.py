"""Training against the clock: bits per byte after the same time, of settings files here and of karpathy/nanochat.

    python -m dev.bench_train --arms="laptop:4x128 laptop:4x192 peer:4x128" --peer=FOLDER --budgets="120 600"

An arm is settings:DEPTHxWIDTH, with a settings file of dev/configs/, or peer for a checkout of nanochat, which gets our
tokenizer and text. Needs a corpus and a tokenizer in $NANOCHAT_BASE_DIR.

1. Pace. The arms' own training commands run at once but take turns, a few seconds each while the others are stopped.
   A step takes the median of its times. So the machine's mood hits all alike, and training may be disturbed later.
   It is kept for this kind of processor; an arm that comes later is paced beside the first, against whose it is put.
2. Training: of each arm and seed as many steps as fit into each of the budgets at that pace. The seed draws weights and
   order of documents. Compiling, evaluating and saving are not in the budget.
3. Score: one program for all (dev/train_score.py), on every second validation document: the others are there to choose
   settings by. Scores are kept in bench_train/ of the base directory: the same arms, settings and text go on from them.

First the noise, the standard deviation over seeds within an arm. The table has the mean over seeds with its standard
error, and that over documents. The last line is one JSON object; report/bench_train.md and .html have a diagram.
"""

from typing import Literal

from nanochat.configurator import Positive, configure

# Arms
arms = "laptop:4x128 laptop:4x192"  # settings:DEPTHxWIDTH, with spaces between; settings: laptop, fast, ... or peer
peer: str | None = None  # folder of a checkout of karpathy/nanochat (92d63d4)
corpus: str | None = None  # directory name in $NANOCHAT_BASE_DIR/data (None = the only one there)
dtype: Literal["float32", "bfloat16"] = "float32"  # what all compute in
total_batch_size: Positive = 4096  # tokens of a step of the peer's, and of the arms whose settings do not say
max_seq_len: Positive = 256  # context in tokens
# Time
budgets = "120 600"  # seconds of optimizer steps ("" = the pace alone)
seeds: Positive = 3  # trainings of each arm and budget
turns: Positive = 4  # of each arm, A B B A, while the pace is taken
turn_seconds: Positive = 12  # of each
lanes: Positive = 1  # trainings at the same time, each on its share of the cores; changes no result
settings = configure(__name__)

import json
import math
import os
import pickle
import re
import signal
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat import report
from nanochat import report_page as page
from nanochat.common import UserError, get_base_dir, print0, run_main
from nanochat.configurator import parse_args, read_block
from nanochat.corpus import Corpus, iter_text, load_corpus
from nanochat.loss_eval import ratio_over_documents
from nanochat.tokenizer import Tokenizer, get_tokenizer

ROOT = Path(__file__).parents[1]
HEAD_DIM = 64
ENDLESS, PACE_SEED = 10**6, 1  # steps of a run whose pace is taken
STARTED: list[subprocess.Popen[bytes]] = []
# nanochat has one seed of its own, so another is added to whatever it asks for.
PEER = "import runpy, torch; f = torch.manual_seed; torch.manual_seed = lambda n: f(n + {seed}); "
PEER += "runpy.run_module('scripts.base_train', run_name='__main__', alter_sys=True)"


@dataclass(frozen=True)
class Arm:
    """Settings and a shape. Two processes of one never run in the same folder."""

    name: str
    settings: str
    depth: int
    width: int

    @property
    def is_peer(self) -> bool:
        return self.settings == "peer"

    @property
    def root(self) -> Path:
        return Path(peer or "").resolve() if self.is_peer else ROOT

    @property
    def file(self) -> str:
        return f"dev/configs/{self.settings}.py"

    @property
    def tokens(self) -> int:
        """Of a step."""
        return total_batch_size if self.is_peer else our_settings(self.file)["total_batch_size"]

    def command(self, seed: int, steps: int) -> list[str]:
        shape = [f"--depth={self.depth}", f"--aspect-ratio={self.width // self.depth}", f"--head-dim={HEAD_DIM}"]
        run = [f"--max-seq-len={max_seq_len}", f"--num-iterations={steps}", f"--model-tag={self.tag(seed, steps)}"]
        run += ["--eval-every=-1", "--sample-every=-1"]
        if self.is_peer:
            batch = [f"--total-batch-size={total_batch_size}", f"--device-batch-size={total_batch_size // max_seq_len}"]
            quiet = ["--window-pattern=L", "--core-metric-every=-1", "--device-type=cpu"]
            return [sys.executable, "-c", PEER.format(seed=seed), *shape, *run, *batch, *quiet]
        own = [f"--seed={seed}", f"--corpus={corpus}", f"--dtype={dtype}", "--eval-tokens=1", "--fresh"]
        return [sys.executable, "-m", "scripts.base_train", self.file, *shape, *run, *own]

    @property
    def label(self) -> str:
        """Other settings, another arm."""
        about = "peer" if self.is_peer else our_settings(self.file)
        return f"{self.settings}-{self.depth}x{self.width}-{checksum(about)}"

    def tag(self, seed: int, steps: int) -> str:
        return f"race-{self.label}-s{seed}-{steps}"

    def start(self, seed: int, steps: int, threads: int | None = None) -> subprocess.Popen[bytes]:
        """Its own training command, in a process group of its own; what it prints goes to a file."""
        environment = os.environ | {"PYTHONPATH": str(self.root), "NANOCHAT_DTYPE": dtype, "PYTHONUNBUFFERED": "1"}
        environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
        environment |= {"NANOCHAT_BASE_DIR": str(peer_folder(seed))} if self.is_peer else {}
        for old in self.records(seed, steps):
            old.unlink()
        with open(self.log(seed, steps), "wb") as log:
            command = self.command(seed, steps)
            process = subprocess.Popen(command, cwd=self.root, env=environment, stdout=log, stderr=log, process_group=0)
        STARTED.append(process)
        return process

    def log(self, seed: int, steps: int) -> Path:
        return work_folder() / f"{self.tag(seed, steps)}.log"

    def times(self, seed: int, steps: int) -> list[float]:
        """Seconds of each step that is done, as the command itself counts them."""
        if self.is_peer:
            log = self.log(seed, steps).read_text(errors="replace")
            return [float(ms) / 1000 for ms in re.findall(r"\| dt: ([\d.]+)ms", log)]
        events = [json.loads(line) for path in self.records(seed, steps) for line in path.read_text().splitlines()]
        return [event["seconds"] for event in events if event["event"] == "step"]

    def records(self, seed: int, steps: int) -> list[Path]:
        return list((get_base_dir() / "records").glob(f"base-{self.tag(seed, steps)}-*.jsonl"))

    def checkpoint(self, seed: int, steps: int) -> Path:
        folder = (peer_folder(seed) if self.is_peer else get_base_dir()) / "base_checkpoints" / self.tag(seed, steps)
        return folder / (f"model_{steps:06d}.pt" if self.is_peer else f"step_{steps:06d}")


def main() -> None:
    global corpus
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that stopped arms do not stay behind
    text = load_corpus(corpus)
    corpus = text.name
    tokenizer = get_tokenizer(text.path)
    field = [read_arm(word) for word in arms.split()]
    for seed in range(1, seeds + 1) if any(arm.is_peer for arm in field) else ():
        lay_out_for_peer(text, tokenizer, seed)
    about = [text.fingerprint, dtype, max_seq_len, total_batch_size, processor(), os.cpu_count()]
    kept = work_folder() / f"results-{checksum(about)}.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    known = results.setdefault("pace", {})
    if new := [arm for arm in field if arm.label not in known]:
        taken = take_paces(list(dict.fromkeys([field[0], *new])))
        mood = known.get(field[0].label, taken[field[0].name]) / taken[field[0].name]
        known |= {arm.label: taken[arm.name] * mood for arm in new}
        kept.write_text(json.dumps(results))
    pace = {arm.name: known[arm.label] for arm in field}
    wanted = []
    for seconds in map(float, budgets.split()):
        for seed in range(1, seeds + 1):
            wanted += [(arm, seed, max(1, round(seconds / pace[arm.name]))) for arm in field]
    documents = scored_documents(text, tokenizer)

    def race(entry: tuple[Arm, int, int]) -> None:
        arm, seed, steps = entry
        if arm.tag(seed, steps) not in results:
            results[arm.tag(seed, steps)] = train_and_score(arm, seed, steps, tokenizer, documents)
            kept.write_text(json.dumps(results))
            score = results[arm.tag(seed, steps)]
            print0(f"{arm.name} seed {seed}, {steps:,} steps: {score['bpb']:.4f} +- {score['stderr']:.4f}")

    pool = ThreadPoolExecutor(lanes)
    try:
        list(pool.map(race, wanted))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        stop(STARTED)
    show(field, pace, results)


def read_arm(word: str) -> Arm:
    """The arm that a word names. Raises UserError where there is none such."""
    found = re.fullmatch(r"(\w+):(\d+)x(\d+)", word)
    if not found:
        raise UserError(f"{word} in --arms: expected settings:DEPTHxWIDTH, such as laptop:4x128 or peer:4x192")
    arm = Arm(word, found[1], int(found[2]), int(found[3]))
    if arm.width % HEAD_DIM or arm.width < arm.depth:
        raise UserError(f"{word} in --arms: the width must be a multiple of {HEAD_DIM}, and at least the depth")
    missing = arm.root / ("nanochat/engine.py" if arm.is_peer else arm.file)
    if not missing.is_file() or (arm.is_peer and not peer):
        raise UserError(f"{word} in --arms: {missing} is missing; peer needs --peer=FOLDER, others dev/configs/NAME.py")
    return arm


def our_settings(file: str) -> dict[str, Any]:
    words = [f"--total-batch-size={total_batch_size}", file]
    given = parse_args(read_block(ROOT / "scripts" / "base_train.py"), words)
    return {name: value for name, (value, _) in given.items()}


def processor() -> list[str]:
    """What tells one kind from another: a cloud's name for it hides the generation."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text() if known.exists() else ""
    return sorted(set(re.findall(r"^(?:cpu family|model|flags)\s*:.*", lines, re.M)))


def checksum(about: Any) -> str:
    return f"{zlib.crc32(repr(about).encode()):08x}"


def work_folder() -> Path:
    folder = get_base_dir() / "bench_train"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# -----------------------------------------------------------------------------
# The peer's files


def peer_folder(seed: int) -> Path:
    return work_folder() / f"peer-s{seed}"


def lay_out_for_peer(text: Corpus, tokenizer: Tokenizer, seed: int) -> None:
    """Its base directory: our text in an order drawn by seed, as its loader reads files from first to last, and our
    tokens as the tiktoken encoding that its tokenizer is. Training text is cut into spans that fill its rows, as our
    loader cuts it: of longer documents its loader takes the beginnings and drops the rest. On books, articles and PEPs
    that was nine tenths of the text, and it came to 2.20 bits per byte where plain of ours came to 1.83.
    """
    import tiktoken
    import torch

    import rustbpe

    folder = peer_folder(seed)
    if (folder / "tokenizer" / "token_bytes.pt").exists():
        return
    shards = folder / "base_data_climbmix"
    shards.mkdir(parents=True, exist_ok=True)
    for name, part in (("shard_00000", text.train), ("shard_00001", text.val)):
        documents = pa.concat_arrays(list(iter_text(part)))
        if part is text.train:
            ids = map(tokenizer.encode, documents.to_pylist())
            spans = (document[i : i + max_seq_len] for document in ids for i in range(0, len(document), max_seq_len))
            documents = pa.array([tokenizer.decode(span) for span in spans])
        order = np.random.default_rng(seed).permutation(len(documents))
        pq.write_table(
            pa.table({"text": documents.take(pa.array(order))}), shards / f"{name}.parquet", row_group_size=256
        )
    ids = range(tokenizer.get_vocab_size())
    special = {tokenizer.decode([i]): i for i in ids if not tokenizer.token_bytes[i]}
    ranks = {tokenizer.decode_bytes([i]): i for i in ids if tokenizer.token_bytes[i]}
    pattern = rustbpe.PATTERNS[tokenizer.pattern]
    encoding = tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    torch.save(torch.tensor(tokenizer.token_bytes.tolist()), folder / "tokenizer" / "token_bytes.pt")


# -----------------------------------------------------------------------------
# Pace


def take_paces(field: list[Arm]) -> dict[str, float]:
    """Seconds of a step of each arm, the median over all its turns, printed with the ratio of speeds to the first."""
    seconds: dict[Arm, list[float]] = {arm: [] for arm in field}
    running: dict[Arm, subprocess.Popen[bytes]] = {}
    try:
        for arm in field:  # one after the other: compiling is nobody's pace
            running[arm] = arm.start(PACE_SEED, ENDLESS)
            wait_for_steps(arm, running[arm])
            os.killpg(running[arm].pid, signal.SIGSTOP)
        for arm in ([*field, *field[::-1]] * turns)[: turns * len(field)]:
            before = len(arm.times(PACE_SEED, ENDLESS))
            os.killpg(running[arm].pid, signal.SIGCONT)
            time.sleep(turn_seconds)
            os.killpg(running[arm].pid, signal.SIGSTOP)
            seconds[arm] += arm.times(PACE_SEED, ENDLESS)[before + 1 :]  # the first had waited for its turn
    finally:
        stop(running.values())
    pace = {arm.name: statistics.median(times) for arm, times in seconds.items()}
    for arm in field:
        rate, first = arm.tokens / pace[arm.name], field[0].tokens / pace[field[0].name]
        times = f"{1000 * pace[arm.name]:.0f} ms a step, median of {len(seconds[arm])}"
        print0(f"{arm.name:>16}: {times}, {rate:,.0f} tokens/s, {rate / first:.2f} of {field[0].name}'s")
    return pace


def stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for_steps(arm: Arm, process: subprocess.Popen[bytes], enough: int = 4) -> None:
    while len(arm.times(PACE_SEED, ENDLESS)) < enough:
        if process.poll() is not None:
            raise UserError(f"{arm.name} ended with exit code {process.returncode}: {arm.log(PACE_SEED, ENDLESS)}")
        time.sleep(0.2)


# -----------------------------------------------------------------------------
# Training and scoring


def scored_documents(text: Corpus, tokenizer: Tokenizer) -> list[tuple[list[int], int]]:
    """Ids and bytes of every second validation document, the second one first."""
    documents = pa.concat_arrays(list(iter_text(text.val))).to_pylist()[1::2]
    return [(ids, len(document.encode())) for document in documents if (ids := tokenizer.encode(document))]


def train_and_score(
    arm: Arm, seed: int, steps: int, tokenizer: Tokenizer, documents: list[tuple[list[int], int]]
) -> dict[str, Any]:
    threads = max(1, (os.cpu_count() or 1) // lanes) if lanes > 1 else None
    process = arm.start(seed, steps, threads)
    if process.wait():
        raise UserError(f"{arm.name} ended with exit code {process.returncode}: {arm.log(seed, steps)}")
    times = arm.times(seed, steps)
    asked = {"documents": [ids for ids, _ in documents], "bos": tokenizer.get_bos_token_id(), "context": max_seq_len}
    role = "peer" if arm.is_peer else "ours"
    scored = subprocess.run(
        [sys.executable, str(ROOT / "dev" / "train_score.py"), role, str(arm.checkpoint(seed, steps))],
        input=json.dumps(asked),
        env=os.environ | {"PYTHONPATH": str(arm.root), "OMP_NUM_THREADS": str(threads or os.cpu_count())},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    nats = json.loads(scored.stdout)
    score = ratio_over_documents(
        np.array([[n, size, len(ids)] for n, (ids, size) in zip(nats, documents, strict=True)])
    )
    about = {"arm": arm.name, "seed": seed, "steps": steps, "seconds": round(sum(times), 1)}
    return about | {"bpb": score.bpb, "stderr": score.stderr, "bytes": score.bytes}


# -----------------------------------------------------------------------------
# What is shown


def show(field: list[Arm], pace: dict[str, float], results: dict[str, Any]) -> None:
    """The noise, the table, the diagram and the line of JSON."""
    head = ["arm", "seconds", "steps", "tokens/s", "seeds", "bits per byte", "over seeds", "over documents"]
    rows, lines, spreads = [], [], []
    said: dict[str, Any] = {"seeds": seeds, "dtype": dtype}
    for hue, arm in enumerate(field):
        points = []
        for seconds in map(float, budgets.split()):
            steps = max(1, round(seconds / pace[arm.name]))
            runs = [results[arm.tag(seed, steps)] for seed in range(1, seeds + 1)]
            values = [run["bpb"] for run in runs]
            mean = statistics.fmean(values)
            error = statistics.stdev(values) / math.sqrt(seeds) if seeds > 1 else math.nan
            spreads += [statistics.variance(values)] if seeds > 1 else []
            points.append((seconds, mean))
            rate = f"{arm.tokens / pace[arm.name]:,.0f}"
            figures = [f"{mean:.4f}", f"{error:.4f}", f"{runs[0]['stderr']:.4f}"]
            rows.append([arm.name, f"{seconds:g}", f"{steps:,}", rate, str(seeds), *figures])
            said |= {f"{arm.name} {seconds:g} s": round(mean, 4)}
            said |= {f"{arm.name} {seconds:g} s error": round(error, 4)} if seeds > 1 else {}
        lines.append(page.Series(arm.name, "line", points, hue % page.HUES))
        said |= {
            f"{arm.name} train_ratio": round(arm.tokens / pace[arm.name] * pace[field[0].name] / field[0].tokens, 3)
        }
    if spreads:
        noise = math.sqrt(statistics.fmean(spreads))
        print0(
            f"noise: {noise:.4f} bits per byte from seed to seed; a mean of {seeds} moves by {noise / seeds**0.5:.4f}"
        )
    if rows:
        drawn = [page.Curve("Bits per byte after the same time", "bits per byte", lines, "seconds of optimizer steps")]
        about = f"{dtype}, {os.cpu_count()} cores, contexts of {max_seq_len}; every second validation document"
        sections = [("Race", [page.table(head, rows, "l" + "r" * (len(head) - 1)), page.curves(drawn)])]
        report.write("bench_train", page.to_markdown("Training against the clock", about, sections), drawn)
    print(json.dumps(said))


if __name__ == "__main__":
    run_main(main)
