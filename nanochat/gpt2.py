"""GPT-2 (Radford et al. 2019), as its published weights have it and nanoGPT trains it; with ALiBi if asked.

What it is: token embedding + table of positions, then `n_layer` blocks of `x += attn(ln_1(x)); x += mlp(ln_2(x))`,
LayerNorm, and the embedding again as the head, with nothing that caps its logits. LayerNorms have gains; biases are on
or off everywhere; GELU in its tanh form; dropout on embeddings and on what the parts of a block add, not on attention's
weights. transformers knows it as GPT2LMHeadModel.

With positions="alibi" there is no table. ALiBi (arXiv 2108.12409) adds -m (i - j) to the score of query i and key j,
with a slope m for each head, so that a model can read further than it was trained. Here that is part of the dot
product: see alibi_channels(). Training, cached decoding and evaluation know nothing of it.

Shapes below: B batch, T time, C width, H heads, D head size, V vocabulary. The plain loss is llama.py's too.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat import gpt
from nanochat.attention import Context, LayerCache, causal_attention, round_length
from nanochat.common import UserError
from nanochat.model import LanguageModel, Linear, fill

SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
ALIBI_CHANNELS = 8  # that a head gets for its distances: 3, and zeros, because attention's kernels want multiples of 8


@dataclass(frozen=True)
class GPT2Config:
    """What rebuilds the model, stored in every checkpoint. Raises UserError for shapes that cannot be built."""

    sequence_len: int = 1024  # context in tokens, and the length of the table of positions
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    positions: str = "learned"  # or "alibi"
    bias: bool = True
    dropout: float = 0.0
    arch: str = "gpt2"

    def __post_init__(self) -> None:
        check_sizes(self)

    @property
    def n_kv_head(self) -> int:
        return self.n_head

    @property
    def head_dim(self) -> int:
        """What a cache holds of a key."""
        return self.n_embd // self.n_head + (ALIBI_CHANNELS if self.positions == "alibi" else 0)

    def build(self) -> "GPT2":
        return GPT2(self)

    def windows(self) -> list[int]:
        return [self.sequence_len] * self.n_layer


def check_sizes(config: Any) -> None:
    """Raises UserError for a config whose width does not split into its heads, or that has nothing of something."""
    if min(config.n_layer, config.n_head, config.n_embd, config.vocab_size, config.sequence_len) < 1:
        raise UserError(f"every size of a model must be at least 1: {asdict(config)}")
    if config.n_embd % config.n_head:
        raise UserError(f"width {config.n_embd} does not split into {config.n_head} heads; choose another --head-dim")


def config_from_depth(
    depth: int, vocab_size: int, sequence_len: int, aspect_ratio: int = 64, head_dim: int | None = None, **options: Any
) -> GPT2Config:
    """The dial of gpt.config_from_depth, with heads of 64 channels at any width: 12 is GPT-2's smallest size. Options:
    positions, bias and dropout.
    """
    shape = gpt.config_from_depth(depth, vocab_size, sequence_len, aspect_ratio, head_dim or 64)
    return GPT2Config(sequence_len, vocab_size, depth, shape.n_head, shape.n_embd, **options)


# -----------------------------------------------------------------------------
# A head without a cap


def plain_loss_slice(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """model.head_loss_slice without the cap: losses (n,) in nats, and d(sum of token_weights * loss)/d(logits), or
    without gradient whether the target is the likeliest token.
    """
    logits = F.linear(hidden, weight).float()  # (n, V)
    total = logits.logsumexp(dim=-1, keepdim=True)
    losses = total - logits.gather(-1, targets[:, None])  # (n, 1)
    if not with_grad:
        return losses.squeeze(-1), logits.argmax(dim=-1) == targets
    w = token_weights[:, None]
    grad = (torch.exp(logits - total) * w).to(hidden.dtype)
    target_grad = w * torch.expm1(-losses)  # p - 1, in fp32: rounded before the subtraction it would often be 0
    return losses.squeeze(-1), grad.scatter(-1, targets[:, None], target_grad.to(hidden.dtype))


class PlainModel(LanguageModel):
    """A model whose logits are what its head gives."""

    def __init__(self) -> None:
        super().__init__()
        self.loss_slice = plain_loss_slice

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) in fp32."""
        return F.linear(hidden, self.lm_head.weight.to(hidden.dtype)).float()


# -----------------------------------------------------------------------------
# ALiBi


def alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """The paper's slope of each head (H,): for a power of two 2^(-8/H), 2^(-16/H), ..., 2^-8. Any other number has
    those of the power of two below it, then every second one of the power above.
    """
    power = 1 << (heads.bit_length() - 1)
    i = torch.arange(heads, device=device, dtype=torch.float32)
    return torch.exp2(torch.where(i < power, -8 * (i + 1) / power, -4 * (2 * (i - power) + 1) / power))


def alibi_channels(positions: Tensor, config: GPT2Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What ALiBi adds to queries (..., H, T, 8) and keys (..., 1, T, 8) at positions (T,) or (B, T). Their product,
    which attention divides by the root of the head size, is m (j - i) for query i and key j:

        (256 m, m, -m i) . (j // 256, j % 256, 1)

    bf16 knows integers up to 256 exactly, so up to 65,536 keys each has a place of its own. What is lost of m i is the
    same for all keys of a query, and softmax does not see it: it only keeps scores small where weights are not.
    """
    slopes = alibi_slopes(config.n_head, positions.device)[:, None, None] * config.head_dim**0.5  # (H, 1, 1)
    at = positions.float()[..., None, :, None]  # (..., 1, T, 1)
    one = torch.ones_like(at)
    queries = slopes * torch.cat([256 * one, one, -at], dim=-1)
    keys = torch.cat([at.div(256, rounding_mode="floor"), at.remainder(256), one], dim=-1)
    return tuple(F.pad(channels, (0, ALIBI_CHANNELS - 3)).to(dtype) for channels in (queries, keys))  # type: ignore[return-value]


def append(x: Tensor, channels: Tensor) -> Tensor:
    """x (B, H, T, D) with more channels (..., T, 8) at the end."""
    return torch.cat([x, channels.expand(*x.shape[:-1], -1)], dim=-1)


# -----------------------------------------------------------------------------
# The parts


def drop(x: Tensor, p: float) -> Tensor:
    """Dropout where a gradient is wanted, which no evaluation does."""
    return F.dropout(x, p) if p and torch.is_grad_enabled() else x


class LayerNorm(nn.Module):
    """With a gain, and a bias if asked; in its input's dtype."""

    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, eps=1e-5)


class Attention(nn.Module):
    """Causal self-attention; `distances` are alibi_channels(), None with learned positions."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.c_q, self.c_k, self.c_v, self.c_proj = (Linear(config.n_embd, config.n_embd, config.bias) for _ in "qkvp")

    def forward(
        self, x: Tensor, distances: tuple[Tensor, Tensor] | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        B, T, C = x.shape
        D = C // self.config.n_head
        q, k, v = (part(x).view(B, T, -1, D).transpose(1, 2) for part in (self.c_q, self.c_k, self.c_v))  # (B, H, T, D)
        if distances:
            q = append(q * (self.config.head_dim / D) ** 0.5, distances[0])  # its scores are still divided by D^0.5
            k, v = append(k, distances[1]), F.pad(v, (0, ALIBI_CHANNELS))
        y = causal_attention(q, k, v, self.config.sequence_len) if cache is None else cache.attend(q, k, v)
        return self.c_proj(y[..., :D].transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        C, self.dropout = config.n_embd, config.dropout
        self.ln_1 = LayerNorm(C, config.bias)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(C, config.bias)
        self.mlp = nn.ModuleDict({"c_fc": Linear(C, 4 * C, config.bias), "c_proj": Linear(4 * C, C, config.bias)})

    def forward(
        self, x: Tensor, distances: tuple[Tensor, Tensor] | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        x = x + drop(self.attn(self.ln_1(x), distances, cache), self.dropout)
        h = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")  # (B, T, 4C)
        return x + drop(self.mlp["c_proj"](h), self.dropout)


# -----------------------------------------------------------------------------
# The whole


class GPT2(PlainModel):
    config: GPT2Config

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.sequence_len, config.n_embd) if config.positions == "learned" else None
        self.blocks: list[Block] = nn.ModuleList([Block(config) for _ in range(config.n_layer)])  # type: ignore[assignment]
        self.ln_f = LayerNorm(config.n_embd, config.bias)
        self.lm_head = self.wte  # the same module: one weight, whose only name is wte.weight

    def hidden(self, idx: Tensor, dtype: torch.dtype, context: Context | None = None) -> Tensor:
        """As GPT.hidden. Raises UserError for a text longer than the table of positions."""
        most, x, distances = self.config.sequence_len, self.wte(idx), None
        positions = context.positions if context else torch.arange(idx.size(1), device=idx.device)
        if not context and self.wpe and idx.size(1) > round_length(most, idx.device):
            raise UserError(f"{idx.size(1)} tokens: this model has learned {most} positions; only alibi has no end")
        if self.wpe:
            x = x + self.wpe(positions.clamp(max=most - 1))  # what lies beyond is padding
        else:
            distances = alibi_channels(positions, self.config, dtype)
        return self.ln_f(self.run_blocks(drop(x.to(dtype), self.config.dropout), distances, context=context))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """GPT-2's: N(0, 0.02) for matrices and tables, 0.02 / sqrt(2 n_layer) for the two of a block whose outputs are
        added up; gains 1, biases 0. One generator; a sharded model gets the rows of the same weights.
        """
        generator = torch.Generator(device=self.device).manual_seed(seed)
        for name, p in self.named_parameters():
            std = 0.02 / math.sqrt(2 * self.config.n_layer if name.endswith("c_proj.weight") else 1)
            if p.ndim == 2:
                fill(p, partial(nn.init.normal_, std=std, generator=generator))
            else:
                fill(p, torch.zero_ if name.endswith("bias") else nn.init.ones_)


# -----------------------------------------------------------------------------
# The layout of transformers' GPT2LMHeadModel


ONLY = {  # settings of a config.json, and what they must be
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_inner": None, "tie_word_embeddings": True,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
}  # fmt: skip


def check_hf(config: Mapping[str, Any], only: Mapping[str, Any]) -> None:
    """Raises UserError for the first setting of a config.json that this architecture cannot have."""
    for name, value in only.items():
        if config.get(name, value) != value:
            raise UserError(f"config.json has {name}={config[name]!r}; here it can only be {value!r}")


def from_hf(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[GPT2Config, dict[str, Tensor]]:
    """Our config and weights, by our names, from a config.json and the tensors beside it, which are not copied. Shapes
    are not compared. Raises UserError for a model that is not this one.

    The layout keeps queries, keys and values in one matrix, and every matrix of a block the other way round, (inputs,
    outputs). Published files leave out the prefix "transformer." and add masks, which are no weights.
    """
    check_hf(config, ONLY)
    sizes = [config[name] for name in ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")]
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")) or name == "lm_head.weight":  # that is wte.weight
            continue
        name = "blocks." + name[2:] if name.startswith("h.") else name
        tensor = tensor.T if ".c_" in name and tensor.ndim == 2 else tensor
        parts = tensor.chunk(3) if ".c_attn." in name else [tensor]
        names = [name.replace("c_attn", f"c_{kind}") for kind in "qkv"[: len(parts)]]
        weights.update(zip(names, parts, strict=True))
    return GPT2Config(*sizes), weights


def to_hf(model: GPT2) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors, fp32 and contiguous, that transformers opens as GPT2LMHeadModel. Biases that the model
    does without are zeros there. Raises UserError for ALiBi, which GPT2LMHeadModel does not have.
    """
    config, weights = model.config, {name: p.detach().cpu() for name, p in model.named_parameters()}
    if config.positions == "alibi":
        raise UserError("a gpt2 with --positions=alibi cannot leave: GPT2LMHeadModel only has learned positions")
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if ".c_k." in name or ".c_v." in name:
            continue  # they go with c_q
        if ".c_q." in name:
            weight = torch.cat([weights[name.replace("c_q", f"c_{kind}")] for kind in "qkv"])
            name = name.replace("c_q", "c_attn")
        name = "transformer." + name.replace("blocks.", "h.")
        tensors[name] = (weight.T if ".c_" in name and weight.ndim == 2 else weight).contiguous()
        if name.endswith(".weight") and (".c_" in name or ".ln_" in name):
            tensors.setdefault(name.removesuffix("weight") + "bias", torch.zeros(tensors[name].size(-1)))
    sizes = {"n_positions": config.sequence_len, "vocab_size": config.vocab_size, "n_layer": config.n_layer}
    sizes |= {"n_ctx": config.sequence_len, "n_head": config.n_head, "n_embd": config.n_embd}
    about = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "dtype": "float32"}
    drops = dict.fromkeys(("embd_pdrop", "resid_pdrop"), config.dropout) | {"attn_pdrop": 0.0}
    return {**about, **sizes, **drops, **ONLY}, tensors
