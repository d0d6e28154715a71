"""The faster recipe: the GPT of gpt.py, and what pays for itself in the same time where time is short.

Bigram hash embedding (modded-nanogpt, record 62): each pair of neighbouring tokens has a row of a table, by a hash,
which is added to the later one's normalised embedding. A lookup costs next to no time, and the layers need not spend
theirs on learning which word follows which. It begins with zeros, as the plain model.

What was tried besides and did not pay stands in docs/reference/experiments.md. transformers has no such class: what is
to leave for other people's software is trained with --arch=gpt.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from nanochat import gpt
from nanochat.attention import Context
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.model import fill


@dataclass(frozen=True)
class FastConfig(GPTConfig):
    bigram_rows: int = 5  # of the table, for each token of the vocabulary
    bigram_scale: float = 4.0  # of what it says: with Adam as good as 4 times the head's rate, which is the table's too
    arch: str = "fast"

    def build(self) -> "FastGPT":
        return FastGPT(self)


@functools.wraps(gpt.config_from_depth)
def config_from_depth(*dial: Any, **options: Any) -> FastConfig:
    return FastConfig(**dataclasses.asdict(gpt.config_from_depth(*dial, **options)))


class FastGPT(GPT):
    config: FastConfig

    def __init__(self, config: FastConfig):
        super().__init__(config)
        self.bigrams = nn.Embedding(config.bigram_rows * config.vocab_size, config.n_embd)

    def embed(self, idx: Tensor, dtype: torch.dtype, context: Context | None) -> Tensor:
        previous = context.previous if context else torch.cat([idx[:, :1], idx[:, :-1]], dim=1)
        pairs = (previous * 36313 ^ idx * 27191) % self.bigrams.num_embeddings  # any two odd factors
        return super().embed(idx, dtype, context) + self.config.bigram_scale * self.bigrams(pairs).to(dtype)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """As the plain model, and no pair says anything yet."""
        super().init_weights(seed)
        fill(self.bigrams.weight, torch.zero_)


def to_hf(model: FastGPT) -> NoReturn:
    raise UserError("--arch=fast: transformers has no such model; what is to leave is trained with --arch=gpt")
