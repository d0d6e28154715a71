"""A corpus, a tokenizer and settings small enough to train in a second, and runners for the real scripts."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
WORDS = "the cat dog bird saw heard liked a small red old house tree river near under over and but then slowly".split()
# Depth 2, width 64, 20 steps of 8 rows of 32 tokens.
RUN = """--depth=2 --aspect-ratio=32 --head-dim=16 --max-seq-len=32 --device-batch-size=2 --total-batch-size=256
    --num-iterations=20 --eval-every=10 --eval-tokens=2000 --sample-every=-1 --device-type=cpu""".split()
EAGER = ["--compile=false", "--dtype=float32"]


def write_text(folder: Path) -> None:
    """Twelve files of made-up sentences, the same every time, one of them for validation."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    for i in range(12):
        sentences = [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))).capitalize() + "." for _ in range(300)]
        name = "val.txt" if i == 0 else f"part_{i:02d}.txt"
        (folder / name).write_text(" ".join(sentences), encoding="utf-8")


def environment(base_dir: Path) -> dict[str, str]:
    return {**os.environ, "NANOCHAT_BASE_DIR": str(base_dir), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(base_dir: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `python -m <command>` as a user would; on an unexpected exit code the test shows its output."""
    words = [sys.executable, "-m", *command]
    result = subprocess.run(words, env=environment(base_dir), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert not check or result.returncode == 0, f"{' '.join(words)}\n{result.stdout}\n{result.stderr}"
    return result


def run_here(monkeypatch: pytest.MonkeyPatch, script: Any, values: dict[str, Any]) -> None:
    """A script's main() in this process, with settings by name and otherwise those that it has."""
    assert values.keys() <= script.settings.keys(), values.keys() - script.settings.keys()
    settings = script.settings | values
    for name, value in settings.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(script, "settings", settings)
    script.main()


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Poll until it holds; fails when it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def torchrun(base_dir: Path, ranks: int, *command: str) -> subprocess.CompletedProcess[str]:
    return run(base_dir, "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m", *command)


def prepare(base_dir: Path) -> None:
    """Corpus `tiny` and a tokenizer of 320 tokens, made by the commands a user types."""
    write_text(base_dir / "text")
    run(base_dir, "nanochat.dataset", "--source=folder", f"--path={base_dir / 'text'}", "--name=tiny")
    run(base_dir, "scripts.tok_train", "--vocab-size=320")


def events(base_dir: Path, stage: str, tag: str, kind: str) -> list[dict]:
    """All events of a kind in the records of a run and of the runs that continued it, oldest first."""
    paths = sorted((base_dir / "records").glob(f"{stage}-{tag}-[0-9]*.jsonl"), key=lambda path: path.stat().st_mtime)
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def weights(base_dir: Path, tag: str, step: int) -> bytes:
    """The whole weight file: equal bytes are equal weights."""
    return (base_dir / "base_checkpoints" / tag / f"step_{step:06d}" / "model.safetensors").read_bytes()
