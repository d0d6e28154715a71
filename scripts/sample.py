"""Continue a text: samples from a run, or straight from GPT-2 as it was published.

    python -m scripts.sample --model-tag=shakespeare_char --prompt="O God, O God!" -n 5
    python -m scripts.sample --prompt=FILE:start.txt --max-tokens=100 --temperature=0
    python -m scripts.sample --init-from=gpt2-xl --prompt="The answer to life is"

What follows is the model's own text; chats are scripts.chat_cli. The same seed gives the same samples, whatever
num_samples is. Only the samples go to standard output.
"""

from typing import Literal

from nanochat.configurator import Natural, Positive, Rate, Seed, Several, configure

SHORT = {
    "p": "prompt",
    "n": "num_samples",
    "i": "source",
    "g": "model_tag",
    "s": "step",
    "t": "temperature",
    "k": "top_k",
}

# Model
source: Literal["base", "mid", "sft", "rl"] = "base"  # stage of the checkpoint
model_tag: str | None = None  # name of the checkpoint directory (None = the one saved last)
step: Natural | None = None  # checkpoint step (None = the last)
init_from: str | None = None  # instead: a Hugging Face folder, or gpt2, gpt2-medium, gpt2-large, gpt2-xl
context: Several | None = None  # tokens the model may see, also more than it was trained with (None = as many)
# Text
prompt = "\n"  # what to continue; FILE:PATH takes a file
num_samples: Positive = 10  # continuations
max_tokens: Positive = 500  # of each; the end of the model's context may come first
temperature: Rate = 0.8  # 0 = always the most likely token
top_k: Natural = 200  # draw from the k most likely tokens only (0 = from all)
seed: Seed = 1337  # of the draws
# Machine
device_type: Literal["auto", "cuda", "mps", "xpu", "cpu"] = "auto"  # cuda also stands for AMD's ROCm
dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # what matmuls compute in
settings = configure(__name__)

import contextlib
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, run_main
from nanochat.compute import Compute, compute_init
from nanochat.engine import Engine, Sampling
from nanochat.hf_export import open_tokenizer
from nanochat.hf_tokenizer import find_hf_folder
from nanochat.model import build_model
from nanochat.tokenizer import Tokenizer


def main() -> None:
    text = read_prompt()
    with contextlib.redirect_stdout(sys.stderr):
        compute = compute_init(device_type, dtype, seed)
        model, tokenizer = load(compute)
    if context is not None and context != model.config.sequence_len:
        model = with_context(model, context)
    engine = Engine(model, None, compute.dtype, [tokenizer.get_bos_token_id()])
    ids = tokenizer.encode(text, prepend="<|bos|>")
    continuations, _ = engine.generate_batch([ids], Sampling(max_tokens, temperature, top_k, seed=seed), num_samples)
    for number, tokens in enumerate(continuations):
        said = [token for token in tokens if token not in engine.stop_tokens]
        print(f"{text}{tokenizer.decode(said)}", end="\n" if number == num_samples - 1 else f"\n{'-' * 15}\n")


def read_prompt() -> str:
    """The text to continue."""
    if not prompt.startswith("FILE:"):
        return prompt
    path = Path(prompt.removeprefix("FILE:")).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt={prompt}: {error}; expected a text file in UTF-8") from None


def load(compute: Compute) -> tuple[Any, Tokenizer]:
    """The model and its tokenizer, of a checkpoint or as published."""
    if init_from is None:
        return load_model(source, compute.device, "eval", model_tag, step)[:2]
    if model_tag is not None or step is not None:
        raise UserError(f"--init-from={init_from} is a model by itself; leave out --model-tag and --step")
    tokenizer = open_tokenizer(find_hf_folder(init_from), chat=False)
    weights = import_module("nanochat.hf_import").open_weights(init_from, tokenizer.get_vocab_size())
    model = build_model(weights.config, compute.device)
    weights.load_into(model)
    return model.eval(), tokenizer


@torch.no_grad()
def with_context(model: Any, length: int) -> Any:
    """The same weights for another context, which rotary positions and ALiBi take and a table of positions does not."""
    if len(set(model.config.windows())) > 1:
        raise UserError(f"--context={length}: the windows of this model are a part of its context; leave it out")
    other = build_model(replace(model.config, sequence_len=length), model.device)
    weights = dict(other.named_parameters())
    for name, weight in model.named_parameters():
        if weights[name].shape != weight.shape:
            raise UserError(f"--context={length}: this model has learned {len(weight)} positions; give fewer or none")
        weights[name].copy_(weight)
    return other.eval()


if __name__ == "__main__":
    run_main(main)
