"""CORE one item at a time: the item's prompts are padded into one batch, all logits are made, and losses read off them.

Takes the rows of a task's file as they are; shares nothing with nanochat.core_eval.
"""

import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F


def read_rows(path: Path) -> list[dict]:
    """The lines of a task's file in the order in which they are scored."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    random.Random(1337).shuffle(rows)
    return rows


def prompts_of(rows: list[dict], index: int, kind: str, num_fewshot: int, delimiter: str) -> list[str]:
    others = [i for i in range(len(rows)) if i != index]
    shots = [rows[i] for i in random.Random(1234 + index).sample(others, num_fewshot)]
    row = rows[index]
    if kind == "multiple_choice":
        head = "".join(f"{s['query']}{delimiter}{s['choices'][s['gold']]}\n\n" for s in shots)
        return [f"{head}{row['query']}{delimiter}{choice}" for choice in row["choices"]]
    if kind == "schema":
        head = "".join(f"{s['context_options'][s['gold']]}{delimiter}{s['continuation']}\n\n" for s in shots)
        return [f"{head}{context}{delimiter}{row['continuation']}" for context in row["context_options"]]
    head = "".join(f"{s['context'].strip()}{delimiter}{s['continuation']}\n\n" for s in shots)
    text = f"{head}{row['context'].strip()}{delimiter}"
    return [text.strip(), text + row["continuation"]]


def common(sequences: list[list[int]]) -> int:
    """Length of the common beginning."""
    n = 0
    while all(len(s) > n and s[n] == sequences[0][n] for s in sequences):
        n += 1
    return n


@torch.no_grad()
def answer(
    model, tokenizer, rows, index, kind, num_fewshot=0, delimiter=" ", context=None, dtype=torch.float32
) -> dict:
    """{right, losses}: the mean loss of each choice in nats per token; where losses tie within 1e-5 the first wins."""
    texts = prompts_of(rows, index, kind, num_fewshot, delimiter)
    sequences = tokenizer.encode(texts, prepend=tokenizer.get_bos_token_id())
    if kind == "language_modeling":
        start = common(sequences)
        sequences = sequences[1:]
        starts = [start]
    elif kind == "multiple_choice":
        starts = [common(sequences)] * len(sequences)
    else:
        suffix = common([sequence[::-1] for sequence in sequences])
        starts = [len(sequence) - suffix for sequence in sequences]
    context = context or model.config.sequence_len
    starts = [max(1, s - max(0, len(ids) - context)) for s, ids in zip(starts, sequences, strict=True)]
    sequences = [ids[-context:] for ids in sequences]
    width = max(map(len, sequences))
    padded = torch.tensor([ids + [0] * (width - len(ids)) for ids in sequences], device=next(model.parameters()).device)
    logits = model(padded, dtype=dtype).float()  # (choices, T, V)
    losses, hits = [], []
    for row, ids, start in zip(logits, sequences, starts, strict=True):
        predicted, targets = row[start - 1 : len(ids) - 1], torch.tensor(ids[start:], device=row.device)
        losses.append(F.cross_entropy(predicted, targets).item() if len(targets) else float("inf"))
        hits.append(len(targets) > 0 and bool((predicted.argmax(dim=-1) == targets).all()))
    if kind == "language_modeling":
        return {"right": hits[0], "losses": losses}
    prediction = next(i for i, loss in enumerate(losses) if loss <= min(losses) + 1e-5)
    return {"right": prediction == rows[index]["gold"], "losses": losses}
