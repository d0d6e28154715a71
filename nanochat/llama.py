"""Llama (arXiv 2302.13971, and 2307.09288 for its grouped heads): RMSNorm with gains, SwiGLU, rotary positions, GQA.

What it is: token embedding, `n_layer` blocks of `x += attn(norm(x)); x += mlp(norm(x))`, RMSNorm, a head of its own or
the embedding again, no biases, no cap on the logits. transformers knows it as LlamaForCausalLM. Rotary positions turn
the pairs (x_i, x_{i + D/2}) as there; gpt.rotate() turns them the other way, so it is given minus the angles.

Shapes below: B batch, T time, C width, H heads, G key/value heads, D head size, F width of the MLP.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat import gpt
from nanochat.attention import Context, LayerCache, causal_attention
from nanochat.common import UserError
from nanochat.gpt2 import PlainModel, check_hf, check_sizes
from nanochat.model import Linear, fill


@dataclass(frozen=True)
class LlamaConfig:
    """What rebuilds the model, stored in every checkpoint. Raises UserError for shapes that cannot be built."""

    sequence_len: int = 2048  # context in tokens
    vocab_size: int = 65536
    n_layer: int = 20
    n_head: int = 10
    n_kv_head: int = 10
    n_embd: int = 1280
    n_hidden: int = 3456  # F
    tied: bool = False  # the embedding is the head too
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    arch: str = "llama"

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.head_dim % 2:
            raise UserError(f"rotary positions need heads of even size, not {self.head_dim}; choose another --head-dim")
        if self.n_head % self.n_kv_head:
            raise UserError(f"--kv-heads={self.n_kv_head} must divide the {self.n_head} query heads")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def build(self) -> "Llama":
        return Llama(self)

    def windows(self) -> list[int]:
        return [self.sequence_len] * self.n_layer


def config_from_depth(
    depth: int,
    vocab_size: int,
    sequence_len: int,
    aspect_ratio: int = 64,
    head_dim: int | None = None,
    kv_heads: int | None = None,
) -> LlamaConfig:
    """The dial of gpt.config_from_depth. F is 8/3 C, rounded up to a multiple of 64: three matrices of it have as many
    weights as two of 4 C.
    """
    shape = gpt.config_from_depth(depth, vocab_size, sequence_len, aspect_ratio, head_dim, kv_heads)
    n_hidden = 64 * math.ceil(shape.n_embd * 8 / 3 / 64)
    return LlamaConfig(sequence_len, vocab_size, depth, shape.n_head, shape.n_kv_head, shape.n_embd, n_hidden)


class RMSNorm(nn.Module):
    """With a gain; computed in fp32, returned in its input's dtype."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(config.n_embd)), config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=self.eps)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        C, kv = config.n_embd, config.n_kv_head * config.head_dim
        self.c_q, self.c_k, self.c_v, self.c_proj = Linear(C, C), Linear(C, kv), Linear(C, kv), Linear(C, C)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = (part(x).view(B, T, -1, self.config.head_dim) for part in (self.c_q, self.c_k, self.c_v))
        q, k = gpt.rotate(q, cos, sin), gpt.rotate(k, cos, sin)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or G, T, D)
        y = causal_attention(q, k, v, self.config.sequence_len) if cache is None else cache.attend(q, k, v)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """C -> F -> C with SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.c_gate, self.c_fc = (Linear(config.n_embd, config.n_hidden) for _ in range(2))
        self.c_proj = Linear(config.n_hidden, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.norm_1, self.attn = RMSNorm(config), Attention(config)
        self.norm_2, self.mlp = RMSNorm(config), MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None) -> Tensor:
        x = x + self.attn(self.norm_1(x), cos, sin, cache)
        return x + self.mlp(self.norm_2(x))


class Llama(PlainModel):
    config: LlamaConfig

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks: list[Block] = nn.ModuleList([Block(config) for _ in range(config.n_layer)])  # type: ignore[assignment]
        self.norm = RMSNorm(config)
        self.lm_head = self.wte if config.tied else Linear(config.n_embd, config.vocab_size)

    def hidden(self, idx: Tensor, dtype: torch.dtype, context: Context | None = None) -> Tensor:
        """As GPT.hidden."""
        positions = context.positions if context else torch.arange(idx.size(1), device=idx.device)
        cos, sin = gpt.rotary_angles(-positions, self.config.head_dim, self.config.rope_base)  # (T, D/2) or (B, T, D/2)
        return self.norm(self.run_blocks(self.wte(idx).to(dtype), cos, sin, context=context))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """N(0, 0.02) for matrices, 0.02 / sqrt(2 n_layer) for the two of a block whose outputs are added up; gains 1.
        An embedding of its own is N(0, 0.8), as gpt.py's, for which --embedding-lr was tuned.
        """
        generator = torch.Generator(device=self.device).manual_seed(seed)
        for name, p in self.named_parameters():
            std = 0.02 / math.sqrt(2 * self.config.n_layer if name.endswith("c_proj.weight") else 1)
            std = 0.8 if name == "wte.weight" and not self.config.tied else std
            fill(p, partial(nn.init.normal_, std=std, generator=generator) if p.ndim == 2 else nn.init.ones_)


# -----------------------------------------------------------------------------
# The layout of transformers' LlamaForCausalLM

PARTS = {  # of a block: ours, theirs
    "norm_1": "input_layernorm", "attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj", "attn.c_proj": "self_attn.o_proj", "norm_2": "post_attention_layernorm",
    "mlp.c_gate": "mlp.gate_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
}  # fmt: skip
ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
SIZES = {  # ours, as they are called in a config.json
    "sequence_len": "max_position_embeddings", "vocab_size": "vocab_size", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size",
    "n_hidden": "intermediate_size", "tied": "tie_word_embeddings", "norm_eps": "rms_norm_eps",
}  # fmt: skip


def hf_names(config: LlamaConfig) -> dict[str, str]:
    """{our name: theirs} of all weights."""
    names = {"wte": "model.embed_tokens", "norm": "model.norm"} | ({} if config.tied else {"lm_head": "lm_head"})
    for i in range(config.n_layer):
        names |= {f"blocks.{i}.{ours}": f"model.layers.{i}.{theirs}" for ours, theirs in PARTS.items()}
    return {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in names.items()}


def from_hf(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """Our config and weights, by our names, from a config.json and the tensors beside it, which are not copied. Shapes
    are not compared. Raises UserError for a model that is not this one.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # the second before transformers 5
    about = {"num_key_value_heads": config["num_attention_heads"], "tie_word_embeddings": False, **config}
    about |= {"rope_type": rope.get("rope_type", rope.get("type", "default"))}
    about["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    check_hf(
        about, {**ONLY, "rope_type": "default", "head_dim": config["hidden_size"] // config["num_attention_heads"]}
    )
    sizes = {ours: about[theirs] for ours, theirs in SIZES.items()}
    ours = LlamaConfig(**sizes, rope_base=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))))
    names = {theirs: name for name, theirs in hf_names(ours).items()}
    left = {"lm_head.weight"} if ours.tied else set()  # that is the embedding; frequencies are no weights
    kept = {name: tensor for name, tensor in tensors.items() if name not in left and "inv_freq" not in name}
    return ours, {names.get(name, name): tensor for name, tensor in kept.items()}


def to_hf(model: Llama) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors, fp32 and contiguous, that transformers opens as LlamaForCausalLM."""
    config, names = model.config, hf_names(model.config)
    tensors = {names[name]: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    about = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "head_dim": config.head_dim,
    }
    about |= {theirs: getattr(config, ours) for ours, theirs in SIZES.items()} | ONLY
    rope = {"rope_type": "default", "rope_theta": config.rope_base}
    return {**about, "rope_theta": config.rope_base, "rope_parameters": rope}, tensors
