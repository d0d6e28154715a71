"""Tokenizers of characters, bytes, symbols and Hugging Face files: the interface of Tokenizer, whatever the kind."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.char_byte import SymbolTokenizer, byte_tokenizer
from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError
from nanochat.engine import Engine, Sampling
from nanochat.hf_tokenizer import LibraryEncoder, bytes_by_character, load_hf_tokenizer
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer, get_tokenizer
from scripts import base_loss, base_train, tok_train
from tests.tiny import run_here

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak. <|endoftext|> Größe, 12 + 345 🙂\n\n  don't"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"


def hf_folder(folder: Path, split: tokenizers.pre_tokenizers.PreTokenizer, **config: str) -> Path:
    """A model folder with a trained tokenizer of the library's, one special token and one that is none."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = split
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = list(config.values()) or ["<|endoftext|>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator([TEXT] * 20, trainer)
    library.add_special_tokens(special)
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def byte_level(**options: Any) -> Any:
    return tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


def llama_split() -> Any:
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated")
    return tokenizers.pre_tokenizers.Sequence([split, byte_level(use_regex=False)])


@pytest.fixture(scope="module", params=["char", "byte", "symbols", "gpt2", "llama"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("hf")
    kinds = {
        "char": lambda: SymbolTokenizer.of_text([TEXT]),
        "byte": byte_tokenizer,
        "symbols": lambda: SymbolTokenizer([*sorted(set(TEXT)), "12", "123", "don't"]),
        "gpt2": lambda: load_hf_tokenizer(hf_folder(folder, byte_level())),
        "llama": lambda: load_hf_tokenizer(hf_folder(folder, llama_split(), bos_token="<|start|>", eos_token="</s>")),
    }
    made: Tokenizer = kinds[request.param]()
    return made


def test_every_kind_has_the_interface_of_the_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.token_bytes[ids].sum() == len(TEXT.encode())
    bos, end = tokenizer.get_bos_token_id(), tokenizer.encode_special("<|assistant_end|>")
    assert tokenizer.encode(["hear", ""], prepend=bos, append="<|assistant_end|>")[1] == [bos, end]
    texts = pa.chunked_array([pa.array([TEXT, ""]), pa.array(["hear me"])])
    flat, offsets = tokenizer.encode_arrow(texts)
    assert flat.tolist() == [*ids, *tokenizer.encode("hear me")] and offsets.tolist() == [
        0,
        len(ids),
        len(ids),
        len(flat),
    ]
    assert flat.dtype == "uint16" and len(tokenizer.token_bytes) == tokenizer.get_vocab_size()
    assert not tokenizer.token_bytes[[tokenizer.encode_special(name) for name in tokenizer.get_special_tokens()]].any()
    assert set(SPECIAL_TOKENS) <= set(tokenizer.get_special_tokens())
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert type(loaded) is type(tokenizer) and loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode(TEXT) == ids and loaded.encode_special("<|assistant_end|>") == end


def test_text_never_becomes_a_special_token_of_any_kind(tokenizer: Tokenizer) -> None:
    special = {tokenizer.encode_special(name) for name in tokenizer.get_special_tokens()}
    assert not special & set(tokenizer.encode(TEXT))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(text=st.text())
def test_bytes_spell_any_text(text: str) -> None:
    assert byte_tokenizer().encode(text) == list(text.encode())
    assert byte_tokenizer().get_vocab_size() == 265


def test_characters_are_sorted_and_an_unknown_one_is_named_with_its_place() -> None:
    tokenizer = SymbolTokenizer.of_text(["banana", pa.array(["an apple\n"])])
    assert tokenizer.symbols == ["\n", " ", "a", "b", "e", "l", "n", "p"]
    assert tokenizer.encode("nab") == [6, 2, 3] and tokenizer.get_bos_token_id() == 8
    with pytest.raises(UserError, match=r"^cannot encode: character 'x' at 4 \(line 2\); .* 8 symbols"):
        tokenizer.encode("ban\nx")
    with pytest.raises(UserError, match="row 1 is null"):
        tokenizer.encode_arrow(pa.array(["a", None]))
    with pytest.raises(UserError, match="0 symbols: expected at least one"):
        SymbolTokenizer.of_text([])


def test_the_longest_symbol_that_fits_is_taken() -> None:
    tokenizer = SymbolTokenizer([*map(str, range(97)), "/", "="])
    assert tokenizer.encode("12/9=45") == [12, 97, 9, 98, 45]


def test_gpt2s_pattern_in_rust_equals_the_library(tmp_path: Path) -> None:
    tokenizer = load_hf_tokenizer(hf_folder(tmp_path, byte_level()))
    assert not isinstance(tokenizer._encoder, LibraryEncoder)
    assert tokenizer.encode(TEXT) == LibraryEncoder(tokenizer.spec, 300).encode_lists([TEXT])[0]
    other = load_hf_tokenizer(hf_folder(tmp_path, llama_split()))
    assert isinstance(other._encoder, LibraryEncoder)


def test_a_model_with_published_weights_has_no_rows_for_our_special_tokens(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, byte_level())
    plain, chats = load_hf_tokenizer(folder, chat=False), load_hf_tokenizer(folder)
    assert plain.get_special_tokens() == ["<|endoftext|>", "<|bos|>"] and chats.get_vocab_size() == 301 + 8
    assert plain.get_bos_token_id() == plain.encode_special("<|endoftext|>") == plain.get_vocab_size() - 1 == 300


def test_tokenizers_that_change_a_text_are_refused_and_a_normalizer_is_named(tmp_path: Path, capsys: Any) -> None:
    folder = hf_folder(tmp_path, byte_level())
    spec = json.loads((folder / "tokenizer.json").read_text())
    space = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(UserError, match="add_prefix_space"):
        load_hf_tokenizer(hf_folder(tmp_path / "space", space))
    for change in ({"pre_tokenizer": None}, {"model": spec["model"] | {"type": "Unigram"}}, {"model": {}}):
        (folder / "tokenizer.json").write_text(json.dumps(spec | change))
        with pytest.raises(UserError, match="expected byte-level BPE|cannot be read"):
            load_hf_tokenizer(folder)
    (folder / "tokenizer.json").write_text(json.dumps(spec | {"normalizer": {"type": "NFC"}}))
    load_hf_tokenizer(folder)
    assert "its normalizer NFC is left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="no tokenizer there; expected tokenizer.json"):
        load_hf_tokenizer(tmp_path / "nowhere")


def test_tinyshakespeare_has_the_published_numbers_of_symbols_and_ids(shared_data: Path) -> None:
    text = (shared_data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    parts = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]
    characters, gpt2 = SymbolTokenizer.of_text([text]), load_hf_tokenizer(shared_data / "gpt2_bpe")
    assert len(characters.symbols) == 65
    assert [len(characters.encode(part)) for part in parts] == [1_003_854, 111_540]
    assert [len(gpt2.encode(part)) for part in parts] == [301_966, 36_059]


def test_bytes_by_character_are_the_librarys() -> None:
    assert set(bytes_by_character()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def test_a_run_with_the_characters_of_its_corpus(
    prepared: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training, validation, samples, checkpoint and evaluation; the tokenizer of other corpora is left as it was."""
    shutil.copytree(prepared, base_dir)
    run_here(monkeypatch, tok_train, {"kind": "char", "corpus_own": True})
    assert get_tokenizer().get_vocab_size() == 320
    tokenizer = get_tokenizer(base_dir / "data" / "tiny")
    assert isinstance(tokenizer, SymbolTokenizer) and 20 < len(tokenizer.symbols) < 50
    model = {"depth": 1, "aspect_ratio": 32, "head_dim": 16, "max_seq_len": 64, "device_type": "cpu", "compile": False}
    batch = {"device_batch_size": 4, "total_batch_size": 512, "num_iterations": 3, "eval_tokens": 500}
    run_here(monkeypatch, base_train, {**model, **batch, "sample_every": 3})
    out = capsys.readouterr().out
    assert f"vocabulary {tokenizer.get_vocab_size()}" in out
    assert "'If the file does not exist,': skipped, cannot encode: character 'I'" in out
    run_here(monkeypatch, base_loss, {"split_tokens": 500, "device_type": "cpu"})
    scored = re.findall(r"(?<!quick )val bpb ([\d.]+)", out + capsys.readouterr().out)
    assert len(scored) == 2 and scored[0] == scored[1]
    loaded, own, _ = load_model("base", torch.device("cpu"))
    assert own.fingerprint == tokenizer.fingerprint
    prompt = own.encode("the cat", prepend="<|bos|>")
    [said], _ = Engine(loaded, own).generate_batch([prompt], Sampling(max_tokens=5))
    assert own.decode(said)
