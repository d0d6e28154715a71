"""Talk to a model in the terminal; a base model continues texts instead.

    python -m scripts.chat_cli -p "Who are you?"
    python -m scripts.chat_cli -i rl
    python -m scripts.chat_cli --source=base -p "Once upon a time"
    python -m scripts.chat_cli -p "Summarise:" < notes.txt > summary.txt

In a chat: `clear` forgets what was said, `quit` or Ctrl-D ends. Ctrl-C stops an answer; at the prompt it clears the
line, and pressed again within a second it ends. What the model asks its calculator is shown in brackets. With -p stdout
has the answer alone, and text on stdin, unless that is a terminal, stands behind the prompt after an empty line.
"""

import sys
from typing import Literal

from nanochat.configurator import Natural, Positive, Rate, Seed, Share, configure

SHORT = {"p": "prompt", "i": "source", "g": "model_tag", "s": "step", "t": "temperature", "k": "top_k"}

# Model
source: Literal["base", "mid", "sft", "rl"] = "sft"  # stage of the checkpoint
model_tag: str | None = None  # name of the checkpoint directory (None = the one saved last)
step: Natural | None = None  # checkpoint step (None = the last)
# Text
prompt: str | None = None  # answer this, and what stdin holds, and exit (None = a chat)
num_samples: Positive = 1  # base only: continuations of each text
max_tokens: Positive = 256  # length of an answer; the end of the model's context may come first
temperature: Rate = 0.6  # 0 = always the most likely token
top_k: Natural = 50  # draw from the k most likely tokens only (0 = from all)
top_p: Share = 0.0  # draw from the most likely tokens that together reach this probability (0 = from all)
seed: Seed = 42  # of the drawing
# Machine
device_type: Literal["auto", "cuda", "mps", "xpu", "cpu"] = "auto"  # cuda also stands for AMD's ROCm
dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # what matmuls compute in
settings = configure(__name__, status=sys.stderr)

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, run_main
from nanochat.compute import compute_init
from nanochat.conversation import StreamDecoder, decode_parts, render_within
from nanochat.engine import Engine, Sampling
from nanochat.tokenizer import Tokenizer

BRACKETS = {"text": "", "python": "[", "python_output": " = "}  # what stands before each kind of piece


def main() -> None:
    asked = prompt
    if asked is not None and sys.stdin and not sys.stdin.isatty():
        asked = "\n\n".join(filter(None, (asked, sys.stdin.read().rstrip())))
    with contextlib.redirect_stdout(sys.stderr):
        compute = compute_init(device_type, dtype)
        model, tokenizer, _ = load_model(source, compute.device, "eval", model_tag, step)
    engine = Engine(model, tokenizer, compute.dtype)
    if source == "base":
        continue_texts(asked, engine, tokenizer)
    elif asked is not None:
        answer([{"role": "user", "content": asked}], engine, tokenizer, seed)
    else:
        chat(engine, tokenizer)


def chat(engine: Engine, tokenizer: Tokenizer) -> None:
    """Questions and answers until the user ends it."""
    print("clear forgets what was said, quit or Ctrl-D ends, Ctrl-C stops an answer.")
    messages: list[dict[str, Any]] = []
    for turn, line in enumerate(read_lines("\nyou: ")):
        if line in ("quit", "exit"):
            return
        if line == "clear":
            messages = []
            print("(forgotten)")
            continue
        question = {"role": "user", "content": line}
        try:
            parts = answer([*messages, question], engine, tokenizer, seed + turn, label="assistant: ")
            messages += [question, {"role": "assistant", "content": parts}] if parts else []
            print("" if parts else "(no answer: the question is taken back)\n", end="")
        except UserError as error:  # too long a question: it is taken back
            print(f"({error})")


def answer(
    messages: list[dict[str, Any]], engine: Engine, tokenizer: Tokenizer, seed: int, label: str = ""
) -> list[dict[str, str]]:
    """Print what the model says next as it says it, and return it as parts. In a chat Ctrl-C ends it early."""
    context = engine.model.config.sequence_len
    tokens, left_out = render_within(messages, tokenizer, context - min(max_tokens, context // 4))
    if left_out:
        print(f"(the first {left_out} messages no longer fit into {context} tokens and are left out)")
    said: list[int] = []
    decoder, kind = StreamDecoder(tokenizer), "text"
    print(label, end="", flush=True)
    try:
        for token in engine.generate(tokens, Sampling(max_tokens, temperature, top_k, top_p, seed)):
            said.append(token)
            piece = decoder.feed(token)
            if piece and piece.kind != kind:
                print("]" * (kind == "python_output") + BRACKETS[piece.kind], end="")
                kind = piece.kind
            print(piece.text if piece else "", end="", flush=True)
    except KeyboardInterrupt:
        if prompt is not None:
            raise
    print("]" * (kind == "python_output"))
    return decode_parts(said, tokenizer)


def continue_texts(asked: str | None, engine: Engine, tokenizer: Tokenizer) -> None:
    """What a base model can do: go on with a text."""
    print("Type the beginning of a text; Ctrl-D ends.\n" if asked is None else "", end="")
    for turn, text in enumerate(read_lines("> ") if asked is None else [asked]):
        ids = tokenizer.encode(text, prepend="<|bos|>")
        sampling = Sampling(max_tokens, temperature, top_k, top_p, seed + turn)
        try:
            sequences, _ = engine.generate_batch([ids], sampling, num_samples)
        except (KeyboardInterrupt, UserError) as stop:
            if asked is not None:
                raise
            print(f"({str(stop) or 'stopped'})")
            continue
        for tokens in sequences:
            print(text + tokenizer.decode(token for token in tokens if token not in engine.stop_tokens))


def read_lines(sign: str) -> Iterator[str]:
    """Lines that are not empty, until the end of the input or a second Ctrl-C within a second of the first, which
    clears the line; with line editing where the terminal has it.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() uses it once it is imported
    interrupted = -math.inf
    while True:
        try:
            line = input(sign).strip()
        except (EOFError, RuntimeError):  # the latter where stdin is closed
            print()
            return
        except KeyboardInterrupt:
            print()
            if time.monotonic() - interrupted < 1:
                return
            print("(line cleared; Ctrl-C again at once, or Ctrl-D: end)")
            interrupted = time.monotonic()
            continue
        interrupted = -math.inf
        if line:
            yield line


if __name__ == "__main__":
    run_main(main)
