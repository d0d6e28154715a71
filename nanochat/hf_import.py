"""Weights of a Hugging Face model folder for --init-from: found, read, cut to a shorter context, put into a model.

A folder has a config.json, whose model_type says which architecture's from_hf() understands it, and one safetensors
file or several. Promises: no code of the folder runs; a tensor of another shape, or one too many or too few, is refused
by name before any weight is changed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import Tensor, nn

from nanochat.checkpoint_manager import open_tensors
from nanochat.common import UserError, print0
from nanochat.download import persist
from nanochat.gpt2 import SIZES
from nanochat.sharding import local, own_rows

MODULES = {"gpt2": "nanochat.gpt2", "llama": "nanochat.llama", "nanochat": "nanochat.gpt_hf"}  # by model_type
PADDING = 128  # more tokens than this beside the tokenizer's are not padding, but another tokenizer


@dataclass(frozen=True)
class Weights:
    """Whole weights by our names, any dtype, and the config of the model that they are for."""

    name: str
    config: Any
    tensors: Mapping[str, Tensor]

    @torch.no_grad()
    def load_into(self, model: nn.Module) -> None:
        """Copy them into a model, or its own rows into one that is sharded. UserError for the first that differs."""
        weights = dict(model.named_parameters())
        stored = {name: str(tuple(tensor.shape)) for name, tensor in self.tensors.items()}
        needed = {name: str(tuple(p.shape)) for name, p in weights.items()}
        for name in sorted(stored | needed):
            there, wanted = stored.get(name, "not there"), needed.get(name, "no such tensor")
            if there != wanted:
                raise UserError(f"--init-from={self.name}: {name} is {there}, its config.json makes it {wanted}", True)
        for name, p in weights.items():
            local(p).copy_(self.tensors[name][own_rows(p)])


def open_weights(name: str, vocab_size: int, sequence_len: int | None = None, **options: Any) -> Weights:
    """The weights of a folder, or of a published GPT-2 by its name, for contexts of `sequence_len` tokens (None = its
    own); the options are base_train's, None = not given, of which dropout alone may be new. Raises UserError where they
    cannot be had or are of another kind, for a longer context, for a tokenizer of another size, and for an option that
    is not what the folder has.
    """
    folder = find_folder(name)
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        module = MODULES[about["model_type"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        known = f"a model_type of {', '.join(MODULES)}"
        raise UserError(f"--init-from={name}: expected a config.json with {known} in {folder} ({error})") from None
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with open_tensors(path) as file:
            tensors |= {tensor: file.get_tensor(tensor) for tensor in file.keys()}  # noqa: SIM118  # no dict
    if not tensors:
        raise UserError(
            f"--init-from={name}: no model*.safetensors in {folder}; other files of weights can hold programs"
        )
    try:
        config, weights = import_module(module).from_hf(about, tensors)
    except KeyError as error:
        raise UserError(f"--init-from={name}: its config.json does not say {error}") from None
    if not vocab_size <= config.vocab_size < vocab_size + PADDING:
        take = f"python -m scripts.tok_train --kind=hf --path={name} --chat-tokens=false --corpus-own"
        needs = f"the tokenizer has {vocab_size:,}; take the model's own, for the same --corpus: {take}"
        raise UserError(f"--init-from={name}: its vocabulary has {config.vocab_size:,} tokens, {needs}")
    sequence_len = sequence_len or config.sequence_len
    if sequence_len > config.sequence_len:
        most = f"--max-seq-len={config.sequence_len} or less fits"
        raise UserError(f"--max-seq-len={sequence_len}: {name} has {config.sequence_len} positions; {most}")
    config, padding = replace(config, sequence_len=sequence_len, vocab_size=vocab_size), config.vocab_size - vocab_size
    if options.get("dropout") is not None and hasattr(config, "dropout"):
        config = replace(config, dropout=options["dropout"])
    C, L = config.n_embd, config.n_layer
    has = {"arch": "gpt", **vars(config), "depth": L, "aspect_ratio": C / L if C % L else C // L}
    has |= {"head_dim": C // config.n_head, "kv_heads": config.n_kv_head}
    for option, value in options.items():
        if value is not None and value != has.get(option):
            flag, theirs = f"--{option.replace('_', '-')}={value}", has.get(option, "no such setting")
            raise UserError(f"{flag}: {name} has {theirs}, which its weights are for; leave it out")
    # A shorter context needs fewer positions; padding would be drawn, and no text is behind it.
    for table, rows in (("wpe.weight", sequence_len), ("wte.weight", vocab_size), ("lm_head.weight", vocab_size)):
        weights |= {table: weights[table][:rows]} if table in weights else {}
    print0(f"weights: {folder}, {len(weights)} tensors" + f", without {padding} tokens of padding" * bool(padding))
    return Weights(name, config, weights)


def find_folder(name: str) -> Path:
    """A folder on this machine, or that of a published GPT-2, which the hub's client fetches once."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name not in SIZES:
        raise UserError(
            f"--init-from={name} is no folder; expected one with a config.json, or one of {', '.join(SIZES)}"
        )
    fetch = huggingface_hub.snapshot_download
    repository, files = f"openai-community/{name}", ["config.json", "model*.safetensors"]
    return Path(persist(lambda: fetch(repository, allow_patterns=files), f"{repository}, or any folder in its place,"))
