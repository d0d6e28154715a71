"""inspect_checkpoint says what a checkpoint is, and ends with 2 where it is not whole."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat.checkpoint_manager import checkpoint_path, mark_best, save_checkpoint
from nanochat.common import UserError
from nanochat.compute import Compute
from nanochat.gpt import GPTConfig
from nanochat.model import build_model
from nanochat.tokenizer import Tokenizer
from scripts import inspect_checkpoint
from tests.corpora import flip_bit
from tests.tiny import run

CPU = Compute(torch.device("cpu"), torch.float32)
CONFIG = GPTConfig(sequence_len=8, vocab_size=265, n_layer=1, n_head=1, n_kv_head=1, n_embd=16)


@pytest.fixture
def saved(base_dir: Path) -> Path:
    """Steps 5 and 10 of a base model `t`, and the record of its run."""
    model = build_model(CONFIG, CPU.device, 0)
    meta = {"model_config": model.config_dict(), "settings": {"depth": 1}, "position": {"shard": 3, "row": 7}}
    for step in (5, 10):
        path = checkpoint_path("base", "t", step)
        save_checkpoint(path, model, model.setup_optimizers(), Tokenizer([]), meta, CPU)
    mark_best("base", "t", 5, 1.25, CPU)
    (base_dir / "records").mkdir()
    events: list[dict[str, Any]] = [{"event": "start", "tag": "t", "time": 1.5}]
    events += [{"event": "eval", "time": 2.5, "step": 10, "val_bpb_quick": 1.75}]
    text = "".join(json.dumps(event) + "\n" for event in events)
    (base_dir / "records" / "base-t-20260101-000000.jsonl").write_text(text)
    (base_dir / "records" / "base-t-2-20260101-000000.jsonl").write_text(
        text.replace('"t"', '"t-2"').replace("1.75", "9.5")
    )
    return base_dir / "base_checkpoints" / "t"


def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **changes: Any) -> SimpleNamespace:
    """What main() prints, and the message that it ends with."""
    for name, value in changes.items():
        monkeypatch.setattr(inspect_checkpoint, name, value)
    error = ""
    try:
        inspect_checkpoint.main()
    except UserError as problem:
        error = str(problem)
    return SimpleNamespace(out=capsys.readouterr().out, error=error)


def test_everything_is_shown(saved, monkeypatch, capsys):
    shown = inspect(monkeypatch, capsys, values=True)
    assert not shown.error
    for words in (
        f"{saved}/step_000010\n",
        "stage base, tag t, step 10, written 20",
        "measured at this step: val_bpb_quick 1.7500\n",
        "  git = ",
        "  n_embd = 16\n",
        "  depth = 1\n",
        '  position = {"shard": 3, "row": 7}\n',
        "model.safetensors: 8 tensors, 11,552 numbers\n",
        "  blocks.0.mlp.c_fc.weight     F32   (64, 16)          min -",
    ):
        assert words in shown.out, shown.out
    assert shown.out.count("as written") == 3


def test_the_tensor_list_can_be_hidden(saved, monkeypatch, capsys):
    shown = inspect(monkeypatch, capsys, keys=False)
    assert "8 tensors" in shown.out and "c_fc" not in shown.out


@pytest.mark.parametrize("name", ["model.safetensors", "optim.safetensors", "tokenizer.json", "meta.json"])
def test_one_wrong_bit_anywhere_is_named(saved, name, monkeypatch, capsys):
    flip_bit(saved / "step_000010" / name, 0.9)
    assert f"step_000010/{name} is damaged" in inspect(monkeypatch, capsys).error
    assert not inspect(monkeypatch, capsys, step=5).error


def test_all_steps_are_listed_with_their_state(saved, monkeypatch, capsys):
    shown = inspect(monkeypatch, capsys, all_steps=True)
    first, second = shown.out.splitlines()[-2:]
    assert first.split()[0] == "5" and first.endswith("  whole, best")
    assert second.split()[0] == "10" and second.endswith("  whole, val_bpb_quick 1.7500")
    flip_bit(saved / "step_000005" / "optim.safetensors", 0.9)
    shown = inspect(monkeypatch, capsys)
    assert "optim.safetensors is damaged (sha256 differs)" in shown.out
    assert "1 of 2 steps" in shown.error and "[5]" in shown.error
    assert "sizes as written, best" in inspect(monkeypatch, capsys, verify=False).out


def test_the_command_ends_with_2_and_one_line(saved, base_dir):
    flip_bit(saved / "step_000005" / "tokenizer.json", 0.9)
    result = run(base_dir, "scripts.inspect_checkpoint", "-i", "base", "--step=5", "--no-keys", check=False)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "tokenizer.json" in result.stderr and "--all-steps" in result.stderr
