"""How well the tokenizer compresses several kinds of text, beside GPT-2's and GPT-4's.

    python -m scripts.tok_eval --reference=DIR

DIR holds the published vocabularies: encoder.json (GPT-2) and cl100k_base.tiktoken (GPT-4). Where they are missing the
table has only our column. The samples below were written for this file; train and val are the corpus's first documents.
"""

from nanochat.configurator import configure

# Text
corpus: str | None = None  # directory name in $NANOCHAT_BASE_DIR/data (None = the only one there)
# Comparison
reference: str | None = None  # folder with the published vocabularies (None = $NANOCHAT_BASE_DIR/tokenizer_reference)
settings = configure(__name__)

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

import rustbpe
from nanochat.common import UserError, get_base_dir, print0, run_main
from nanochat.corpus import iter_text, load_corpus
from nanochat.hf_tokenizer import bytes_by_character
from nanochat.record import open_record
from nanochat.tokenizer import get_tokenizer

REFERENCES = {"GPT-2": "gpt2", "GPT-4": "gpt4"}

NEWS = """
HARBOUR TOWN (Tuesday) - The city council voted 7-2 last night to reopen the old ferry line, eleven years after the
last boat left the pier. Mayor Ellen Brandt called the decision "a small miracle of patience"; her critics, who had
asked for a second bus lane instead, said the $4.6 million would be spent before the first passenger came aboard. Two
boats are to run every twenty minutes from 6 a.m. until midnight. "My father sold tickets here," said Tom Okafor, 58,
who watched the vote from the back row. "I didn't think I'd see it again." Tickets will cost $2.80, and children under
ten won't pay at all.
"""

KOREAN = """
오늘 아침에는 비가 조금 내렸지만 점심때부터 날씨가 맑아졌습니다. 시장에는 사과와 배를 사러 온 사람들이 많았고,
가게 주인은 올해 과일이 작년보다 더 달다고 말했습니다. 저녁에는 가족과 함께 강가를 걸으며 새로 생긴 다리를 구경했습니다.
"""

CODE = '''
def longest_run(values: list[int], limit: int = 100) -> tuple[int, int]:
    """Return (start, length) of the longest ascending run; the first one wins."""
    best = start = 0
    best_length = 0
    for i in range(1, len(values) + 1):
        if i == len(values) or values[i] <= values[i - 1]:
            if i - start > best_length:
                best, best_length = start, i - start
            start = i
    return best, min(best_length, limit)  # e.g. [3, 1, 2, 5, 4] -> (1, 3)
'''

LATEX = r"""
\begin{theorem}\label{thm:mean} Let $f\colon [a,b] \to \mathbb{R}$ be continuous and differentiable on $(a,b)$. Then
there is a $\xi \in (a,b)$ with \[ f'(\xi) = \frac{f(b) - f(a)}{b - a}. \] \end{theorem}
\begin{proof} Put $g(x) = f(x) - \frac{f(b)-f(a)}{b-a}\,(x-a)$, so that $g(a) = g(b)$, and apply Rolle's theorem.
Hence $\int_0^{\infty} e^{-x^2}\,dx = \tfrac{1}{2}\sqrt{\pi}$ is not needed at all. \end{proof}
"""

SCIENCE = """
Chloroplasts capture light with chlorophyll a (absorption maxima near 430 nm and 662 nm) and pass the excitation
energy to photosystem II, where water is split: 2 H2O -> O2 + 4 H+ + 4 e-. The proton gradient across the thylakoid
membrane drives ATP synthase, and the Calvin cycle fixes CO2 by means of ribulose-1,5-bisphosphate carboxylase. At 25
°C and 400 ppm the net rate in a C3 leaf is about 20 µmol per square metre and second; photorespiration costs it
roughly a quarter of that.
"""


def main() -> None:
    text = load_corpus(corpus)
    tokenizer = get_tokenizer(text.path)
    samples = {"news": NEWS, "Korean": KOREAN, "code": CODE, "LaTeX": LATEX, "science": SCIENCE}
    samples |= {"train": first_documents(iter_text(text.train)), "val": first_documents(iter_text(text.val))}
    encoders: dict[str, Any] = {"ours": tokenizer} | published()

    record = open_record("tok_eval", text.name, settings)
    print0(f"bytes per token (ours: {tokenizer.get_vocab_size():,} tokens; in brackets: our tokens against theirs)")
    print0(f"{'text':10}{'bytes':>10}" + "".join(f"{name:>18}" for name in encoders))
    for kind, sample in samples.items():
        size = len(sample.encode())
        tokens = {name: len(encoder.encode(sample)) for name, encoder in encoders.items()}
        ours, *others = tokens.values()
        cells = [f"{size / ours:18.2f}", *(f"{size / theirs:9.2f} ({ours / theirs - 1:+6.1%})" for theirs in others)]
        print0(f"{kind:10}{size:10,}" + "".join(f"{cell:>18}" for cell in cells))
        record.write("compression", text=kind, bytes=size, tokens=tokens)
    record.close()


def published() -> dict[str, rustbpe.Encoder]:
    """{name: encoder} of the vocabularies whose files are there; a notice for the others."""
    folder = Path(reference) if reference else get_base_dir() / "tokenizer_reference"
    if reference and not folder.is_dir():
        raise UserError(f"--reference={reference} is not a directory")
    found = {}
    for name, file in REFERENCES.items():
        try:
            found[name] = load_reference_encoder(folder, file)
        except FileNotFoundError as error:
            print0(f"without {name}: no {error.filename}")
    return found


def load_reference_encoder(folder: Path | str, name: str) -> rustbpe.Encoder:
    """GPT-2's or GPT-4's own vocabulary (without special tokens) from its published file in `folder`: encoder.json for
    "gpt2", cl100k_base.tiktoken for "gpt4". Encodes as tiktoken does. Raises FileNotFoundError, and UserError where the
    file is damaged.
    """
    path = Path(folder) / {"gpt2": "encoder.json", "gpt4": "cl100k_base.tiktoken"}[name]
    try:
        if name == "gpt2":
            byte_of = bytes_by_character()
            names = json.loads(path.read_text(encoding="utf-8"))
            del names["<|endoftext|>"]
            ranks = {rank: bytes(byte_of[character] for character in token) for token, rank in names.items()}
        else:
            lines = (line.split() for line in path.read_bytes().splitlines())
            ranks = {int(rank): base64.b64decode(token, validate=True) for token, rank in lines}
        return rustbpe.Encoder([ranks[rank] for rank in range(len(ranks))], name)
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: not the published vocabulary ({error!r}); get the file again") from None


def first_documents(texts: Iterator[pa.Array], chars: int = 1_000_000) -> str:
    """The first documents of a text, as one text of at most `chars` characters."""
    return "\n\n".join(next(texts).to_pylist())[:chars]


if __name__ == "__main__":
    run_main(main)
