"""Greedy generation without a cache: the whole sequence is computed again for every token."""

import torch


@torch.no_grad()
def greedy(model, tokens: list[int], max_tokens: int) -> list[int]:
    ids = list(tokens)
    for _ in range(max_tokens):
        logits = model(torch.tensor([ids]))
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(tokens) :]
