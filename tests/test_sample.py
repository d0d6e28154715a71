"""scripts.sample, and nanoGPT's quickstart: prepare a text, train on its characters, sample."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dev import prepare_shakespeare
from nanochat.char_byte import byte_tokenizer
from nanochat.common import UserError, get_base_dir
from nanochat.configurator import parse_args, read_block
from nanochat.corpus import load_corpus
from nanochat.gpt import GPT, GPTConfig
from nanochat.hf_tokenizer import find_hf_folder, load_hf_tokenizer
from nanochat.model import build_model
from nanochat.tokenizer import get_tokenizer
from nanochat.train import complete
from scripts import base_train, sample
from tests.test_char_byte import byte_level, hf_folder
from tests.test_gpt2 import SMALL, theirs_of
from tests.tiny import ROOT, run_here

LINE = "-" * 15


def byte_model(**options: Any) -> GPT:
    config = GPTConfig(sequence_len=32, vocab_size=265, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, **options)
    model = build_model(config, torch.device("cpu"), seed=0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(weight.numel()))
    return model.eval()


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """What a small model of bytes writes with some settings, as text."""

    def run(**values: Any) -> str:
        monkeypatch.setattr(sample, "load", lambda compute: (byte_model(), byte_tokenizer()))
        run_here(monkeypatch, sample, {"device_type": "cpu", "dtype": "float32", "max_tokens": 8, **values})
        return capfd.readouterr().out

    return run


def test_samples_are_continuations_and_a_seed_repeats_them(samples: Any) -> None:
    three = samples(prompt="ab", num_samples=3).removesuffix("\n").split(f"\n{LINE}\n")
    assert len(three) == 3 == len(set(three)) and all(text.startswith("ab") for text in three)
    two = samples(prompt="ab", num_samples=2, seed=1337).removesuffix("\n").split(f"\n{LINE}\n")
    assert two == three[:2], "whatever the number of samples"
    assert samples(prompt="ab", num_samples=2, seed=1) != samples(prompt="ab", num_samples=2, seed=2)


def test_temperature_0_is_the_likeliest_text_and_a_file_is_a_prompt(samples: Any, tmp_path: Path) -> None:
    file = tmp_path / "start.txt"
    file.write_text("To be")
    tokenizer = byte_tokenizer()
    said = complete(byte_model(), tokenizer.encode("To be", prepend="<|bos|>"), 8, torch.float32)
    expected = "To be" + tokenizer.decode(said[: said.index(256)] if 256 in said else said)
    for prompt in ("To be", f"FILE:{file}"):
        assert samples(prompt=prompt, temperature=0.0, num_samples=1) == expected + "\n"
    with pytest.raises(UserError, match=r"^--prompt=FILE:nowhere: .*No such file"):
        samples(prompt="FILE:nowhere")


def test_a_longer_context_gives_the_same_logits_and_more_room(samples: Any) -> None:
    with pytest.raises(UserError, match="the prompt has 41 tokens; this model takes 1 to 31"):
        samples(prompt="x" * 40)
    assert samples(prompt="x" * 40, context=64, num_samples=1).startswith("x" * 40)
    short, ids = byte_model(), torch.arange(32)[None]
    assert torch.equal(sample.with_context(short, 64)(ids), short(ids))
    with pytest.raises(UserError, match="the windows of this model are a part of its context"):
        sample.with_context(byte_model(window_pattern="SL"), 64)


def test_a_folder_samples_as_transformers_does_and_its_padding_is_never_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """nanoGPT's GPT-2 has 50,304 rows for 50,257 tokens: the first of the others that was drawn ended sample.py."""
    tokenizer = load_hf_tokenizer(hf_folder(tmp_path, byte_level()), chat=False)
    V, bos = tokenizer.get_vocab_size(), tokenizer.get_bos_token_id()
    theirs = theirs_of(replace(SMALL, vocab_size=V + 60, sequence_len=48))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "start.txt").write_text("hear me", encoding="utf-8")
    ids = torch.tensor([[bos, *tokenizer.encode("hear me")]])
    how = {"suppress_tokens": [*range(V, V + 60)], "eos_token_id": bos, "pad_token_id": bos}
    said = theirs.generate(ids, max_new_tokens=20, do_sample=False, **how)[0, 1:].tolist()

    def run(**values: Any) -> str:
        where = {"init_from": str(tmp_path), "device_type": "cpu", "dtype": "float32"}
        run_here(monkeypatch, sample, {**where, "prompt": "hear me", "max_tokens": 20, **values})
        return capfd.readouterr().out

    expected = tokenizer.decode([token for token in said if token != bos]) + "\n"
    for prompt in ("hear me", f"FILE:{tmp_path / 'start.txt'}"):
        assert run(prompt=prompt, temperature=0.0, num_samples=1, top_k=0) == expected
    wild = {"temperature": 100.0, "top_k": 0}
    drawn = run(num_samples=20, **wild).split(f"\n{LINE}\n")
    assert len(drawn) == 20 and run(num_samples=3, **wild).removesuffix("\n").split(f"\n{LINE}\n") == drawn[:3]
    assert run(num_samples=3, **wild, seed=1) != run(num_samples=3, **wild, seed=2)
    assert run(num_samples=1, temperature=100.0, top_k=1) == expected, "the likeliest of one"
    with pytest.raises(UserError, match="--context=64: this model has learned 48 positions; give fewer or none"):
        run(context=64)
    with pytest.raises(UserError, match=r"is a model by itself; leave out --model-tag and --step"):
        run(step=3)


def test_a_model_that_is_nowhere_is_one_line() -> None:
    with pytest.raises(UserError, match="nowhere: no such file or folder; expected one, or OWNER/NAME"):
        find_hf_folder("nowhere")


def test_the_quickstart_of_nanogpt(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "input.txt"
    file.write_text("First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n" * 60)
    run_here(monkeypatch, prepare_shakespeare, {"path": str(file)})
    assert "30 symbols, 4,428 ids to train on and 492 to validate on" in capfd.readouterr().out
    assert get_tokenizer(load_corpus("shakespeare_char").path).get_vocab_size() == 30 + 9
    config = parse_args(read_block(ROOT / "scripts/base_train.py"), [str(ROOT / "dev/configs/shakespeare_char.py")])
    settings = {name: value for name, (value, _) in config.items()}
    run_here(monkeypatch, base_train, {**settings, "num_iterations": 2, "device_type": "cpu"})
    capfd.readouterr()
    run_here(monkeypatch, sample, {"max_tokens": 20, "num_samples": 2, "device_type": "cpu", "dtype": "float32"})
    assert capfd.readouterr().out.count(LINE) == 1


@pytest.mark.parametrize("length", [0, 1, 72])
def test_a_text_too_short_to_train_on_makes_no_corpus(
    base_dir: Path, tmp_path: Path, monkeypatch: Any, length: int
) -> None:
    """One character was all for validation, and nine could be trained on with nothing that we recommend."""
    (tmp_path / "short.txt").write_text("x" * length)
    with pytest.raises(UserError, match=f"^path=.*short.txt: {length} characters; expected at least 73, nine tenths"):
        run_here(monkeypatch, prepare_shakespeare, {"path": str(tmp_path / "short.txt")})
    assert not (base_dir / "data").exists()
    (tmp_path / "short.txt").write_text("x" * 73)
    run_here(monkeypatch, prepare_shakespeare, {"path": str(tmp_path / "short.txt")})


def test_shakespeare_without_a_network_says_what_takes_a_file(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(url: str, target: Path) -> None:
        raise UserError(f"cannot fetch {url}")

    monkeypatch.setattr(prepare_shakespeare, "fetch_url", fetch)
    with pytest.raises(UserError, match=r"without a network, python -m dev.prepare_shakespeare FILE takes a text"):
        run_here(monkeypatch, prepare_shakespeare, {"path": None})
    assert not (get_base_dir() / "data").exists()
