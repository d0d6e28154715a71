"""Pure numbers, no torch: how many steps, how they are split over ranks, and how rates move along the run.

Schedules are functions of (step, num_steps) with 0 <= step < num_steps: a resumed run needs nothing but its step.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchPlan:
    """One optimizer step: `grad_accum_steps` micro-batches of device_batch_size rows on each of world_size ranks."""

    device_batch_size: int
    sequence_len: int
    world_size: int
    grad_accum_steps: int

    @property
    def rows(self) -> int:
        """Rows of one step over all ranks."""
        return self.device_batch_size * self.world_size * self.grad_accum_steps

    @property
    def tokens(self) -> int:
        """Tokens of one step over all ranks."""
        return self.rows * self.sequence_len

    def __str__(self) -> str:
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        micro = f"{self.grad_accum_steps} micro-batch{'es' if self.grad_accum_steps > 1 else ''}"
        rows = f"{self.device_batch_size} rows x {self.sequence_len} tokens"
        return f"{self.tokens:,} tokens = {micro} x {rows} x {ranks}"


def plan_batches(total_batch_size: int, device_batch_size: int, sequence_len: int, world_size: int) -> BatchPlan:
    """The whole number of micro-batches nearest to total_batch_size tokens, at least one. It may differ from what was
    asked (six GPUs rarely divide a power of two): print the plan, never assert divisibility.
    """
    micro_batch = device_batch_size * sequence_len * world_size
    return BatchPlan(device_batch_size, sequence_len, world_size, max(1, round(total_batch_size / micro_batch)))


def plan_horizon(
    tokens_per_step: int,
    flops_per_token: int,
    params: tuple[int, str],
    num_iterations: int | None = None,
    target_flops: float | None = None,
    target_param_data_ratio: float | None = None,
) -> tuple[int, str]:
    """Steps, and the arithmetic that gave them, from at most one of: steps, training FLOPs, tokens per parameter (20,
    Chinchilla's, arXiv 2203.15556, where none is set). `params` are those of model.ratio_params().
    """
    if num_iterations is not None:
        return num_iterations, f"{num_iterations:,} steps as asked"
    if target_flops is not None:
        steps = target_flops / (flops_per_token * tokens_per_step)
        formula = f"{target_flops:.3g} FLOPs / ({flops_per_token:,} per token x {tokens_per_step:,} tokens per step)"
    else:
        ratio, (count, which) = target_param_data_ratio or 20, params
        steps = ratio * count / tokens_per_step
        formula = f"{ratio:g} tokens x {count:,} {which} / {tokens_per_step:,} tokens per step"
    return max(1, round(steps)), formula


def learning_rate(step: int, num_steps: int, warmup: float, warmdown: float, final: float, schedule: str) -> float:
    """Learning rate multiplier: up to 1 over a share `warmup` of the run, then down to `final`. Never 0 at the first
    step, never negative.

        trapezoid        flat, then a line over the last share `warmdown`
        wsd              the same with 1 - sqrt in place of the line (arXiv 2405.18392)
        linear, cosine   a line, or half a cosine, over all that follows the warm-up (cosine: nanoGPT)
        constant         flat to the end
        range            none of these: from e^-2.5 to e^2.5, exponentially (the range test of arXiv 1506.01186)
    """
    if schedule == "range":
        return math.exp(5 * step / max(1, num_steps - 1) - 2.5)
    shares = {"trapezoid": warmdown, "wsd": warmdown, "constant": 0.0}
    warmup_steps, fall_steps = warmup * num_steps, shares.get(schedule, 1 - warmup) * num_steps
    up = min(1.0, (step + 1) / warmup_steps) if warmup_steps >= 1 else 1.0
    left = min(1.0, max(0, num_steps - step) / fall_steps) if fall_steps >= 1 else 1.0
    bent = {"wsd": 1 - math.sqrt(1 - left), "cosine": 0.5 * (1 - math.cos(math.pi * left))}
    left = bent.get(schedule, left)
    return up * (left + (1 - left) * final)


def muon_momentum(step: int, num_steps: int, low: float = 0.85, high: float = 0.95) -> float:
    """Muon's momentum: from low to high over the first 300 steps (nanochat), or a fifth of a run below 1,500."""
    return low + (high - low) * min(1.0, step / max(1.0, min(300, num_steps / 5)))


def cosine_to_zero(step: int, num_steps: int) -> float:
    """Weight decay multiplier: half a cosine from 1 to 0 over the run, so that the last steps only refine."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, step / num_steps)))
