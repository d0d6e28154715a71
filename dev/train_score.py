"""The scorer of dev/bench_train.py: a process of its own that reads one checkpoint, whoever wrote it.

`python train_score.py ours|peer CHECKPOINT`, the root of the code that made it in PYTHONPATH. Documents come as JSON
on stdin, {"documents": [[id, ...], ...], "bos": id, "context": T}; nats of each go to stdout. Every token is scored
once: windows of T tokens, BOS in front of each, the first of a document counted whole, of every other its second half.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

Predict = Callable[[Tensor], Tensor]  # ids (B, T) -> logits (B, T, V)


def main(arm: str, checkpoint: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the code under test prints
    asked = json.load(sys.stdin)
    predict = {"ours": load_ours, "peer": load_peer}[arm](Path(checkpoint))
    nats = [0.0] * len(asked["documents"])
    with torch.inference_mode():
        rows = list(windows(**asked))
        for batch in (rows[i : i + 32] for i in range(0, len(rows), 32)):
            inputs, targets = (torch.stack(column) for column in list(zip(*batch, strict=True))[1:])
            logits = predict(inputs).float().transpose(1, 2)
            losses = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none").double().sum(dim=1)
            for (document, *_), loss in zip(batch, losses.tolist(), strict=True):
                nats[document] += loss
    print(json.dumps(nats), file=answers)


def windows(documents: list[list[int]], bos: int, context: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """A document's number, inputs (T,) and targets (T,), -1 where one doesn't count or there is none."""
    for number, ids in enumerate(documents):
        for start in range(0, max(1, len(ids) - context // 2), context // 2):
            part = torch.tensor(ids[start : start + context])
            targets = F.pad(part, (0, context - len(part)), value=-1)
            inputs = F.pad(part[:-1], (1, context - len(part)), value=0)
            inputs[0] = bos
            if start:
                targets[: context // 2] = -1
            yield number, inputs, targets


def load_ours(checkpoint: Path) -> Predict:
    from nanochat.checkpoint_manager import open_checkpoint, open_model

    return open_model(open_checkpoint(checkpoint), torch.device("cpu"))[0]


def load_peer(checkpoint: Path) -> Predict:
    """Of nanochat 92d63d4: model_<step>.pt, and meta_<step>.json beside it."""
    os.environ["NANOCHAT_DTYPE"] = "float32"
    from nanochat.gpt import GPT, GPTConfig

    about = json.loads(checkpoint.with_name(checkpoint.stem.replace("model", "meta") + ".json").read_text())
    model = GPT(GPTConfig(**about["model_config"]))
    model.init_weights()  # buffers, which are not saved
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    return model.eval().float()


if __name__ == "__main__":
    main(*sys.argv[1:])
