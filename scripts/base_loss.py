"""Score a base model: bits per byte on training and validation text, and what a model must beat.

    python -m scripts.base_loss
    torchrun --standalone --nproc_per_node=8 -m scripts.base_loss -- --model-tag=d20 --split-tokens=10485760

Two numbers for each split, each with every byte scored once: bpb, the honest one, in windows that overlap by half;
bpb_quick, which base_train shows on its way, in windows that do not. +- is the standard error over documents.
"""

from typing import Literal

from nanochat.configurator import configure

# Model
model_tag: str | None = None  # name of the checkpoint directory (None = the one saved last)
step: int | None = None  # checkpoint step (None = the last)
# Evaluation
corpus: str | None = None  # directory name in $NANOCHAT_BASE_DIR/data (None = the only one there)
split_tokens = 20 * 524288  # tokens of each split to score; a smaller split is scored whole
device_batch_size = 32  # windows per rank and forward pass
baselines = True  # also measure what must be beaten: byte frequencies and xz -9 (corpora up to 64 MB)
# Machine
device_type: Literal["auto", "cuda", "mps", "xpu", "cpu"] = "auto"  # cuda also stands for AMD's ROCm
dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # what matmuls compute in
settings = configure(__name__)

from nanochat.checkpoint_manager import find_checkpoint, open_model
from nanochat.common import print0, run_main
from nanochat.compute import compute_cleanup, compute_init
from nanochat.corpus import iter_text, load_corpus
from nanochat.loss_eval import byte_unigram_bpb, evaluate_bpb, xz_bpb
from nanochat.record import open_record

XZ_WINDOW = 64 * 2**20  # the dictionary of xz -9: it cannot look back further, and would be an easy opponent


def main() -> None:
    compute = compute_init(device_type, dtype)
    checkpoint = find_checkpoint("base", model_tag, step)
    model, tokenizer = open_model(checkpoint, compute.device)
    text = load_corpus(corpus)
    splits = {"train": text.train, "val": text.val}
    T = model.config.sequence_len
    record = open_record("base_loss", f"{checkpoint.tag}-step{checkpoint.step}", settings, **compute.about())
    for split, shards in splits.items():
        for name, stride in (("bpb", max(1, T // 2)), ("bpb_quick", T)):
            texts = iter_text(shards)
            result = evaluate_bpb(model, tokenizer, texts, compute, device_batch_size, stride, split_tokens)
            about = {"stderr": result.stderr, "documents": result.documents, "bytes": result.bytes}
            record.write(
                name, split=split, **{name: result.bpb}, **about, tokens=result.tokens, window=T, stride=stride
            )
            error = "" if result.stderr is None else f" +- {result.stderr:.4f}"
            print0(
                f"{split} {name} {result.bpb:.4f}{error}: {result.bytes:,} bytes, each scored once, documents: "
                f"{result.documents:,}, windows of {T}, stride {stride}"
            )
    if baselines and compute.is_master:
        measured = {"byte_unigram": byte_unigram_bpb(iter_text(text.val))}
        print0(f"to beat: byte frequencies {measured['byte_unigram']:.4f}")
        size = sum(entry["text_bytes"] for entry in text.manifest["train"])
        if size <= XZ_WINDOW:
            measured["xz"] = xz_bpb(iter_text(text.train), iter_text(text.val))
            print0(f"to beat: xz -9 of train + val, the part for val {measured['xz']:.4f}")
        else:
            print0(f"xz -9 left out: {size:,} bytes of training text are more than its dictionary of {XZ_WINDOW:,}")
        record.write("baselines", **measured)
    record.close()
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
