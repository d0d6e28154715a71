"""Time CORE against tests/reference/core.py, which takes one item at a time as nanochat does.

    python -m dev.bench_core --bundle=../shared/data/eval_bundle

A laptop model (4 layers, width 192, vocabulary 4,096) with random weights scores the first items of every task that is
there. The arms take turns within one process; CPU seconds are counted, so that other programs disturb little, and each
context's medians are compared. Ours is compiled first, and what that takes is said apart. The last line is one JSON
object.
"""

import json
import statistics
import time
from pathlib import Path

from nanochat.common import run_main
from nanochat.configurator import Interval, Positive, configure

# Items
bundle: str | None = None  # folder of the CORE tasks (None = the one in $NANOCHAT_BASE_DIR)
max_per_task: Interval = 8  # items of each task
contexts = "256 512 1024"  # tokens that the model takes, one measurement for each
# Measuring
compile = True  # torch.compile ours, as base_eval does for many items
repeats: Positive = 3  # rounds of both arms
settings = configure(__name__)


def main() -> None:
    import torch

    from nanochat.core_eval import find_bundle, load_tasks
    from nanochat.tokenizer import Tokenizer

    tasks = [task for task in load_tasks(Path(bundle) if bundle else find_bundle()) if task.path.is_file()]
    tokenizer = Tokenizer.train([task.path.read_text(encoding="utf-8") for task in tasks], 4096)
    result = {"threads": torch.get_num_threads(), "tasks": len(tasks)}
    print(
        f"{'context':>7} {'warm-up':>9} {'ours':>9} {'one by one':>11} {'ratio':>7}   CPU seconds; items per CPU second"
    )
    for context in map(int, contexts.split()):
        warmup, ours, reference = measure(tasks, tokenizer, context)
        print(f"{context:7} {warmup:9.1f} {ours:9.1f} {reference:11.1f} {ours / reference:7.2f}")
        result |= {f"core_ratio_{context}": round(ours / reference, 2)}
    print(json.dumps(result))


def measure(tasks, tokenizer, context):
    """CPU seconds of ours the first time, then items per CPU second of both arms, in the same dtype."""
    import torch

    from nanochat.compute import Compute, choose_dtype, keep_freed_memory
    from nanochat.core_eval import GPTScorer, read_items, score_task
    from nanochat.gpt import config_from_depth
    from nanochat.model import build_model
    from tests.reference import core

    keep_freed_memory()  # as compute_init() does
    device = torch.device("cpu")
    compute = Compute(device, choose_dtype("auto", device))
    model = build_model(config_from_depth(4, 4096, context, aspect_ratio=48), device, seed=0)
    items = {task.label: read_items(task) for task in tasks}  # whole files: what is timed are some of the items
    rows = {task.label: core.read_rows(task.path) for task in tasks}
    scorer = GPTScorer(model, tokenizer, compute, compile=compile)
    start = time.process_time()
    for task in tasks:
        score_task(task, scorer, compute, max_per_task, items[task.label])
    warmup = time.process_time() - start
    speeds = {"ours": [], "reference": []}
    for _ in range(repeats):
        start = time.process_time()
        scores = [score_task(task, scorer, compute, max_per_task, items[task.label]) for task in tasks]
        speeds["ours"].append(sum(score.n for score in scores) / (time.process_time() - start))
        start = time.process_time()
        for task, score in zip(tasks, scores, strict=True):
            how = (task.kind, task.num_fewshot, task.delimiter, context, compute.dtype)
            for index in range(score.n):
                core.answer(model, tokenizer, rows[task.label], index, *how)
        speeds["reference"].append(sum(score.n for score in scores) / (time.process_time() - start))
    return warmup, statistics.median(speeds["ours"]), statistics.median(speeds["reference"])


if __name__ == "__main__":
    run_main(main)
