"""
Evaluate a chat model on tasks: accuracy with its standard error.

    python -m scripts.chat_eval -i sft                        # every task
    python -m scripts.chat_eval -i sft -a offline             # those that need no download
    python -m scripts.chat_eval -i mid -a 'GSM8K|ARC-Easy' --max-problems=100
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -- -i rl -a GSM8K

Each task is scored on its own test split, the same problems every time. ChatCORE, printed when all of its tasks ran, is
the mean of (accuracy - guessing) / (1 - guessing) over nanochat's six tasks.
"""

from typing import Literal

from nanochat.configurator import configure

SHORT = {"i": "source", "a": "task_name", "g": "model_tag", "s": "step", "t": "temperature", "m": "max_new_tokens"}
SHORT |= {"n": "num_samples", "k": "top_k", "b": "device_batch_size", "x": "max_problems"}

# Model
source: Literal["base", "mid", "sft", "rl"] = "sft"  # stage of the checkpoint
model_tag: str | None = None  # name of the checkpoint directory (None = the one saved last)
step: int | None = None  # checkpoint step (None = the last)
# Tasks
task_name = "all"  # names joined by |, or all, or offline (those that need no download)
max_problems: int | None = None  # problems of each task (None = all of them)
# Answers
device_batch_size = 64  # problems per rank that are answered together
num_samples = 1  # answers to each generative problem; one right answer is enough
max_new_tokens = 512  # length at which an unfinished answer is cut off
temperature = 0.0  # 0 = always the most likely token
top_k = 50  # draw from the k most likely tokens only (0 = from all)
seed = 42  # of the drawing
show = 2  # answers of each task to print
# Machine
device_type: Literal["auto", "cuda", "mps", "xpu", "cpu"] = "auto"  # cuda also stands for AMD's ROCm
dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # what matmuls compute in
settings = configure(__name__)

from nanochat.checkpoint_manager import find_checkpoint, open_model
from nanochat.common import UserError, open_record, print0, run_main
from nanochat.compute import compute_cleanup, compute_init
from nanochat.engine import Engine
from nanochat.task_eval import evaluate_task
from tasks.mixtures import CHATCORE, EVALUATIONS, OFFLINE


def main() -> None:
    compute = compute_init(device_type, dtype)
    names = chosen_tasks(task_name)
    tasks = {name: EVALUATIONS[name]() for name in names}  # missing data is found here, before anything is computed
    checkpoint = find_checkpoint(source, model_tag, step)
    model, tokenizer = open_model(checkpoint, compute.device)
    engine = Engine(model, tokenizer, compute.dtype)
    record = open_record("chat_eval", f"{source}-{checkpoint.tag}", settings)
    accuracies = {}
    for name, task in tasks.items():
        options = (device_batch_size, max_problems, num_samples, max_new_tokens, temperature, top_k, seed)
        result = evaluate_task(task, engine, tokenizer, compute, *options)
        accuracies[name] = result.accuracy
        about = {"source": source, "task": name, "baseline": task.baseline, "too_long": result.too_long}
        score = {"accuracy": result.accuracy, "stderr": result.stderr, "n": result.n, "seconds": result.seconds}
        record.write("task", **about, **score)
        long = f", {result.too_long} prompts longer than the context" if result.too_long else ""
        print0(f"{name}: {result.accuracy:.1%} +- {result.stderr:.1%} of {result.n}, {result.seconds:.1f} s{long}")
        for shown in result.answers[:show]:
            values = {"prompt": shown.prompt, "answer": shown.answer, "correct": shown.correct}
            record.write("sample", source=source, task=name, **values)
            print0(f"    {'right' if shown.correct else 'wrong'}: {shown.prompt!r} -> {shown.answer!r}")
    if all(name in accuracies for name in CHATCORE):
        centred = [(accuracies[name] - tasks[name].baseline) / (1 - tasks[name].baseline) for name in CHATCORE]
        chatcore = sum(centred) / len(centred)
        record.write("chatcore", source=source, value=chatcore, tasks=list(CHATCORE))
        print0(f"ChatCORE: {chatcore:.4f}")
    record.write("end")
    record.close()
    compute_cleanup()


def chosen_tasks(given: str) -> list[str]:
    """The names that the user means; UserError for one that is none."""
    if given in ("all", "offline"):
        return list(EVALUATIONS if given == "all" else OFFLINE)
    for name in given.split("|"):
        if name not in EVALUATIONS:
            raise UserError(f"-a {name}: expected all, offline, or some of {'|'.join(EVALUATIONS)}")
    return given.split("|")


if __name__ == "__main__":
    run_main(main)
