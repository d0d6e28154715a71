"""Bring a checkpoint of karpathy/nanochat here: its model_000500.pt, meta_000500.json and tokenizer.pkl.

    python -m dev.import_nanochat --checkpoint=DIR --tokenizer=FILE --source=sft --model-tag=d20
    python -m scripts.chat_cli -i sft -g d20

Imports what nanochat trained from October 2025 to January 2026, whose architecture is ours with a rotary base of
10,000. Later models have tensors that ours has no place for (value embeddings, lambdas, smear): they are refused by
name, so that no trained number is dropped. Logits are those of the original in fp32; the original itself rounds its
rotary angles to bf16. The state of its optimizers is not imported: train on with the next stage, not with --resume.

Nothing in the files is executed: the model is read by torch's weights-only loader, the pickled tokenizer by a reader of
the few instructions that make up dictionaries of bytes and numbers.
"""

from typing import Literal

from nanochat.configurator import Natural, configure

SHORT = {"i": "source", "g": "model_tag", "s": "step"}

# From
checkpoint: str | None = None  # directory with model_<step>.pt and meta_<step>.json
tokenizer: str | None = None  # its tokenizer.pkl, which nanochat keeps in another directory
step: Natural | None = None  # checkpoint step (None = the last)
# To
source: Literal["base", "mid", "sft", "rl"] = "base"  # stage of the checkpoint
model_tag: str | None = None  # name of the checkpoint directory (None = that of --checkpoint)
settings = configure(__name__)

import json
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import torch
from torch import Tensor

import rustbpe
from nanochat.checkpoint_manager import checkpoint_path, save_checkpoint, saved_steps
from nanochat.common import UserError, print0, run_main
from nanochat.compute import Compute
from nanochat.files import one_line, sha256_file
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

ROPE_BASE = 10_000.0  # became 100,000 in March 2026, when the model had long had tensors that are refused here
PADDING = 64  # from December 2025 the vocabulary is padded to a multiple of this; rows that no token uses
SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
MAX_PICKLE_BYTES = 1 << 26  # a vocabulary of 65,536 takes 1 MB
HARD_TEXT = "I'll  don't 1234567 x=3.14\t\r\n\n \u00e9\u00df \u4f60\u597d \u0417\u0434 \U0001f600\u200d<|bos|> \u00a0 "


# -----------------------------------------------------------------------------
# The tokenizer


def read_encoding(data: bytes) -> Any:
    """What a pickled tiktoken.Encoding holds. A pickle is a program; of its instructions this one knows those that
    build dictionaries of bytes, strings and numbers, and of all classes the name of that one: nothing is imported or
    called. Raises ValueError for any other instruction, and what a broken program leads to.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "BININT" | "BININT1" | "BININT2" | "BINBYTES" | "SHORT_BINBYTES" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                marks.append(len(stack))
            case "SETITEM" | "SETITEMS":
                start = marks.pop() if opcode.name == "SETITEMS" else len(stack) - 2
                items = stack[start:]
                del stack[start:]
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "GLOBAL" | "STACK_GLOBAL":
                name = argument or f"{stack.pop(-2)} {stack.pop()}"
                if name != "tiktoken.core Encoding":
                    raise ValueError(f"it names {ascii(name.replace(' ', '.'))}, which no tokenizer needs")
                stack.append(name)
            case "NEWOBJ":
                stack.pop()  # its arguments, none; the class stands for the object
            case "BUILD":
                return stack.pop()
            case other:
                raise ValueError(f"it has the instruction {other}, which no tokenizer needs")
    raise ValueError("there is no object in it")


def read_ranks(path: Path) -> list[bytes]:
    """The tokens of a pickled tokenizer in the order of their ids. Raises UserError where it is not nanochat's kind."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_PICKLE_BYTES:
            raise ValueError(f"not a file of at most {MAX_PICKLE_BYTES:,} bytes")
        encoding = read_encoding(path.read_bytes())
        if not isinstance(encoding, dict):
            raise ValueError("it is a published encoding, by name")
        ranks, specials, pattern = (encoding[key] for key in ("mergeable_ranks", "special_tokens", "pat_str"))
        tokens = [token for token, _ in sorted(ranks.items(), key=lambda item: item[1])]
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError("its ranks are not 0, 1, 2, ...")
        if not all(isinstance(token, bytes) for token in tokens):
            raise ValueError("its tokens are not bytes")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # all that a broken program can lead to
        raise UserError(f"{path} is no tokenizer of nanochat: {one_line(error)}; nothing in it was executed") from None
    if tokens[:256] != [bytes([value]) for value in range(256)]:
        raise UserError(f"{path}: the first 256 tokens are not the bytes in order, as nanochat's are")
    if pattern != rustbpe.PATTERNS["nanochat"]:
        raise UserError(f"{path}: it splits text by another pattern than nanochat's: {ascii(pattern)[:200]}")
    if specials != {name: len(tokens) + i for i, name in enumerate(SPECIAL_TOKENS)}:
        raise UserError(f"{path}: its special tokens are not {' '.join(SPECIAL_TOKENS)} after all others")
    return tokens


def split_token(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The parts that byte-pair encoding has made of a token just before it joins them to the token itself."""
    parts = [bytes([value]) for value in token]
    while len(parts) > 2:
        own = ranks[token]
        pairs = zip(parts, parts[1:], strict=False)
        joins = [(ranks.get(left + right, own), i) for i, (left, right) in enumerate(pairs)]
        rank, i = min(joins)
        if rank >= own:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def import_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.pkl. It has the merges as ranks only; the pair behind each is what encoding the
    token with the earlier ones leaves. Raises UserError where it does not encode as tiktoken does with these ranks.
    """
    tokens = read_ranks(path)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = [[ranks[part] for part in split_token(token, ranks)] for token in tokens[256:]]
    odd = next((i for i, merge in enumerate(merges) if len(merge) != 2), None)
    if odd is not None:
        raise UserError(f"{path}: token {256 + odd} {tokens[256 + odd][:40]!r} is no merge of two earlier tokens")
    imported = Tokenizer(np.array(merges, dtype=np.uint32).reshape(-1, 2))
    oracle = tiktoken.Encoding(
        "imported", pat_str=rustbpe.PATTERNS["nanochat"], mergeable_ranks=ranks, special_tokens={}
    )
    for text in (HARD_TEXT, b"".join(tokens).decode(errors="replace"), Path(__file__).read_text(encoding="utf-8")):
        if imported.encode(text) != oracle.encode_ordinary(text):
            raise UserError(
                f"{path}: {text[:40]!r}... is not encoded as tiktoken does; the tokenizer cannot be imported"
            )
    return imported


# -----------------------------------------------------------------------------
# The model


def find_step(folder: Path) -> int:
    """The step that was asked for, or the last. Raises UserError where there is none."""
    names = [re.fullmatch(r"model_(\d{6,})\.pt", path.name) for path in folder.glob("model_*.pt")]
    steps = sorted(int(name[1]) for name in names if name)
    if not steps:
        raise UserError(f"--checkpoint={folder}: no model_<step>.pt in it")
    if step is not None and step not in steps:
        raise UserError(f"--step={step}: {folder} has {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


def read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); it belongs beside the model") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({one_line(error)}); get it again") from None
    if not isinstance(meta, dict) or not isinstance(meta.get("model_config"), dict):
        raise UserError(f"{path} is not of a nanochat checkpoint: it has no model_config")
    return meta


def read_config(found: dict[str, Any], path: Path) -> GPTConfig:
    """Our config of a nanochat model_config. Raises UserError where ours cannot say the same."""
    sizes = {name: found.get(name) for name in SIZES}
    wrong = [f"{name}={value!r}"[:80] for name, value in sizes.items() if type(value) is not int]
    more = [f"{name}={value!r}"[:80] for name, value in found.items() if name not in (*SIZES, "window_pattern")]
    if wrong or more:
        raise UserError(f"{path}: this model_config cannot be imported: {', '.join(wrong + more)}")
    if set(found.get("window_pattern", "L")) != {"L"}:
        raise UserError(f"{path}: window_pattern={found['window_pattern']!r} cannot be imported, only full context, L")
    return GPTConfig(**sizes, rope_base=ROPE_BASE)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pt file under their names here, not yet in memory. Raises UserError where there is more."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        what = f"names {name[1]}" if name else "is no plain pickle"
        raise UserError(f"{path} holds more than tensors ({what}); nothing in it was executed") from None
    except Exception as error:  # a foreign file: whatever it makes torch raise, it is no checkpoint
        raise UserError(f"{path} cannot be read as a torch checkpoint ({one_line(error)}); get it again") from None
    if not isinstance(found, dict) or not all(
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
        for name, tensor in found.items()
    ):
        raise UserError(f"{path} is not a dict of floating-point tensors by name")
    names = {name: re.sub(r"^(_orig_mod\.)?(transformer\.)?(h(?=\.\d))?", rename_prefix, name) for name in found}
    if len(set(names.values())) < len(names):
        raise UserError(f"{path} has two tensors for one place; it cannot be imported")
    return {names[name]: tensor for name, tensor in found.items()}


def rename_prefix(match: re.Match[str]) -> str:
    """nanochat's transformer.wte and transformer.h.0 are our wte and blocks.0; torch.compile adds _orig_mod."""
    return "blocks" if match[3] else ""


def fit(model: GPT, state: dict[str, Tensor], path: Path) -> None:
    """Give a model on "meta" these tensors, in fp32. Rows of padding, which stand for no token, are cut off and that is
    printed. Raises UserError naming every tensor that the model does not have, and the first that does not fit.
    """
    expected = model.state_dict()
    if more := sorted(state.keys() - expected.keys()):
        names = ", ".join(name[:60] for name in more[:6]) + (f" and {len(more) - 6} more" if len(more) > 6 else "")
        raise UserError(f"{path} is of a later nanochat: our model has no place for its trained tensors {names}")
    fitted = {}
    for name, place in expected.items():
        if name not in state:
            raise UserError(f"{path} has no tensor {name}, which the model of its meta file needs")
        tensor, shape = state[name], place.shape
        padding = tensor.size(0) - shape[0] if tensor.ndim else 0
        if 0 < padding < PADDING and tensor.size(0) % PADDING == 0 and name in ("wte.weight", "lm_head.weight"):
            print0(f"{name}: left out the last {padding} rows, padding that stands for no token")
            tensor = tensor[: shape[0]]
        if tensor.shape != shape:
            raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, its meta file says {tuple(shape)}")
        fitted[name] = tensor.float().contiguous()
    model.load_state_dict(fitted, assign=True)


# -----------------------------------------------------------------------------


def main() -> None:
    if checkpoint is None or not Path(checkpoint).is_dir():
        raise UserError(f"--checkpoint={checkpoint}: no such directory; give the one with model_<step>.pt")
    if tokenizer is None:
        raise UserError("--tokenizer=None: give the tokenizer.pkl; nanochat keeps it in ~/.cache/nanochat/tokenizer")
    folder = Path(checkpoint).absolute()
    tag = model_tag or folder.name
    at = find_step(folder)
    path = checkpoint_path(source, tag, at)
    if steps := saved_steps(path.parent):
        raise UserError(f"--model-tag={tag}: {source} already has that with step {steps[-1]}; choose another")
    model_path, meta_path = folder / f"model_{at:06d}.pt", folder / f"meta_{at:06d}.json"
    foreign_meta = read_meta(meta_path)
    config = read_config(foreign_meta["model_config"], meta_path)
    imported = import_tokenizer(Path(tokenizer))
    if imported.get_vocab_size() != config.vocab_size:
        raise UserError(
            f"{tokenizer} has {imported.get_vocab_size():,} tokens, {meta_path} says {config.vocab_size:,}; "
            "give the tokenizer that the model was trained with"
        )
    state = read_state(model_path)
    if config.n_layer > len(state):
        raise UserError(
            f"{model_path} has {len(state)} tensors, too few for the {config.n_layer} layers of {meta_path}"
        )
    with torch.device("meta"):
        model = GPT(config)
    fit(model, state, model_path)
    files = {str(file): sha256_file(file) for file in (model_path, meta_path, Path(tokenizer).absolute())}
    meta = {"model_config": model.config_dict(), "imported": {"files": files, "meta": foreign_meta}}
    save_checkpoint(path, model, [], imported, meta, Compute(torch.device("cpu"), torch.float32))
    print0(f"{path}: {model.num_params():,} parameters, {config.n_layer} layers")


if __name__ == "__main__":
    run_main(main)
