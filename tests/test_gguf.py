"""A .gguf file holds a Llama's or a GPT-2's numbers, tokenizer and sizes; what llama.cpp cannot run stays here."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanochat.common import UserError
from nanochat.gguf_export import find_pattern, write_gguf
from nanochat.hf_export import TEMPLATE, settings_files, tokenizer_json
from nanochat.tokenizer import Tokenizer
from tests.tiny import ROOT

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}
GPT2 = {"n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    trained = Tokenizer.train([(ROOT / "nanochat" / "engine.py").read_text(encoding="utf-8")], 320)
    return Tokenizer(trained.merges, pattern="gpt2")


def make(kind: str, tokenizer: Tokenizer) -> tuple[Any, dict[str, Any], dict[str, torch.Tensor]]:
    """A random model of transformers, and its JSON files and tensors."""
    torch.manual_seed(0)
    configs = {"llama": (transformers.LlamaConfig, LLAMA), "gpt2": (transformers.GPT2Config, GPT2)}
    known, sizes = configs[kind]
    model = transformers.AutoModelForCausalLM.from_config(known(vocab_size=tokenizer.get_vocab_size(), **sizes)).eval()
    for p in model.parameters():
        p.data.normal_(0, 0.3)
    files = settings_files(tokenizer, 64, chats=True)
    files |= {"config.json": model.config.to_dict(), "tokenizer.json": tokenizer_json(tokenizer)}
    return model, files, model.state_dict()


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """{key: value} and {tensor: values} of a file."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor.data for tensor in reader.tensors}


def test_every_number_of_a_llama_is_in_the_file(tmp_path, tokenizer):
    _, files, tensors = make("llama", tokenizer)
    write_gguf(tmp_path / "m.gguf", files, tensors)
    fields, stored = read(tmp_path / "m.gguf")
    assert len(stored) == len(tensors) == 2 * 9 + 3
    assert np.array_equal(stored["token_embd.weight"], tensors["model.embed_tokens.weight"].numpy())
    assert np.array_equal(stored["output.weight"], tensors["lm_head.weight"].numpy())
    for ours, theirs in (
        ("attn_v", "self_attn.v_proj"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_norm", "post_attention_layernorm"),
    ):
        assert np.array_equal(stored[f"blk.1.{ours}.weight"], tensors[f"model.layers.1.{theirs}.weight"].numpy())
    for part, heads in (("q", 4), ("k", 2)):  # llama.cpp's pairs are neighbours, transformers' half a head apart
        rows = tensors[f"model.layers.0.self_attn.{part}_proj.weight"].view(heads, 16, 64)
        there = stored[f"blk.0.attn_{part}.weight"].reshape(heads, 16, 64)
        for i in range(8):
            assert np.array_equal(there[:, 2 * i], rows[:, i].numpy())
            assert np.array_equal(there[:, 2 * i + 1], rows[:, i + 8].numpy())
    sizes = {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "rope.dimension_count": 16,
    }
    sizes |= {"attention.head_count": 4, "attention.head_count_kv": 2, "rope.freq_base": 10_000.0, "vocab_size": 320}
    assert {key: fields[f"llama.{key}"] for key in sizes} == sizes and fields["general.architecture"] == "llama"
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


def test_every_number_of_a_gpt2_is_in_the_file(tmp_path, tokenizer):
    _, files, tensors = make("gpt2", tokenizer)
    write_gguf(tmp_path / "m.gguf", files, tensors)
    fields, stored = read(tmp_path / "m.gguf")
    assert len(stored) == 2 * 12 + 4  # the head is the embedding
    assert np.array_equal(stored["position_embd.weight"], tensors["transformer.wpe.weight"].numpy())
    for part, theirs in (
        ("attn_qkv", "attn.c_attn"),
        ("attn_output", "attn.c_proj"),
        ("ffn_up", "mlp.c_fc"),
        ("ffn_down", "mlp.c_proj"),
    ):
        assert np.array_equal(stored[f"blk.1.{part}.weight"], tensors[f"transformer.h.1.{theirs}.weight"].numpy().T)
        assert np.array_equal(stored[f"blk.1.{part}.bias"], tensors[f"transformer.h.1.{theirs}.bias"].numpy())
    assert fields["gpt2.attention.head_count"] == 4 and fields["gpt2.context_length"] == 64


def test_the_tokenizer_goes_along(tmp_path, tokenizer):
    _, files, tensors = make("llama", tokenizer)
    write_gguf(tmp_path / "m.gguf", files, tensors)
    fields, _ = read(tmp_path / "m.gguf")
    named = {key.removeprefix("tokenizer."): value for key, value in fields.items() if key.startswith("tokenizer.")}
    names = named["ggml.tokens"]
    assert named["ggml.model"] == "gpt2" and named["ggml.pre"] == "gpt-2" and len(names) == 320
    assert names[-9:] == tokenizer.get_special_tokens() and named["ggml.token_type"] == [1] * 311 + [3] * 9
    merged = [tuple(map(names.index, merge.split(" "))) for merge in named["ggml.merges"]]
    assert merged == [tuple(pair) for pair in tokenizer.merges.tolist()]
    assert names[named["ggml.eos_token_id"]] == "<|assistant_end|>" and names[named["ggml.bos_token_id"]] == "<|bos|>"
    assert named["ggml.add_bos_token"] and named["chat_template"] == TEMPLATE


def test_padding_and_added_words_are_no_control_tokens(tmp_path, tokenizer):
    """llama.cpp prints no control tokens, such as runs of spaces would be, and opens no file with fewer tokens than its
    embedding has rows.
    """
    _, files, tensors = make("llama", tokenizer)
    files["config.json"]["vocab_size"] = 323
    files["tokenizer.json"]["added_tokens"].append({"id": 320, "content": "  ", "special": False})
    write_gguf(tmp_path / "m.gguf", files, tensors)
    fields, _ = read(tmp_path / "m.gguf")
    assert fields["tokenizer.ggml.tokens"][-3:] == ["  ", "[PAD321]", "[PAD322]"]
    assert fields["tokenizer.ggml.token_type"][-5:] == [3, 3, 4, 5, 5]


def test_what_llama_cpp_cannot_run_is_refused_in_one_line(tmp_path, tokenizer):
    _, files, tensors = make("llama", tokenizer)
    other = Tokenizer(tokenizer.merges)  # nanochat's pattern: digits in twos
    with pytest.raises(UserError, match=r"--to=gguf: llama.cpp cannot split text as this tokenizer does"):
        write_gguf(tmp_path / "m.gguf", files | {"tokenizer.json": tokenizer_json(other)}, tensors)
    with pytest.raises(UserError, match=r"--to=gguf: llama.cpp has no nanochat; train with --arch=llama"):
        find_pattern(files | {"config.json": {"model_type": "nanochat"}})
    assert list(tmp_path.iterdir()) == []
