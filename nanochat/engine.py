"""
Inference: a KV cache, sampling, tool use and batched generation. The same engine serves CLI, web, RL and evaluation.

Weights are cast once, when the engine is made. The cache has a row (slot) per sequence and a position per slot, so rows
of different lengths decode together: attention masks what lies beyond a row's own position. A step reads nothing back
from the device but its sampled tokens.

Promises: equals the full forward pass token for token in fp32 (tests/test_engine.py, against
tests/reference/generate.py); each sequence draws its own random numbers, so what it says does not depend on which other
sequences share its batch (but for the last bits of a matmul).
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nanochat.calculator import use_calculator
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer

Column = list[int | None]  # one entry per sequence, None for those that have ended


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

    def expand(self, copies: int, capacity: int) -> "KVCache":
        """A cache with room for `capacity` tokens and `copies` of each sequence in a row: prefill once, sample many."""
        grown = KVCache(self.config, copies * len(self.lengths), capacity, self.device, self.dtype)
        longest = max(self.lengths)
        for mine, theirs in zip(self.layers, grown.layers, strict=True):
            theirs.keys[:, :, :longest] = mine.keys[:, :, :longest].repeat_interleave(copies, dim=0)
            theirs.values[:, :, :longest] = mine.values[:, :, :longest].repeat_interleave(copies, dim=0)
        grown.lengths = [length for length in self.lengths for _ in range(copies)]
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
    draws: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """
    One token per row of logits (B, V), as (B,), by the row's own random number of draws (B,), uniform in [0, 1).
    Temperature 0 takes the most likely one. top_k keeps the k most likely, then top_p the fewest whose probabilities
    reach p; 0 or None switches either off.
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
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # probability of everything more likely
        logits = logits.masked_fill((before >= top_p).gather(-1, order.argsort(dim=-1)), -torch.inf)
    # The first token whose cumulative probability exceeds the draw. Kept below 1 by more than a rounding error, or the
    # last token could come out although it has probability 0.
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    return (cumulative <= draws[:, None].clamp(max=1 - 1e-6) * cumulative[:, -1:]).sum(dim=-1)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises UserError for settings that mean nothing."""
    if temperature < 0 or (top_k is not None and top_k < 0) or (top_p is not None and not 0 <= top_p <= 1):
        raise UserError(
            f"temperature={temperature} top_k={top_k} top_p={top_p}: expected at least 0, at least 0, and 0 to 1"
        )


def uniform_draws(seed: int, sequences: int, steps: int, first: int = 0) -> np.ndarray:
    """Random numbers (sequences, steps) in [0, 1): sequence i's depend on seed and first + i alone."""
    rows = [np.random.default_rng([seed, first + i]).random(steps, dtype=np.float32) for i in range(sequences)]
    return np.stack(rows)


# -----------------------------------------------------------------------------
# Tool use


@dataclass
class ToolUse:
    """
    The tool of one sequence. Tokens between <|python_start|> and <|python_end|> go to the calculator; what it answers
    is forced upon the sequence as <|output_start|> answer <|output_end|>, also when that is "error": a model left alone
    after a failed call invents a result.
    """

    tokenizer: Tokenizer
    call: list[int] | None = None  # the tokens of a call that is being written
    forced: deque[int] = field(default_factory=deque)  # what the sequence must say next

    def see(self, token: int) -> None:
        """Take notice of the sequence's next token."""
        if token == self.tokenizer.encode_special("<|python_start|>"):
            self.call = []
        elif token == self.tokenizer.encode_special("<|python_end|>") and self.call is not None:
            answer = use_calculator(self.tokenizer.decode(self.call)) or "error"
            self.forced.extend(self.tokenizer.encode(answer, prepend="<|output_start|>", append="<|output_end|>"))
            self.call = None
        elif self.call is not None:
            self.call.append(token)


# -----------------------------------------------------------------------------


class Engine:
    """
    Generates with a frozen copy of `model` in `dtype`; later changes of the model are not seen. With a tokenizer,
    <|assistant_end|> and <|bos|> end a sequence and the calculator answers tool calls; without one, nothing does.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer | None = None,
        dtype: torch.dtype = torch.float32,
        stop_tokens: Sequence[int] = (),
    ):
        self.model = model.inference_copy(dtype)
        self.tokenizer, self.dtype = tokenizer, dtype
        ends = [tokenizer.encode_special(name) for name in ("<|assistant_end|>", "<|bos|>")] if tokenizer else []
        self.stop_tokens = frozenset([*stop_tokens, *ends])

    def generate(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 42,
    ) -> Iterator[tuple[Column, Column]]:
        """Several continuations of one prompt; see generate_many."""
        return self.generate_many([tokens], num_samples, max_tokens, temperature, top_k, top_p, seed)

    @torch.inference_mode()
    def generate_many(
        self,
        prompts: Sequence[Sequence[int]],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 42,
        first: int = 0,
    ) -> Iterator[tuple[Column, Column]]:
        """
        Continue all prompts together, num_samples times each (sequence p * num_samples + s is sample s of prompt p).
        Yields per step a column of tokens and a column of masks: 1 for a token that was sampled, 0 for one that the
        tool forced. A sequence ends after a stop token (which is yielded), max_tokens, or at the end of the context.

        Same seed, same tokens; `first` is the number of the first sequence, for callers that deal sequences to ranks.
        Raises UserError for a prompt that is empty or leaves no room.
        """
        limit = self.model.config.sequence_len
        for tokens in prompts:
            if not 0 < len(tokens) < limit:
                raise UserError(f"the prompt has {len(tokens)} tokens; this model takes 1 to {limit - 1}")
        rooms = [limit - len(tokens) for tokens in prompts for _ in range(num_samples)]
        rooms = [room if max_tokens is None else min(room, max_tokens) for room in rooms]
        tools = [ToolUse(self.tokenizer) if self.tokenizer else None for _ in rooms]
        draws = torch.from_numpy(uniform_draws(seed, len(rooms), max(rooms), first)).to(self.model.device)

        logits, cache = self.prefill(prompts, num_samples, max(map(len, prompts)) + max(rooms))
        slots = list(range(len(rooms)))  # which sequence each of the cache's slots holds
        running = set(slots)
        for step in range(max(rooms)):
            sampled = sample(logits, draws[slots, step], temperature, top_k, top_p).tolist()
            column: Column = [None] * len(rooms)
            mask: Column = [None] * len(rooms)
            for slot, sequence in enumerate(slots):
                if sequence not in running:
                    continue
                tool = tools[sequence]
                mask[sequence] = 0 if tool and tool.forced else 1
                if tool and tool.forced:
                    sampled[slot] = tool.forced.popleft()
                elif tool:
                    tool.see(sampled[slot])
                column[sequence] = sampled[slot]
                if sampled[slot] in self.stop_tokens or step + 1 == rooms[sequence]:
                    running.discard(sequence)
            yield column, mask
            if not running:
                return
            # Finished sequences stay in the batch until a quarter of it is idle: dropping one copies the whole cache.
            if len(running) <= 0.75 * len(slots):
                kept = [slot for slot, sequence in enumerate(slots) if sequence in running]
                cache.keep(kept)
                slots, sampled = [slots[slot] for slot in kept], [sampled[slot] for slot in kept]
            logits = self.forward(torch.tensor(sampled, device=self.model.device)[:, None], cache)

    def prefill(self, prompts: Sequence[Sequence[int]], copies: int, capacity: int) -> tuple[Tensor, KVCache]:
        """
        Read all prompts in one pass: logits (P * copies, V) of what follows each, and the cache to go on with. Shorter
        prompts are padded at the end; what is stored there lies beyond the row's length and is overwritten.
        """
        lengths = [len(tokens) for tokens in prompts]
        idx = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for row, tokens in zip(idx, prompts, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        cache = KVCache(self.model.config, len(prompts), max(lengths), self.model.device, self.dtype)
        positions = cache.begin_step(max(lengths))
        hidden = self.model.hidden(idx.to(self.model.device), self.dtype, positions, list(cache.layers))
        cache.lengths = lengths
        last = torch.tensor(lengths, device=self.model.device) - 1
        logits = self.model.logits(hidden[torch.arange(len(prompts), device=last.device), last])
        return logits.repeat_interleave(copies, dim=0), cache.expand(copies, capacity)

    def forward(self, idx: Tensor, cache: KVCache) -> Tensor:
        """
        Append idx (B, T) to the cache's slots; logits (B, V) fp32 of what follows the last token. Chunks of any size
        are equal.
        """
        positions = cache.begin_step(idx.size(1))
        hidden = self.model.hidden(idx, self.dtype, positions, list(cache.layers))
        return self.model.logits(hidden[:, -1])

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        num_samples: int = 1,
        until: Callable[[], object] | None = None,
        **options: object,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """
        The whole sequences of generate_many, without their prompts: tokens (the terminal one included) and masks, one
        list for each. `until` is asked after each step; once it is true the sequences stay as they are.
        """
        results: list[list[int]] = [[] for _ in range(len(prompts) * num_samples)]
        masks: list[list[int]] = [[] for _ in results]
        for column, mask in self.generate_many(prompts, num_samples, **options):  # type: ignore[arg-type]
            for i, (token, sampled) in enumerate(zip(column, mask, strict=True)):
                if token is not None and sampled is not None:
                    results[i].append(token)
                    masks[i].append(sampled)
            if until and until():
                break
        return results, masks
