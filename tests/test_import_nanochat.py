"""A checkpoint of karpathy/nanochat comes in with equal logits and ids, whole, or is refused; nothing in it runs."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rustbpe
from dev import import_nanochat
from nanochat.checkpoint_manager import find_checkpoint, load_model
from nanochat.common import UserError
from nanochat.hf_tokenizer import bytes_by_character
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer, expand_merges
from tests.reference import nanochat_model
from tests.tiny import ROOT

CONFIG = {"sequence_len": 32, "vocab_size": 320, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32}


class Attack:
    """Unpickled, it makes a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> Any:
        import os

        return os.system, (f"touch {self.target}",)


def encoding(trained: Tokenizer, **changes: Any) -> tiktoken.Encoding:
    """As nanochat makes it."""
    tokens = expand_merges(trained.merges)
    parts: dict[str, Any] = {
        "pat_str": rustbpe.PATTERNS["nanochat"],
        "mergeable_ranks": {token: rank for rank, token in enumerate(tokens)},
        "special_tokens": {name: len(tokens) + i for i, name in enumerate(SPECIAL_TOKENS)},
    }
    return tiktoken.Encoding("rustbpe", **parts | changes)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "nanochat").glob("*.py")))
    return Tokenizer.train([text, "=" * 80, "    " * 40, "aaaa aaaaa aaaaaa"] * 2, 320)


@pytest.fixture
def foreign(base_dir: Path, tmp_path: Path, trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with what nanochat writes, and the settings that import it."""
    folder = tmp_path / "d2"
    folder.mkdir()
    save(folder, nanochat_model.random_weights(CONFIG, torch.Generator().manual_seed(0)))
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding(trained)))
    for name, value in {"checkpoint": folder, "tokenizer": folder / "tokenizer.pkl", "source": "sft"}.items():
        monkeypatch.setattr(import_nanochat, name, str(value))
    return folder


def save(folder: Path, weights: Any, step: int = 700, **config: Any) -> None:
    torch.save(weights, folder / f"model_{step:06d}.pt")
    meta = {"step": step, "val_bpb": 1.5, "model_config": CONFIG | config}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta), encoding="utf-8")


def refusal() -> str:
    """The one line with which the import is refused; nothing was written."""
    with pytest.raises(UserError) as caught:
        import_nanochat.main()
    with pytest.raises(UserError, match="no sft checkpoint"):
        find_checkpoint("sft")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    return str(caught.value)


# -----------------------------------------------------------------------------
# The model


def test_logits_are_those_of_the_original(foreign):
    import_nanochat.main()
    model, _, meta = load_model("sft", torch.device("cpu"), model_tag="d2")
    weights = torch.load(foreign / "model_000700.pt", weights_only=True)
    ids = torch.randint(320, (32,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(ids[None])[0]
    theirs = nanochat_model.logits(weights, CONFIG, ids)
    assert (ours - theirs).abs().max() < 1e-5
    assert theirs.abs().max() > 5  # the cap bends some: the test would notice another one
    assert meta["step"] == 700 and meta["imported"]["meta"]["val_bpb"] == 1.5
    assert sum(p.numel() for p in model.parameters()) == sum(tensor.numel() for tensor in weights.values())


def test_keys_of_a_compiled_model_and_the_last_step_are_taken(foreign):
    weights = nanochat_model.random_weights(CONFIG, torch.Generator().manual_seed(2))
    save(foreign, {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}, step=1200)
    import_nanochat.main()
    model, _, meta = load_model("sft", torch.device("cpu"))
    assert meta["step"] == 1200
    assert torch.equal(model.blocks[1].mlp.c_proj.weight, weights["transformer.h.1.mlp.c_proj.weight"])
    assert torch.equal(model.wte.weight, weights["transformer.wte.weight"].float())


def test_a_later_nanochat_is_refused_by_the_names_of_its_tensors(foreign):
    weights = nanochat_model.random_weights(CONFIG, torch.Generator().manual_seed(0))
    save(foreign, weights | {"resid_lambdas": torch.ones(2), "value_embeds.1.weight": torch.ones(320, 16)})
    assert "our model has no place for its trained tensors resid_lambdas, value_embeds.1.weight" in refusal()


def test_rows_of_padding_are_left_out_and_that_is_said(foreign, trained, monkeypatch, capsys):
    smaller = Tokenizer(trained.merges[:-10])
    (foreign / "tokenizer.pkl").write_bytes(pickle.dumps(encoding(smaller)))
    weights = nanochat_model.random_weights(CONFIG, torch.Generator().manual_seed(0))  # 320 rows, a multiple of 64
    save(foreign, weights, vocab_size=310, window_pattern="L")
    import_nanochat.main()
    assert "lm_head.weight: left out the last 10 rows" in capsys.readouterr().out
    model, _, _ = load_model("sft", torch.device("cpu"))
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"][:310])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"n_head": "4"}, "n_head='4'"),
        ({"n_layer": 10**9}, "too few for the 1000000000 layers"),
        ({"n_layer": 3}, "has no tensor blocks.2.attn.c_q.weight"),
        ({"n_embd": 64}, "has shape (320, 32), its meta file says (320, 64)"),
        ({"vocab_size": 65536}, "has 320 tokens"),
        ({"window_pattern": "SSSL"}, "window_pattern='SSSL'"),
        ({"frozen_embd": True}, "frozen_embd=True"),
    ],
)
def test_a_config_that_is_not_the_models_is_refused(foreign, config, words):
    save(foreign, nanochat_model.random_weights(CONFIG, torch.Generator().manual_seed(0)), **config)
    assert words in refusal()


def test_an_existing_tag_is_not_touched(foreign):
    import_nanochat.main()
    with pytest.raises(UserError, match="already has that with step 700; choose another"):
        import_nanochat.main()


# -----------------------------------------------------------------------------
# Foreign files


def test_a_malicious_model_runs_nothing(foreign, tmp_path):
    path = foreign / "model_000700.pt"
    torch.save({"lm_head.weight": Attack(tmp_path / "harm")}, path)
    assert "holds more than tensors (names posix.system); nothing in it was executed" in refusal()
    path.write_bytes(pickle.dumps(Attack(tmp_path / "harm")))  # not even a zip file
    assert "cannot be read as a torch checkpoint" in refusal()
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_malicious_tokenizer_runs_nothing(foreign, tmp_path, protocol):
    path = foreign / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(Attack(tmp_path / "harm"), protocol))
    assert "it names 'posix.system', which no tokenizer needs; nothing in it was executed" in refusal()
    assert not (tmp_path / "harm").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "harm").exists()  # it would have: the test above is about something


def test_a_pickle_that_only_begins_like_a_tokenizer_runs_nothing(foreign, tmp_path, trained):
    class Named:
        def __reduce__(self) -> Any:
            return tiktoken.Encoding, ("x", Attack(tmp_path / "harm"))

    path = foreign / "tokenizer.pkl"
    for harmful in (Named(), [encoding(trained), Attack(tmp_path / "harm")], {"pat_str": Attack(tmp_path / "harm")}):
        path.write_bytes(pickle.dumps(harmful))
        assert "is no tokenizer of nanochat" in refusal()
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04.", b"\x80\x04N.", b"\x80\x04\x8e" + b"\xff" * 8, b"r\xff\xff\xff\xff.", b"b" * 50, b"u."],
)
def test_a_broken_pickle_is_refused(foreign, content):
    (foreign / "tokenizer.pkl").write_bytes(content)
    assert "is no tokenizer of nanochat" in refusal()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"\x00" * 5000])
def test_a_broken_model_file_is_refused(foreign, content):
    (foreign / "model_000700.pt").write_bytes(content)
    assert "model_000700.pt" in refusal()


def test_a_cut_model_file_is_refused(foreign):
    path = foreign / "model_000700.pt"
    whole = path.read_bytes()
    for end in range(100, len(whole), len(whole) // 7):
        path.write_bytes(whole[:end])
        assert "cannot be read as a torch checkpoint" in refusal()


@pytest.mark.parametrize("weights", [[1, 2], {"lm_head.weight": 3}, {"lm_head.weight": torch.ones(2).long()}])
def test_what_is_no_dict_of_tensors_is_refused(foreign, weights):
    save(foreign, weights)
    assert "is not a dict of floating-point tensors" in refusal()


# -----------------------------------------------------------------------------
# The tokenizer


def test_the_merges_are_recovered_from_the_ranks(foreign, trained):
    imported = import_nanochat.import_tokenizer(foreign / "tokenizer.pkl")
    assert imported.fingerprint == trained.fingerprint


def test_the_published_merges_of_gpt2_are_recovered_from_its_ranks(shared_data):
    """Both are published, so here the right answer is known."""
    folder = shared_data / "gpt2_bpe"
    byte_of = bytes_by_character()
    names = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    ranks = {bytes(byte_of[char] for char in name): rank for name, rank in names.items() if name != "<|endoftext|>"}
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    for rank, line in enumerate(lines, 256):
        published = [bytes(byte_of[char] for char in part) for part in line.split(" ")]
        assert import_nanochat.split_token(b"".join(published), ranks) == published, rank


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_every_protocol_with_bytes_is_read(foreign, trained, protocol):
    (foreign / "tokenizer.pkl").write_bytes(pickle.dumps(encoding(trained), protocol))
    assert len(import_nanochat.read_ranks(foreign / "tokenizer.pkl")) == 311


@settings(deadline=None)
@given(text=st.text())
def test_ids_are_those_of_the_original(trained, text):
    original = encoding(trained)
    tokens = [token for token, _ in sorted(original._mergeable_ranks.items(), key=lambda item: item[1])]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = [[ranks[part] for part in import_nanochat.split_token(token, ranks)] for token in tokens[256:]]
    assert Tokenizer(merges).encode(text) == original.encode_ordinary(text)


def test_another_kind_of_tokenizer_is_refused_by_what_differs(foreign, trained):
    tokens = expand_merges(trained.merges)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    reversed_bytes = {bytes([255 - value]): value for value in range(256)}
    for changes, words in (
        ({"pat_str": r"\w+|\W+"}, "another pattern"),
        ({"special_tokens": {"<|endoftext|>": len(tokens)}}, "special tokens are not"),
        ({"mergeable_ranks": ranks | reversed_bytes}, "not the bytes in order"),
        ({"mergeable_ranks": ranks | {b"\x00\x01\x02\x03": 500}}, "ranks are not 0, 1, 2"),
        (
            {"mergeable_ranks": ranks | {b"\x00\x01\x02\x03": 311}, "special_tokens": specials(312)},
            "is no merge of two",
        ),
    ):
        (foreign / "tokenizer.pkl").write_bytes(pickle.dumps(encoding(trained, **changes)))
        assert words in refusal()


def specials(first: int) -> dict[str, int]:
    return {name: first + i for i, name in enumerate(SPECIAL_TOKENS)}
