"""Muon and AdamW for one matrix, written from the papers, in float64 and without batching or ranks."""

import torch


def polar_factor(matrix):
    """The exact orthogonal factor U V^T by singular value decomposition."""
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vt


def adamw(param, grads, lr, beta1, beta2, eps, weight_decay):
    """Apply one AdamW step per gradient (Loshchilov and Hutter, algorithm 2)."""
    m = v = torch.zeros_like(param)
    for t, g in enumerate(grads, 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        param = param - lr * weight_decay * param
        param = param - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    return param
