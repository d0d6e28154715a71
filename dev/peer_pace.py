"""How fast karpathy/nanochat (92d63d4) trains here: its own base_train, and the tokens/s and MFU that it prints.

    python -m dev.peer_pace --peer=FOLDER --depth=12 --device-batch-size=16

dev.bench_train has its arms take turns, on a CPU alone; a GPU has no moods, so this one runs by itself. Full context,
one micro-batch a step, the text and tokenizer in $NANOCHAT_BASE_DIR. `python -m scripts.bench --data=real` is ours
beside it. Medians of the steps after the first ten, then it is killed. The last line is one JSON object.
"""

from typing import Literal

from nanochat.configurator import Positive, configure

peer: str | None = None  # folder of the checkout
device_type: Literal["cuda", "cpu"] = "cuda"  # where it runs
corpus: str | None = None  # directory name in $NANOCHAT_BASE_DIR/data (None = the only one there)
depth: Positive = 12  # number of Transformer layers
max_seq_len: Positive = 2048  # context in tokens
device_batch_size: Positive = 16  # rows of a step
steps: Positive = 20  # that are counted
settings = configure(__name__)

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

from dev.bench_train import ENDLESS, lay_out_for_peer, peer_folder
from nanochat.common import UserError, run_main
from nanochat.corpus import load_corpus
from nanochat.gpt import config_from_depth
from nanochat.tokenizer import get_tokenizer

STEP = re.compile(r"\| dt: ([\d.]+)ms \| tok/sec: ([\d,]+) \| bf16_mfu: ([\d.]+)")
SKIP = 10


def main() -> None:
    root = Path(peer or "").resolve()
    if not peer or not (root / "scripts" / "base_train.py").is_file():
        raise UserError(f"--peer={peer}: expected the folder of a checkout of karpathy/nanochat")
    text = load_corpus(corpus)
    tokenizer = get_tokenizer(text.path)
    lay_out_for_peer(text, tokenizer, seed=1)
    config, tokens = config_from_depth(depth, tokenizer.get_vocab_size(), max_seq_len), device_batch_size * max_seq_len
    words = [f"--depth={depth}", f"--head-dim={config.head_dim}", f"--max-seq-len={max_seq_len}", "--window-pattern=L"]
    words += [f"--device-batch-size={device_batch_size}", f"--total-batch-size={tokens}", f"--num-iterations={ENDLESS}"]
    words += [f"--{name}-every=-1" for name in ("eval", "sample", "core-metric")] + [f"--device-type={device_type}"]
    environment = os.environ | {"PYTHONPATH": str(root), "NANOCHAT_BASE_DIR": str(peer_folder(1))}
    command = [sys.executable, "-u", "-m", "scripts.base_train", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    done: list[list[float]] = []
    with subprocess.Popen(command, cwd=root, env=environment, **pipes) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            if found := STEP.search(line):
                done.append([float(word.replace(",", "")) for word in found.groups()])
            if len(done) == SKIP + steps:
                process.kill()
                break
    if len(done) < SKIP + steps:
        raise UserError(f"it ended with exit code {process.returncode} after {len(done)} steps; what it said is above")
    ms, rate, mfu = (statistics.median(column) for column in zip(*done[SKIP:], strict=True))
    said = {"rows": device_batch_size, "tokens_per_step": tokens, "vocab_size": config.vocab_size, "ms_per_step": ms}
    print(json.dumps(said | {"tokens_per_second": rate, "mfu": round(mfu / 100, 4)}))


if __name__ == "__main__":
    run_main(main)
