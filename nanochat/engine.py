"""Inference: a KV cache, sampling, tool use and batched generation. The same engine serves CLI, web, RL and evaluation.

The cache has a row (slot) per sequence and a position per slot, so rows of different lengths decode together: attention
masks what lies beyond a row's own position. A step reads nothing back from the device but its sampled tokens.

Promises: equals the full forward pass token for token in fp32, in chunks of any size (tests/test_engine.py, against
tests/reference/generate.py); each sequence draws its own random numbers, so what it says does not depend on which other
sequences share its batch (but for the last bits of a matmul).
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.attention import round_length
from nanochat.calculator import use_calculator
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer

IDLE = 0.25  # share of a batch that idles before it is filled up


@dataclass
class LayerSlots:
    """One layer's keys and values (slots, G, capacity, D), which a block appends to and looks at."""

    cache: "KVCache"
    window: int
    keys: Tensor
    values: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v (B, G, T, D) at the positions of the current step; attention (B, H, T, D) of q over all that is
        stored: causal, inside the window, a row's own tokens only.
        """
        positions, S = self.cache.step_positions, self.cache.step_keys  # (B, T)
        rows = torch.arange(k.size(0), device=k.device)[:, None]
        self.keys[rows, :, positions] = k.transpose(1, 2)
        self.values[rows, :, positions] = v.transpose(1, 2)
        ahead = positions[:, :, None] - torch.arange(S, device=k.device)  # (B, T, S)
        mask = ((ahead >= 0) & (ahead < self.window))[:, None]
        keys, values = self.keys[:, :, :S], self.values[:, :, :S]
        return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=q.size(1) != k.size(1))


class KVCache:
    """Keys and values of `slots` sequences, up to `capacity` tokens each."""

    def __init__(self, config: GPTConfig, slots: int, capacity: int, device: torch.device, dtype: torch.dtype):
        self.config, self.capacity, self.device, self.dtype = config, capacity, device, dtype
        self.lengths = [0] * slots  # tokens stored per slot
        shape = (slots, config.n_kv_head, round_length(capacity, device), config.head_dim)
        self.layers = [
            LayerSlots(self, window, *(torch.zeros(shape, device=device, dtype=dtype) for _ in range(2)))
            for window in config.windows()
        ]

    def begin_step(self, tokens: int) -> Tensor:
        """Make room for `tokens` more in every slot; returns their positions (slots, tokens)."""
        longest = max(self.lengths) + tokens
        assert longest <= self.capacity, "a cache that overflows silently goes on with a frozen context"
        self.step_keys = round_length(longest, self.device)
        starts = torch.tensor(self.lengths, device=self.device)
        self.step_positions = starts[:, None] + torch.arange(tokens, device=self.device)
        self.lengths = [length + tokens for length in self.lengths]
        return self.step_positions

    def put(self, slots: Sequence[int], other: "KVCache", rows: Sequence[int]) -> None:
        """Copy `rows` of another cache into these slots, whatever they held: prefill once, sample many."""
        into, taken = torch.tensor(slots, device=self.device), torch.tensor(rows, device=self.device)
        longest = max(other.lengths[row] for row in rows)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.keys[into, :, :longest] = theirs.keys[taken, :, :longest]
            mine.values[into, :, :longest] = theirs.values[taken, :, :longest]
        for slot, row in zip(slots, rows, strict=True):
            self.lengths[slot] = other.lengths[row]

    def keep(self, slots: Sequence[int]) -> None:
        """Drop all other slots, so that finished rows cost nothing."""
        index = torch.tensor(slots, device=self.device)
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[index], layer.values[index]
        self.lengths = [self.lengths[slot] for slot in slots]


@dataclass(frozen=True)
class Sampling:
    """How continuations are drawn."""

    max_tokens: int | None = None  # of a continuation (None = up to the end of the context)
    temperature: float = 1.0  # 0 = always the most likely token
    top_k: int | None = None  # draw from the k most likely tokens only (None or 0 = from all)
    top_p: float | None = None  # then from the fewest whose probabilities reach p (None or 0 = from all)
    seed: int = 42


def sample(logits: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """One token per row of logits (B, V), as (B,), by the row's own random number of draws (B,), uniform in [0, 1)."""
    top_k, top_p = sampling.top_k, sampling.top_p
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / sampling.temperature
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


@dataclass
class ToolUse:
    """The tool of one sequence: what stands between <|python_start|> and <|python_end|> goes to the calculator, whose
    answer is forced upon the sequence between <|output_start|> and <|output_end|>. So is "error": a model left alone
    after a failed call invents a result.
    """

    tokenizer: Tokenizer
    call: list[int] | None = None  # the tokens of a call that is being written
    forced: deque[int] = field(default_factory=deque)  # what the sequence must say next

    def see(self, token: int) -> None:
        if token == self.tokenizer.encode_special("<|python_start|>"):
            self.call = []
        elif token == self.tokenizer.encode_special("<|python_end|>") and self.call is not None:
            answer = use_calculator(self.tokenizer.decode(self.call)) or "error"
            self.forced.extend(self.tokenizer.encode(answer, prepend="<|output_start|>", append="<|output_end|>"))
            self.call = None
        elif self.call is not None:
            self.call.append(token)


@dataclass
class Continuation:
    """A sequence that is being decoded, or waits for its turn."""

    number: int  # among all that were asked for
    prompt: Sequence[int]
    draws: np.ndarray  # (tokens at most,) in [0, 1): a random number for each, which depends on seed and number alone
    tool: ToolUse | None
    said: int = 0  # tokens so far

    def say(self, sampled: int) -> tuple[int, int]:
        """The next token, and 1 where it is the sampled one, 0 where the tool forces another."""
        self.said += 1
        if self.tool and self.tool.forced:
            return self.tool.forced.popleft(), 0
        if self.tool:
            self.tool.see(sampled)
        return sampled, 1


def round_batch(n: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, ...: few sizes, and less than half as many again."""
    power = 1 << (n - 1).bit_length()
    return 3 * power // 4 if n <= 3 * power // 4 else power


class Engine:
    """Generates with a frozen copy of `model` in `dtype`; later changes of the model are not seen. With a tokenizer,
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

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Generator[int]:
        """The tokens of one continuation as they come, those that the tool forces too; see decode()."""
        return (token for ((_, token, _),) in self.decode([prompt], sampling))

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        num_samples: int = 1,
        slots: int | None = None,
        first: Sequence[int] | None = None,
        until: Callable[[], object] = lambda: False,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """The whole continuations of decode(): tokens and masks (1 sampled, 0 forced), a list for each sequence.
        `until` is asked after each step; once it is true the sequences stay as they are.
        """
        sequences: list[list[int]] = [[] for _ in range(len(prompts) * num_samples)]
        masks: list[list[int]] = [[] for _ in sequences]
        for said in self.decode(prompts, sampling, num_samples, slots, first):
            for number, token, sampled in said:
                sequences[number].append(token)
                masks[number].append(sampled)
            if until():
                break
        return sequences, masks

    @torch.inference_mode()
    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        num_samples: int = 1,
        slots: int | None = None,
        first: Sequence[int] | None = None,
    ) -> Iterator[list[tuple[int, int, int]]]:
        """Continue prompts, num_samples times each (sequence p * num_samples + s is sample s of prompt p), `slots` of
        them at a time (None = all): as sequences end, others take their places. Yields per step, for all that run,
        (sequence, token, 1 if it was sampled or 0 if the tool forced it). A sequence ends after a stop token (which is
        yielded), max_tokens, or at the end of the context.

        Same seed, same tokens; for callers that deal prompts to ranks, `first` numbers each prompt's first sequence in
        the drawing (None = as they are yielded). Raises UserError for a prompt that is empty or leaves no room.
        """
        waiting = self.continuations(prompts, sampling, num_samples, first)
        running: list[Continuation | None] = [None] * min(slots or len(waiting), len(waiting))
        capacity = max((len(sequence.prompt) + len(sequence.draws) for sequence in waiting), default=0)
        cache = KVCache(self.model.config, len(running), capacity, self.model.device, self.dtype)
        logits = torch.zeros(len(running), self.model.config.vocab_size, device=self.model.device)
        while waiting or any(running):
            idle = [slot for slot, sequence in enumerate(running) if not sequence]
            rows = round_batch(len(running) - len(idle))
            if waiting and len(idle) >= IDLE * len(running):
                admitted = {slot: waiting.popleft() for slot in idle[: len(waiting)]}
                logits[list(admitted)] = self.admit(admitted, cache)
                running = [admitted.get(slot, sequence) for slot, sequence in enumerate(running)]
            elif not waiting and rows < len(running):
                kept = sorted(range(len(running)), key=lambda slot: running[slot] is None)[:rows]
                cache.keep(kept)
                logits, running = logits[kept], [running[slot] for slot in kept]
            draws = torch.tensor([sequence.draws[sequence.said] if sequence else 0.0 for sequence in running])
            sampled = sample(logits, draws.to(self.model.device), sampling).tolist()
            said = []
            for slot, sequence in enumerate(running):
                if sequence:
                    sampled[slot], mask = sequence.say(sampled[slot])
                    said.append((sequence.number, sampled[slot], mask))
                    if sampled[slot] in self.stop_tokens or sequence.said == len(sequence.draws):
                        running[slot], cache.lengths[slot] = None, 0
            yield said
            if any(running):
                states = self.forward(torch.tensor(sampled, device=self.model.device)[:, None], cache)
                logits = self.model.logits(states)

    def continuations(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, num_samples: int, first: Sequence[int] | None
    ) -> deque[Continuation]:
        """What decode() is to do, those with the longest prompts first: neighbours are read together, with padding."""
        limit = self.model.config.sequence_len
        found: list[Continuation] = []
        for prompt, tokens in enumerate(prompts):
            if not 0 < len(tokens) < limit:
                raise UserError(f"the prompt has {len(tokens)} tokens; this model takes 1 to {limit - 1}")
            room = min(limit - len(tokens), limit if sampling.max_tokens is None else sampling.max_tokens)
            for copy in range(num_samples if room > 0 else 0):
                number = prompt * num_samples + copy
                rng = np.random.default_rng([sampling.seed, number if first is None else first[prompt] + copy])
                tool = ToolUse(self.tokenizer) if self.tokenizer else None
                found.append(Continuation(number, tokens, rng.random(room, dtype=np.float32), tool))
        return deque(sorted(found, key=lambda sequence: -len(sequence.prompt)))

    def admit(self, sequences: dict[int, Continuation], cache: KVCache) -> Tensor:
        """Read the prompts of {slot: sequence}, each once, into the slots: logits (slots, V) of what follows them."""
        prompts = {id(sequence.prompt): sequence.prompt for sequence in sequences.values()}  # samples share one
        row_of = {key: row for row, key in enumerate(prompts)}
        rows = [row_of[id(sequence.prompt)] for sequence in sequences.values()]
        states, read = self.prefill(list(prompts.values()))
        cache.put(list(sequences), read, rows)
        return self.model.logits(states)[rows]

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, KVCache]:
        """Read all prompts in one pass, shorter ones padded at the end: states (P, C) at their ends, their cache."""
        lengths = [len(tokens) for tokens in prompts]
        rows = [torch.tensor(tokens, dtype=torch.long) for tokens in prompts]
        T = round_length(max(lengths), self.model.device)
        idx = torch.stack([F.pad(row, (0, T - len(row))) for row in rows])  # (P, T)
        cache = KVCache(self.model.config, len(prompts), T, self.model.device, self.dtype)
        states = self.forward(idx.to(self.model.device), cache, torch.tensor(lengths) - 1)
        cache.lengths = lengths  # the padding lies beyond
        return states, cache

    def forward(self, idx: Tensor, cache: KVCache, last: Tensor | None = None) -> Tensor:
        """Append idx (B, T) to the slots; the final states (B, C) at each row's place `last` (B,) or end."""
        hidden = self.model.hidden(idx, self.dtype, cache.begin_step(idx.size(1)), list(cache.layers))
        rows = torch.arange(len(idx), device=idx.device)
        return hidden[:, -1] if last is None else hidden[rows, last.to(idx.device)]
