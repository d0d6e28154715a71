"""Score a base model: bits per byte on training and validation text, and what a model must beat.

    python -m scripts.base_loss
    torchrun --standalone --nproc_per_node=8 -m scripts.base_loss -- --model-tag=d20 --split-tokens=10485760

Two numbers for each split, each with every byte scored once: bpb, the honest one, in windows that overlap by half;
bpb_quick, which base_train shows on its way, in windows that do not. +- is the standard error over documents.
"""

from typing import Literal

from nanochat.configurator import Natural, Positive, configure

# Model
model_tag: str | None = None  # name of the checkpoint directory (None = the one saved last)
step: Natural | None = None  # checkpoint step (None = the last)
# Evaluation
corpus: str | None = None  # directory name in $NANOCHAT_BASE_DIR/data (None = the only one there)
split_tokens: Positive = 20 * 524288  # tokens of each split to score; a smaller split is scored whole
device_batch_size: Positive | Literal["auto"] = 32  # windows per rank and forward pass (auto = the most that fit)
baselines = True  # also measure what must be beaten: byte frequencies and xz -9 (corpora up to 64 MB)
# Machine
device_type: Literal["auto", "cuda", "mps", "xpu", "cpu"] = "auto"  # cuda also stands for AMD's ROCm
dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # what matmuls compute in
settings = configure(__name__)

import lzma
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np
import pyarrow as pa

from nanochat.checkpoint_manager import find_checkpoint, open_model
from nanochat.common import print0, run_main
from nanochat.compute import compute_cleanup, compute_init
from nanochat.corpus import iter_text, load_corpus
from nanochat.loss_eval import evaluate_bpb, validation_windows
from nanochat.record import open_record
from nanochat.sizing import choose_device_batch

XZ_WINDOW = 64 * 2**20  # the dictionary of xz -9: it cannot look back further, and would be an easy opponent


def main() -> None:
    compute = compute_init(device_type, dtype)
    checkpoint = find_checkpoint("base", model_tag, step)
    model, tokenizer = open_model(checkpoint, compute.device)
    text = load_corpus(corpus)
    T = model.config.sequence_len
    batch_size = choose_device_batch(device_batch_size, model, split_tokens, T, compute, compiled=False)
    record = open_record("base_loss", f"{checkpoint.tag}-step{checkpoint.step}", settings, **compute.about())
    for split, shards in (("train", text.train), ("val", text.val)):
        for name, stride in (("bpb", max(1, T // 2)), ("bpb_quick", T)):
            windows = validation_windows(shards, tokenizer, T, stride, split_tokens)
            result = evaluate_bpb(model, windows, tokenizer, compute, batch_size)
            about = asdict(result)
            about[name] = about.pop("bpb")
            record.write(name, split=split, **about, window=T, stride=stride)
            error = "" if result.stderr is None else f" +- {result.stderr:.4f}"
            scored = f"{result.bytes:,} bytes, each scored once, documents: {result.documents:,}"
            print0(f"{split} {name} {result.bpb:.4f}{error}: {scored}, windows of {T}, stride {stride}")
    if baselines and text.val.tokens:
        print0("baselines left out: they need text, and this corpus holds token ids")
    elif baselines and compute.is_master:
        measured = {"byte_unigram": byte_unigram_bpb(iter_text(text.val))}
        print0(f"to beat: byte frequencies {measured['byte_unigram']:.4f}")
        size = text.manifest["totals"]["train"]["text_bytes"]
        if size <= XZ_WINDOW:
            measured["xz"] = xz_bpb(iter_text(text.train), iter_text(text.val))
            print0(f"to beat: xz -9 of train + val, the part for val {measured['xz']:.4f}")
        else:
            print0(f"xz -9 left out: {size:,} bytes of training text are more than its dictionary of {XZ_WINDOW:,}")
        record.write("baselines", **measured)
    record.close()
    compute_cleanup()


def byte_unigram_bpb(texts: Iterable[pa.Array]) -> float:
    """Entropy of the byte frequencies in bits per byte: what knowing nothing but letter counts achieves."""
    counts = np.zeros(256, dtype=np.int64)
    for text in texts:
        counts += np.bincount(np.frombuffer("".join(text.to_pylist()).encode(), dtype=np.uint8), minlength=256)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


def xz_bpb(train: Iterable[pa.Array], validation: Iterable[pa.Array]) -> float:
    """Bits per validation byte that `xz -9` adds when the validation text follows the training text: it may copy from
    everything the model was trained on, within its 64 MB dictionary. Takes about two seconds per MB of training text.
    """
    known, new = (
        "".join(document for text in texts for document in text.to_pylist()).encode() for texts in (train, validation)
    )
    with ThreadPoolExecutor(2) as pool:  # lzma releases the GIL
        alone, both = pool.map(lambda data: len(lzma.compress(data, preset=9)), (known, known + new))
    return 8 * (both - alone) / len(new)


if __name__ == "__main__":
    run_main(main)
