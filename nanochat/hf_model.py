"""A Hugging Face model folder on this machine, scored as our own models are: any causal language model that
transformers knows.

Promises: reads nothing but the folder; weights are safetensors, and no code of the folder runs. Does not: share the
common beginning of an item's choices (not every model takes a mask of one's own), so it is slower than a GPT.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from nanochat.common import UserError, print0
from nanochat.compute import Compute
from nanochat.core_eval import Batch, default_batch_tokens
from nanochat.files import one_line


class HFScorer:
    """A core_eval.Scorer of a model and a tokenizer of transformers."""

    branches = False

    def __init__(self, model: Any, tokenizer: Any, compute: Compute, batch_tokens: int | None = None):
        self.model, self.tokenizer, self.device = model, tokenizer, compute.device
        self.context = int(getattr(model.config, "max_position_embeddings", None) or 2048)  # 2048: if it does not say
        self.batch_tokens = batch_tokens or default_batch_tokens(compute.device)
        self.bos = start_token(tokenizer)
        self.picks = "logits_to_keep" in inspect.signature(model.forward).parameters

    def encode(self, texts: list[str], prepend: int) -> list[list[int]]:
        """As Tokenizer.encode: `prepend`, then a text's tokens."""
        rows = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [[prepend, *row] for row in rows]

    @torch.inference_mode()
    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses and hits of everything asked; logits at no more places than some unit asks for, if the model can."""
        (tokens, _, _, branches), (lines, places, targets, *_) = batch.fed.to(self.device), batch.asked.to(self.device)
        options: dict[str, Any] = {"attention_mask": (branches == 0).long(), "use_cache": False}
        if self.picks:
            options["logits_to_keep"], places = places.unique(return_inverse=True)
        logits = self.model(tokens, **options).logits[lines, places].float()  # (N, V)
        return F.cross_entropy(logits, targets, reduction="none").cpu(), (logits.argmax(dim=-1) == targets).cpu()


def load_hf(folder: Path, compute: Compute, batch_tokens: int | None = None) -> HFScorer:
    """Open a model folder. Raises UserError where it is none, or has its weights as anything but safetensors."""
    if not (folder / "config.json").is_file():
        raise UserError(f"--hf-path={folder}: no config.json there; expected the folder of a downloaded model")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"--hf-path={folder}: no *.safetensors there; other files of weights can hold programs")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise UserError("--hf-path needs transformers: pip install transformers") from None
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype=compute.dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(f"--hf-path={folder}: transformers cannot open it ({one_line(error)})") from None
    scorer = HFScorer(model.to(compute.device).eval(), tokenizer, compute, batch_tokens)
    about = f"context {scorer.context:,}, texts begin with {tokenizer.decode([scorer.bos])!r}"
    print0(f"model: {folder}, {model.num_parameters():,} parameters, {about}")
    return scorer


def start_token(tokenizer: Any) -> int:
    """What a text begins with: BOS, or for models without one the token that ends a document, as they were trained."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError("this tokenizer has neither a BOS nor an EOS token; a text needs something to begin with")
