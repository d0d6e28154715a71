"""Corpora in which a small model learns a rule or does not: grokking (arXiv 2201.02177) and multiplication by digits.

    python -m dev.make_arithmetic --operation=x/y --p=53 --train-share=0.6
    python -m scripts.base_train dev/configs/grokking.py
    python -m dev.make_arithmetic --task=multiplication --digits=1 --train-share=1
    python -m scripts.base_train dev/configs/multiplication.py

A document is one line of the table, `12o9=34` with a token for each number below p, or `12*34=0408` with one for each
digit; only what follows `=` is learnt and scored. A share of the lines, drawn by the seed, trains; the others validate.
The corpus has its own vocabulary. Does not: make a line twice.
"""

from typing import Literal

from nanochat.configurator import Positive, Seed, Share, configure

# Task
task: Literal["grokking", "multiplication"] = "grokking"  # a table of numbers modulo p, or of products in digits
name: str | None = None  # what to call the corpus (None = as the task)
train_share: Share = 0.5  # of the lines (1 = all, and the same ones validate)
seed: Seed = 42  # of the split, and of the lines where there are more than max_lines
max_lines: Positive = 1_000_000  # of both parts together
# Grokking: the paper's nine operations modulo p, a prime where one divides; x/y|x-y is x/y where y is odd, else x-y
operation: Literal["x+y", "x-y", "x/y", "x/y|x-y", "x2+y2", "x2+xy+y2", "x2+xy+y2+x", "x3+xy", "x3+xy2+y"] = "x/y"  # o
p: Positive = 97  # the modulus
# Multiplication
digits: Positive = 1  # of each factor, which begins with zeros where it is smaller; products have twice as many
settings = configure(__name__)

import random

import numpy as np

from dev.import_bin import describe
from nanochat.char_byte import SymbolTokenizer
from nanochat.common import UserError, get_base_dir, print0, run_main
from nanochat.token_files import write_tokens


def main() -> None:
    table, symbols = numbers_table() if task == "grokking" else digits_table()
    tokenizer = SymbolTokenizer(symbols)
    lines = np.column_stack([np.full(len(table), tokenizer.get_bos_token_id()), table])  # (N, L)
    split = round(train_share * len(lines))
    parts = {"train": lines[:split], "validation": lines if train_share == 1 else lines[split:]}
    if not all(map(len, parts.values())):
        raise UserError(f"--train-share={train_share:g}: no line of {len(lines):,} is left for a part; give another")
    if train_share == 1:
        print0("every line trains; the same lines validate, so this measures memory alone")
    arguments = {key: value for key, value in settings.items() if key != "name"}
    about = {"source": "dev.make_arithmetic", "arguments": arguments}
    about |= {"document": lines.shape[1], "answer": symbols.index("=")}
    corpus = get_base_dir() / "data" / (name or task)
    flat = {role: part.ravel() for role, part in parts.items()}
    describe(corpus, write_tokens(corpus, flat, tokenizer, "uint16", about))
    print0(f"documents of {lines.shape[1]} tokens: --max-seq-len={lines.shape[1] - 1} --corpus={corpus.name}")


def numbers_table() -> tuple[np.ndarray, list[str]]:
    """x o y = z modulo p, as (N, 5) ids in an order of their own, and the symbols: the numbers, o and =."""
    divides = "/" in operation
    if p < 2 or (divides and any(p % n == 0 for n in range(2, int(p**0.5) + 1))):
        raise UserError(f"--p={p}: expected {'a prime, as there is a division' if divides else 'at least 2'}")
    x, y = drawn(p, first=1 if operation == "x/y" else 0)
    z = operate(x, y)
    symbols = [*map(str, range(p)), "o", "="]
    return np.column_stack([x, np.full_like(x, p), y, np.full_like(x, p + 1), z]), symbols


def operate(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The operation of the settings, modulo p, of each pair."""
    inverse = np.array([pow(int(n), p - 2, p) for n in range(p)])  # by Fermat's little theorem, where p is a prime
    results = {
        "x+y": x + y,
        "x-y": x - y,
        "x/y": x * inverse[y],
        "x/y|x-y": np.where(y % 2 == 1, x * inverse[y], x - y),
        "x2+y2": x**2 + y**2,
        "x2+xy+y2": x**2 + x * y + y**2,
        "x2+xy+y2+x": x**2 + x * y + y**2 + x,
        "x3+xy": x**3 + x * y,
        "x3+xy2+y": x**3 + x * y**2 + y,
    }
    return np.asarray(results[operation] % p)


def digits_table() -> tuple[np.ndarray, list[str]]:
    """x * y = z as (N, 4 digits + 2) ids of digits, in an order of their own, and the symbols."""
    x, y = drawn(10**digits)
    factors = [(number[:, None] // 10 ** np.arange(digits)[::-1]) % 10 for number in (x, y)]
    product = (x * y)[:, None] // 10 ** np.arange(2 * digits)[::-1] % 10
    times, equals = np.full((len(x), 1), 10), np.full((len(x), 1), 11)
    return np.hstack([factors[0], times, factors[1], equals, product]), [*"0123456789", "*", "="]


def drawn(n: int, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """max_lines or all pairs of x below n and y from `first` below n, shuffled."""
    count = n * (n - first)
    places = np.array(random.Random(seed).sample(range(count), min(count, max_lines)))
    return places // (n - first), first + places % (n - first)


if __name__ == "__main__":
    run_main(main)
