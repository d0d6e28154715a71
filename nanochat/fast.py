"""The faster recipe: the GPT of gpt.py, and what pays for itself in the same time where time is short.

- Bigram hash embedding (modded-nanogpt, record 62): each pair of neighbouring tokens has a row of a table, by a hash,
  which is added to the later one's normalised embedding. The layers need not learn which word follows which.
- Value embeddings (modded-nanogpt, after arXiv 2410.17897): a row of one table, the same in all layers, is added to
  what a token says to those that look at it.
- Partial key offset (modded-nanogpt): of the channels that the rotation hardly turns, a token's key has those of the
  token before. So one layer finds what followed a token like this one, which otherwise takes two.

Tables take a lookup and no matmul. They begin with zeros, so the model begins as the plain one does.

What was tried besides and did not pay stands in docs/reference/experiments.md. transformers has no such class: what is
to leave for other people's software is trained with --arch=gpt.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat import gpt
from nanochat.attention import Context, LayerCache, causal_attention
from nanochat.common import UserError
from nanochat.gpt import GPT, Attention, Block, GPTConfig, norm, rotary_angles
from nanochat.model import fill


@dataclass(frozen=True)
class FastConfig(GPTConfig):
    bigram_rows: int = 20  # of the table of pairs, for each token of the vocabulary
    table_scale: float = 4.0  # of what tables say: with Adam as good as 4 times the head's rate, which is theirs too
    arch: str = "fast"

    def build(self) -> "FastGPT":
        return FastGPT(self)


@functools.wraps(gpt.config_from_depth)
def config_from_depth(*dial: Any, **options: Any) -> FastConfig:
    return FastConfig(**dataclasses.asdict(gpt.config_from_depth(*dial, **options)))


class FastAttention(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, values: Tensor, cache: LayerCache | None = None) -> Tensor:  # type: ignore[override]
        """As the plain model's, with these values (B, G, T, D) on top of its own."""
        late = torch.arange(k.size(3), device=k.device) % (k.size(3) // 2) >= k.size(3) // 4  # see rotate()
        if cache is not None:
            return cache.attend(q, k, v + values, late)
        before = F.pad(k[:, :, :-1], (0, 0, 1, 0))
        return causal_attention(q, torch.where(late, before, k), v + values, self.window)


class FastBlock(Block):
    def __init__(self, config: GPTConfig, window: int):
        super().__init__(config, window)
        self.attn = FastAttention(config, window)


class FastGPT(GPT):
    config: FastConfig
    block = FastBlock

    def __init__(self, config: FastConfig):
        super().__init__(config)
        self.bigrams = nn.Embedding(config.bigram_rows * config.vocab_size, config.n_embd)
        self.values = nn.Embedding(config.vocab_size, config.n_kv_head * config.head_dim)

    def hidden(self, idx: Tensor, dtype: torch.dtype, context: Context | None = None) -> Tensor:
        positions = context.positions if context else torch.arange(idx.size(1), device=idx.device)
        previous = context.previous if context else torch.cat([idx[:, :1], idx[:, :-1]], dim=1)
        cos, sin = rotary_angles(positions, self.config.head_dim, self.config.rope_base)
        pairs = (previous * 36313 ^ idx * 27191) % self.bigrams.num_embeddings  # any two odd factors
        x = norm(self.wte(idx).to(dtype)) + self.config.table_scale * self.bigrams(pairs).to(dtype)
        values = self.config.table_scale * self.values(idx).to(dtype)  # (B, T, G * D)
        values = values.unflatten(-1, (self.config.n_kv_head, -1)).transpose(1, 2)
        return norm(self.run_blocks(x, cos, sin, values, context=context))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """As the plain model, and no table says anything yet."""
        super().init_weights(seed)
        fill(self.bigrams.weight, torch.zero_)
        fill(self.values.weight, torch.zero_)


def to_hf(model: FastGPT) -> NoReturn:
    raise UserError("--arch=fast: transformers has no such model; what is to leave is trained with --arch=gpt")
