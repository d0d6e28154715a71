"""One training step, told in reading order: tokens, embedding, each part of a block, head, loss, gradients, update.

    python -m scripts.trace_step
    python -m scripts.trace_step --source=base --text="The capital of France is Paris." --markdown=step.md

Every tensor that a module or a function of torch makes is shown with its shape, mean, standard deviation, smallest and
largest value, down to the square in the MLP and the slices of the loss; what only looks at another tensor's numbers,
such as a transposition, is left out. Parameters follow with their gradients and with what the optimizers made of them.
The step is base_train's, in fp32 and without torch.compile. The checkpoint is not changed.
"""

from typing import Literal

from nanochat.configurator import Natural, Positive, Seed, configure

SHORT = {"i": "source", "g": "model_tag", "s": "step", "p": "text"}

# Text
text = "The cat saw a small red house near the river. The dog saw it too."  # the row that is learned from
# Model
source: Literal["new", "base", "mid", "sft", "rl"] = "new"  # a new one, or the stage of a checkpoint
model_tag: str | None = None  # name of its directory (None = the one saved last)
step: Natural | None = None  # its step (None = the last)
arch: Literal["gpt", "fast", "gpt2", "llama"] = "gpt"  # architecture of a new one, by its file in nanochat/
depth: Positive = 2  # layers of a new one
aspect_ratio: Positive = 64  # width / depth of a new one
seed: Seed = 42  # of its weights
optimizer: Literal["muon", "adamw"] = "muon"  # muon: Muon and AdamW; adamw: for everything
warmup_steps: Natural = 2  # on this text before the one that is told: half of a new model's matrices begin as zeros
# Output
blocks: Positive = 1  # of the Transformer's layers told in full; of the others the result
color: Literal["auto", "always", "never"] = "auto"  # auto = on a terminal, unless NO_COLOR is set
markdown: str | None = None  # file to write it to, too
settings = configure(__name__)

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nanochat.adamw import AdamW
from nanochat.char_byte import byte_tokenizer
from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, print0, run_main
from nanochat.compute import compute_init
from nanochat.files import write_atomic
from nanochat.model import LanguageModel, build_model, choose_config
from nanochat.muon import Muon
from nanochat.tokenizer import Tokenizer, get_tokenizer
from nanochat.train import Rates, accumulate, agree, update

RATES = Rates(lr=1.0, momentum=0.85, weight_decay=0.0)
COLORS = {"title": "\033[1;36m", "module": "\033[1;33m", "function": "\033[32m", "plain": ""}
HEAD = f"{'shape':>16} {'mean':>10} {'std':>10} {'min':>10} {'max':>10}"


class Line(NamedTuple):
    """A line of the story."""

    kind: Literal["title", "module", "function", "plain"]
    level: int  # of indentation
    name: str
    told: str = ""  # in columns


def main() -> None:
    compute = compute_init("cpu", "float32", seed)
    model, tokenizer = open_model(compute.device)
    whole = tokenizer.encode(text, prepend="<|bos|>")
    ids = torch.tensor(whole)[None, : model.config.sequence_len + 1]  # (1, T + 1)
    if ids.size(1) < 2:
        raise UserError("--text is empty: there is nothing to predict")
    if len(whole) > ids.size(1):
        print0(f"of the {len(whole)} tokens of --text the first {ids.size(1)} are told, a row of this model")
    optimizers = model.setup_adamw() if optimizer == "adamw" else model.setup_optimizers(dtype=compute.dtype)

    def forward_and_backward() -> Any:
        return accumulate(model, iter([(ids[:, :-1], ids[:, 1:], None)]), 1, compute)

    for _ in range(warmup_steps):
        update(optimizers, agree(forward_and_backward(), 0, optimizers, compute), RATES, compute)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with Watch(model, blocks) as watch:
        sums = forward_and_backward()
    agreed = agree(sums, 0, optimizers, compute)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    result = update(optimizers, agreed, RATES, compute)

    V = model.config.vocab_size
    story = [*tell_tokens(ids[0], tokenizer), Line("title", 0, "Forward", HEAD), *watch.lines]
    loss = f"{result.loss:.4f} nats per token, the mean of {result.tokens}; knowing nothing costs ln {V:,} ="
    story += [Line("title", 0, "Loss"), Line("plain", 1, f"{loss} {torch.tensor(float(V)).log():.4f}")]
    story += tell_gradients(model, gradients, agreed.tokens, result.grad_norm)
    story += tell_update(model, before, optimizers)
    colored = color == "always" or (color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    print0("\n".join(as_text(line, colored) for line in story))
    if markdown:
        write_atomic(Path(markdown), as_markdown(story))
        print0(f"written to {markdown}")


def open_model(device: torch.device) -> tuple[LanguageModel, Tokenizer]:
    """The model to look at, and its tokenizer; a new one without a tokenizer on this machine reads bytes."""
    if source != "new":
        model, tokenizer, _ = load_model(source, device, "train", model_tag, step)
        return model, tokenizer
    try:
        tokenizer = get_tokenizer()
    except UserError as error:
        print0(f"{error}: so this text is taken, byte by byte")
        tokenizer = byte_tokenizer()
    config = choose_config(arch, depth, tokenizer.get_vocab_size(), 256, aspect_ratio=aspect_ratio)
    return build_model(config, device, seed), tokenizer


# -----------------------------------------------------------------------------
# Watching


class Watch(TorchFunctionMode):
    """Writes down, while the model computes, what each of its modules and each function of torch gives."""

    def __init__(self, model: nn.Module, told: int):
        super().__init__()
        self.model, self.lines, self.level, self.muted = model, list[Line](), 0, 0
        self.quiet = set(list(getattr(model, "blocks", []))[told:])  # blocks of which the result is told
        self.hooks: list[Any] = []

    def __enter__(self) -> "Watch":
        for name, module in self.model.named_modules():
            if not isinstance(module, nn.ModuleList):
                self.hooks += [
                    module.register_forward_pre_hook(lambda m, _, name=name: self.begin(m, name or "model")),
                    module.register_forward_hook(lambda m, _, output, name=name: self.end(m, name, output)),
                ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def begin(self, module: nn.Module, name: str) -> None:
        self.tell("module", name, f"[{type(module).__name__}]")
        self.level += 1
        self.muted += module in self.quiet

    def end(self, module: nn.Module, name: str, output: Any) -> None:
        self.muted -= module in self.quiet
        if isinstance(output, Tensor):
            self.tell("function", "= result", statistics(output))
        self.level -= 1

    def tell(self, kind: Literal["module", "function"], name: str, told: str) -> None:
        if not self.muted:
            self.lines.append(Line(kind, self.level, name, told))

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if self.level and not self.muted and isinstance(result, Tensor) and result.ndim:
            inputs = [arg for arg in args if isinstance(arg, Tensor)]
            storage = result.untyped_storage().data_ptr()
            fresh = all(storage != tensor.untyped_storage().data_ptr() for tensor in inputs)
            name = getattr(function, "__name__", "")  # resolve_name gives the last of several: spmm for mm
            if fresh and not name.startswith("__") and name not in ("empty_like", "zeros_like", "apply"):
                self.tell("function", name, statistics(result))
        return result


def statistics(tensor: Tensor) -> str:
    """Shape, mean, standard deviation, smallest and largest of a tensor, in columns."""
    shape = " x ".join(map(str, tensor.shape)) or "scalar"
    with torch._C.DisableTorchFunction():  # that which watches would tell of these, too
        numbers = tensor.detach().double()
        figures = (numbers.mean(), numbers.std(correction=0), numbers.min(), numbers.max()) if numbers.numel() else ()
        return f"{shape:>16} {' '.join(f'{value.item():10.4g}' for value in figures)}"


# -----------------------------------------------------------------------------
# Telling


def tell_tokens(ids: Tensor, tokenizer: Tokenizer) -> list[Line]:
    """The row: what is read at each position, and what is to be predicted there."""
    pieces = [tokenizer.decode([i]) for i in ids.tolist()]
    rows = [f"{i:4} {ids[i].item():6} {pieces[i]!r:>16} -> {pieces[i + 1]!r}" for i in range(len(pieces) - 1)]
    return [
        Line("title", 0, "Tokens: position, id, what it is -> what comes next"),
        *(Line("plain", 1, row) for row in rows),
    ]


def tell_gradients(model: nn.Module, gradients: dict[str, Tensor], tokens: int, norm: float) -> list[Line]:
    """The mean gradient of each parameter."""
    lines = [Line("title", 0, f"Gradients of the mean loss, norm {norm:.4g} together", HEAD)]
    for name, _ in model.named_parameters():
        told = statistics(gradients[name] / tokens) if name in gradients else "none"
        lines.append(Line("function", 1, name, told))
    return lines


def tell_update(model: nn.Module, before: dict[str, Tensor], optimizers: Sequence[AdamW | Muon]) -> list[Line]:
    """How each parameter moved: statistics of the difference, and its size beside the parameter's."""
    lines = []
    named = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        lines.append(Line("title", 0, f"Update by {type(optimizer).__name__}", f"{HEAD}  norm / weight's"))
        for group in optimizer.param_groups:
            for p in group["params"]:
                old = before[named[id(p)]]
                moved = p.detach() - old
                share = f"{(moved.norm() / old.norm().clamp(min=1e-12)).item():10.2%}"
                lines.append(Line("function", 1, named[id(p)], f"{statistics(moved)} {share}  lr {group['lr']:.4g}"))
    return lines


def as_text(line: Line, colored: bool) -> str:
    """A line for the terminal; titles stand apart."""
    name = "  " * line.level + line.name
    start, end = (COLORS[line.kind], "\033[0m") if colored and COLORS[line.kind] else ("", "")
    return ("\n" if line.kind == "title" else "") + f"{start}{name:<44}{end} {line.told}".rstrip()


def as_markdown(story: Sequence[Line]) -> str:
    """The story with headings, and with each part as a block of code, in which columns stay in line."""
    parts: list[str] = ["# One training step"]
    for line in story:
        if line.kind == "title":
            parts += ["```"] * (len(parts) > 1) + [
                f"\n## {line.name}\n",
                "```",
                *([f"{'':<44} {line.told}"] * bool(line.told)),
            ]
        else:
            parts.append(as_text(line, colored=False))
    return "\n".join([*parts, "```"]) + "\n"


if __name__ == "__main__":
    run_main(main)
