"""Reinforcement learning: let a chat model try problems with a known answer, and make what was right more likely.

    python -m scripts.chat_rl dev/configs/laptop_rl.py
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl -- --task=GSM8K --run=rl

REINFORCE (Williams 1992) with the mean reward of a prompt's samples as baseline: what remains of GRPO
(arXiv 2402.03300) without its clipping, KL term and division by the spread, as in nanochat. Samples come from the full
distribution at temperature 1, so the gradient is on-policy; the token that ends an answer is trained like any other.
Prompts whose samples all got the same reward teach nothing and are skipped.
"""

from typing import Literal

from nanochat.configurator import configure

SHORT = {"i": "source", "g": "model_tag", "s": "step"}

# Run
run = "dummy"  # wandb run name; dummy = no wandb
device_type: Literal["auto", "cuda", "mps", "xpu", "cpu"] = "auto"  # cuda also stands for AMD's ROCm
dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # what matmuls compute in; master weights are always fp32
seed = 42  # of the samples
# Start
source: Literal["mid", "sft", "rl"] = "sft"  # stage of the checkpoint to start from
model_tag: str | None = None  # name of its directory, and of the new one (None = the one saved last)
step: int | None = None  # step of the checkpoint to start from (None = the last)
# Problems
task: Literal["GSM8K", "Arithmetic-Hard", "Arithmetic"] = "GSM8K"  # where prompts and rewards come from
examples_per_step = 16  # prompts per step over all ranks
num_samples = 16  # answers to each prompt
max_new_tokens = 256  # length at which an unfinished answer is cut off
# Horizon
num_iterations: int | None = None  # optimizer steps (None = once through the problems)
# Batch
device_batch_size = 8  # answers per rank and forward/backward pass
# Optimizers
matrix_lr = 0.02  # Muon, for the matrices in the blocks
embedding_lr = 0.2  # AdamW, for the embedding; scales with (width / 768)^-0.5
unembedding_lr = 0.004  # AdamW, for the head; scales likewise
init_lr_frac = 0.05  # share of these rates to begin with; they fall to 0 along a line
weight_decay = 0.0  # Muon's cautious weight decay; falls to 0 along a cosine
skip_spikes = False  # no update by a step whose loss or gradient norm is 6 standard deviations too high
# Evaluation, on held-out problems
eval_every = 60  # steps between evaluations (-1 = only at the start and at the end)
eval_examples = 400  # problems of an evaluation
eval_samples = 8  # answers to each: pass@k for k = 1, 2, 4, ... up to this many
max_dead_steps = 5  # give up after so many steps in a row in which no prompt taught anything
# Checkpoints
save_every = 60  # steps between checkpoints (-1 = only at the end)
save_minutes = -1.0  # minutes between checkpoints (-1 = by steps alone); both may be given
save_best = False  # save after each evaluation with the best pass@1 so far, and never delete that one
keep_last = -1  # checkpoints to keep, older ones are deleted (-1 = all)
resume = False  # continue from the newest whole checkpoint of this tag
resume_from_step: int | None = None  # continue from this step
fresh = False  # start over although this tag has checkpoints; they are kept under another name
settings = configure(__name__)

import math
from dataclasses import dataclass
from typing import Any

import torch

from nanochat import train
from nanochat.checkpoint_manager import (
    checkpoint_path,
    find_checkpoint,
    find_resume,
    is_best,
    mark_best,
    open_model,
    restore_model,
    restore_optimizers,
    save_checkpoint,
)
from nanochat.common import Stopped, UserError, print0, run_main
from nanochat.compute import Compute, compute_cleanup, compute_init, peak_memory_bytes
from nanochat.conversation import decode_parts, fingerprint, parts_text, render_for_completion
from nanochat.engine import Engine, Sampling
from nanochat.gpt import GPT
from nanochat.guard import SaveClock, SignalWatch, Spikes
from nanochat.record import open_record
from nanochat.task_eval import pass_at_k
from nanochat.tokenizer import Tokenizer
from tasks.common import Task
from tasks.gsm8k import extract_answer
from tasks.mixtures import rl_task


def main() -> None:
    compute = compute_init(device_type, dtype, seed)
    start = find_checkpoint(source, model_tag, step)
    model, tokenizer = open_model(start, compute.device, "train")
    problems, held_out = rl_task(task, "train"), rl_task(task, "dev")
    if min(examples_per_step, num_samples - 1, eval_examples, eval_samples, device_batch_size) < 1:
        raise UserError(
            f"--examples-per-step={examples_per_step} --num-samples={num_samples} --eval-examples={eval_examples} "
            f"--eval-samples={eval_samples} --device-batch-size={device_batch_size}: expected at least 1, num-samples 2"
        )
    if num_iterations is not None and num_iterations < 1:
        raise UserError(
            f"--num-iterations={num_iterations}: expected at least 1, or None for once through the problems"
        )
    print0(f"steps of {examples_per_step} prompts x {num_samples} samples; {len(problems):,} problems")

    # What a checkpoint and the run that continues it must agree on
    identity: dict[str, Any] = {
        "model_config": model.config_dict(),
        "task": task,
        "problems": fingerprint(problems),
        "seed": seed,
    }
    identity |= {"examples_per_step": examples_per_step, "num_samples": num_samples, "started_from": start.identity}
    checkpoint = find_resume("rl", start.tag, identity, resume, resume_from_step, fresh, compute)
    if checkpoint and num_iterations is None:
        num_steps = checkpoint.meta["num_steps"]
    else:
        num_steps = num_iterations or max(1, len(problems) // examples_per_step)
    print0(f"horizon: {num_steps:,} steps")
    rates = [rate * init_lr_frac for rate in (matrix_lr, embedding_lr, unembedding_lr)]
    optimizers = model.setup_optimizers(rates[0], rates[1], rates[2], weight_decay, compute.dtype)
    meter, spikes, dead_steps = train.Meter(model.estimate_flops(), num_steps, compute), Spikes(), 0
    if checkpoint:
        restore_model(model, checkpoint)
        restore_optimizers(optimizers, checkpoint)
        dead_steps = train.restore_loop(checkpoint, meter, spikes)["dead_steps"]
        if meter.steps >= num_steps:
            print0(f"this run is finished; more steps: --resume --num-iterations={2 * num_steps}")
            compute_cleanup()
            return
    first_step = meter.steps
    record = open_record("rl", start.tag, settings, **compute.about())
    plan = {"task": task, "optimizer_state_bytes": sum(optimizer.state_bytes() for optimizer in optimizers)}
    record.write("plan", first_step=first_step, num_steps=num_steps, started_from=start.identity, **plan)
    wandb_run = train.open_wandb(run, "rl", settings, checkpoint)

    def save() -> None:
        """The state after the last whole step, whatever has happened since."""
        loop = train.loop_state(num_steps, {"dead_steps": dead_steps}, meter, spikes, wandb_run)
        meta = {**identity, **loop, "settings": settings}
        path = checkpoint_path("rl", start.tag, meter.steps)
        save_checkpoint(path, model, optimizers, tokenizer, meta, compute, keep_last)

    def evaluate(done: int, watch: SignalWatch) -> None:
        pass_at = evaluate_pass_at_k(model, tokenizer, held_out, compute, watch)
        record.write("eval", step=done, problems=min(eval_examples, len(held_out)), pass_at=pass_at)
        shown = (f"pass@{k} {score['value']:.1%} +- {score['stderr']:.1%}" for k, score in pass_at.items())
        print0(f"step {done:,}: {', '.join(shown)}")
        loss = -pass_at["1"]["value"]
        if save_best and done and is_best("rl", start.tag, loss):
            save()
            mark_best("rl", start.tag, done, loss, compute)

    clock = SaveClock(save_every, save_minutes, compute)
    with (
        SignalWatch(compute) as watch,
        train.whole_steps(f"rl-{start.tag}", meter, model, optimizers, record, compute, save),
        train.progress_bar(num_steps, first_step) as bar,
    ):
        if first_step == 0:
            evaluate(0, watch)
        for done in range(first_step + 1, num_steps + 1):
            meter.start()
            numbers = [(i + (done - 1) * examples_per_step) % len(problems) for i in range(examples_per_step)]
            draws = seed * 2**24 + done
            rollouts = roll_out(model, tokenizer, problems, numbers, compute, num_samples, draws, watch)
            vitals = measure(rollouts, compute)
            sums = policy_gradient(model, rollouts, compute)
            multipliers = train.Rates(lr=1 - (done - 1) / num_steps, momentum=0.95, weight_decay=1.0)
            result = train.update(optimizers, sums, multipliers, compute, watch.received, spikes, skip_spikes)
            dead_steps = 0 if vitals["groups_with_signal"] else dead_steps + 1
            logged = {**meter.tick(result), **vitals}
            record.write("step", step=done - 1, lr=round(multipliers.lr, 6), **logged)
            bar.update()
            print0(f"step {done:,}/{num_steps:,}: " + describe(logged))
            if wandb_run:
                wandb_run.log({"step": done - 1, "lr": multipliers.lr, **logged})
            if result.stop_signal:
                raise Stopped(result.stop_signal)
            if clock.due(done) or done == num_steps:
                save()
            if dead_steps >= max_dead_steps:
                raise UserError(diagnose(vitals, dead_steps), everywhere=True)
            if train.every(eval_every, done) or done == num_steps:
                evaluate(done, watch)

    questions = [str(held_out[i]["messages"][0]["content"]) for i in range(min(3, len(held_out)))]
    train.show_chats(questions, model, tokenizer, compute, record, num_steps)
    record.write("end", **meter.summary(), **spikes.summary(), peak_memory_bytes=peak_memory_bytes(compute.device))
    print0(f"{meter.train_seconds:,.0f} s of training, {peak_memory_bytes(compute.device) / 1e9:.1f} GB at most")
    if wandb_run:
        wandb_run.finish()
    record.close()
    compute_cleanup()


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


def roll_out(
    model: GPT,
    tokenizer: Tokenizer,
    problems: Task,
    numbers: list[int],
    compute: Compute,
    samples: int,
    seed: int,
    watch: SignalWatch,
) -> list[list[Rollout]]:
    """This rank's share of the prompts, `samples` answers to each from one decode batch, with rewards: a group each.
    Raises Stopped, on every rank, when a signal came to any meanwhile: the step is not begun, and tried again by the
    run that resumes.
    """
    low, high = (len(numbers) * (compute.rank + i) // compute.world_size for i in (0, 1))
    conversations = [problems[number] for number in numbers[low:high]]
    prompts = [render_for_completion(conversation["messages"], tokenizer) for conversation in conversations]
    engine = Engine(model, tokenizer, compute.dtype)
    sampling = Sampling(max_new_tokens, seed=seed)
    firsts = range(low * samples, high * samples, samples)  # answers do not depend on who gives them
    sequences, masks = [], []
    if prompts:
        sequences, masks = engine.generate_batch(prompts, sampling, samples, first=firsts, until=lambda: watch.received)
    watch.poll()
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


def policy_gradient(model: GPT, groups: list[list[Rollout]], compute: Compute) -> train.Sums[dict[str, int]]:
    """Gradients of -sum(advantage * log p) over the sampled tokens of the groups with signal, left on the parameters.
    Returns that sum and the number of those tokens, on this rank, for train.update to divide by.
    """
    sums: train.Sums[dict[str, int]] = train.Sums(torch.zeros(2, dtype=torch.float64), {}, [])
    rollouts = [rollout for group in groups for rollout in group if rollout.advantage]
    rollouts.sort(key=lambda rollout: len(rollout.prompt) + len(rollout.tokens))  # little padding
    for start in range(0, len(rollouts), device_batch_size):
        chunk = rollouts[start : start + device_batch_size]
        T = max(len(rollout.prompt) + len(rollout.tokens) for rollout in chunk) - 1
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
        sums.totals += torch.stack([loss.detach(), (targets >= 0).sum()]).cpu()
        sums.batches.append((inputs, targets))
    sums.totals = sums.totals.to(compute.device, torch.float32 if compute.device.type == "mps" else torch.float64)
    return sums


# -----------------------------------------------------------------------------
# Vital signs


def measure(groups: list[list[Rollout]], compute: Compute) -> dict[str, float]:
    """What tells a living run from a dead one, over all ranks."""
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
    mean = total / n
    return {
        "reward": round(mean, 6),
        "reward_std": round(math.sqrt(max(0.0, squares / n - mean**2)), 6),
        "ended": round(ended / n, 6),
        "parsed": round(parsed / n, 6),
        "groups_with_signal": int(alive),
        "groups": int(groups_in_all),
    }


def describe(logged: dict[str, float]) -> str:
    return (
        f"reward {logged['reward']:.3f} +- {logged['reward_std']:.3f}, ended {logged['ended']:.0%}, parsed "
        f"{logged['parsed']:.0%}, groups with signal {logged['groups_with_signal']}/{logged['groups']}, "
        f"{logged['tokens']:,} tokens, {logged['seconds']:.1f} s"
    )


def diagnose(vitals: dict[str, float], dead_steps: int) -> str:
    """Why nothing is learned, and what to do about it."""
    ended, parsed, reward = vitals["ended"], vitals["parsed"], vitals["reward"]
    if ended < 0.05:
        why = f"{ended:.0%} of the answers ended in {max_new_tokens} tokens: raise --max-new-tokens or run chat_sft"
    elif parsed < 0.05:
        why = f"{parsed:.0%} of the answers have a `#### number`: the model does not know the form; run chat_sft"
    elif reward > 0.95:
        why = f"reward {reward:.2f}: there is nothing left to learn; take harder problems"
    else:
        why = f"reward {reward:.2f}: too hard; raise --num-samples, take easier problems or run chat_sft for longer"
    return f"no prompt taught anything for {dead_steps} steps; {why}"


def evaluate_pass_at_k(
    model: GPT, tokenizer: Tokenizer, problems: Task, compute: Compute, watch: SignalWatch
) -> dict[str, dict[str, float]]:
    """pass@k and its standard error on the first eval_examples problems, the same on every rank."""
    numbers = list(range(min(eval_examples, len(problems))))
    groups = roll_out(model, tokenizer, problems, numbers, compute, eval_samples, seed, watch)
    right = torch.zeros(len(numbers), dtype=torch.float64)  # of each problem; this rank has some of them
    first = len(numbers) * compute.rank // compute.world_size
    for i, group in enumerate(groups, first):
        right[i] = sum(rollout.reward for rollout in group)
    pass_at = pass_at_k([int(count) for count in compute.sum(right).tolist()], eval_samples)
    return {str(k): {"value": round(value, 6), "stderr": round(error, 6)} for k, (value, error) in pass_at.items()}


if __name__ == "__main__":
    run_main(main)
