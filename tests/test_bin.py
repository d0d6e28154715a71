"""A corpus of token ids: nanoGPT's .bin files through the ordinary stream, validation and training."""

import json
import pickle
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dev import import_bin, make_bin
from nanochat import token_files
from nanochat.char_byte import SymbolTokenizer, byte_tokenizer
from nanochat.common import UserError
from nanochat.compute import Compute
from nanochat.corpus import Corpus, iter_text, load_corpus
from nanochat.dataloader import Position, training_stream
from nanochat.loss_eval import validation_windows
from nanochat.schedule import BatchPlan
from nanochat.token_files import documents, gather, read_ids, row_starts, write_tokens
from nanochat.tokenizer import get_tokenizer
from scripts import base_loss, base_train, bench
from tests.reference.bin_rows import epoch_rows
from tests.tiny import events, run_here

T = 8
IDS = np.arange(3, 256, dtype=np.uint16)  # 253 = 31 rows of 8 and 5 ids


def write_bins(folder: Path, train: np.ndarray, val: np.ndarray, dtype: str = "uint16") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    train.astype(dtype).tofile(folder / "train.bin")
    val.astype(dtype).tofile(folder / "val.bin")
    return folder


@pytest.fixture
def corpus(base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """The bytes 3 to 255 in order, and for validation two documents of 10 and 20 bytes."""
    folder = write_bins(tmp_path / "bins", IDS, np.array([256, *range(10), 256, *range(20)]))
    byte_tokenizer().save(folder)
    run_here(monkeypatch, import_bin, {"path": str(folder)})
    return load_corpus()


def batches(corpus: Corpus, rank: int = 0, ranks: int = 1, rows: int = 4, start: Position | None = None) -> Any:
    compute = Compute(torch.device("cpu"), torch.float32, rank, ranks)
    plan = BatchPlan(rows, T, ranks, 1)
    return training_stream(corpus.train, get_tokenizer(corpus.path), plan, compute, "flat", 42, start)


def test_rows_equal_the_slow_twins_and_every_id_is_a_target() -> None:
    for n in (9, 16, 17, 253):
        ids = np.arange(n)
        starts = row_starts(n, T, None, seed=1, epoch=n)
        rows = epoch_rows(ids.tolist(), int(starts[0]), T)
        assert gather(ids, starts, T).tolist() == rows
        assert {token for row in rows for token in row[1:]} == set(range(n))
    assert not len(row_starts(8, T, None, 1, 0))


def test_both_ways_of_reading_give_the_same_rows(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for in_memory in (True, False):
        monkeypatch.setattr(token_files, "read_ids", partial(read_ids, in_memory=in_memory))
        found.append([tokens.tolist() for tokens, _, _ in islice(batches(corpus), 30)])
        assert isinstance(read_ids(corpus.train.paths[0], "uint16", in_memory), np.memmap) != in_memory
    assert found[0] == found[1]
    assert not isinstance(read_ids(corpus.train.paths[0], "uint16"), np.memmap)  # so little fits
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(10**12))
    assert isinstance(read_ids(corpus.train.paths[0], "uint16"), np.memmap)


def test_an_epoch_is_one_true_shuffle(corpus: Corpus) -> None:
    """The ancestor drew one start for a batch, so its rows were neighbours, and ranks could share a window."""
    first = torch.cat([tokens[:, 0] for tokens, _, _ in islice(batches(corpus), 8)])
    assert len(set(first.tolist())) == 32, "of 32 rows none comes twice"
    gaps = (first.diff() % 253).abs()
    assert (gaps == T).sum() < 5
    again = torch.cat([tokens[:, 0] for tokens, _, _ in islice(batches(corpus), 8)])
    assert torch.equal(first, again), "the same seed, the same order"
    second = torch.cat([tokens[:, 0] for tokens, _, _ in islice(batches(corpus), 8, 16)])
    assert sorted(second.tolist()) != sorted(first.tolist()), "rows of the second epoch begin elsewhere"


def test_two_ranks_see_what_one_sees_and_a_position_resumes_any_number(corpus: Corpus) -> None:
    one = [(tokens, targets) for tokens, targets, _ in islice(batches(corpus), 20)]
    ranks = [list(islice(batches(corpus, rank, 2, rows=2), 20)) for rank in range(2)]
    for (tokens, targets), *parts in zip(one, *ranks, strict=True):
        assert torch.equal(tokens, torch.cat([part[0] for part in parts]))
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
    for step in (3, 8, 13):  # within an epoch, at its end, and in the second
        position = Position.from_json(vars(ranks[0][step][2]))
        [(resumed, _, _)] = islice(batches(corpus, start=position), 1)
        assert torch.equal(resumed, one[step + 1][0])


def test_validation_scores_every_id_of_every_document_once(corpus: Corpus) -> None:
    windows = list(validation_windows(corpus.val, get_tokenizer(corpus.path), T, T // 2))
    scored = {d: [t for w in windows if w.document == d for t in w.tokens[w.first + 1 :].tolist()] for d in (0, 1)}
    assert scored == {0: list(range(10)), 1: list(range(20))}
    assert all(window.tokens[0] == 256 for window in windows)
    assert [part.tolist() for part in documents(np.array([5, 9, 9, 6, 7, 9]), 9)] == [[5], [6, 7]]
    assert corpus.manifest["totals"]["validation"] == {"files": 1, "documents": 2, "text_bytes": 30}


def test_only_what_follows_the_answer_token_is_learnt_and_scored(base_dir: Path) -> None:
    tokenizer = SymbolTokenizer([*"0123456789*="])
    bos, texts = tokenizer.get_bos_token_id(), ["3*7=21", "2*4=08", "9*9=81"]
    ids = np.array([tokenizer.encode(text, prepend=bos) for text in texts]).flatten()
    about = {"source": "dev.make_arithmetic", "arguments": {}, "document": 7, "answer": tokenizer.encode("=")[0]}
    write_tokens(base_dir / "data" / "x", {"train": ids, "validation": ids}, tokenizer, "uint16", about)
    corpus = load_corpus("x")
    compute, plan = Compute(torch.device("cpu"), torch.float32), BatchPlan(3, 6, 1, 1)
    inputs, targets, _ = next(training_stream(corpus.train, tokenizer, plan, compute))
    assert (targets[:, :3] == -1).all() and (inputs[:, 0] == bos).all()
    assert {tokenizer.decode(row) for row in targets[:, 4:].tolist()} == {"21", "08", "81"}
    windows = validation_windows(corpus.val, tokenizer, 6, 3)
    assert [tokenizer.decode(window.tokens[window.first + 1 :]) for window in windows] == ["21", "08", "81"]
    with pytest.raises(UserError, match="is documents of one length; give --packing=bos"):
        next(training_stream(corpus.train, tokenizer, plan, compute, "flat"))
    with pytest.raises(UserError, match="each document is a row of 7 ids; give --max-seq-len=6"):
        next(training_stream(corpus.train, tokenizer, BatchPlan(3, 5, 1, 1), compute))


def test_mistakes_are_one_line(base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(folder: Path, message: str, token_type: str = "uint16") -> None:
        with pytest.raises(UserError, match=message):
            run_here(monkeypatch, import_bin, {"path": str(folder), "name": "x", "token_type": token_type})

    refused(tmp_path, "no train.bin there; expected train.bin and val.bin")
    folder = write_bins(tmp_path / "bins", IDS, IDS)
    refused(
        folder, "no tokenizer there; expected tokenizer.json, vocab.json with merges.txt, encoder.json with vocab.bpe"
    )
    byte_tokenizer().save(folder)
    refused(folder, "506 bytes are no uint32 ids", token_type="uint32")
    refused(write_bins(folder, IDS, IDS, "uint32"), "every second id is 0; give --token-type=uint32")
    refused(write_bins(folder, IDS + 20, IDS), "id 275 is none of the tokenizer's 265")
    refused(write_bins(folder, IDS[:0], IDS), "0 bytes are no uint16 ids; make the file again")
    (folder / "tokenizer.json").write_text("{cut off")
    refused(write_bins(folder, IDS, IDS), "tokenizer.json: .*; expected the tokenizer of these ids")
    assert not (base_dir / "data" / "x").exists()


def test_bench_reads_ids_too(corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """It asked for a --packing that it has not."""
    shape = {"depth": 1, "aspect_ratio": 16, "head_dim": 8, "max_seq_len": T, "device_type": "cpu", "compile": False}
    run_here(monkeypatch, bench, {**shape, "data": "real", "rows": "2", "steps": 1})
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens_per_step"] == 2 * T


def test_a_changed_file_is_refused_and_text_is_asked_for_in_one_line(corpus: Corpus) -> None:
    with pytest.raises(UserError, match="val.bin holds token ids, and this needs text; give another --corpus"):
        next(iter_text(corpus.val))
    with open(corpus.train.paths[0], "r+b") as file:
        file.write(b"\x07")
    with pytest.raises(UserError, match="changed since its manifest was written"):
        next(batches(corpus))
    with pytest.raises(
        UserError, match="ids up to 256, the tokenizer 11 tokens; give the one that they were made with"
    ):
        next(iter(validation_windows(corpus.val, SymbolTokenizer(["a", "b"]), T, T)))
    corpus.train.paths[0].resolve().unlink()
    with pytest.raises(
        UserError, match=r"missing; .*: python -m dev.import_bin --path=.* --token_type=uint16 --name=bins"
    ):
        load_corpus()


def test_nanogpts_characters_are_those_of_input_txt_and_its_pickle_is_never_read(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "To be, or not to be\n" * 30
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}  # as its prepare.py does
    ids = np.array([numbers[character] for character in text])
    folder = write_bins(tmp_path / "shakespeare_char", ids[:500], ids[500:])
    (folder / "input.txt").write_text(text)
    (folder / "meta.pkl").write_bytes(pickle.dumps("a program"))
    monkeypatch.setattr(pickle, "load", None)
    run_here(monkeypatch, import_bin, {"path": str(folder)})
    assert "meta.pkl is not read" in capsys.readouterr().out
    corpus = load_corpus()
    assert get_tokenizer(corpus.path).decode(read_ids(corpus.val.paths[0], "uint16")) == text[500:]


def test_a_run_on_ids_of_our_own_and_its_scores(
    prepared: Path, base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """dev.make_bin, dev.import_bin, base_train, base_loss: the same validation as that of the text."""
    (base_dir / "data").parent.mkdir(exist_ok=True)
    for part in ("data", "tokenizer"):
        (base_dir / part).mkdir()
        for file in (prepared / part).iterdir():
            (base_dir / part / file.name).symlink_to(file)
    run_here(monkeypatch, make_bin, {"path": str(tmp_path / "own"), "corpus": "tiny"})
    run_here(monkeypatch, import_bin, {"path": str(tmp_path / "own")})
    model = {"depth": 1, "aspect_ratio": 32, "head_dim": 16, "max_seq_len": 32, "device_type": "cpu", "compile": False}
    batch = {
        "device_batch_size": 4,
        "total_batch_size": 512,
        "num_iterations": 4,
        "eval_tokens": 500,
        "sample_every": -1,
    }
    run_here(monkeypatch, base_train, {**model, **batch, "corpus": "own", "packing": "flat", "model_tag": "ids"})
    assert "epoch 1, 64 rows of it, all in an order of its own" in capsys.readouterr().out
    for corpus in ("own", "tiny"):
        run_here(monkeypatch, base_loss, {"corpus": corpus, "split_tokens": 500, "device_type": "cpu"})
    out = capsys.readouterr().out
    assert "baselines left out: they need text" in out
    ids, text = (line for line in out.splitlines() if line.startswith("val bpb "))
    assert ids == text
    assert events(base_dir, "base", "ids", "corpus")[0]["name"] == "own"
