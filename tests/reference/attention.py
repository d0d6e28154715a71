"""Attention one head and one query at a time, and the whole model's loss in plain float64."""

import math

import torch


def attention(q, k, v, mask):
    """q (B, H, T, D), k and v (B, G, S, D), mask (T, S) bool -> (B, H, T, D), looping over everything."""
    B, H, T, D = q.shape
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            g = h // (H // k.shape[1])  # consecutive query heads share a key head
            for t in range(T):
                seen = mask[t].nonzero().flatten()
                scores = torch.stack([q[b, h, t] @ k[b, g, s] for s in seen]) / math.sqrt(D)
                out[b, h, t] = scores.softmax(0) @ v[b, g, seen]
    return out


def loss(hidden, weight, targets, weights, softcap=15.0):
    """sum(weights * cross-entropy) of capped logits, dense."""
    logits = softcap * torch.tanh(hidden @ weight.T / softcap)
    keep = targets >= 0
    nll = torch.nn.functional.cross_entropy(logits[keep], targets[keep], reduction="none")
    return (nll * weights[keep]).sum()
