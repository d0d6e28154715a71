"""Time the engine: prompts read and tokens decoded per second, time to first token, memory, share of what is possible.

    python -m dev.bench_infer --depth=4 --vocab-size=4096
    python -m dev.bench_infer --peer=../nanochat            # beside the engine of a checkout of karpathy/nanochat
    python -m dev.bench_infer --rollouts --old=../before    # RL's sampling, beside an older checkout of this project

Each arm is a process of its own with the same random weights; they take turns, A B B A. A batch is that many greedy
samples of one prompt. The other arm's greedy tokens must equal ours first (in bfloat16, where roundings differ, how
many do is said). The limit: bytes that a step must move, every weight once and all keys and values of the tokens
before, over the rate at which torch reads as many bytes here. Medians, and the best; the last line is one JSON object.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

from nanochat.common import UserError, run_main
from nanochat.configurator import Natural, Positive, Seed, Several, configure

# Model
depth: Positive = 6  # layers; the width follows
vocab_size: Several = 4096  # tokens
context: Several = 1024  # tokens that the model takes
dtype: Literal["float32", "bfloat16"] = "float32"  # what it computes in
device_type: Literal["cpu", "cuda"] = "cpu"  # of all arms (cuda: not yet run)
seed: Seed = 42  # of weights and prompts
# Work
batches = "1 8 32"  # how many continuations at once, with spaces or commas between; a measurement for each
prompt_tokens: Positive = 256  # of each prompt
max_tokens: Several = 128  # of each continuation
rollouts = False  # instead: 16 samples of 16 prompts each, most of which end early
# Arms
peer: str | None = None  # folder of a checkout of karpathy/nanochat
old: str | None = None  # folder of an older checkout of this project
compile = True  # the decoding step of our arm, for each of the batches; on a CPU alone
# Measuring
repeats: Positive = 2  # rounds of A B B A
threads: Natural = 0  # of each arm (0 = as torch chooses)
settings = configure(__name__)

ROOT = Path(__file__).parents[1]
SAMPLES, STOPS = 16, 64  # of each of as many prompts; how many tokens end a rollout: 1 in 64 of 4,096


class Arm:
    """A process that runs infer_arm.py on the code of `root`."""

    def __init__(self, name: str, root: str | Path, shape: dict[str, Any]):
        if not (Path(root) / "nanochat" / "engine.py").is_file():
            raise UserError(f"--{name}={root} holds no nanochat/engine.py; give the folder of a checkout")
        environment = os.environ | {"PYTHONPATH": str(Path(root).resolve())}
        command = [sys.executable, str(ROOT / "dev" / "infer_arm.py"), name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.name, self.answers, self.peak_mb = name, [], 0.0
        self.process = subprocess.Popen(command, env=environment, **pipes)
        self.ready = self.ask(**shape)["ready"]

    def ask(self, **question: Any) -> dict[str, Any]:
        print(json.dumps(question), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"the {self.name} arm ended; what it said stands above")
        answer = json.loads(line)
        self.peak_mb = max(self.peak_mb, answer.get("peak_mb", 0))
        return answer


def main() -> None:
    import torch

    from nanochat.gpt import config_from_depth

    config = config_from_depth(depth, vocab_size, context)
    shape = {name: settings[name] for name in ("depth", "vocab_size", "context", "dtype", "device_type", "seed")}
    shape |= {"compile": compile and device_type == "cpu"}
    shape |= {"n_head": config.n_head, "n_embd": config.n_embd, "threads": threads or torch.get_num_threads()}
    shape |= {"rows": [int(rows) for rows in batches.replace(",", " ").split()]}
    torch.set_num_threads(shape["threads"])
    arms = [Arm(name, root, shape) for name, root in (("ours", ROOT), ("peer", peer), ("old", old)) if root]
    result = {name: shape[name] for name in ("depth", "vocab_size", "dtype", "device_type", "threads", "compile")}
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(vocab_size, (SAMPLES, prompt_tokens), generator=generator).tolist()
    result |= measure_rollouts(arms, prompts) if rollouts else measure_speeds(arms, prompts[0], config)
    result |= {f"{arm.name}_peak_mb": round(arm.peak_mb) for arm in arms}
    print(json.dumps(result | {f"{arm.name}_ready_s": round(arm.ready, 1) for arm in arms}))


def alternate(arms: list[Arm], **question: Any) -> dict[str, list[dict[str, Any]]]:
    """The answers of each arm, which take turns: A B B A, after a first time that isn't counted."""
    answers: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
    for number, arm in enumerate([*arms, *(arms + arms[::-1]) * repeats]):
        answer = arm.ask(**question)
        if number >= len(arms):
            answers[arm.name].append(answer)
    return answers


# -----------------------------------------------------------------------------
# Speeds


def measure_speeds(arms: list[Arm], prompt: list[int], config: Any) -> dict[str, float]:
    """The gate, then each batch; a table, and what the last line says of it."""
    result = check_equal(arms, prompt)
    names = ("first ms", "read/s", "decode/s", "best", "per CPU s", "of reads", "of copies")
    print(f"{'rows':>4} {'arm':5}" + "".join(f"{name:>10}" for name in names))
    for rows in map(int, batches.replace(",", " ").split()):
        answers = alternate(arms, what="speed", rows=rows, prompt=prompt, tokens=max_tokens)
        moved = step_bytes(config, rows)
        reads, copies = memory_rates(moved)
        medians = {}
        for name, measured in answers.items():
            rates = [answer["decode"] for answer in measured]
            first, decode, cpu = (
                statistics.median(answer[key] for answer in measured) for key in ("first", "decode", "cpu")
            )
            shares = [decode / rows * moved / rate for rate in (reads, copies)]
            medians[name] = first, decode, cpu
            print(
                f"{rows:4} {name:5}{first * 1e3:10.1f}{prompt_tokens / first:10,.0f}{decode:10,.0f}{max(rates):10,.0f}"
                f"{cpu:10,.0f}{shares[0]:10.0%}{shares[1]:10.0%}"
            )
            prefix = "" if name == "ours" else f"{name}_"
            result |= {f"{prefix}decode_b{rows}": round(decode), f"{prefix}first_ms_b{rows}": round(first * 1e3, 1)}
            if rows == 1:
                result |= {f"{prefix}bandwidth_share_b1": round(shares[0], 3)}
                result |= {
                    f"{prefix}copy_share_b1": round(shares[1], 3),
                    f"{prefix}prefill": round(prompt_tokens / first),
                }
            if name != "ours":
                prefix = "" if name == "peer" else f"{name}_"
                result |= {f"{prefix}decode_ratio_b{rows}": round(medians["ours"][1] / decode, 2)}
                result |= {f"{prefix}cpu_ratio_b{rows}": round(medians["ours"][2] / cpu, 2)}
                result |= {f"{prefix}prefill_ratio": round(first / medians["ours"][0], 2)} if rows == 1 else {}
    return result


def check_equal(arms: list[Arm], prompt: list[int], tokens: int = 64) -> dict[str, int]:
    """How many of the first greedy tokens the arms agree on. UserError in float32 unless they all do."""
    said = [arm.ask(what="gate", prompt=prompt, tokens=tokens)["tokens"] for arm in arms]
    equal = next((place for place, column in enumerate(zip(*said, strict=True)) if len({*column}) > 1), tokens)
    print(f"{' and '.join(arm.name for arm in arms)}: the first {equal} of {tokens} greedy tokens are equal, {dtype}")
    if equal < tokens and dtype == "float32":
        raise UserError("the arms disagree: they don't compute the same model, so their speeds mean nothing")
    return {"equal_tokens": equal}


def step_bytes(config: Any, rows: int) -> float:
    """What a decoding step must move, halfway through: all weights of matmuls once, and each row's keys and values."""
    C, L = config.n_embd, config.n_layer
    weights = L * (2 * C * C + 2 * C * config.n_kv_head * config.head_dim + 8 * C * C) + C * config.vocab_size
    keys = rows * L * 2 * config.n_kv_head * config.head_dim * (prompt_tokens + max_tokens / 2)
    return (weights + keys) * (4 if dtype == "float32" else 2)


def memory_rates(size: float) -> tuple[float, float]:
    """Bytes per second at which torch sums a buffer of this size, and copies one half of it to the other (read or
    written: each byte counts once): medians. What fits a cache is read as fast as that cache gives it, as weights are.
    """
    import torch

    from nanochat.compute import synchronize

    device = torch.device(device_type)
    buffer = torch.ones(2, int(size) // 8, device=device)
    rates = []
    for touch in (buffer.sum, lambda: buffer[0].copy_(buffer[1])):
        times = []
        for _ in range(20):
            synchronize(device)
            start = time.perf_counter()
            touch()
            synchronize(device)
            times.append(time.perf_counter() - start)
        rates.append(size / statistics.median(times))
    return rates[0], rates[1]


# -----------------------------------------------------------------------------
# Rollouts


def measure_rollouts(arms: list[Arm], prompts: list[list[int]]) -> dict[str, float]:
    """Sampled tokens per CPU second, and on how many of the sequences the arms agree."""
    question = {"prompts": prompts, "samples": SAMPLES, "tokens": max_tokens, "stops": STOPS}
    answers = alternate(arms, what="rollouts", **question)
    result, digests = {}, [measured[0]["digests"] for measured in answers.values()]
    for name, measured in answers.items():
        rate = statistics.median(answer["said"] / answer["seconds"] for answer in measured)
        print(
            f"{name:5} {measured[0]['said']:,} tokens in {len(prompts) * SAMPLES} rollouts, {rate:,.0f} per CPU second"
        )
        result |= {f"{name}_rollout": round(rate)}
    if len(arms) > 1:
        equal = sum(len({*column}) == 1 for column in zip(*digests, strict=True))
        result |= {"rollouts_equal": equal, "rollouts": len(digests[0])}
        result |= {"rollout_ratio": round(result["ours_rollout"] / result["old_rollout"], 2)}
        print(f"{equal} of {len(digests[0])} rollouts are the same in both")
    return result


if __name__ == "__main__":
    run_main(main)
