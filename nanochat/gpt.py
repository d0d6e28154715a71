"""The Transformer. One dial: `depth` decides width, heads and (with the vocabulary) everything else.

What it is, exactly: token embedding, RMSNorm, then `n_layer` blocks of `x += attn(norm(x)); x += mlp(norm(x))`,
RMSNorm, an untied head, logits softly capped at +-15. Rotary positions, QK-norm after them, ReLU squared, grouped-query
attention, no biases and no learned norms anywhere. transformers knows this model as NanoChatForCausalLM, so a
checkpoint exports without loss while every layer sees the full context (window pattern "L").

Shapes below: B batch, T time, C width, H heads, G key/value heads, D head size. Head and loss are in model.py.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.attention import Context, LayerCache, causal_attention
from nanochat.common import UserError
from nanochat.model import LanguageModel, Linear, fill


@dataclass(frozen=True)
class GPTConfig:
    """What rebuilds the model, stored in every checkpoint. Raises UserError for shapes that cannot be built."""

    sequence_len: int = 2048  # training context in tokens; also half of it is the window of an "S" layer
    vocab_size: int = 65536
    n_layer: int = 20
    n_head: int = 10
    n_kv_head: int = 10
    n_embd: int = 1280
    window_pattern: str = "L"  # tiled over the layers: L full context, S half of it; the last layer is always L
    rope_base: float = 100_000.0

    def __post_init__(self) -> None:
        if min(self.n_layer, self.n_head, self.n_kv_head, self.n_embd, self.vocab_size, self.sequence_len) < 1:
            raise UserError(f"every size of a model must be at least 1: {asdict(self)}")
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            heads = f"{self.n_head} heads of even size"
            raise UserError(f"width {self.n_embd} does not split into {heads}; choose another --head-dim")
        if self.n_head % self.n_kv_head:
            raise UserError(f"--kv-heads={self.n_kv_head} must divide the {self.n_head} query heads")
        if not self.window_pattern or set(self.window_pattern) - set("LS"):
            raise UserError(f"--window-pattern={self.window_pattern}: expected the letters L and S, such as SSSL")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def build(self) -> "GPT":
        return GPT(self)

    def windows(self) -> list[int]:
        """How many tokens each layer sees, itself included."""
        pattern = self.window_pattern
        letters = [pattern[i % len(pattern)] for i in range(self.n_layer - 1)] + ["L"]
        return [self.sequence_len if letter == "L" else max(1, self.sequence_len // 2) for letter in letters]


def config_from_depth(
    depth: int,
    vocab_size: int,
    sequence_len: int,
    aspect_ratio: int = 64,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    window_pattern: str = "L",
) -> GPTConfig:
    """The one dial: width = depth * aspect_ratio, rounded up to whole heads. Heads have 128 channels where the width is
    at least 512 and a multiple of 128, else 64: a 256-wide model with two heads is worse than one with four.
    """
    width = depth * aspect_ratio
    if head_dim is None:
        head_dim = 128 if width >= 512 and width % 128 == 0 else 64
    n_head = math.ceil(width / head_dim)
    return GPTConfig(sequence_len, vocab_size, depth, n_head, kv_heads or n_head, n_head * head_dim, window_pattern)


# -----------------------------------------------------------------------------
# The parts


def norm(x: Tensor) -> Tensor:
    """RMSNorm without a learned gain, over the last dimension."""
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def rotary_angles(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE (arXiv 2104.09864) in fp32, shape (*positions.shape, D/2)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[..., None] * base**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+D/2}) of x (B, T, H, D) by minus its angle; computed in fp32, returned in x's dtype."""
    left, right = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (T, 1, D/2) or (B, T, 1, D/2)
    return torch.cat([left * cos + right * sin, right * cos - left * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions, QK-norm and grouped key/value heads."""

    def __init__(self, config: GPTConfig, window: int):
        super().__init__()
        self.config, self.window = config, window
        C, D = config.n_embd, config.head_dim
        self.c_q = Linear(C, config.n_head * D)
        self.c_k = Linear(C, config.n_kv_head * D)
        self.c_v = Linear(C, config.n_kv_head * D)
        self.c_proj = Linear(C, C)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *more: Any) -> Tensor:
        B, T, C = x.shape
        D = self.config.head_dim
        q = self.c_q(x).view(B, T, self.config.n_head, D)
        k = self.c_k(x).view(B, T, self.config.n_kv_head, D)
        v = self.c_v(x).view(B, T, self.config.n_kv_head, D)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or G, T, D)
        return self.c_proj(self.attend(q, k, v, *more).transpose(1, 2).reshape(B, T, C))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None = None) -> Tensor:
        return causal_attention(q, k, v, self.window) if cache is None else cache.attend(q, k, v)


class MLP(nn.Module):
    """C -> 4C -> C with ReLU squared (Primer, arXiv 2109.08668)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """One layer. The unit of torch.compile: all layers share one compiled graph, which keeps compilation to seconds."""

    def __init__(self, config: GPTConfig, window: int):
        super().__init__()
        self.attn = Attention(config, window)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *more: Any) -> Tensor:
        x = x + self.attn(norm(x), cos, sin, *more)
        return x + self.mlp(norm(x))


# -----------------------------------------------------------------------------
# The whole


class GPT(LanguageModel):
    config: GPTConfig
    block = Block

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks: list[Block] = nn.ModuleList([self.block(config, window) for window in config.windows()])  # type: ignore[assignment]
        self.lm_head = Linear(config.n_embd, config.vocab_size)

    def hidden(self, idx: Tensor, dtype: torch.dtype, context: Context | None = None) -> Tensor:
        """The final normalised states (B, T, C) of tokens idx (B, T), which without a context begin a text."""
        positions = context.positions if context else torch.arange(idx.size(1), device=idx.device)
        cos, sin = rotary_angles(positions, self.config.head_dim, self.config.rope_base)  # (T, D/2) or (B, T, D/2)
        return norm(self.run_blocks(norm(self.wte(idx).to(dtype)), cos, sin, context=context))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """All initialisation in one place, from its own generator; a sharded model gets the rows of the same weights. U
        is uniform in (-a, a) with the standard deviation given.

            wte                  N(0, 0.8)
            attn.c_q c_k c_v     U, std C^-0.5
            mlp.c_fc             U, std 0.4 C^-0.5
            attn.c_proj          0     each block starts as the identity
            mlp.c_proj           0
            lm_head              N(0, 0.001)    the first loss is ln V
        """
        generator = torch.Generator(device=self.device).manual_seed(seed)
        a = math.sqrt(3) * self.config.n_embd**-0.5  # a uniform in (-a, a) has standard deviation a / sqrt(3)
        fill(self.wte.weight, lambda w: w.normal_(0, 0.8, generator=generator))
        for block in self.blocks:
            attn, mlp = block.attn, block.mlp
            for linear in (attn.c_q, attn.c_k, attn.c_v):
                fill(linear.weight, lambda w: w.uniform_(-a, a, generator=generator))
            fill(mlp.c_fc.weight, lambda w: w.uniform_(-0.4 * a, 0.4 * a, generator=generator))
            fill(attn.c_proj.weight, torch.zero_)
            fill(mlp.c_proj.weight, torch.zero_)
        fill(self.lm_head.weight, lambda w: w.normal_(0, 0.001, generator=generator))
