"""Memory of a training step on a CPU, counted by the allocator itself: torch's profiler reports every allocation, those
of compiled code too.

    python -m tests.step_memory '{"n_layer": 2, "n_embd": 256, "n_head": 4, "sequence_len": 256}' 4 bfloat16 eager
    python -m tests.step_memory '{"n_layer": 2, "n_embd": 256, "n_head": 4, "arch": "gpt2"}' 1 float32 eager+adamw
    torchrun --nproc_per_node=3 -m tests.step_memory '{"n_layer": 4}' 4 bfloat16 compiled+shard+recompute

Last line: weights and optimizer state, and the most that forward, backward and update held beside them, in bytes, on
rank 0.
"""

import json
import sys
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from nanochat.common import print0
from nanochat.compute import compute_cleanup, compute_init
from nanochat.model import build_model, load_config
from nanochat.sharding import held_bytes, placement


def most_held(work: Callable[[], None]) -> tuple[int, int]:
    """(the most bytes allocated at once, bytes still allocated at the end) of some work."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most, held


def main(shape: str, rows: str, dtype: str, mode: str) -> None:
    compute = compute_init("cpu", dtype)
    place = placement(compute, "shard" in mode, offload=False)
    model = build_model(load_config(json.loads(shape)), compute.device, 0, place)
    model.recompute = "recompute" in mode
    if "compiled" in mode:
        model.compile_parts()
    optimizers = model.setup_adamw() if "adamw" in mode else model.setup_optimizers(dtype=compute.dtype)
    tokens = torch.randint(model.config.vocab_size, (int(rows), model.config.sequence_len + 1))

    def gradients() -> None:
        for _ in range(2):
            model(tokens[:, :-1], tokens[:, 1:], loss_reduction="sum", dtype=compute.dtype).backward()

    def update() -> None:
        for optimizer in optimizers:
            optimizer.reduce_gradients(tokens.numel())
        for optimizer in optimizers:
            optimizer.step()

    gradients()  # compiles, and fills caches
    update()
    lasting = held_bytes(model) + sum(optimizer.state_bytes() for optimizer in optimizers)
    gradients_most, left = most_held(gradients)
    update_most, _ = most_held(update)
    print0(json.dumps({"lasting": lasting, "gradients": gradients_most, "update": left + update_most}))
    compute_cleanup()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
