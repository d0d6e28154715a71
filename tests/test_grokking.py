"""dev.make_arithmetic: tables of numbers modulo p and of products, with a loss on what follows = alone."""

import json
import xml.dom.minidom
from pathlib import Path
from typing import Any

import pytest
import torch

from dev import grokking_curve, make_arithmetic
from nanochat.checkpoint_manager import find_checkpoint, open_model
from nanochat.common import UserError
from nanochat.compute import Compute
from nanochat.corpus import Corpus, load_corpus
from nanochat.dataloader import training_stream
from nanochat.schedule import BatchPlan
from nanochat.token_files import read_ids
from nanochat.tokenizer import get_tokenizer
from scripts import base_train
from tests.tiny import run_here

# As the paper writes them (arXiv 2201.02177, appendix A.1.1), for one pair after another.
OPERATIONS: dict[str, Any] = {
    "x+y": lambda x, y, p: (x + y) % p,
    "x-y": lambda x, y, p: (x - y) % p,
    "x/y": lambda x, y, p: next(z for z in range(p) if z * y % p == x),
    "x/y|x-y": lambda x, y, p: next(z for z in range(p) if z * y % p == x) if y % 2 else (x - y) % p,
    "x2+y2": lambda x, y, p: (x * x + y * y) % p,
    "x2+xy+y2": lambda x, y, p: (x * x + x * y + y * y) % p,
    "x2+xy+y2+x": lambda x, y, p: (x * x + x * y + y * y + x) % p,
    "x3+xy": lambda x, y, p: (x**3 + x * y) % p,
    "x3+xy2+y": lambda x, y, p: (x**3 + x * y * y + y) % p,
}


@pytest.fixture
def make(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The corpus that the command makes with some settings."""
    defaults = dict(make_arithmetic.settings)

    def run(**values: Any) -> Corpus:
        run_here(monkeypatch, make_arithmetic, {**defaults, "name": "made", **values})
        return load_corpus("made")

    return run


def lines(corpus: Corpus, role: str) -> list[str]:
    """A part's documents as text, in order."""
    shards, tokenizer = getattr(corpus, role), get_tokenizer(corpus.path)
    ids = read_ids(shards.paths[0], "uint16").reshape(-1, shards.tokens["document"])
    return [tokenizer.decode(row).removeprefix("<|bos|>") for row in ids]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_nine_operations_of_the_paper(make: Any, operation: str) -> None:
    corpus = make(operation=operation, p=7, train_share=0.5)
    train, val = lines(corpus, "train"), lines(corpus, "val")
    pairs = [(x, y) for x in range(7) for y in range(operation == "x/y", 7)]
    assert sorted(train + val) == sorted(f"{x}o{y}={OPERATIONS[operation](x, y, 7)}" for x, y in pairs)
    assert abs(len(train) - len(val)) <= 1 and not set(train) & set(val)
    assert make(operation=operation, p=7, train_share=0.5).fingerprint == corpus.fingerprint


def test_only_the_answer_is_learnt(make: Any) -> None:
    corpus = make(p=11)
    plan, tokenizer = BatchPlan(8, 5, 1, 1), get_tokenizer(corpus.path)
    inputs, targets, _ = next(
        training_stream(corpus.train, tokenizer, plan, Compute(torch.device("cpu"), torch.float32))
    )
    assert (targets[:, :4] == -1).all() and (inputs[:, 4] == tokenizer.encode("=")[0]).all()
    for (_, x, _, y, _), z in zip(inputs.tolist(), targets[:, 4].tolist(), strict=True):
        assert z * y % 11 == x


def test_products_have_a_token_for_each_digit(make: Any) -> None:
    table = lines(make(task="multiplication", digits=1, train_share=1.0), "train")
    assert len(set(table)) == len(table) == 100 and {"3*7=21", "2*4=08", "0*9=00"} <= set(table)
    corpus = make(task="multiplication", digits=3, train_share=0.75, max_lines=400)
    train, val = lines(corpus, "train"), lines(corpus, "val")
    assert (len(train), len(val)) == (300, 100) and len({*train, *val}) == 400
    for line in train:
        x, y, z = line.replace("*", "=").split("=")
        assert (len(x), len(y), len(z)) == (3, 3, 6) and int(x) * int(y) == int(z)


def test_a_table_that_cannot_be_is_one_line(make: Any) -> None:
    with pytest.raises(UserError, match=r"^--p=9: expected a prime, as there is a division$"):
        make(p=9)
    with pytest.raises(UserError, match=r"^--train-share=0: no line of 6 is left for a part"):
        make(p=3, train_share=0.0)


def test_a_table_is_learnt_by_the_ordinary_loop_and_its_curve_drawn(
    make: Any, base_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The scores in the record are those of the saved model, asked for the answer of one line after another."""
    corpus = make(operation="x+y", p=5, train_share=0.8)
    shape = {"depth": 1, "aspect_ratio": 64, "head_dim": 32, "max_seq_len": 5, "total_batch_size": 100}
    how = {"optimizer": "adamw", "lr": 5e-3, "schedule": "constant", "num_iterations": 40, "compile": False}
    quiet = {"dtype": "float32", "device_type": "cpu", "sample_every": -1, "model_tag": "table"}
    evaluated = {"eval_every": 20, "eval_train": True, "corpus": "made", "device_batch_size": 20}
    run_here(monkeypatch, base_train, {**shape, **how, **quiet, **evaluated})
    run_here(monkeypatch, grokking_curve, {"model_tag": "table", "reached": 0.6})
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["training"] > 0.6 and result["training_reached_at"] in (20, 40)  # chance is 0.2

    model, _ = open_model(find_checkpoint("base", "table", None), torch.device("cpu"))
    for part, role in (("training", "train"), ("validation", "val")):
        rows = torch.tensor(read_ids(getattr(corpus, role).paths[0], "uint16").reshape(-1, 6).astype(int))
        answers = [int(model(row[None, :-1])[0, -1].argmax()) for row in rows]
        assert result[part] == sum(map(int.__eq__, answers, rows[:, -1].tolist())) / len(rows)
    drawn = xml.dom.minidom.parse(str(base_dir / "report" / "grokking-table.svg"))
    assert len(drawn.getElementsByTagName("polyline")) == 2


def test_a_curve_of_a_run_without_scores_is_one_line(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^--model-tag=none: no scores of training documents in .*--eval-train"):
        run_here(monkeypatch, grokking_curve, {"model_tag": "none"})
