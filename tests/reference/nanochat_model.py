"""The model that nanochat trained in October 2025, as its description says it, one step per line and fp32 throughout.

Weights are a plain dict under nanochat's names. Embedding, RMSNorm; per layer attention and a squared-ReLU MLP, each on
the normalised stream; RMSNorm, untied head, logits capped at 15. Positions turn the complex numbers made of the two
halves of each head by minus position x 10,000^(-i / half); queries and keys are normalised after that.
"""

import torch
from torch import Tensor


def random_weights(config: dict[str, int], generator: torch.Generator) -> dict[str, Tensor]:
    """Weights in which every part matters (a trained model's are not zero either); the embedding in bf16."""
    C, V = config["n_embd"], config["vocab_size"]
    kv = config["n_kv_head"] * (C // config["n_head"])
    shapes = {"transformer.wte.weight": (V, C), "lm_head.weight": (V, C)}
    for i in range(config["n_layer"]):
        layer = f"transformer.h.{i}"
        shapes |= {f"{layer}.attn.c_{name}.weight": (rows, C) for name, rows in (("q", C), ("k", kv), ("v", kv))}
        shapes |= {f"{layer}.attn.c_proj.weight": (C, C)}
        shapes |= {f"{layer}.mlp.c_fc.weight": (4 * C, C), f"{layer}.mlp.c_proj.weight": (C, 4 * C)}
    weights = {name: torch.randn(shape, generator=generator) * shape[1] ** -0.5 for name, shape in shapes.items()}
    weights["lm_head.weight"] *= 2  # so that the cap bends some logits
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"].bfloat16()
    return weights


def norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def turn(x: Tensor) -> Tensor:
    """x (T, H, D) by its positions."""
    T, _, D = x.shape
    angles = torch.arange(T)[:, None] * 10_000.0 ** -(torch.arange(D // 2) / (D // 2))  # (T, D / 2)
    pairs = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.exp(-1j * angles)[:, None]
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def logits(weights: dict[str, Tensor], config: dict[str, int], ids: Tensor) -> Tensor:
    """(T, V) of ids (T,)."""
    T, H, G = len(ids), config["n_head"], config["n_kv_head"]
    D = config["n_embd"] // H
    x = norm(weights["transformer.wte.weight"].float()[ids])
    for i in range(config["n_layer"]):
        w = {name: weights[f"transformer.h.{i}.{name}.weight"] for name in ("attn.c_q", "attn.c_k", "attn.c_v")}
        w |= {name: weights[f"transformer.h.{i}.{name}.weight"] for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
        h = norm(x)
        q = norm(turn((h @ w["attn.c_q"].T).view(T, H, D)))
        k = norm(turn((h @ w["attn.c_k"].T).view(T, G, D)))
        v = (h @ w["attn.c_v"].T).view(T, G, D)
        heads = []
        for head in range(H):
            group = head // (H // G)
            scores = q[:, head] @ k[:, group].T / D**0.5
            future = torch.ones(T, T, dtype=torch.bool).triu(1)
            heads.append(scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ v[:, group])
        x = x + torch.cat(heads, dim=-1) @ w["attn.c_proj"].T
        x = x + (norm(x) @ w["mlp.c_fc"].T).clamp(min=0).square() @ w["mlp.c_proj"].T
    return 15 * torch.tanh(norm(x) @ weights["lm_head.weight"].T / 15)
