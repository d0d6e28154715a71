"""Attention in training: one function, and the room for faster kernels of it.

Promises: the same sums whatever computes them, to rounding; tests/reference/attention.py is the slow twin.
Shapes: B batch, T queries, S keys, H heads, G key/value heads, D head size.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_BLOCK = 128
LENGTHS = {"cuda": 64}  # of what lengths attention sees multiples only, by kind of device


def round_length(n: int, device: torch.device) -> int:
    """Tokens to make room for where n are needed and a mask or nothing hides the rest. On Hopper torch 2.11 and later
    takes cuDNN's attention, which makes a plan, 23 to 37 ms of the host's time, for each shape that it has not seen.
    """
    step = LENGTHS.get(device.type, 1)
    return -(-n // step) * step


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Softmax attention of q (B, H, T, D) over k, v (B, G, T, D): each position sees itself and the window - 1 before
    it.

    When training on CPU, contexts up to 1,024 are written out in blocks of 128 queries, each with just the keys it may
    see: two batched bf16 matmuls and a fused softmax take 8.5 ms where torch's flash kernel takes 19 (forward and
    backward, 16 rows of 256 tokens, 3 heads of 64, two Zen 5 cores). Elsewhere it is torch's kernel (forward alone 3.5
    ms to the blocks' 22), with a dense mask where the window is shorter than the context.
    """
    H, T, D = q.shape[1:]
    G = k.shape[1]
    if not torch.is_grad_enabled() or q.device.type != "cpu" or T > 1024:
        mask = causal_mask(T, T, window, q.device) if window < T else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=H != G)
    if H != G:
        k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
    outputs = []
    for start in range(0, T, QUERY_BLOCK):
        end, first = min(start + QUERY_BLOCK, T), max(0, start - window + 1)
        scores = (q[:, :, start:end] @ k[:, :, first:end].mT).float() * D**-0.5  # (B, H, <= 128, keys)
        mask = causal_mask(end - start, end - first, window, q.device)
        weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1).to(q.dtype)
        outputs.append(weights @ v[:, :, first:end])
    return torch.cat(outputs, dim=2)


def causal_mask(T: int, S: int, window: int, device: torch.device | str) -> Tensor:
    """(T, S) bool: query t stands at position S - T + t and sees itself and the window - 1 positions before it."""
    ahead = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)[None, :]
    return (ahead >= 0) & (ahead < window)


class LayerCache(Protocol):
    """What a layer's queries look at, if not simply at the tokens before them: engine.KVCache, core_eval.Branches."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, late: Tensor | None = None) -> Tensor:
        """Attention (B, H, T, D) of q (B, H, T, D), where k, v (B, G, T, D) are the same tokens' keys and values. In
        the channels `late` (D,), a token's key is that of the one before it; a first one's is 0.
        """


class Context(NamedTuple):
    """Where tokens (B, T) stand that are not the beginning of a text."""

    positions: Tensor  # (T,) or (B, T)
    previous: Tensor  # (B, T) the token before each; the first of a text follows itself
    caches: Sequence[LayerCache | None]  # one for each layer
