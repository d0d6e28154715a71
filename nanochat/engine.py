"""
Inference: a KV cache, sampling, and batched generation. The same engine serves CLI, web, RL rollouts and evaluation.

Weights are cast once, when the engine is made. The cache has a row (slot) per sequence and a position per slot, so rows
of different lengths decode together: attention masks what lies beyond a row's own position. Positions live on the
device and on the host; a step reads nothing back but its sampled tokens.

Equals the full forward pass token for token in fp32 (tests/test_engine.py, against tests/reference/generate.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig


@dataclass
class LayerSlots:
    """
    One layer's keys and values (slots, G, capacity, D), and what a block needs to append to them and look at them.
    """

    cache: "KVCache"
    window: int
    keys: Tensor
    values: Tensor

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Store k, v (B, T, G, D) at the positions of the current step. Returns views of all keys and values up to the
        longest row (B, G, S, D) and the mask (B, 1, T, S): causal, inside the window, a row's own tokens only.
        """
        positions, longest = self.cache.step_positions, self.cache.step_longest  # (B, T)
        rows = torch.arange(k.size(0), device=k.device)[:, None]
        self.keys[rows, :, positions] = k
        self.values[rows, :, positions] = v
        ahead = positions[:, :, None] - torch.arange(longest, device=k.device)  # (B, T, S)
        mask = (ahead >= 0) & (ahead < self.window)
        return self.keys[:, :, :longest], self.values[:, :, :longest], mask[:, None]


class KVCache:
    """
    Keys and values of `slots` sequences, up to `capacity` tokens each. Raises UserError when a sequence would outgrow
    it: a cache that overflows silently goes on with a frozen context.
    """

    def __init__(self, config: GPTConfig, slots: int, capacity: int, device: torch.device, dtype: torch.dtype):
        self.config, self.capacity, self.device, self.dtype = config, capacity, device, dtype
        self.lengths = [0] * slots  # tokens stored per slot
        shape = (slots, config.n_kv_head, capacity, config.head_dim)
        self.layers = [
            LayerSlots(self, window, *(torch.zeros(shape, device=device, dtype=dtype) for _ in range(2)))
            for window in config.windows()
        ]

    def begin_step(self, tokens: int) -> Tensor:
        """Make room for `tokens` more in every slot; returns their positions (slots, tokens)."""
        self.step_longest = max(self.lengths) + tokens
        if self.step_longest > self.capacity:
            raise UserError(
                f"the context is full: {self.step_longest} tokens asked, {self.capacity} fit; begin anew or shorten it"
            )
        starts = torch.tensor(self.lengths, device=self.device)
        self.step_positions = starts[:, None] + torch.arange(tokens, device=self.device)
        self.lengths = [length + tokens for length in self.lengths]
        return self.step_positions

    def expand(self, slots: int, capacity: int) -> "KVCache":
        """A cache of `slots` copies of this one's single sequence: prefill once, sample many."""
        assert len(self.lengths) == 1
        grown = KVCache(self.config, slots, capacity, self.device, self.dtype)
        length = self.lengths[0]
        for mine, theirs in zip(self.layers, grown.layers, strict=True):
            theirs.keys[:, :, :length] = mine.keys[:, :, :length]
            theirs.values[:, :, :length] = mine.values[:, :, :length]
        grown.lengths = [length] * slots
        return grown

    def keep(self, slots: Sequence[int]) -> None:
        """Drop all other slots, so that finished rows cost nothing."""
        index = torch.tensor(slots, device=self.device)
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[index], layer.values[index]
        self.lengths = [self.lengths[slot] for slot in slots]


# -----------------------------------------------------------------------------
# Sampling


def sample(
    logits: Tensor,
    generator: torch.Generator | None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """
    One token per row of logits (B, V), as (B,). Temperature 0 takes the most likely one. top_k keeps the k most likely,
    then top_p the fewest whose probabilities reach p; 0 or None switches either off. Each row draws its own random
    number.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k and top_k < logits.size(-1):
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(
            dim=-1
        )  # probability of everything more likely
        logits = logits.masked_fill((before >= top_p).gather(-1, order.argsort(dim=-1)), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(-1)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises UserError for settings that mean nothing."""
    if temperature < 0 or (top_k is not None and top_k < 0) or (top_p is not None and not 0 <= top_p <= 1):
        raise UserError(
            f"temperature={temperature} top_k={top_k} top_p={top_p}: expected at least 0, at least 0, and 0 to 1"
        )


# -----------------------------------------------------------------------------


@dataclass
class Engine:
    """
    Generates with a frozen copy of `model` in `dtype` (default: the model's own fp32). Later changes of the model are
    not seen. stop_tokens end a row and are yielded as its last token.
    """

    model: GPT
    dtype: torch.dtype = torch.float32
    stop_tokens: frozenset[int] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        self.model = self.model.inference_copy(self.dtype)

    @torch.inference_mode()
    def generate(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 42,
    ) -> Iterator[list[int | None]]:
        """
        Yield one token per sample and step, None for samples that have ended. The prompt is read once whatever
        num_samples is. Generates until max_tokens, the end of the context, or until every sample has met a stop token.
        Same seed, same tokens.
        """
        room = self.model.config.sequence_len - len(tokens)
        if not tokens or room < 1:
            limit = self.model.config.sequence_len
            raise UserError(f"the prompt has {len(tokens)} tokens; this model takes 1 to {limit - 1}")
        steps = room if max_tokens is None else min(room, max_tokens)
        generator = torch.Generator(device=self.model.device).manual_seed(seed)
        prompt = KVCache(self.model.config, 1, len(tokens), self.model.device, self.dtype)
        logits = self.forward(torch.tensor([list(tokens)], device=self.model.device), prompt)
        cache = prompt.expand(num_samples, len(tokens) + steps)
        logits = logits.expand(num_samples, -1)
        running = list(range(num_samples))  # which samples the cache's slots hold
        for step in range(steps):
            new = sample(logits, generator, temperature, top_k, top_p)
            column: list[int | None] = [None] * num_samples
            for slot, token in zip(running, new.tolist(), strict=True):
                column[slot] = token
            yield column
            alive = [i for i, slot in enumerate(running) if column[slot] not in self.stop_tokens]
            if not alive or step == steps - 1:
                return
            if len(alive) < len(running):
                cache.keep(alive)
                running, new = [running[i] for i in alive], new[alive]
            logits = self.forward(new[:, None], cache)

    def forward(self, idx: Tensor, cache: KVCache) -> Tensor:
        """
        Append idx (B, T) to the cache's slots; logits (B, V) fp32 of what follows the last token. Chunks of any size
        are equal.
        """
        positions = cache.begin_step(idx.size(1))
        hidden = self.model.hidden(idx, self.dtype, positions, list(cache.layers))
        return self.model.logits(hidden[:, -1])

    def generate_batch(self, tokens: Sequence[int], num_samples: int = 1, **options: object) -> list[list[int]]:
        """All samples as lists of tokens, stop token included; options as for generate()."""
        results: list[list[int]] = [[] for _ in range(num_samples)]
        for column in self.generate(tokens, num_samples, **options):  # type: ignore[arg-type]
            for result, token in zip(results, column, strict=True):
                if token is not None:
                    result.append(token)
        return results
