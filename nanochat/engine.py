"""Inference: a KV cache, sampling, continuous batching. The same engine serves CLI, web, RL and evaluation.

A Batch has slots, each with the keys and values of one sequence. Requests join and leave between steps; a step reads at
most a chunk of the prompts that wait, then feeds one token of every running row and draws the next. A prompt's last
token is fed by that step too, so samples of one prompt, and the turns of a chat, only copy what a slot already holds.

Promises: equals the full forward pass token for token in fp32, in chunks of any size (tests/test_engine.py, against
tests/reference/generate.py); each request draws its own random numbers, so what it says does not depend on which others
share its batch (but for the last bits of a matmul).
"""

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.attention import Context, LayerCache, round_length
from nanochat.calculator import ToolUse
from nanochat.common import UserError
from nanochat.model import LanguageModel, slice_rows
from nanochat.tokenizer import Tokenizer

CHUNK = 256  # tokens of prompts read per step while others wait for their next token
READ = 8192  # the same while nobody does
SHARED = 16  # tokens in common with another slot from which on they are copied and not computed

# -----------------------------------------------------------------------------
# Keys and values


@dataclass(frozen=True)
class LayerSlots:
    """One layer's keys and values (slots, G, R, D) in one pass. Position p lies in cell p mod R: a layer with a window
    keeps little more than that.
    """

    keys: Tensor
    values: Tensor
    rows: slice | Tensor  # the slots that are fed, B of them
    follows: Tensor  # (B, T, 1, 1): whether there is a token before
    cells: Tensor  # (B, T): where the fed tokens go
    mask: Tensor  # (B, 1, T, R): which of the cells each of them sees

    def attend(self, q: Tensor, k: Tensor, v: Tensor, late: Tensor | None = None) -> Tensor:
        """Store k, v (B, G, T, D); attention (B, H, T, D) of q over what is stored. Late channels go to the cell of the
        token after, which nobody sees yet.
        """
        slots = torch.arange(k.size(0), device=k.device) if isinstance(self.rows, slice) else self.rows
        cells = slots[:, None], slice(None), self.cells
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, T, G, D)
        self.keys[cells] = k if late is None else torch.where(late, self.keys[cells] * self.follows, k)
        if late is not None:
            after = slots[:, None], slice(None), (self.cells + 1) % self.keys.size(2)
            self.keys[after] = torch.where(late, k, self.keys[after])
        self.values[cells] = v
        keys, values = self.keys[self.rows], self.values[self.rows]
        if q.size(2) == 1 and q.device.type == "cpu":
            return attend_one(q, keys, values, self.mask)
        return F.scaled_dot_product_attention(q, keys, values, self.mask, enable_gqa=q.size(1) != keys.size(1))


def attend_one(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention (B, H, 1, D) of one query each over keys and values (B, G, S, D), as two batched matmuls: in bf16 they
    take 0.5 ms where torch's kernel takes 4.6 (32 rows, 4 heads of 64, 320 keys, one Zen 4 core), in fp32 as long.
    """
    q = q.view(*keys.shape[:2], -1, q.size(3))  # (B, G, H / G, D)
    scores = (q @ keys.mT).float() * q.size(3) ** -0.5
    weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1).to(q.dtype)  # (B, G, H / G, S)
    return (weights @ values).view(len(q), -1, 1, q.size(3))


def look(
    windows: Sequence[int], keys: Sequence[Tensor], values: Sequence[Tensor], rows: slice | Tensor, positions: Tensor
) -> list[LayerCache]:
    """What each layer's queries at `positions` (B, T) of the slots `rows` see: themselves and what came before, as far
    back as the window goes.
    """
    masks: dict[int, Tensor] = {}
    found: list[LayerCache] = []
    for window, k, v in zip(windows, keys, values, strict=True):
        R = k.size(2)
        if window not in masks:
            cells = torch.arange(R, device=k.device)
            ahead = (positions[:, :, None] - cells).remainder(R)  # (B, T, R) how far back what a cell holds lies
            masks[window] = (ahead < (positions[:, :, None] + 1).clamp(max=window))[:, None]
        found.append(LayerSlots(k, v, rows, (positions > 0)[:, :, None, None], positions.remainder(R), masks[window]))
    return found


class KVCache:
    """Keys and values of `slots` sequences, up to `capacity` tokens each. Room is made for little more than the longest
    of them so far, and attention looks at all of it: of a part of a tensor a bf16 matmul makes a copy first, which was
    17 of the 29 seconds of 256 rollouts.
    """

    def __init__(self, config: Any, slots: int, capacity: int, device: torch.device, dtype: torch.dtype):
        self.windows, self.capacity = config.windows(), round_length(capacity + 1, device)  # one cell after the last
        self.tokens: list[list[int]] = [[] for _ in range(slots)]  # what each slot holds
        # A chunk is written before its first token looks back: a ring has room for both.
        self.cells = [min(self.capacity, round_length(window + CHUNK, device)) for window in self.windows]
        shape = (slots, config.n_kv_head, 0, config.head_dim)
        self.keys, self.values = ([torch.zeros(shape, device=device, dtype=dtype) for _ in self.cells] for _ in "kv")

    def reserve(self, S: int) -> None:
        """Make room for S tokens and one, or an eighth more, in multiples of 64: so it is rarely done."""
        for tensors in (self.keys, self.values):
            for i, most in enumerate(self.cells):
                if (R := tensors[i].size(2)) < min(S + 1, most):
                    tensors[i] = F.pad(tensors[i], (0, 0, 0, min(-(-(S + S // 8) // 64) * 64, most) - R))

    def shared(self, slot: int, prompt: Sequence[int]) -> int:
        """How many of a prompt's tokens can be taken from a slot: all but the last at most, 0 where few are the same,
        or where a ring has written over what the next one would look at.
        """
        held = self.tokens[slot]
        most = min(len(held), len(prompt) - 1)
        if most < SHARED or held[:SHARED] != prompt[:SHARED]:
            return 0
        n = bisect_left(range(SHARED, most), True, key=lambda n: held[: n + 1] != prompt[: n + 1]) + SHARED
        rings = (
            k.size(2) - window for k, window in zip(self.keys, self.windows, strict=True) if k.size(2) <= len(held)
        )
        return n if len(held) - n <= min(rings, default=n + len(held)) else 0

    def copy(self, source: int, slot: int, n: int) -> None:
        """Let a slot hold the first n tokens of another, or of itself."""
        if source != slot:
            for tensor in (*self.keys, *self.values):
                tensor[slot, :, : len(self.tokens[source]) + 1] = tensor[source, :, : len(self.tokens[source]) + 1]
        self.tokens[slot] = self.tokens[source][:n]


# -----------------------------------------------------------------------------
# Sampling


@dataclass(frozen=True)
class Sampling:
    """How a continuation is drawn. top_k, min_p and top_p cut the distribution, in this order; None or 0 = not."""

    max_tokens: int | None = None  # of a continuation (None = up to the end of the context)
    temperature: float = 1.0  # 0 = always the most likely token
    top_k: int | None = None  # draw from the k most likely tokens only
    top_p: float | None = None  # from the fewest whose probabilities reach p
    seed: int = 42
    min_p: float | None = None  # from those with at least this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # logits of tokens seen before are divided, negative ones multiplied (CTRL)
    logprobs: int | None = None  # report the token's log-probability, and this many of the likeliest ones'


def penalise(logits: Tensor, seen: Sequence[int], penalty: float) -> None:
    """CTRL's repetition penalty (arXiv 1909.05858) on one row (V,) in place."""
    ids = torch.tensor(sorted(set(seen)), device=logits.device)
    values = logits[ids]
    logits[ids] = torch.where(values > 0, values / penalty, values * penalty)


def sample(logits: Tensor, draws: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """One token per row of logits (B, V), as (B,), by the row's own random number of draws (B,), uniform in [0, 1)."""
    kinds = [bool(s.temperature) and (2 if s.top_k or s.min_p or s.top_p else 1) for s in samplings]
    if len(set(kinds)) == 1 and kinds[0]:  # the usual case, without a copy
        return draw(logits, draws, samplings, cut=kinds[0] == 2)
    drawn = logits.argmax(dim=-1)
    for kind in (1, 2):  # a row's own way, whatever the others'
        if rows := [i for i, own in enumerate(kinds) if own == kind]:
            drawn[rows] = draw(logits[rows], draws[rows], [samplings[i] for i in rows], cut=kind == 2)
    return drawn


@lru_cache(maxsize=4)
def columns(samplings: tuple[Sampling, ...], V: int, device: torch.device) -> tuple[Tensor, ...]:
    """Temperatures, numbers of tokens, floors and shares of these rows, (B, 1) each: the same at most steps."""
    # The likeliest is 0 whatever the temperature; fp32 knows 1e-20, and nothing is left of the others by then.
    temperatures = [max(s.temperature, 1e-20) for s in samplings]
    floors = [math.log(s.min_p) if s.min_p else -math.inf for s in samplings]
    rows = (temperatures, [min(s.top_k or V, V) for s in samplings], floors, [s.top_p or 1 for s in samplings])
    return tuple(torch.tensor(row, device=device)[:, None] for row in rows)


def draw(logits: Tensor, draws: Tensor, samplings: Sequence[Sampling], cut: bool) -> Tensor:
    """sample() of rows with a temperature, all of them cut or none: the first token, in the order of likelihood or of
    the vocabulary, whose cumulative probability exceeds the draw.
    """
    V = logits.size(-1)
    temperatures, ks, floors, most = columns(tuple(samplings), V, logits.device)
    scaled, order = (logits - logits.amax(dim=-1, keepdim=True)) / temperatures, None
    if cut:
        scaled, order = scaled.topk(min(V, max(s.top_k or V for s in samplings)), dim=-1)
        ranks = torch.arange(scaled.size(-1), device=logits.device)
        scaled = scaled.masked_fill((ranks >= ks) | (scaled < floors), -torch.inf)
        shares = scaled.softmax(dim=-1)
        before = shares.cumsum(dim=-1) - shares  # probability of everything more likely
        scaled = scaled.masked_fill((before >= most) & (ranks > 0), -torch.inf)
    # The draw is kept below 1 by more than a rounding error, or a last token without probability could come out.
    cumulative = scaled.softmax(dim=-1).cumsum(dim=-1)
    places = (cumulative <= draws[:, None].clamp(max=1 - 1e-6) * cumulative[:, -1:]).sum(dim=-1)
    return places if order is None else order.gather(1, places[:, None])[:, 0]


# -----------------------------------------------------------------------------
# Requests, and the batch that they decode in


class Request:
    """A prompt to continue; `stream` tells samples of one seed apart. It fills while its batch steps."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling, stream: int = 0):
        self.prompt, self.sampling, self.stream = list(prompt), sampling, stream
        self.tokens: list[int] = []  # said so far
        self.masks: list[int] = []  # 1 drawn, 0 forced by the tool
        self.finished: str | None = None  # "stop" (the stop token is the last of tokens), "length" or "cancelled"
        self.tool: ToolUse | None = None

    def open(self, room: int, tool: ToolUse | None) -> None:
        self.tool = tool
        self.draws: np.ndarray = np.random.default_rng([self.sampling.seed, self.stream]).random(room, dtype=np.float32)
        self.finished = None if room else "length"

    def say(self, drawn: int, stop_tokens: frozenset[int]) -> tuple[int, int]:
        """The next token, and 1 where it is the drawn one, 0 where the tool forces another."""
        forced = bool(self.tool and self.tool.forced)
        token = self.tool.forced.popleft() if self.tool and forced else drawn
        if self.tool and not forced:
            self.tool.see(token)
        self.tokens.append(token)
        self.masks.append(int(not forced))
        if token in stop_tokens:
            self.finished = "stop"
        elif len(self.tokens) == len(self.draws):
            self.finished = "length"
        return token, self.masks[-1]


@dataclass(frozen=True)
class Said:
    """What a step adds to a request. Log-probabilities are the model's own, before temperature, penalty and cuts."""

    request: Request
    token: int
    sampled: int  # 1, or 0 where the tool forced it
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


def round_batch(n: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, ...: few sizes, and less than half as many again."""
    power = 1 << (n - 1).bit_length()
    return 3 * power // 4 if n <= 3 * power // 4 else power


class Batch:
    """Requests that decode together, `slots` at a time, first come first served. It belongs to one thread."""

    def __init__(self, engine: "Engine", slots: int, capacity: int | None = None):
        self.engine, config = engine, engine.model.config
        self.limit = min(capacity or config.sequence_len, config.sequence_len)  # tokens of a sequence
        whole = 1 << (slots - 1).bit_length()  # a compiled step may have more rows than slots
        self.cache = KVCache(config, whole, self.limit, engine.model.device, engine.dtype)
        self.running: list[Request | None] = [None] * slots
        self.waiting: deque[Request] = deque()

    def __len__(self) -> int:
        """Requests that are not finished."""
        return len(self.waiting) + sum(request is not None for request in self.running)

    def add(self, request: Request) -> None:
        """Let a request wait for a slot. Raises UserError for a prompt that is empty or leaves no room."""
        room, asked = self.limit - len(request.prompt), request.sampling.max_tokens
        if not 0 < room < self.limit:
            raise UserError(f"the prompt has {len(request.prompt)} tokens; this model takes 1 to {self.limit - 1}")
        tokenizer = self.engine.tokenizer
        request.open(room if asked is None else min(room, asked), ToolUse(tokenizer) if tokenizer else None)
        if not request.finished:
            self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """End a request, wherever it is; its slot is free for the next step."""
        request.finished = request.finished or "cancelled"
        if request in self.waiting:
            self.waiting.remove(request)
        if request in self.running:
            self.running[self.running.index(request)] = None

    @torch.inference_mode()
    def step(self) -> list[Said]:
        """The next token of every request whose prompt is read."""
        for slot, request in enumerate(self.running):
            if request is None and self.waiting:
                self.begin(slot, self.waiting.popleft())
        self.close_gaps()
        self.read()
        return self.decode()

    def begin(self, slot: int, request: Request) -> None:
        """Give a slot to a request, which finds there what any slot knows of its prompt."""
        self.running[slot] = request
        shares = {other: self.cache.shared(other, request.prompt) for other in range(len(self.running))}
        source = max(shares, key=lambda other: (shares[other], other == slot))
        self.cache.copy(source, slot, shares[source])

    def unread(self, slot: int) -> list[int]:
        """What a slot's request still has to read before its last token is fed."""
        request = self.running[slot]
        return request.prompt[len(self.cache.tokens[slot]) : -1] if request else []

    def close_gaps(self) -> None:
        """Move requests from the last slots to free ones before them, where that makes a smaller batch."""
        taken, slots = [slot for slot, request in enumerate(self.running) if request], len(self.cache.tokens)
        while taken and self.engine.rows(len(taken), slots) < self.engine.rows(taken[-1] + 1, slots):
            last, gap = taken.pop(), self.running.index(None)
            self.cache.copy(last, gap, len(self.cache.tokens[last]))
            self.running[gap], self.running[last] = self.running[last], None
            taken = sorted([*taken, gap])

    def read(self) -> None:
        """Read prompts: CHUNK tokens in all if anybody waits for his next token, else a chunk of each. Of requests with
        the same prompt one reads, and the others copy.
        """
        readers: dict[tuple[int, ...], int] = {}
        followers: list[tuple[int, int]] = []
        for slot, request in enumerate(self.running):
            if request and self.unread(slot):
                reader = readers.setdefault(tuple(request.prompt), slot)
                followers += [(slot, reader)] if reader != slot else []
        chunks = {slot: self.unread(slot)[:CHUNK] for slot in readers.values()}
        busy = len(chunks) + len(followers) < len(self) - len(self.waiting)
        most = CHUNK if busy else READ
        while len(chunks) > 1 and (
            round_batch(len(chunks)) > len(chunks) or len(chunks) * max(map(len, chunks.values())) > most
        ):
            chunks.popitem()
        if chunks:
            self.feed(chunks)
        for slot, reader in followers:
            if not self.unread(reader):
                self.cache.copy(reader, slot, len(self.cache.tokens[reader]))

    def feed(self, chunks: dict[int, list[int]]) -> None:
        """Append tokens to slots, shorter rows padded at the end with tokens that the next one will replace."""
        cache, device = self.cache, self.engine.model.device
        T = round_length(max(map(len, chunks.values())), device)
        starts = torch.tensor([[len(cache.tokens[slot])] for slot in chunks])
        ends = starts + torch.tensor([[len(chunk)] for chunk in chunks.values()])
        positions = torch.minimum(starts + torch.arange(T), ends).to(device)  # (B, T)
        idx = torch.tensor([chunk + [0] * (T - len(chunk)) for chunk in chunks.values()]).to(device)
        before = torch.tensor([(cache.tokens[slot] or chunk[:1])[-1:] for slot, chunk in chunks.items()]).to(device)
        cache.reserve(int(ends.max()) + 1)
        caches = look(cache.windows, cache.keys, cache.values, torch.tensor(list(chunks)).to(device), positions)
        context = Context(positions, torch.cat([before, idx[:, :-1]], dim=1), caches)
        self.engine.model.hidden(idx, self.engine.dtype, context)
        for slot, chunk in chunks.items():
            cache.tokens[slot] += chunk

    def decode(self) -> list[Said]:
        """Feed one token of every request that is read, and draw the next. Other slots are fed a token beyond what they
        hold, which the next one will replace; a free one that holds more than all requests forgets it.
        """
        ready = [slot for slot, request in enumerate(self.running) if request and not self.unread(slot)]
        if not ready:
            return []
        held = self.cache.tokens
        S = 1 + max(len(held[slot]) for slot, request in enumerate(self.running) if request)
        fed, previous, positions = ([0] * self.engine.rows(ready[-1] + 1, len(held)) for _ in range(3))
        for slot in range(len(fed)):
            if len(held[slot]) >= S:
                held[slot] = []
            positions[slot] = len(held[slot])
        for slot in ready:
            request = self.running[slot]
            fed[slot] = (request.tokens or request.prompt)[-1]  # type: ignore[union-attr]
            held[slot].append(fed[slot])
            previous[slot] = held[slot][-2:][0]
        self.cache.reserve(S)
        logits = self.engine.decode((fed, previous, positions), self.cache)
        return self.choose(ready, logits if len(ready) == len(fed) else logits[ready])

    def choose(self, slots: list[int], logits: Tensor) -> list[Said]:
        """Draw a token for each of these slots from its row of logits (B, V); those that end leave."""
        requests = [request for slot in slots if (request := self.running[slot])]
        asked = [request.sampling for request in requests]
        shares = logits.log_softmax(dim=-1) if any(s.logprobs is not None for s in asked) else None
        for row, request in enumerate(requests):
            if asked[row].repetition_penalty != 1:
                penalise(logits[row], request.prompt + request.tokens, asked[row].repetition_penalty)
        draws = torch.tensor([request.draws[len(request.tokens)] for request in requests]).to(logits.device)
        drawn = sample(logits, draws, asked).tolist()
        said = []
        for row, (slot, request) in enumerate(zip(slots, requests, strict=True)):
            token, mask = request.say(drawn[row], self.engine.stop_tokens)
            wanted = asked[row].logprobs
            scores = (None, ()) if shares is None or wanted is None else scores_of(shares[row], token, wanted)
            said.append(Said(request, token, mask, *scores))
            if request.finished:
                self.running[slot] = None
        return said


def scores_of(shares: Tensor, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """The log-probability of a token, and the likeliest `top` tokens with theirs, from all of them (V,)."""
    values, ids = shares.topk(min(top, len(shares)))
    return shares[token].item(), list(zip(ids.tolist(), values.tolist(), strict=True))


# -----------------------------------------------------------------------------
# The engine

Step = Callable[..., Tensor]  # as Engine.eager_step


class Engine:
    """Generates with a frozen copy of `model` in `dtype`; later changes of the model are not seen. With a tokenizer,
    <|assistant_end|> and <|bos|> end a sequence and the calculator answers tool calls; without one, nothing does.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None = None,
        dtype: torch.dtype = torch.float32,
        stop_tokens: Sequence[int] = (),
    ):
        self.model = model.inference_copy(dtype)
        self.tokenizer, self.dtype = tokenizer, dtype
        ends = [tokenizer.encode_special(name) for name in ("<|assistant_end|>", "<|bos|>")] if tokenizer else []
        self.stop_tokens = frozenset([*stop_tokens, *ends])
        self.compiled: dict[int, Step] = {}  # by rows; decode_step.py fills it, and the eager step serves the others
        self.spare: Batch | None = None  # with what the last generate() left in it

    def batch(self, slots: int, capacity: int | None = None) -> Batch:
        """A batch of this engine, each of its slots with room for `capacity` tokens (None = the model's context)."""
        return Batch(self, slots, capacity)

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Generator[int]:
        """The tokens of one continuation as they come, those that the tool forces too. What the last call left is not
        computed again: the next turn of a chat reads what is new in it.
        """
        batch, self.spare = self.batch(1) if self.spare is None else self.spare, None
        request = Request(prompt, sampling)
        try:
            batch.add(request)
            while len(batch):
                yield from (said.token for said in batch.step())
        except GeneratorExit:  # the caller has enough; after a Ctrl-C within a step a slot may hold half of it
            batch.cancel(request)
        self.spare = batch

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        num_samples: int = 1,
        slots: int | None = None,
        first: Sequence[int] | None = None,
        until: Callable[[], object] = lambda: False,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Continue prompts, num_samples times each (sequence p * num_samples + s is sample s of prompt p), `slots` of
        them at a time (None = all): tokens and masks (1 drawn, 0 forced), a list for each sequence. One ends after a
        stop token (which is kept), max_tokens, or at the end of the context. `until` is asked after each step; once it
        is true the sequences stay as they are.

        Same seed, same tokens; for callers that deal prompts to ranks, `first` numbers each prompt's first sequence in
        the drawing (None = as they are returned). Raises UserError for a prompt that is empty or leaves no room.
        """
        requests = [
            Request(prompt, sampling, (i * num_samples if first is None else first[i]) + copy)
            for i, prompt in enumerate(prompts)
            for copy in range(num_samples)
        ]
        if requests:
            context = self.model.config.sequence_len
            longest = max(len(prompt) for prompt in prompts)
            room = context if sampling.max_tokens is None else max(1, sampling.max_tokens)
            batch = self.batch(min(slots or len(requests), len(requests)), min(context, longest + room))
            for request in sorted(requests, key=lambda request: -len(request.prompt)):  # read with little padding
                batch.add(request)
            while len(batch) and not until():
                batch.step()
        return [request.tokens for request in requests], [request.masks for request in requests]

    def rows(self, n: int, slots: int) -> int:
        """How many rows a step has in which n are needed and there is room for `slots`."""
        return min((rows for rows in self.compiled if n <= rows <= slots), default=round_batch(n))

    def decode(self, fed: tuple[list[int], ...], cache: KVCache) -> Tensor:
        """Logits (B, V) after one token of each of the first B slots, fed with the one before and its place."""
        step = self.compiled.get(len(fed[0]), self.eager_step)
        return step(*(torch.tensor(values).to(self.model.device) for values in fed), cache.keys, cache.values)

    def eager_step(
        self, idx: Tensor, previous: Tensor, positions: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        """What is compiled too: logits (B, V) after tokens idx (B,) at positions (B,) of the first B slots."""
        places = positions[:, None]
        caches = look(self.model.config.windows(), keys, values, slice(0, len(idx)), places)
        context = Context(places, previous[:, None], caches)
        return self.model.logits(self.model.hidden(idx[:, None], self.dtype, context)[:, 0])

    @torch.inference_mode()
    def last_states(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The final states (P, C) at the ends of prompts, read in one pass without a cache."""
        T = round_length(max(map(len, prompts)), self.model.device)
        idx = torch.tensor([[*prompt, *[0] * (T - len(prompt))] for prompt in prompts])
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts])
        return self.model.hidden(idx.to(self.model.device), self.dtype)[torch.arange(len(prompts)), ends]

    @torch.inference_mode()
    def score(self, tokens: Sequence[int], top: int = 0) -> list[tuple[float, list[tuple[int, float]]]]:
        """For each token but the first its log-probability after those before it, and the likeliest `top` with theirs.
        Raises UserError for more tokens than the context has.
        """
        if len(tokens) > (limit := self.model.config.sequence_len):
            raise UserError(f"the text has {len(tokens)} tokens; this model takes {limit}")
        states = self.model.hidden(torch.tensor([tokens]).to(self.model.device), self.dtype)[0, :-1]
        scores = []
        for part in slice_rows(len(states), self.model.config.vocab_size, self.model.device) if len(states) else []:
            rows = self.model.logits(states[part]).log_softmax(dim=-1)
            scores += [scores_of(*pair, top) for pair in zip(rows, tokens[1:][part], strict=True)]
        return scores
