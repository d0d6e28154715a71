"""The tokenizer: round trips, special tokens, and a file that is refused when a bit in it is wrong."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.files import seal
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer, get_tokenizer
from scripts import tok_train
from tests.corpora import run_dataset, write_parquet

TEXT = "The quick brown fox jumps over the lazy dog; the dog sleeps. Größe 你好 🙂 1,234 <|bos|>\n" * 20
VOCAB_SIZE = 256 + 40 + len(SPECIAL_TOKENS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], VOCAB_SIZE)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(text=st.text())
def test_decode_undoes_encode(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_text_never_becomes_a_special_token(tokenizer: Tokenizer) -> None:
    """A user who writes <|assistant_start|> must not speak for the assistant."""
    text = "".join(SPECIAL_TOKENS) + " <|bos|><|bos|>"
    assert max(tokenizer.encode(text)) < VOCAB_SIZE - len(SPECIAL_TOKENS)
    learnt_from = Tokenizer.train([text * 100], 290)
    assert max(learnt_from.encode(text)) < 290 - len(SPECIAL_TOKENS)


def test_special_tokens_have_the_last_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    ids = [tokenizer.encode_special(name) for name in tokenizer.get_special_tokens()]
    assert ids == list(range(VOCAB_SIZE - 9, VOCAB_SIZE))
    assert tokenizer.get_special_tokens() == list(SPECIAL_TOKENS)
    assert tokenizer.get_bos_token_id() == ids[0]
    assert tokenizer.decode(ids) == "".join(SPECIAL_TOKENS)
    assert tokenizer.decode([ids[3]]) == "<|assistant_start|>"
    with pytest.raises(UserError, match="no special token '<|eos|>'"):
        tokenizer.encode_special("<|eos|>")


def test_encode_of_one_text_and_of_many(tokenizer: Tokenizer) -> None:
    bos, end = tokenizer.get_bos_token_id(), tokenizer.encode_special("<|user_end|>")
    plain = [tokenizer.encode(text) for text in ("the dog", "", "x")]
    assert tokenizer.encode("the dog", prepend="<|bos|>", append=end) == [bos, *plain[0], end]
    many = tokenizer.encode(["the dog", "", "x"], prepend=bos, append="<|user_end|>", num_threads=2)
    assert many == [[bos, *ids, end] for ids in plain]
    assert all(type(token) is int for token in many[0])
    ids, offsets = tokenizer.encode_arrow(pa.array(["the dog", "", "x"]), num_threads=2)
    assert ids.tolist() == [token for ids in plain for token in ids]
    assert offsets.tolist() == np.cumsum([0] + [len(ids) for ids in plain]).tolist()


def test_token_bytes_are_raw_bytes_not_those_of_the_printed_token(tokenizer: Tokenizer) -> None:
    """A token that is half a character prints as U+FFFD, three bytes: counting those makes bits per byte too low."""
    lengths = tokenizer.token_bytes
    assert lengths.dtype == np.int32 and lengths.shape == (VOCAB_SIZE,)
    assert (lengths[:256] == 1).all() and (lengths[-9:] == 0).all()
    half = tokenizer.encode("ÿ")[0]
    assert tokenizer.decode([half]) == "\ufffd" and lengths[half] == 1
    for token in range(256, VOCAB_SIZE - 9):
        assert lengths[token] == len(tokenizer.decode_bytes([token]))


def test_decode_replaces_cut_characters_and_refuses_unknown_ids(tokenizer: Tokenizer) -> None:
    smile = list("🙂".encode())
    assert tokenizer.decode(smile) == "🙂"
    assert tokenizer.decode(np.array(smile[:2], dtype=np.uint16)) == "\ufffd"
    for token in (-1, VOCAB_SIZE):
        with pytest.raises(ValueError, match=f"token id {token}: the vocabulary has 0 to {VOCAB_SIZE - 1}"):
            tokenizer.decode([65, token])


def test_training_takes_strings_and_arrow_and_reports_progress() -> None:
    documents = TEXT.splitlines(keepends=True)
    seen: list[int] = []
    one = Tokenizer.train(documents, VOCAB_SIZE, progress=seen.append)
    two = Tokenizer.train([pa.array(documents[:5]), pa.chunked_array([documents[5:8]]), *documents[8:]], VOCAB_SIZE)
    assert one.fingerprint == two.fingerprint
    assert seen == sorted(seen) and 0 <= seen[0] <= seen[-1] <= VOCAB_SIZE - 265


def test_a_vocabulary_size_that_cannot_be_says_what_can() -> None:
    with pytest.raises(UserError, match="vocab_size 264: .* --vocab-size=265 or more"):
        Tokenizer.train(["text"], 264)
    with pytest.raises(UserError, match="vocab_size 1000000000000: .* at most 16777216"):
        Tokenizer.train(["text"], 10**12)
    with pytest.raises(UserError, match="gives 3 merges, so at most --vocab-size=268"):
        Tokenizer.train(["text"], 1000)
    assert Tokenizer.train([], 265).encode("é") == [0xC3, 0xA9]


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a")
    for path in (tmp_path / "a", tmp_path / "a" / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.encode(TEXT, prepend="<|bos|>") == tokenizer.encode(TEXT, prepend="<|bos|>")
        assert loaded.fingerprint == tokenizer.fingerprint
    loaded.save(tmp_path / "b")
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    assert Tokenizer.train([TEXT], VOCAB_SIZE - 1).fingerprint != tokenizer.fingerprint


def test_every_flipped_bit_of_the_file_is_noticed(tmp_path: Path) -> None:
    """Two merges exchanged are a tokenizer too, but another one than the model was trained with."""
    Tokenizer.train(["ab ab cd cd"], 268).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="not as it was written"):
            Tokenizer.load(path)


OTHERS = [seal(content).encode() for content in ('{"version": 2}', '{"model": {"type": "BPE"}}')]


@pytest.mark.parametrize("data", [*OTHERS, b"", b"\x80\x04\x95", b'{"version": 1', b"[" * 100_000])
def test_a_file_of_another_version_or_kind_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    problem = "version .* of the format; this program reads 1; " if data in OTHERS else ".*"
    with pytest.raises(UserError, match=f"tokenizer.json: {problem}make it again with: python -m scripts.tok_train"):
        Tokenizer.load(tmp_path)


def test_a_missing_tokenizer_names_the_command(base_dir: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="no tokenizer at .* train one with: python -m scripts.tok_train"):
        get_tokenizer()
    tokenizer.save(base_dir / "tokenizer")
    assert get_tokenizer().fingerprint == tokenizer.fingerprint


def test_a_tokenizer_says_what_share_of_the_text_it_saw(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of books, 10,000 characters each were taken: 1 % of the text, and not a word of it."""
    write_parquet(tmp_path / "in" / "a.parquet", [f"{number} " + "a book in words " * 300 for number in range(40)])
    run_dataset(monkeypatch, source="folder", path=str(tmp_path / "in"))
    for name, value in {"doc_cap": 1200, "vocab_size": 300}.items():
        monkeypatch.setattr(tok_train, name, value)
    tok_train.main()
    said = capsys.readouterr().out
    assert "that is 24.99% of the training text: at most 1,200 characters of a document, 2,000,000,000 in all" in said
    monkeypatch.setattr(tok_train, "doc_cap", 0)
    tok_train.main()
    assert "of the training text" not in capsys.readouterr().out
