"""Reinforcement learning: let a chat model try problems with a known answer, and make what was right more likely.

    python -m scripts.chat_rl dev/configs/laptop_rl.py
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl -- --task=GSM8K --run=rl

REINFORCE (Williams 1992) with the mean reward of a prompt's samples as baseline: what remains of GRPO
(arXiv 2402.03300) without its clipping, KL term and division by the spread, as in nanochat. Samples come from the full
distribution at temperature 1, so the gradient is on-policy; the token that ends an answer is trained like any other.
Prompts whose samples all got the same reward teach nothing and are skipped.
"""

from typing import Literal

from nanochat.configurator import Amount, Interval, Minutes, Natural, Positive, Rate, Seed, Several, configure

SHORT = {"i": "source", "g": "model_tag", "s": "step"}

# Run
run = "dummy"  # wandb run name; dummy = no wandb
device_type: Literal["auto", "cuda", "mps", "xpu", "cpu"] = "auto"  # cuda also stands for AMD's ROCm
dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # what matmuls compute in; master weights are always fp32
seed: Seed = 42  # of the samples
# Start
source: Literal["mid", "sft", "rl"] = "sft"  # stage of the checkpoint to start from
source_tag: str | None = None  # name of its directory (None = --model-tag, without that the one saved last)
step: Natural | None = None  # its step (None = the last)
# Problems
task: Literal["GSM8K", "Arithmetic-Hard", "Arithmetic"] = "GSM8K"  # where prompts and rewards come from
examples_per_step: Positive = 16  # prompts per step over all ranks
num_samples: Several = 16  # answers to each prompt
max_new_tokens: Positive = 256  # length at which an unfinished answer is cut off
# Horizon: at most one of these two; none = once through the problems
num_iterations: Positive | None = None  # optimizer steps (the only one that changes the plan of a resumed run)
minutes: Amount | None = None  # training time, turned into steps once; evaluation and saving not counted
# Batch
device_batch_size: Positive = 8  # answers per rank and forward/backward pass
# Optimizers
matrix_lr: Rate = 0.02  # Muon, for the matrices in the blocks
embedding_lr: Rate = 0.2  # AdamW, for the embedding; scales with (width / 768)^-0.5
unembedding_lr: Rate = 0.004  # AdamW, for the head; scales likewise
init_lr_frac: Rate = 0.05  # share of these rates to begin with; they fall to 0 along a line
weight_decay: Rate = 0.0  # Muon's cautious weight decay; falls to 0 along a cosine
skip_spikes = False  # no update by a step whose loss or gradient norm is 6 standard deviations too high
# Evaluation, on held-out problems
eval_every: Interval = 60  # steps between evaluations (-1 = only at the start and at the end)
eval_examples: Positive = 400  # problems of an evaluation
eval_samples: Positive = 8  # answers to each: pass@k for k = 1, 2, 4, ... up to this many
max_dead_steps: Positive = 5  # give up after so many steps in a row in which no prompt taught anything
# Checkpoints
model_tag: str | None = None  # name of the new directory (None = that of the checkpoint to start from)
save_every: Interval = 60  # steps between checkpoints (-1 = only at the end)
save_minutes: Minutes = -1.0  # minutes between checkpoints (-1 = by steps alone); both may be given
save_best = False  # save after each evaluation with the best pass@1 so far, and never delete that one
keep_last: Interval = -1  # checkpoints to keep, older ones are deleted (-1 = all)
resume = False  # continue from the newest whole checkpoint of this tag
resume_from_step: Natural | None = None  # continue from this step
fresh = False  # start over although this tag has checkpoints; they are kept under another name
settings = configure(__name__)

import math
from dataclasses import dataclass
from typing import Any

import torch

from nanochat.attention import round_length
from nanochat.chat_train import find_start, show_chats
from nanochat.checkpoint_manager import open_model
from nanochat.common import UserError, print0, run_main
from nanochat.compute import Compute, compute_init
from nanochat.conversation import decode_parts, fingerprint, parts_text, render_for_completion
from nanochat.engine import Engine, Sampling
from nanochat.model import LanguageModel
from nanochat.run import Run, open_run
from nanochat.schedule import cosine_to_zero
from nanochat.task_eval import pass_at_k
from nanochat.tokenizer import Tokenizer
from nanochat.train import Rates, Spikes, Sums, agree, every, fits, steps_for_minutes, update, zero_sums
from tasks.common import Task
from tasks.gsm8k import extract_answer
from tasks.mixtures import rl_task


def main() -> None:
    compute = compute_init(device_type, dtype, seed)
    start, tag = find_start("rl", source, source_tag, model_tag, step)
    model, tokenizer = open_model(start, compute.device, "train")
    problems, held_out = rl_task(task, "train"), rl_task(task, "dev")
    print0(f"steps of {examples_per_step} prompts x {num_samples} samples; {len(problems):,} problems")

    # What a checkpoint and the run that continues it must agree on
    identity: dict[str, Any] = {"model_config": model.config_dict(), "task": task, "problems": fingerprint(problems)}
    identity |= {"seed": seed, "examples_per_step": examples_per_step, "num_samples": num_samples}
    identity |= {"started_from": start.identity}

    with open_run("rl", tag, settings, identity, compute) as run:
        num_steps, formula = run.horizon or plan_steps(model, tokenizer, problems, run)
        print0(f"horizon: {num_steps:,} steps ({formula})")
        rates = [rate * init_lr_frac for rate in (matrix_lr, embedding_lr, unembedding_lr)]
        optimizers = model.setup_optimizers(*rates, weight_decay, compute.dtype)
        spikes, dead_steps = Spikes(), run.position.get("dead_steps", 0)
        plan = {"formula": formula, "task": task, "started_from": start.identity}
        run.begin(model, optimizers, tokenizer, num_steps, spikes, **plan)
        if run.is_finished:
            return

        if run.done == 0:
            evaluate(model, tokenizer, held_out, run)
        for number in run.steps():
            drawn = [(i + number * examples_per_step) % len(problems) for i in range(examples_per_step)]
            numbers = fitting(drawn, problems, model, tokenizer)
            draws = seed * 2**24 + number + 1
            groups = roll_out(model, tokenizer, problems, numbers, num_samples, draws, run)
            vitals = {**measure(groups, compute), "left_out": len(drawn) - len(numbers)}
            sums = policy_gradient(model, groups, compute)
            agreed = agree(sums, run.watch.received, optimizers, compute)  # raises on every rank or on none
            multipliers = rates_of(number, num_steps)
            result = update(optimizers, agreed, multipliers, compute, spikes, skip_spikes)
            dead_steps = 0 if vitals["groups_with_signal"] else dead_steps + 1
            run.end_step(result, {"dead_steps": dead_steps}, describe(vitals), lr=round(multipliers.lr, 6), **vitals)

            if dead_steps >= max_dead_steps:
                raise UserError(diagnose(vitals, dead_steps), everywhere=True)
            if every(eval_every, run.done, num_steps) or run.done == num_steps:
                evaluate(model, tokenizer, held_out, run)

        questions = [str(held_out[i]["messages"][0]["content"]) for i in range(min(3, len(held_out)))]
        show_chats(questions, model, tokenizer, compute, run)
        run.finish()


def plan_steps(model: LanguageModel, tokenizer: Tokenizer, problems: Task, run: Run) -> tuple[int, str]:
    """The number of steps and where it comes from."""
    if minutes is None:
        once = max(1, len(problems) // examples_per_step)
        return (num_iterations, "as given") if num_iterations else (once, "once through the problems")
    numbers = fitting(list(range(min(examples_per_step, len(problems)))), problems, model, tokenizer)

    def gradients() -> Sums:
        groups = roll_out(model, tokenizer, problems, numbers, num_samples, seed, run)
        return policy_gradient(model, groups, run.compute)

    trial = model.setup_optimizers(dtype=run.compute.dtype)
    return steps_for_minutes(minutes, trial, gradients, run.compute, fewest=4)  # of seconds each


def rates_of(number: int, num_steps: int) -> Rates:
    """The schedules of RL, at a step."""
    return Rates(lr=1 - number / num_steps, momentum=0.95, weight_decay=cosine_to_zero(number, num_steps))


# -----------------------------------------------------------------------------
# Trying


@dataclass
class Rollout:
    """One answer of the model to a prompt."""

    prompt: list[int]
    tokens: list[int]  # what was generated, tool output and terminal token included
    mask: list[int]  # 1 for tokens that were sampled
    ended: bool  # by a terminal token, not by max_new_tokens or the end of the context
    text: str
    reward: float
    advantage: float = 0.0  # reward minus the mean of the group; 0 in a group without signal


def fitting(numbers: list[int], problems: Task, model: LanguageModel, tokenizer: Tokenizer) -> list[int]:
    """Those of the problems with these numbers whose prompts leave room for an answer. The same on every rank."""
    return [i for i in numbers if fits(render_for_completion(problems[i]["messages"], tokenizer), model)]


def roll_out(
    model: LanguageModel,
    tokenizer: Tokenizer,
    problems: Task,
    numbers: list[int],
    samples: int,
    draws: int,
    run: Run,
) -> list[list[Rollout]]:
    """This rank's share of the problems with these numbers, `samples` answers to each from one decode batch, with
    rewards: a group each. `draws` seeds the sampling. Raises Stopped,
    on every rank, when a signal came to any meanwhile: the step is not begun, and tried again by the run that resumes.
    """
    rank, world_size = run.compute.rank, run.compute.world_size
    low, high = (len(numbers) * (rank + i) // world_size for i in (0, 1))
    conversations = [problems[number] for number in numbers[low:high]]
    prompts = [render_for_completion(conversation["messages"], tokenizer) for conversation in conversations]
    engine = Engine(model, tokenizer, run.compute.dtype)
    firsts = range(low * samples, high * samples, samples)  # what is drawn does not depend on who draws
    sequences, masks = [], []
    if prompts:
        sampling = Sampling(max_new_tokens, seed=draws)
        sequences, masks = engine.generate_batch(
            prompts, sampling, samples, first=firsts, until=lambda: run.watch.received
        )
    run.watch.poll()
    groups = []
    for i, conversation in enumerate(conversations):
        group = []
        for tokens, mask in zip(sequences[i * samples :][:samples], masks[i * samples :][:samples], strict=True):
            text = parts_text(decode_parts(tokens, tokenizer))
            reward = float(problems.evaluate(conversation, text))
            group.append(Rollout(prompts[i], tokens, mask, tokens[-1] in engine.stop_tokens, text, reward))
        mean = sum(rollout.reward for rollout in group) / samples
        for rollout in group:
            rollout.advantage = rollout.reward - mean
        groups.append(group)
    return groups


def policy_gradient(model: LanguageModel, groups: list[list[Rollout]], compute: Compute) -> Sums:
    """Gradients of -sum(advantage * log p) over the sampled tokens of the groups with signal, left on the parameters.
    Returns that sum and the number of those tokens, on this rank, for agree() and update() to divide by.
    """
    sums = zero_sums(compute)
    rollouts = [rollout for group in groups for rollout in group if rollout.advantage]
    rollouts.sort(key=lambda rollout: len(rollout.prompt) + len(rollout.tokens))  # little padding
    for start in range(0, len(rollouts), device_batch_size):
        chunk = rollouts[start : start + device_batch_size]
        longest = max(len(rollout.prompt) + len(rollout.tokens) for rollout in chunk) - 1
        T = round_length(longest, compute.device)
        inputs = torch.zeros(len(chunk), T, dtype=torch.long)
        targets = torch.full((len(chunk), T), -1)
        for row, rollout in enumerate(chunk):
            ids = torch.tensor(rollout.prompt + rollout.tokens)
            trained = torch.tensor([0] * len(rollout.prompt) + rollout.mask)
            inputs[row, : len(ids) - 1] = ids[:-1]
            targets[row, : len(ids) - 1] = torch.where(trained[1:] > 0, ids[1:], -1)
        inputs, targets = inputs.to(compute.device), targets.to(compute.device)
        advantages = torch.tensor([rollout.advantage for rollout in chunk], device=compute.device)
        weights = advantages[:, None].expand(-1, T)
        loss = model(inputs, targets, weights, loss_reduction="sum", dtype=compute.dtype)
        loss.backward()
        sums.totals += torch.stack([loss.detach(), (targets >= 0).sum()])
        sums.batches.append((inputs, targets))
    return sums


# -----------------------------------------------------------------------------
# Vital signs


def measure(groups: list[list[Rollout]], compute: Compute) -> dict[str, float]:
    """What tells a living run from a dead one, over all ranks; of no answers only that there are none."""
    rollouts = [rollout for group in groups for rollout in group]
    mine = [
        len(groups),
        sum(any(rollout.advantage for rollout in group) for group in groups),
        len(rollouts),
        sum(rollout.reward for rollout in rollouts),
        sum(rollout.reward**2 for rollout in rollouts),
        sum(rollout.ended for rollout in rollouts),
        sum(extract_answer(rollout.text) is not None for rollout in rollouts),
    ]
    groups_in_all, alive, n, total, squares, ended, parsed = compute.sum(
        torch.tensor(mine, dtype=torch.float64)
    ).tolist()
    counts = {"groups_with_signal": int(alive), "groups": int(groups_in_all)}
    if not n:
        return counts
    mean, squared, ended, parsed = (value / n for value in (total, squares, ended, parsed))
    return {
        "reward": round(mean, 6),
        "reward_std": round(math.sqrt(max(0.0, squared - mean**2)), 6),
        "ended": round(ended, 6),
        "parsed": round(parsed, 6),
        **counts,
    }


def describe(vitals: dict[str, float]) -> str:
    long = f", {vitals['left_out']} prompts longer than the context" if vitals["left_out"] else ""
    if not vitals["groups"]:
        return f"no answers{long}"
    rewards = f"reward {vitals['reward']:.3f} +- {vitals['reward_std']:.3f}, ended {vitals['ended']:.0%}"
    signal = f"groups with signal {vitals['groups_with_signal']}/{vitals['groups']}"
    return f"{rewards}, parsed {vitals['parsed']:.0%}, {signal}{long}"


def diagnose(vitals: dict[str, float], dead_steps: int) -> str:
    """Why nothing is learned, and what to do about it."""
    nothing = f"no prompt taught anything for {dead_steps} steps"
    if not vitals["groups"]:
        return f"{nothing}; all their prompts fill the context: train with a larger --max-seq-len"
    ended, parsed, reward = vitals["ended"], vitals["parsed"], vitals["reward"]
    if ended < 0.05:
        why = f"{ended:.0%} of the answers ended in {max_new_tokens} tokens: raise --max-new-tokens or run chat_sft"
    elif parsed < 0.05:
        why = f"{parsed:.0%} of the answers have a `#### number`: the model does not know the form; run chat_sft"
    elif reward > 0.95:
        why = f"reward {reward:.2f}: there is nothing left to learn; take harder problems"
    else:
        why = f"reward {reward:.2f}: too hard; raise --num-samples, take easier problems or run chat_sft for longer"
    return f"{nothing}; {why}"


def evaluate(model: LanguageModel, tokenizer: Tokenizer, held_out: Task, run: Run) -> None:
    """Record pass@k and its standard error on the first eval_examples problems. The same on every rank."""
    numbers = fitting(list(range(min(eval_examples, len(held_out)))), held_out, model, tokenizer)
    if not numbers:
        context = f"the context of {model.config.sequence_len} tokens"
        raise UserError(f"--task={task}: no held-out prompt fits {context}; train with a larger --max-seq-len", True)
    groups = roll_out(model, tokenizer, held_out, numbers, eval_samples, seed, run)
    right = torch.zeros(len(numbers), dtype=torch.float64)  # of each problem; this rank has some of them
    first = len(numbers) * run.compute.rank // run.compute.world_size
    for i, group in enumerate(groups, first):
        right[i] = sum(rollout.reward for rollout in group)
    scores = pass_at_k([int(count) for count in run.compute.sum(right).tolist()], eval_samples)
    shown = (f"pass@{k} {value:.1%} +- {error:.1%}" for k, (value, error) in scores.items())
    print0(f"step {run.done:,}: {', '.join(shown)}")
    pass_at = {str(k): {"value": round(value, 6), "stderr": round(error, 6)} for k, (value, error) in scores.items()}
    run.evaluated(-scores[1][0], problems=len(numbers), pass_at=pass_at)


if __name__ == "__main__":
    run_main(main)
