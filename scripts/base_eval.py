"""Score a model on CORE: 22 tasks that ask a base model for knowledge, language, reading and logic.

    python -m scripts.base_eval
    python -m scripts.base_eval --max-per-task=500                # 500 items of each task: minutes instead of hours
    python -m scripts.base_eval --tasks='piqa|copa' --bundle=../eval_bundle
    python -m scripts.base_eval --hf-path=../gpt2                 # a Hugging Face model folder, by the same rules
    torchrun --standalone --nproc_per_node=8 -m scripts.base_eval -- --model-tag=d20

Guessing is 0, perfection 1; GPT-2 has 0.1139 (124 M), 0.1849, 0.2146 and 0.2565 (1.6 B). A run that was stopped goes on
after the last task that it finished. The answer to every item is kept in $NANOCHAT_BASE_DIR/core/<model>/<task>.json.
"""

from typing import Literal

from nanochat.configurator import configure

SHORT = {"i": "source", "g": "model_tag", "s": "step", "x": "max_per_task"}

# Model
source: Literal["base", "mid", "sft", "rl"] = "base"  # stage of the checkpoint
model_tag: str | None = None  # name of the checkpoint directory (None = the one saved last)
step: int | None = None  # checkpoint step (None = the last)
hf_path: str | None = None  # score this folder with a Hugging Face model instead
# Evaluation
eval = "core"  # only that is done here; of core,bpb,sample the others are answered with the commands that do them
tasks = "all"  # names joined by |, or all
max_per_task = -1  # items of each task (-1 = all of them)
bundle: str | None = None  # folder with core.yaml (None = $NANOCHAT_BASE_DIR/eval_bundle, compared with its manifest)
batch_tokens: int | None = None  # tokens per rank and forward pass (None = 4,096 on CPU, 32,768 elsewhere)
compile = True  # torch.compile our model if there is a C++ compiler, and 2,000 items or more in what is asked
rescore = False  # score every task, also those that an earlier run of the same model and settings has scored
# Machine
device_type: Literal["auto", "cuda", "mps", "xpu", "cpu"] = "auto"  # cuda also stands for AMD's ROCm
dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # what matmuls compute in
settings = configure(__name__)

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat.checkpoint_manager import find_checkpoint, open_model
from nanochat.common import UserError, get_base_dir, print0, run_main
from nanochat.compute import Compute, can_compile, compute_cleanup, compute_init
from nanochat.core_eval import (
    FEWSHOT_SEED,
    SHUFFLE_SEED,
    CoreTask,
    GPTScorer,
    Scorer,
    TaskScore,
    evaluate_task,
    find_bundle,
    load_score,
    load_tasks,
    save_score,
    score_key,
)
from nanochat.files import sha256_file
from nanochat.hf_model import load_hf
from nanochat.record import Record, open_record
from nanochat.task_eval import mean_centred

HF_FILES = (".safetensors", ".json", ".txt", ".model")  # what a model folder consists of: weights, settings, tokenizer
COMPILE_ITEMS = 2000  # a d4 on one core scores these in 42 s eagerly and in 26 s compiled
ELSEWHERE = {  # what else nanochat's base_eval does
    "bpb": "python -m scripts.base_loss",
    "sample": 'python -m scripts.chat_cli --source=base -p "The capital of France is"',
}


def main() -> None:
    compute = compute_init(device_type, dtype)
    if max_per_task == 0 or max_per_task < -1:
        raise UserError(f"--max-per-task={max_per_task}: expected at least 1, or -1 for all items")
    for part in chosen_parts(eval):
        print0(f"{part} is measured by: {ELSEWHERE[part]}")
    every_task = load_tasks(Path(bundle) if bundle else find_bundle())
    there = choose_tasks(tasks, every_task)
    compiled = compile and not hf_path and worth_compiling(there, compute)
    name, identity, scorer = open_scorer(compute, compiled)
    about = {"model": identity, "dtype": str(compute.dtype), "device": compute.device.type, "compiled": compiled}
    about |= {"max_per_task": max_per_task, "context": scorer.context}
    record = open_record("base_eval", name, settings)
    score_tasks(every_task, there, scorer, compute, record, get_base_dir() / "core" / name, about)
    record.write("end")
    record.close()
    compute_cleanup()


def chosen_parts(given: str) -> list[str]:
    """What --eval asks for beside core; UserError for what nothing measures, and where there is no core."""
    parts = given.split(",")
    if "core" not in parts or set(parts) - {"core", *ELSEWHERE}:
        raise UserError(f"--eval={given}: expected core, and perhaps {' or '.join(ELSEWHERE)} joined by commas")
    return [part for part in parts if part != "core"]


def choose_tasks(given: str, every_task: Sequence[CoreTask]) -> list[CoreTask]:
    """The tasks that the user means and whose files are there; UserError for a name that is none, and for no task."""
    by_label = {task.label: task for task in every_task}
    labels = list(by_label) if given == "all" else given.split("|")
    for label in labels:
        if label not in by_label:
            raise UserError(f"--tasks={label}: expected all, or some of {'|'.join(by_label)}")
    there = []
    for label in dict.fromkeys(labels):
        task = by_label[label]
        if task.path.is_file():
            there.append(task)
        else:
            print0(f"{label}: not scored, there is no {task.path}")
    if not there:
        raise UserError("none of these tasks is there: get them with: python -m nanochat.dataset --prefetch=eval")
    return there


def worth_compiling(there: Sequence[CoreTask], compute: Compute) -> bool:
    """Whether the model can be compiled, and is asked for so many items that they make up for the time it takes."""
    if not can_compile(compute.device):
        return False
    most = math.inf if max_per_task == -1 else max_per_task
    return sum(min(most, task.path.read_bytes().count(b"\n")) for task in there) >= COMPILE_ITEMS


def open_scorer(compute: Compute, compiled: bool) -> tuple[str, dict[str, Any], Scorer]:
    """The name of the model, what tells it from any other, and what scores it."""
    if hf_path:
        folder = Path(hf_path).expanduser().resolve()
        hf_scorer = load_hf(folder, compute, batch_tokens)
        files = {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.suffix in HF_FILES}
        return "hf-" + re.sub(r"[^\w.-]", "_", folder.name), files, hf_scorer
    checkpoint = find_checkpoint(source, model_tag, step)
    model, tokenizer = open_model(checkpoint, compute.device)
    files = {name: entry["sha256"] for name, entry in checkpoint.meta["files"].items() if "optim" not in name}
    identity = {**files, "model_config": model.config_dict()}
    name = f"{source}-{checkpoint.tag}-{checkpoint.step:06d}"
    return name, identity, GPTScorer(model, tokenizer, compute, batch_tokens, compiled)


def score_tasks(
    every_task: Sequence[CoreTask],
    there: Sequence[CoreTask],
    scorer: Scorer,
    compute: Compute,
    record: Record,
    folder: Path,
    about: dict[str, Any],
) -> None:
    """Score the tasks that are there; print and record each, and CORE or what there is of it."""
    scores = []
    for task in there:
        score = score_task(task, scorer, compute, folder, about)
        if score:
            log_score(score, record)
            scores.append(score)
    if not compute.is_master:
        return
    value, stderr = mean_centred((score.accuracy, score.stderr, score.baseline) for score in scores)
    labels = [task.label for task in there]
    missing = [task.label for task in every_task if task not in there]
    values = {
        "value": value,
        "stderr": stderr,
        "tasks": labels,
        "missing": missing,
        "partial": bool(missing),
        "max_per_task": max_per_task,
    }
    record.write("core", source=source, **values)
    few = f" (at most {max_per_task:,} items of each task)" if max_per_task > 0 else ""
    if missing:
        print0(f"partial, not CORE: {value:.4f} +- {stderr:.4f} over {len(there)} of {len(every_task)} tasks{few}")
        print0(f"without {', '.join(missing)}")
    else:
        print0(f"CORE: {value:.4f} +- {stderr:.4f}{few}")
    print0(f"the answer to every item: {folder}")


def score_task(
    task: CoreTask, scorer: Scorer, compute: Compute, folder: Path, about: dict[str, Any]
) -> TaskScore | None:
    """A task's score: an earlier one of the same model, settings and file, which rank 0 alone has, or a new one, which
    it keeps. None where a rank does not know it.
    """
    key = score_key(task, about)
    path = folder / f"{task.label}.json"
    earlier = load_score(path, key) if compute.is_master and not rescore else None
    if compute.any(earlier is not None):
        print0(f"{task.label}: scored before, {path}")
        return earlier
    score = evaluate_task(task, scorer, compute, None if max_per_task == -1 else max_per_task)
    if compute.is_master:
        save_score(path, key, score)
    return score


def log_score(score: TaskScore, record: Record) -> None:
    figures = {"n": score.n, "accuracy": score.accuracy, "stderr": score.stderr, "centered": score.centered}
    seeds = {"shuffle_seed": SHUFFLE_SEED, "fewshot_seed": FEWSHOT_SEED}
    record.write("core_task", source=source, task=score.task, **figures, cut=score.cut, seconds=score.seconds, **seeds)
    cut = f", {score.cut} cut at the context" if score.cut else ""
    share = f"{score.accuracy:.1%} +- {score.stderr:.1%} of {score.n:,}"
    print0(f"{score.task}: {share}, centred {score.centered:+.4f}, {score.seconds:.1f} s{cut}")


if __name__ == "__main__":
    run_main(main)
