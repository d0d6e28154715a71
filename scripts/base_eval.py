"""Score a model on CORE: 22 tasks that ask a base model for knowledge, language, reading and logic.

    python -m scripts.base_eval
    python -m scripts.base_eval --max-per-task=500                # 500 items of each task: minutes instead of hours
    python -m scripts.base_eval --tasks='piqa|copa' --bundle=../eval_bundle
    python -m scripts.base_eval --hf-path=../gpt2                 # a Hugging Face model folder, by the same rules
    torchrun --standalone --nproc_per_node=8 -m scripts.base_eval -- --model-tag=d20

Guessing is 0, perfection 1; GPT-2 has 0.1139 (124 M), 0.1849, 0.2146 and 0.2565 (1.6 B). A run that was stopped goes on
after the last task that it finished. The answer to every item is kept in $NANOCHAT_BASE_DIR/core/<model>/<task>.json.
Bits per byte are measured by scripts.base_loss; scripts.chat_cli --source=base continues texts.
"""

from typing import Literal

from nanochat.configurator import Interval, Natural, Positive, configure

SHORT = {"i": "source", "g": "model_tag", "s": "step", "x": "max_per_task"}

# Model
source: Literal["base", "mid", "sft", "rl"] = "base"  # stage of the checkpoint
model_tag: str | None = None  # name of the checkpoint directory (None = the one saved last)
step: Natural | None = None  # checkpoint step (None = the last)
hf_path: str | None = None  # score this folder with a Hugging Face model instead
# Evaluation
tasks = "all"  # names joined by |, or all
max_per_task: Interval = -1  # items of each task (-1 = all of them)
bundle: str | None = None  # folder with core.yaml (None = $NANOCHAT_BASE_DIR/eval_bundle, compared with its manifest)
batch_tokens: Positive | None = None  # tokens per rank and forward pass (None = 4,096 on CPU, 32,768 elsewhere)
compile = True  # torch.compile our model if there is a C++ compiler, and 2,000 items or more in what is asked
rescore = False  # score every task, also those that an earlier run of the same model and settings has scored
# Machine
device_type: Literal["auto", "cuda", "mps", "xpu", "cpu"] = "auto"  # cuda also stands for AMD's ROCm
dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # what matmuls compute in
settings = configure(__name__)

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nanochat import core_eval
from nanochat.checkpoint_manager import find_checkpoint, open_model
from nanochat.common import UserError, get_base_dir, print0, run_main
from nanochat.compute import Compute, can_compile, compute_cleanup, compute_init
from nanochat.core_eval import Answer, CoreTask, GPTScorer, Scorer, TaskScore, find_bundle, load_tasks, score_task
from nanochat.files import read_sealed, seal, sha256_file, write_atomic
from nanochat.hf_model import load_hf
from nanochat.record import Record, open_record

HF_FILES = (".safetensors", ".json", ".txt", ".model")  # what a model folder consists of: weights, settings, tokenizer
COMPILE_ITEMS = 2000  # a d4 on one core scores these in 42 s eagerly and in 26 s compiled
VERSION = 1  # of prompts, scoring and the file of a task's answers: what another version wrote is not reused


def main() -> None:
    compute = compute_init(device_type, dtype)
    every_task = load_tasks(Path(bundle) if bundle else find_bundle())
    there = choose_tasks(tasks, every_task)
    compiled = compile and not hf_path and worth_compiling(there, compute)
    name, identity, scorer = open_scorer(compute, compiled)
    about = {"model": identity, "dtype": str(compute.dtype), "device": compute.device.type, "compiled": compiled}
    about |= {"max_per_task": max_per_task, "context": scorer.context}
    record = open_record("base_eval", name, settings)
    folder = get_base_dir() / "core" / name
    scores = []
    for task in there:
        if score := kept_score(task, scorer, compute, folder / f"{task.label}.json", about):
            log_score(score, record)
            scores.append(score)
    if compute.is_master:
        log_core(scores, [task.label for task in every_task if task not in there], record)
        if folder.is_dir():
            print0(f"the answer to every item: {folder}")
    record.write("end")
    record.close()
    compute_cleanup()


def choose_tasks(given: str, every_task: Sequence[CoreTask]) -> list[CoreTask]:
    """The tasks that the user means and whose files are there; UserError for a name that is none, and for no task."""
    by_label = {task.label: task for task in every_task}
    labels = dict.fromkeys(by_label if given == "all" else given.split("|"))
    if unknown := [label for label in labels if label not in by_label]:
        raise UserError(f"--tasks={unknown[0]}: expected all, or some of {'|'.join(by_label)}")
    there = [by_label[label] for label in labels if by_label[label].path.is_file()]
    for label in labels:
        if by_label[label] not in there:
            print0(f"{label}: not scored, there is no {by_label[label].path}")
    if not there:
        raise UserError(f"none of these tasks is there: get them with: {core_eval.PREFETCH}")
    return there


def worth_compiling(there: Sequence[CoreTask], compute: Compute) -> bool:
    """Whether the model can be compiled, and is asked for so many items that they make up for the time it takes."""
    most = math.inf if max_per_task == -1 else max_per_task
    items = (min(most, task.path.read_bytes().count(b"\n")) for task in there)
    return can_compile(compute.device) and sum(items) >= COMPILE_ITEMS


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
    scorer = GPTScorer(model, tokenizer, compute, batch_tokens, compiled)
    return f"{source}-{checkpoint.tag}-{checkpoint.step:06d}", identity, scorer


def kept_score(task: CoreTask, scorer: Scorer, compute: Compute, path: Path, about: dict[str, Any]) -> TaskScore | None:
    """A task's score: an earlier one of the same model, settings and file, which rank 0 alone has, or a new one, which
    it keeps. None where a rank does not know it.
    """
    key = score_key(task, about)
    earlier = load_score(path, key) if compute.is_master and not rescore else None
    if compute.any(earlier is not None):
        print0(f"{task.label}: scored before, {path}")
        return earlier
    score = score_task(task, scorer, compute, max_per_task)
    if compute.is_master:
        try:
            save_score(path, key, score)
        except OSError as error:
            print0(f"{error.filename}: {error.strerror}; the answers to {task.label} are not kept")
    return score


def log_score(score: TaskScore, record: Record) -> None:
    figures = {"n": score.n, "accuracy": score.accuracy, "stderr": score.stderr, "centered": score.centered}
    seeds = {"shuffle_seed": core_eval.SHUFFLE_SEED, "fewshot_seed": core_eval.FEWSHOT_SEED}
    record.write("core_task", source=source, task=score.task, **figures, cut=score.cut, seconds=score.seconds, **seeds)
    cut = f", {score.cut} cut at the context" if score.cut else ""
    share = f"{score.accuracy:.1%} +- {score.stderr:.1%} of {score.n:,}"
    print0(f"{score.task}: {share}, centred {score.centered:+.4f}, {score.seconds:.1f} s{cut}")


def log_core(scores: Sequence[TaskScore], missing: Sequence[str], record: Record) -> None:
    """CORE, or what there is of it without the `missing` tasks."""
    value, stderr = core_eval.mean_centred((score.accuracy, score.stderr, score.baseline) for score in scores)
    about = {"tasks": [score.task for score in scores], "missing": missing, "partial": bool(missing)}
    record.write("core", source=source, value=value, stderr=stderr, **about, max_per_task=max_per_task)
    few = f" (at most {max_per_task:,} items of each task)" if max_per_task > 0 else ""
    if missing:
        of = f"{len(scores)} of {len(scores) + len(missing)} tasks{few}"
        print0(f"partial, not CORE: {value:.4f} +- {stderr:.4f} over {of}\nwithout {', '.join(missing)}")
    else:
        print0(f"CORE: {value:.4f} +- {stderr:.4f}{few}")


# -----------------------------------------------------------------------------
# A task's answers on disk: what a stopped evaluation continues with


def score_key(task: CoreTask, about: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for a score to be used again: `about` the model and the settings, and all that a task is."""
    described = {"num_fewshot": task.num_fewshot, "delimiter": task.delimiter, "kind": task.kind}
    return {"version": VERSION, "task": task.label, "file_sha256": sha256_file(task.path), **described, **about}


def save_score(path: Path, key: dict[str, Any], score: TaskScore) -> None:
    """Write a sealed JSON file with one line for each item."""
    answers = ",\n".join(json.dumps(asdict(answer)) for answer in score.answers)
    head = json.dumps({"key": key, **asdict(replace(score, answers=[]))}).removesuffix("]}")
    write_atomic(path, seal(f"{head}\n{answers}\n]}}"))


def load_score(path: Path, key: dict[str, Any]) -> TaskScore | None:
    """The score that save_score() wrote, or None where there is none of this key. Says so where the file is damaged."""
    try:
        content = read_sealed(path)
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        print0(f"{path}: {error}; the task is scored again")
        return None
    if content.pop("key", None) != key:
        return None
    answers = [Answer(**answer) for answer in content.pop("answers")]
    return TaskScore(**content, answers=answers)


if __name__ == "__main__":
    run_main(main)
