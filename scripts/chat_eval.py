"""Evaluate a chat model on tasks: accuracy with its standard error.

    python -m scripts.chat_eval -i sft                        # every task
    python -m scripts.chat_eval -i sft -a offline             # those that need no download
    python -m scripts.chat_eval -a list                       # which there are
    python -m scripts.chat_eval -i mid -a 'GSM8K|ARC-Easy' --max-problems=100
    python -m scripts.chat_eval -i rl -a GSM8K --num-samples=8 --temperature=1 --top-k=0   # pass@1, 2, 4, 8
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -- -i rl -a GSM8K

Each task is scored on its own test split, the same problems every time; no other script reads a test split. ChatCORE is
the mean of (accuracy - guessing) / (1 - guessing) over nanochat's six tasks, ChatCORE-cat that over ARC-Easy,
ARC-Challenge and MMLU; each is printed when all of its tasks ran. What is measured on fewer problems than were
published is called partial.
"""

from typing import Literal

from nanochat.configurator import Natural, Positive, Rate, Seed, configure

SHORT = {
    "i": "source", "a": "task_name", "g": "model_tag", "s": "step", "t": "temperature", "m": "max_new_tokens",
    "n": "num_samples", "k": "top_k", "b": "device_batch_size", "x": "max_problems",
}  # fmt: skip

# Model
source: Literal["base", "mid", "sft", "rl"] = "sft"  # stage of the checkpoint
model_tag: str | None = None  # name of the checkpoint directory (None = the one saved last)
step: Natural | None = None  # checkpoint step (None = the last)
# Tasks
task_name = "all"  # names joined by |, or all, or offline (those that need no download), or list to see them
max_problems: Positive | None = None  # problems of each task (None = all of them)
# Answers
device_batch_size: Positive = 64  # answers per rank that are written together
num_samples: Positive = 1  # answers to each generative problem: accuracy is over all of them, pass@k up to k = this
max_new_tokens: Positive = 512  # length at which an unfinished answer is cut off
temperature: Rate = 0.0  # 0 = always the most likely token
top_k: Natural = 50  # draw from the k most likely tokens only (0 = from all)
seed: Seed = 42  # of the drawing
show: Natural = 2  # problems of each task to print with an answer
unsafe_exec = False  # run programs that a model wrote even where the machine cannot lock them in
log_answers = False  # write every answer to records/answers/, a line of JSON per problem
# Machine
device_type: Literal["auto", "cuda", "mps", "xpu", "cpu"] = "auto"  # cuda also stands for AMD's ROCm
dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # what matmuls compute in
settings = configure(__name__)

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanochat.checkpoint_manager import find_checkpoint, open_model
from nanochat.common import UserError, print0, run_main
from nanochat.compute import compute_cleanup, compute_init
from nanochat.core_eval import mean_centred
from nanochat.engine import Engine, Sampling
from nanochat.execution import active_layers
from nanochat.record import Record, open_record
from nanochat.task_eval import TaskResult, evaluate_task, pass_at_k
from tasks.common import Task
from tasks.humaneval import HumanEval
from tasks.mixtures import CATEGORICAL, CHATCORE, EVALUATIONS, OFFLINE


def main() -> None:
    if task_name in ("", "list"):
        print0(list_tasks())
        return
    names = chosen_tasks(task_name)
    compute = compute_init(device_type, dtype)
    tasks = {name: make_task(name) for name in names}  # missing data is found here, before anything is computed
    skipped = lock_in_programs(tasks)
    checkpoint = find_checkpoint(source, model_tag, step)
    model, tokenizer = open_model(checkpoint, compute.device)
    engine = Engine(model, tokenizer, compute.dtype)
    sampling = Sampling(max_new_tokens, temperature, top_k, seed=seed)
    record = open_record("chat_eval", f"{source}-{checkpoint.tag}", settings, **compute.about())
    for name in skipped:
        record.write("skipped", source=source, task=name, why="programs cannot be locked in on this system")
    results: dict[str, TaskResult] = {}
    for name, task in tasks.items():
        results[name] = evaluate_task(task, engine, compute, sampling, device_batch_size, max_problems, num_samples)
        if compute.is_master:
            report_task(name, task, results[name], record)
    for label, members in (("ChatCORE", CHATCORE), ("ChatCORE-cat", CATEGORICAL)):
        if all(name in results for name in members):
            report_mean(label, {name: tasks[name] for name in members}, results, record)
    record.write("end")
    record.close()
    compute_cleanup()


def chosen_tasks(given: str) -> list[str]:
    """The names that the user means; UserError for one that is none."""
    names = list({"all": EVALUATIONS, "offline": OFFLINE}.get(given) or dict.fromkeys(given.split("|")))
    if unknown := [name for name in names if name not in EVALUATIONS]:
        print0(list_tasks())
        known = "|".join(EVALUATIONS)
        raise UserError(f"-a {unknown[0]}: expected all, offline, list, or some of {known}", everywhere=True)
    return names


def make_task(name: str) -> Task:
    return HumanEval("test", unsafe=unsafe_exec) if name == "HumanEval" else EVALUATIONS[name]()


def lock_in_programs(tasks: dict[str, Task]) -> list[str]:
    """Say what keeps the programs in that a model writes. Where the system has no jail for them, and it was not said
    that they may run all the same, their tasks are taken out, counted and returned.
    """
    skipped = [name for name in tasks if name == "HumanEval" and sys.platform != "linux" and not unsafe_exec]
    for name in skipped:
        n = len(tasks.pop(name))
        print0(f"{name}: {n} problems skipped, programs are locked in on Linux alone; --unsafe-exec runs them")
    if "HumanEval" in tasks:
        print0("programs run with: " + ", ".join(active_layers(unsafe_exec)))
    return skipped


def list_tasks() -> str:
    """A table of all tasks; of those whose data is not here, what gets it. Nothing is downloaded for it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    lines = [f"{'task':<16} {'problems':>15}  {'type':<11} {'guessing':>8}  split"]
    for name, make in EVALUATIONS.items():
        try:
            task = make()
        except UserError as error:
            get = "python -m nanochat.dataset --prefetch=tasks"
            lines.append(f"{name:<16} {'not here':>15}  {error if name in OFFLINE else f'get it with: {get}'}")
            continue
        n, of = len(task), len(task) + task.missing
        count = f"{n:,}" + (f" of {of:,}" if n < of else "")
        lines.append(f"{name:<16} {count:>15}  {task.eval_type:<11} {task.baseline:>8.0%}  test")
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# Print and record


def is_partial(task: Task, result: TaskResult) -> bool:
    return result.n < len(task) + task.missing


def score(result: TaskResult) -> dict[str, Any]:
    return {"accuracy": result.accuracy, "stderr": result.stderr, "n": result.n}


def report_task(name: str, task: Task, result: TaskResult, record: Record) -> None:
    """One line for the task, one for each way to look closer at it, and some answers."""
    about = {"source": source, "task": name, "split": "test", "baseline": task.baseline, "too_long": result.too_long}
    of, partial = len(task) + task.missing, is_partial(task, result)
    parts: dict[str, list[int]] = {}
    for problem in result.problems:
        for label in task.labels(problem.index):
            parts.setdefault(label, []).append(problem.index)
    scores = {label: score(result.among(indices)) for label, indices in parts.items()}
    pass_at = pass_at_k(result.right, result.num_samples) if result.num_samples > 1 else {}
    more = {"of": of, "partial": partial, "num_samples": result.num_samples, "parts": scores, "seconds": result.seconds}
    more["pass_at"] = {k: {"value": value, "stderr": error} for k, (value, error) in pass_at.items()}
    flexible = result.flexible()
    if flexible.right != result.right:
        more["flexible"] = score(flexible)
    record.write("task", **about, **score(result), **more)
    count = f"{result.n:,} of {of:,} (partial)" if partial else f"{result.n:,}"
    long = f", {result.too_long} prompts longer than the context" if result.too_long else ""
    print0(f"{name}: {result.accuracy:.1%} +- {result.stderr:.1%} of {count}, {result.seconds:.1f} s{long}")
    if "flexible" in more:
        print0(f"    flexible, by the last number anywhere: {flexible.accuracy:.1%} +- {flexible.stderr:.1%}")
    for group in [group for group in task.groups if group in scores]:
        part = scores[group]
        print0(f"    {group}: {part['accuracy']:.1%} +- {part['stderr']:.1%} of {part['n']:,}")
    if pass_at:
        print0("    " + ", ".join(f"pass@{k} {value:.1%} +- {error:.1%}" for k, (value, error) in pass_at.items()))
    for shown in [problem for problem in result.problems if problem.answers][:show]:
        answer, correct = shown.answers[0], shown.right[0]
        record.write("sample", source=source, task=name, prompt=shown.prompt, answer=answer, correct=correct)
        print0(f"    {'right' if correct else 'wrong'}: {shown.prompt!r} -> {answer!r}")
    if log_answers and record.path:
        write_answers(record.path, name, result)


def write_answers(record: Path, name: str, result: TaskResult) -> None:
    """Append a task's answers to the file in answers/ that has the record's name."""
    path = record.parent / "answers" / record.name
    path.parent.mkdir(exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps({"task": name, **asdict(problem)}) + "\n" for problem in result.problems)


def report_mean(label: str, tasks: dict[str, Task], results: dict[str, TaskResult], record: Record) -> None:
    value, error = mean_centred((results[name].accuracy, results[name].stderr, tasks[name].baseline) for name in tasks)
    partial = any(is_partial(task, results[name]) for name, task in tasks.items())
    kind = label.lower().replace("-", "_")
    record.write(kind, source=source, value=value, stderr=error, tasks=list(tasks), partial=partial)
    print0(f"{label}: {value:.4f} +- {error:.4f}" + (" (partial)" if partial else ""))


if __name__ == "__main__":
    run_main(main)
