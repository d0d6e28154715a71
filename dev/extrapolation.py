"""How far models read beyond the length they were trained on: ALiBi, rotary and learned positions, by character.

    python -m dev.extrapolation --file=../shared/data/tinyshakespeare/input.txt

Trains a small model of each kind on rows of --max-seq-len characters of a text file, nine tenths of it, and scores the
last tenth in windows of 1, 2, 4 and 8 times as many. Prints a table, and writes report/extrapolation.md and .html with
the curves. The same text is scored at each length, so a model that uses what it sees becomes better; learned positions
end where training did, and say so. The published form: Press et al., Train Short, Test Long (arXiv 2108.12409).
"""

from nanochat.configurator import Positive, Rate, Seed, configure

# Text
file: str | None = None  # the text file
# Models
depth: Positive = 4  # number of Transformer layers
aspect_ratio: Positive = 32  # width / depth
head_dim: Positive = 32  # channels per attention head
max_seq_len: Positive = 64  # characters of a row in training
# Training
num_iterations: Positive = 800  # optimizer steps
device_batch_size: Positive = 16  # rows per step
matrix_lr: Rate = 0.02  # Muon
embedding_lr: Rate = 0.2  # AdamW, for an embedding of its own
unembedding_lr: Rate = 0.004  # AdamW, for the head and the rest
seed: Seed = 42  # of weights and rows
eval_tokens: Positive = 65536  # characters scored at each length
settings = configure(__name__)

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nanochat import report
from nanochat import report_page as page
from nanochat.common import UserError, print0, run_main
from nanochat.compute import Compute, compute_init
from nanochat.model import LanguageModel, build_model, choose_config
from nanochat.report_page import Curve, Series
from nanochat.train import Stream, accumulate, agree, rates_at, update

KINDS = {
    "ALiBi": ("gpt2", {"positions": "alibi"}),
    "rotary": ("gpt", {}),
    "learned": ("gpt2", {"positions": "learned"}),
}
TIMES = (1, 2, 4, 8)  # the training length


def main() -> None:
    train, validation, symbols = read_symbols()
    compute = compute_init("cpu", "float32", seed)
    found: dict[str, dict[int, float | str]] = {}
    for kind, (arch, options) in KINDS.items():
        shape = {"aspect_ratio": aspect_ratio, "head_dim": head_dim, **options}
        model = build_model(choose_config(arch, depth, symbols, max_seq_len, **shape), compute.device, seed)
        learn(model, random_rows(train), compute)
        found[kind] = {}
        for times in TIMES:
            found[kind][times] = loss_at(model, validation, times * max_seq_len)
            print0(f"{kind}: {times * max_seq_len} characters, {figure(found[kind][times])}")
    show(found, symbols)


def read_symbols() -> tuple[Tensor, Tensor, int]:
    """The file's characters as numbers, for training and for validation, and how many different ones there are."""
    if file is None or not (path := Path(file).expanduser()).is_file():
        raise UserError(f"--file={file}: expected a text file, such as tinyshakespeare's input.txt")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--file={file}: {error}; expected a text file in UTF-8") from None
    symbols = sorted(set(text))
    places = {symbol: place for place, symbol in enumerate(symbols)}
    ids = torch.tensor([places[symbol] for symbol in text])
    cut = len(ids) * 9 // 10
    if len(ids) - cut <= max(TIMES) * max_seq_len:
        raise UserError(f"--file={file}: its last tenth, {len(ids) - cut:,} characters, is no longer than a window")
    return ids[:cut], ids[cut:], len(symbols)


def random_rows(ids: Tensor) -> Iterator[tuple[Tensor, Tensor, None]]:
    """Inputs and targets (B, T) from anywhere in the text, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(ids) - max_seq_len, (device_batch_size, 1), generator=generator)
        rows = ids[starts + torch.arange(max_seq_len + 1)]
        yield rows[:, :-1], rows[:, 1:], None


def learn(model: LanguageModel, stream: Stream, compute: Compute) -> None:
    optimizers = model.setup_optimizers(matrix_lr, embedding_lr, unembedding_lr, dtype=compute.dtype)
    for step in range(num_iterations):
        agreed = agree(accumulate(model, stream, 1, compute), 0, optimizers, compute)
        update(optimizers, agreed, rates_at(step, num_iterations, 0.0, 0.4, 0.0), compute)


@torch.no_grad()
def loss_at(model: LanguageModel, ids: Tensor, length: int) -> float | str:
    """Mean loss in nats over windows of `length` characters, side by side; where the model cannot read so many, why."""
    windows = min(len(ids) - 1, eval_tokens) // length
    inputs, targets = (ids[start:][: windows * length].view(windows, length) for start in (0, 1))
    try:
        longer = build_model(replace(model.config, sequence_len=length), ids.device)
        for (name, p), (_, trained) in zip(longer.named_parameters(), model.named_parameters(), strict=True):
            if p.shape != trained.shape:
                return f"{name} has {len(trained)} positions"
            p.copy_(trained)
        losses = [longer(*rows) for rows in zip(inputs.split(16), targets.split(16), strict=True)]
    except UserError as error:
        return str(error)
    sizes = [len(rows) for rows in inputs.split(16)]
    return float(sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes))


def figure(value: float | str) -> str:
    return f"{value:.3f}" if isinstance(value, float) else f"refused: {value}"


def show(found: dict[str, dict[int, float | str]], symbols: int) -> None:
    """The table and the curves."""
    head = ["positions", *(f"{times * max_seq_len}" for times in TIMES)]
    rows = [[kind, *(figure(value) for value in values.values())] for kind, values in found.items()]
    lines = [
        Series(
            kind,
            "line",
            [(times * max_seq_len, value) for times, value in values.items() if isinstance(value, float)],
            hue,
        )
        for hue, (kind, values) in enumerate(found.items())
    ]
    drawn = [Curve("Loss beyond the training length", "nats per character", lines, "characters of a window")]
    run = f"d{depth} x {aspect_ratio}, {num_iterations} steps of {device_batch_size} rows of {max_seq_len}"
    about = f"{symbols} symbols; {run}; the last tenth of {file}"
    text = page.to_markdown(
        "Extrapolation", about, [("Loss", [page.table(head, rows, "l" + "r" * len(TIMES)), page.curves(drawn)])]
    )
    report.write("extrapolation", text, drawn)


if __name__ == "__main__":
    run_main(main)
