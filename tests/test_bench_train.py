"""The race: its scorer against ours, and arms that are none. (The race itself takes minutes and is run by hand.)"""

import os
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dev import bench_train
from dev.train_score import windows
from nanochat.common import UserError
from nanochat.loss_eval import document_windows, window_rows
from tests.test_gpt import small_model


@pytest.mark.parametrize("context", [4, 32])
def test_every_token_is_scored_once_and_as_base_loss_does(context):
    """Documents shorter and longer than a window, and of whole windows."""
    model, generator = small_model(), np.random.default_rng(0)
    documents = [generator.integers(0, 299, n).tolist() for n in (1, context // 2, context, context + 1, 3 * context)]
    ours, theirs = [0.0] * len(documents), [0.0] * len(documents)
    counted = [0] * len(documents)
    with torch.no_grad():
        for number, inputs, targets in windows(documents, 299, context):
            theirs[number] += float(F.cross_entropy(model(inputs[None])[0], targets, reduction="sum", ignore_index=-1))
            counted[number] += int((targets >= 0).sum())
        offsets = np.cumsum([0, *map(len, documents)])
        for window in document_windows(np.concatenate(documents), offsets, 299, context, context // 2):
            inputs, targets = torch.from_numpy(window_rows([window], 1, context)).unbind(1)
            ours[window.document] += float(model(inputs[:, :-1], targets[:, 1:], loss_reduction="none").sum())
    assert counted == [len(ids) for ids in documents]
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(
    ("word", "said"), [("laptop", "expected settings:DEPTHxWIDTH"), ("laptop:4x100", "multiple"), ("no:4x128", "no.py")]
)
def test_an_arm_that_is_none_is_one_line(word, said):
    with pytest.raises(UserError, match=said):
        bench_train.read_arm(word)


def test_the_peer_needs_its_folder():
    with pytest.raises(UserError, match="--peer=FOLDER"):
        bench_train.read_arm("peer:4x128")


def test_a_step_has_the_tokens_of_its_settings_file():
    """They were a pair, with where they had been given."""
    assert bench_train.read_arm("fast:4x128").tokens == 4096


@pytest.fixture
def race(monkeypatch, tmp_path):
    """A race of 10 s over two seeds without text, whose arms make a step in half a second; its folder."""
    text = SimpleNamespace(name="text", path=tmp_path, fingerprint="f00")
    for name, fake in {
        "load_corpus": lambda _: text,
        "get_tokenizer": lambda _: None,
        "scored_documents": lambda *_: [],
        "take_paces": lambda field: {arm.name: 0.5 for arm in field},
        "work_folder": lambda: tmp_path,
        "budgets": "10",
        "seeds": 2,
        "corpus": None,
    }.items():
        monkeypatch.setattr(bench_train, name, fake)
    monkeypatch.setattr(bench_train.report, "write", lambda *_: None)
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)


def test_the_race_goes_on_at_the_pace_that_it_began_with(monkeypatch, race):
    """An arm that comes later is paced beside the first, on a machine that is half as fast by then."""
    paced, trained = [], []

    def pace(field):
        paced.append([arm.name for arm in field])
        return {arm.name: len(paced) * seconds for arm, seconds in zip(field, (0.5, 1.0), strict=False)}

    def train(arm, seed, steps, *_):
        trained.append((arm.name, seed, steps))
        return {"bpb": 2.0, "stderr": 0.1}

    monkeypatch.setattr(bench_train, "take_paces", pace)
    monkeypatch.setattr(bench_train, "train_and_score", train)
    for arms in ("laptop:4x128", "laptop:4x128 fast:4x128", "fast:4x128"):
        monkeypatch.setattr(bench_train, "arms", arms)
        bench_train.main()
    assert paced == [["laptop:4x128"], ["laptop:4x128", "fast:4x128"]]
    assert sorted(trained) == [
        ("fast:4x128", 1, 10),
        ("fast:4x128", 2, 10),
        ("laptop:4x128", 1, 20),
        ("laptop:4x128", 2, 20),
    ]


def test_a_race_that_was_stopped_trained_on(monkeypatch, race):
    """Its trainings are processes with groups of their own, and the threads that wait for them had more to start."""
    monkeypatch.setattr(bench_train, "arms", "laptop:4x128")
    monkeypatch.setattr(bench_train, "STARTED", [])
    monkeypatch.setattr(bench_train.Arm, "command", lambda *_: ["sleep", "600"])

    def stop():
        while not bench_train.STARTED:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(SystemExit) as stopped:
        bench_train.main()
    (process,) = bench_train.STARTED
    assert stopped.value.code == 143 and process.poll() == -signal.SIGKILL
