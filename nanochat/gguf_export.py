"""A Llama or GPT-2 as a .gguf file, for llama.cpp, Ollama and what is built on them, from what transformers reads.

llama.cpp has the split patterns of known tokenizers in its code, so text is split by one of those or the model stays
here. Promises: every number as it was, in fp32; quantising is llama.cpp's own work.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nanochat.common import UserError
from nanochat.hf_export import REGEXES

PATTERNS = {REGEXES["gpt2"]: "gpt-2", REGEXES["rustbpe"]: "llama-bpe"}  # llama.cpp's names of the same patterns
TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")  # GPT-2's matrices lie the other way round


def find_pattern(files: Mapping[str, Any]) -> str:
    """llama.cpp's name of the tokenizer's pattern. Raises UserError for a model that llama.cpp cannot run."""
    kind, spec = files["config.json"]["model_type"], files["tokenizer.json"]
    if kind not in ("llama", "gpt2"):
        raise UserError(f"--to=gguf: llama.cpp has no {kind}; train with --arch=llama, or export with --to=hf")
    split = spec["pre_tokenizer"]
    first = split["pretokenizers"][0] if split["type"] == "Sequence" else split
    if first["type"] == "ByteLevel" and first.get("use_regex", True):
        return "gpt-2"
    if (regex := first.get("pattern", {}).get("Regex")) not in PATTERNS:
        mend = "train the tokenizer with --pattern=gpt2, or export with --to=hf"
        raise UserError(f"--to=gguf: llama.cpp cannot split text as this tokenizer does, by {regex}; {mend}")
    return PATTERNS[regex]


def write_gguf(path: Path, files: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the model of a folder's JSON files (by name) and tensors. Raises UserError as find_pattern() does."""
    pattern = find_pattern(files)
    try:
        import gguf
    except ImportError:
        raise UserError("--to=gguf needs the package gguf: pip install gguf") from None
    config = files["config.json"]
    kind, layers = config["model_type"], config.get("num_hidden_layers") or config["n_layer"]
    writer = gguf.GGUFWriter(path, kind)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(layers)
    (add_llama if kind == "llama" else add_gpt2)(writer, config)
    add_tokenizer(writer, files, pattern)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(arch, layers)
    for name, tensor in tensors.items():
        data = tensor.float().numpy()
        if kind == "gpt2" and name.endswith(TRANSPOSED):
            data = data.T
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            data = interleave(data, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue  # it is the embedding
        if not (stored := names.get_name(name, (".weight", ".bias"))):
            raise UserError(f"--to=gguf: llama.cpp has no place for {name}; export with --to=hf")
        writer.add_tensor(stored, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp turns the pairs (x_2i, x_2i+1) of a head where transformers turns (x_i, x_i+D/2): the rows (H D, C) of
    queries and keys in its order.
    """
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def add_llama(writer: Any, config: Mapping[str, Any]) -> None:
    """Sizes and constants of a LlamaForCausalLM."""
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])


def add_gpt2(writer: Any, config: Mapping[str, Any]) -> None:
    """Sizes and constants of a GPT2LMHeadModel."""
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def add_tokenizer(writer: Any, files: Mapping[str, Any], pattern: str) -> None:
    """Vocabulary, merges, special tokens and the chat template."""
    import gguf

    spec, drawing = files["tokenizer.json"], files["generation_config.json"]
    added, kinds, ids = spec["added_tokens"], gguf.TokenType, range(files["config.json"]["vocab_size"])
    names = {token: name for name, token in spec["model"]["vocab"].items()}
    names |= {token["id"]: token["content"] for token in added}
    kind_of = dict.fromkeys(names, kinds.NORMAL)
    kind_of |= {token["id"]: kinds.CONTROL if token["special"] else kinds.USER_DEFINED for token in added}
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(pattern)
    writer.add_token_list([names.get(token, f"[PAD{token}]") for token in ids])
    writer.add_token_types([kind_of.get(token, kinds.UNUSED) for token in ids])
    writer.add_token_merges([" ".join(pair) for pair in spec["model"]["merges"]])
    writer.add_bos_token_id(drawing["bos_token_id"])
    writer.add_eos_token_id(drawing["eos_token_id"][0])
    writer.add_add_bos_token(True)
    if template := files["tokenizer_config.json"].get("chat_template"):
        writer.add_chat_template(template)
