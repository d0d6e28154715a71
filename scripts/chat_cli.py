"""
Continue a text in the terminal.

    python -m scripts.chat_cli --source=base -p "Once upon a time"
"""

from typing import Literal

from nanochat.configurator import configure

SHORT = {"p": "prompt", "i": "source", "g": "model_tag", "s": "step", "t": "temperature", "k": "top_k"}

# Model
source: Literal["base"] = "base"  # stage of the checkpoint
model_tag: str | None = None  # name of the checkpoint directory (None = the one saved last)
step: int | None = None  # checkpoint step (None = the last)
# Text
prompt: str | None = None  # continue this text and exit (None = ask for texts until Ctrl-D)
num_samples = 1  # continuations of each text
max_tokens = 128  # length of a continuation
temperature = 0.6  # 0 = always the most likely token
top_k = 50  # draw from the k most likely tokens only (0 = from all)
top_p = 0.0  # draw from the most likely tokens that together reach this probability (0 = from all)
seed = 42  # of the drawing
# Machine
device_type: Literal["auto", "cuda", "mps", "xpu", "cpu"] = "auto"  # cuda also stands for AMD's ROCm
dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # what matmuls compute in
settings = configure(__name__)

from nanochat.checkpoint_manager import load_model
from nanochat.common import run_main
from nanochat.compute import compute_init
from nanochat.engine import Engine


def main() -> None:
    compute = compute_init(device_type, dtype)
    model, tokenizer, _ = load_model(source, compute.device, "eval", model_tag, step)
    bos = tokenizer.get_bos_token_id()
    engine = Engine(model, compute.dtype, stop_tokens=frozenset({bos}))

    def continue_text(text: str, seed: int) -> None:
        ids = tokenizer.encode(text, prepend="<|bos|>")
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        for tokens in engine.generate_batch(ids, num_samples, max_tokens=max_tokens, **options):
            print(text + tokenizer.decode([token for token in tokens if token != bos]))

    if prompt is not None:
        continue_text(prompt, seed)
        return
    print("Type the beginning of a text; Ctrl-D ends.")
    for turn, line in enumerate(iter(read_line, None)):
        if line:
            continue_text(line, seed + turn)


def read_line() -> str | None:
    """The next line, None at the end of the input."""
    try:
        return input("> ")
    except EOFError:
        print()
        return None


if __name__ == "__main__":
    run_main(main)
