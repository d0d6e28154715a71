"""One arm of dev/bench_infer.py: a process of its own that loads one engine and answers requests, JSON by line.

`python infer_arm.py ours|old|peer`, with the root of the code to time in PYTHONPATH: this checkout for ours, an older
one of this project for old, a checkout of karpathy/nanochat for peer. All make the same weights from a seed.
"""

import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

Shape = dict[str, Any]


def main(arm: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the code under test prints
    shape = json.loads(sys.stdin.readline())
    torch.set_num_threads(shape["threads"])
    start = time.perf_counter()
    engine = {"ours": Ours, "old": Old, "peer": Peer}[arm](shape)
    print(json.dumps({"ready": time.perf_counter() - start}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        answer = {"speed": speed, "gate": gate, "rollouts": rollouts}[asked.pop("what")](engine, **asked)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB on Linux
        if torch.cuda.is_initialized():
            peak = torch.cuda.max_memory_allocated() / 2**20
        print(json.dumps(answer | {"peak_mb": peak}), file=answers, flush=True)


# -----------------------------------------------------------------------------
# What is asked


def speed(engine: Any, rows: int, prompt: list[int], tokens: int) -> dict[str, float]:
    """Seconds until each of `rows` samples of a prompt has its first token, and tokens per second from then on, also
    per CPU second (which other programs disturb less, and says as much where there is one thread).
    """
    said, first, early, used = 0, 0.0, 0, 0.0
    start = time.perf_counter()
    for new in engine.steps(rows, prompt, tokens):
        said += len(new)
        if said >= rows and not first:
            first, early, used = time.perf_counter() - start, said, time.process_time()
    seconds, used = time.perf_counter() - start - first, time.process_time() - used
    assert said == rows * tokens
    return {"first": first, "decode": (said - early) / seconds, "cpu": (said - early) / used}


def gate(engine: Any, prompt: list[int], tokens: int) -> dict[str, list[int]]:
    """What one greedy continuation says, the peer made equal to our model as far as it can be."""
    with engine.same_arithmetic():
        return {"tokens": [token for new in engine.steps(1, prompt, tokens) for token in new]}


def rollouts(engine: Any, prompts: list[list[int]], samples: int, tokens: int, stops: int) -> dict[str, Any]:
    """Sampled continuations that end early, as RL draws them: how many tokens, CPU seconds, and a digest of each."""
    start = time.process_time()
    sequences = engine.sample(prompts, samples, tokens, stops)
    seconds = time.process_time() - start
    digests = [hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16] for tokens in sequences]
    return {"said": sum(map(len, sequences)), "seconds": seconds, "digests": digests}


# -----------------------------------------------------------------------------
# Engines


def draw_weights(named: Iterator[tuple[str, torch.Tensor]], seed: int) -> None:
    """Every matrix from N(0, 1 / columns), none 0 as at the start of a training: each layer says something, and the
    likeliest token leads by far more than rounding.
    """
    for name, weight in sorted(named):
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        generator = torch.Generator().manual_seed(seed + number)
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * weight.size(-1) ** -0.5)


class Ours:
    def __init__(self, shape: Shape):
        from nanochat.compute import keep_freed_memory
        from nanochat.engine import Engine
        from nanochat.gpt import config_from_depth
        from nanochat.model import build_model

        keep_freed_memory()  # as compute_init() does
        config = config_from_depth(shape["depth"], shape["vocab_size"], shape["context"])
        model = build_model(config, torch.device(shape["device_type"]))
        draw_weights(model.named_parameters(), shape["seed"])
        self.engine = Engine(model, dtype=getattr(torch, shape["dtype"]))
        self.prepare(shape)

    def prepare(self, shape: Shape) -> None:
        if shape["compile"]:
            from nanochat.decode_step import compile_decoding

            compile_decoding(self.engine, shape["rows"], wait=True)
            assert self.engine.compiled.keys() == set(shape["rows"]), "no figure says compiled that is not"

    def steps(self, rows: int, prompt: list[int], tokens: int) -> Iterator[list[int]]:
        from nanochat.engine import Request, Sampling

        batch = self.engine.batch(rows, len(prompt) + tokens)
        for stream in range(rows):
            batch.add(Request(prompt, Sampling(tokens, 0), stream))
        while len(batch):
            yield [said.token for said in batch.step()]

    def sample(self, prompts: list[list[int]], samples: int, tokens: int, stops: int) -> list[list[int]]:
        from nanochat.engine import Sampling

        self.engine.stop_tokens = frozenset(range(stops))
        return self.engine.generate_batch(prompts, Sampling(tokens), samples)[0]

    def same_arithmetic(self) -> Any:
        import contextlib

        return contextlib.nullcontext()


class Old(Ours):
    """The engine before there were batches that requests join and leave."""

    def prepare(self, shape: Shape) -> None:
        pass

    def steps(self, rows: int, prompt: list[int], tokens: int) -> Iterator[list[int]]:
        from nanochat.engine import Sampling

        for said in self.engine.decode([prompt], Sampling(tokens, 0), rows):
            yield [token for _, token, _ in said]


class Peer:
    """nanochat 92d63d4. Its model has parts that ours has not; those that are weights are set so that they add nothing,
    and are computed all the same. Its sharper attention is undone for same_arithmetic() only.
    """

    def __init__(self, shape: Shape):
        os.environ["NANOCHAT_DTYPE"] = shape["dtype"]
        from nanochat.engine import Engine
        from nanochat.gpt import GPT, GPTConfig

        heads = shape["n_head"]
        sizes = {"n_layer": shape["depth"], "n_head": heads, "n_kv_head": heads, "n_embd": shape["n_embd"]}
        model = GPT(GPTConfig(shape["context"], shape["vocab_size"], **sizes, window_pattern="L"))
        model.to(shape["device_type"]).init_weights()
        for extra in (model.x0_lambdas, model.smear_lambda, model.backout_lambda, *model.value_embeds.parameters()):
            extra.data.zero_()
        model.resid_lambdas.data.fill_(1)
        ours = ("transformer.wte.", "lm_head.", "attn.c_", "mlp.c_")
        named = [(name, weight) for name, weight in model.named_parameters() if any(part in name for part in ours)]
        renamed = [(name.replace("transformer.h.", "blocks.").replace("transformer.", ""), w) for name, w in named]
        draw_weights(iter(renamed), shape["seed"])
        self.engine = Engine(model.eval(), NoTokenizer())

    def steps(self, rows: int, prompt: list[int], tokens: int) -> Iterator[list[int]]:
        for column, _ in self.engine.generate(prompt, num_samples=rows, max_tokens=tokens, temperature=0.0):
            yield column

    def same_arithmetic(self) -> Any:
        from unittest.mock import patch

        from nanochat.gpt import flash_attn

        attend: Callable[..., Any] = flash_attn.flash_attn_with_kvcache
        scaled = lambda q, *values, **named: attend(q / 1.44, *values, **named)  # noqa: E731  q and k are times 1.2
        return patch.object(flash_attn, "flash_attn_with_kvcache", scaled)


class NoTokenizer:
    """Special tokens that no model says: nothing ends a continuation and no tool is called."""

    def encode_special(self, name: str) -> int:
        return -1

    def get_bos_token_id(self) -> int:
        return -1


if __name__ == "__main__":
    main(sys.argv[1])
