"""A checkpoint exists whole or not at all, and says what is wrong with it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat import checkpoint_manager as manager
from nanochat.common import NotFinite, UserError
from nanochat.compute import Compute
from nanochat.files import read_sealed, seal
from nanochat.gpt import GPTConfig
from nanochat.model import build_model
from nanochat.tokenizer import Tokenizer

CPU = Compute(torch.device("cpu"), torch.float32)
CONFIG = GPTConfig(sequence_len=8, vocab_size=50, n_layer=1, n_head=1, n_kv_head=1, n_embd=16)


TOKENIZER = Tokenizer([])


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A model at steps 5 and 10 under the tag `t`."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    model = build_model(CONFIG, CPU.device, 0)
    for step in (5, 10):
        save(model, step)
    return model


@pytest.fixture
def root(saved, tmp_path):
    return tmp_path / "base_checkpoints" / "t"


def set_aside(root):
    return [manager.saved_steps(path) for path in root.parent.glob("t-before-*")]


def save(model, step, tag="t", keep_last=-1):
    path, meta = manager.checkpoint_path("base", tag, step), {"model_config": model.config_dict(), "seed": 1}
    manager.save_checkpoint(path, model, model.setup_optimizers(), TOKENIZER, meta, CPU, keep_last)


def test_weights_and_optimizer_state_round_trip(saved):
    checkpoint = manager.find_checkpoint("base", "t")
    assert checkpoint.step == 10
    other = build_model(CONFIG, CPU.device, 1)
    manager.restore_model(other, checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), other.parameters(), strict=True))
    optimizers = saved.setup_optimizers()
    manager.restore_optimizers(optimizers, checkpoint)
    assert optimizers[0].steps == 0


def test_only_whole_directories_count(saved, root):
    """nanochat takes the highest number it finds in a file name, complete or not."""
    (root / "step_000099").mkdir()  # a crash before meta.json
    (root / ".step_000098.1.tmp").mkdir()
    (root / "step_77").mkdir()
    (root / "step_77" / "meta.json").write_text("{}")
    assert manager.saved_steps(root) == [5, 10]
    assert manager.find_checkpoint("base").step == 10
    assert manager.find_checkpoint("base", "t", 5).step == 5


FILES = ["model.safetensors", "optim.safetensors", "tokenizer.json", "meta.json"]


def hurt(path, how="flip"):
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
    path.write_bytes(data[:-1] if how == "cut" else data)
    if how == "remove":
        path.unlink()


def read_it(checkpoint, name):
    """What a stage does that reads this file of a checkpoint."""
    if name == "optim.safetensors":
        model = build_model(CONFIG, CPU.device, 0)
        return manager.restore_optimizers(model.setup_optimizers(), checkpoint)
    return manager.open_model(checkpoint, CPU.device)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_damage_is_found_and_named_when_the_file_is_read(saved, root, name, how):
    path = root / "step_000010"
    hurt(path / name, how)
    for read in (lambda: read_it(manager.open_checkpoint(path), name), lambda: manager.open_checkpoint(path).verify()):
        with pytest.raises(UserError, match=f"{name} is damaged .*; use another step: --step=5"):
            read()


def test_a_bit_anywhere_in_the_weights_counts(saved, root):
    """Of the header, of its length, of the first and the last tensor."""
    path = root / "step_000010" / "model.safetensors"
    data = path.read_bytes()
    for at in range(0, len(data), len(data) // 60):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        with pytest.raises(UserError, match="model.safetensors is damaged"):
            manager.load_model("base", CPU.device, model_tag="t")


@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_a_model_is_read_without_its_optimizer_state(saved, root, capsys, how):
    """Chatting hashed 3 GB of a d20 that it never looked at; training goes on with them, so there they count."""
    hurt(root / "step_000010" / "optim.safetensors", how)
    model, tokenizer, meta = manager.load_model("base", CPU.device, model_tag="t")
    assert meta["step"] == 10 and torch.equal(model.wte.weight, saved.wte.weight)
    assert tokenizer.fingerprint == TOKENIZER.fingerprint
    assert find_resume(resume=True).step == 5
    assert "optim.safetensors is damaged" in capsys.readouterr().out


def test_no_file_is_hashed_twice(saved, monkeypatch):
    hashed = []
    hash_file = manager.sha256_file
    monkeypatch.setattr(manager, "sha256_file", lambda path: hashed.append(path.name) or hash_file(path))
    checkpoint = find_resume(resume=True)
    assert sorted(hashed) == ["model.safetensors", "optim.safetensors", "tokenizer.json"]
    manager.restore_model(saved, checkpoint)
    manager.restore_optimizers(saved.setup_optimizers(), checkpoint)
    assert len(hashed) == 3
    hashed.clear()
    manager.load_model("base", CPU.device, model_tag="t")
    assert hashed == ["model.safetensors", "tokenizer.json"]


def test_a_failed_save_leaves_what_was_there(saved, root, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manager, "save_file", full_disk)
    with pytest.raises(
        UserError, match=r"step 000015 could not be saved \(No space left on device\): .* needs 1,0\d\d,\d{3} bytes"
    ):
        save(saved, 15)
    assert manager.saved_steps(root) == [5, 10]
    assert not list(root.glob(".*"))


def test_weights_that_nobody_but_their_owner_could_read(saved, root):
    """A class that shares a base directory chats with models that others trained."""
    modes = {file.name: file.stat().st_mode & 0o777 for file in (root / "step_000010").iterdir()}
    assert set(modes.values()) == {root.stat().st_mode & 0o666} and len(modes) == 4


def test_a_verified_checkpoint_is_not_written_again(saved, root):
    path = root / "step_000010"
    before = (path / "meta.json").stat().st_mtime_ns
    save(saved, 10)
    assert (path / "meta.json").stat().st_mtime_ns == before
    (path / "model.safetensors").write_bytes(b"damaged")
    save(saved, 10)
    manager.open_checkpoint(path).verify()


def find_resume(seed=1, **options):
    settings = {"resume": False, "resume_from_step": None, "fresh": False, **options}
    return manager.find_resume("base", "t", settings, {"seed": seed}, CPU)


def test_a_start_over_existing_work_needs_a_word(saved, root):
    with pytest.raises(UserError, match="--resume"):
        find_resume()
    assert find_resume(resume=True).step == 10
    with pytest.raises(UserError, match="exclude"):
        find_resume(resume=True, fresh=True)
    assert find_resume(fresh=True) is None
    assert manager.saved_steps(root) == []
    assert set_aside(root) == [[5, 10]]  # kept


def test_going_back_sets_later_steps_aside(saved, root):
    """Otherwise the step-10 checkpoint of the first attempt would stand in the place of the second one's."""
    assert find_resume(resume_from_step=5).step == 5
    assert manager.saved_steps(root) == [5]
    assert set_aside(root) == [[10]]


def test_another_setting_is_refused_by_name(saved):
    with pytest.raises(UserError, match="seed = 1, this run has 2"):
        find_resume(seed=2, resume=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"wte.weight": None}, r"wte.weight is not there, this model has F32 \(50, 16\); check --depth"),
        ({"value_embeds.1": torch.ones(3)}, r"value_embeds.1 is F32 \(3,\), this model has no such tensor"),
        ({"wte.weight": torch.ones(50, 8)}, r"wte.weight is F32 \(50, 8\), this model has F32 \(50, 16\); check"),
        ({"wte.weight": torch.ones(1, 16)}, r"wte.weight is F32 \(1, 16\), this model has F32 \(50, 16\)"),
        ({"wte.weight": torch.ones(50, 16).half()}, r"wte.weight is F16 \(50, 16\), this model has F32"),
    ],
)
def test_the_first_difference_from_the_model_is_named_and_nothing_loaded(saved, change, words):
    checkpoint = manager.find_checkpoint("base", "t")
    path = checkpoint.file("model.safetensors")
    tensors = load_file(path) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    other = build_model(CONFIG, CPU.device, 1)
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(UserError, match=words):
        manager.restore_model(other, checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def raw(header, data=b"", length=None):
    """A safetensors file with this header, whatever it says."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return raw(json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode(), bytes(8))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        raw(b"{}", length=1 << 63),
        raw(b'{"x":'),
        raw(b'{"x":' + b"[" * 1_000_000),
        raw(b'{"\\u001b[2J\\n":1}'),
        entry((-2,)),
        entry(offsets=(8, 0)),
        entry(dtype="F31"),
    ],
)
def test_what_safetensors_refuses_is_one_line(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with (
        pytest.raises(UserError, match="x.safetensors is no intact safetensors file: ") as caught,
        manager.open_tensors(path),
    ):
        pass
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_missing_checkpoints_name_the_command(tmp_path, monkeypatch, saved):
    with pytest.raises(UserError, match="no base checkpoint d20 .*there is t"):
        manager.find_checkpoint("base", "d20")
    with pytest.raises(UserError, match="no step 7 .*5, 10"):
        manager.find_checkpoint("base", "t", 7)
    with pytest.raises(UserError, match=r"python -m scripts\.chat_sft"):
        manager.find_checkpoint("sft")
    with pytest.raises(UserError, match="expected one of base, mid, sft, rl"):
        manager.load_model("best", CPU.device)


def test_another_format_is_refused(saved, root):
    path = root / "step_000010" / "meta.json"
    path.write_text(seal(json.dumps({**read_sealed(path), "format": 99})))
    with pytest.raises(UserError, match="format 99"):
        manager.find_checkpoint("base", "t")


# -----------------------------------------------------------------------------
# What is damaged is passed over, and kept


@pytest.mark.parametrize("name", FILES)
def test_resume_falls_back_to_the_newest_whole_checkpoint(saved, root, capsys, name):
    hurt(root / "step_000010" / name)
    assert find_resume(resume=True).step == 5
    assert f"{name} is damaged" in capsys.readouterr().out
    assert set_aside(root) == [[10]]  # kept


def test_resume_from_a_damaged_step_is_refused(saved, root):
    for step in (5, 10):
        hurt(root / f"step_{step:06d}" / "meta.json")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole; start over with --fresh"):
        find_resume(resume_from_step=10)
    with pytest.raises(UserError, match="is whole"):
        find_resume(resume=True)


def test_a_damaged_checkpoint_in_the_place_of_a_new_one_is_kept(saved, root):
    hurt(root / "step_000010" / "model.safetensors")
    save(saved, 10)
    manager.open_checkpoint(root / "step_000010").verify()
    assert len(list(root.glob("step_000010-damaged-*"))) == 1
    assert manager.saved_steps(root) == [5, 10]


def test_what_a_killed_save_left_is_swept_up(saved, root):
    (root / ".step_000015.99.tmp").mkdir()
    (root / ".step_000015.99.tmp" / "model.safetensors").write_bytes(b"half")
    find_resume(resume=True)
    assert sorted(path.name for path in root.iterdir()) == ["step_000005", "step_000010"]


def test_one_run_at_a_time_writes_under_a_tag(saved, root):
    """A job that Slurm had started twice wrote over its own checkpoints."""
    code = f"import fcntl, os, time; fcntl.flock(os.open({str(root)!r}, 0), 2); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="another run is writing to"):
            find_resume(resume=True)
        other.kill()
    assert find_resume(resume=True).step == 10


def test_weights_that_are_not_finite_are_not_saved(saved, root):
    """Such a checkpoint would be the newest one, and the one to go on from."""
    with torch.no_grad():
        saved.blocks[0].mlp.c_fc.weight[1, 2] = torch.nan
    with pytest.raises(NotFinite, match=r"blocks.0.mlp.c_fc.weight .*: step 15 is not saved"):
        save(saved, 15)
    assert manager.saved_steps(root) == [5, 10]


def test_old_checkpoints_are_deleted_but_not_the_best(saved, root):
    manager.mark_best("base", "t", 5, 1.25, CPU)
    for step in (15, 20):
        save(saved, step, keep_last=2)
    assert manager.saved_steps(root) == [5, 15, 20] and manager.read_best(root) == (5, 1.25)
    manager.mark_best("base", "t", 20, 1.0, CPU)
    save(saved, 25, keep_last=1)
    assert manager.saved_steps(root) == [20, 25]
    assert not list(root.glob(".*"))
    assert manager.is_best("base", "t", 0.9) and not manager.is_best("base", "t", 1.0)


def test_the_mark_of_a_step_that_is_gone_means_nothing(saved, root):
    manager.mark_best("base", "t", 10, 1.0, CPU)
    find_resume(resume_from_step=5)
    assert manager.is_best("base", "t", 7.0)
    manager.mark_best("base", "t", 5, 1.0, CPU)
    hurt(root / "best.json")
    assert manager.is_best("base", "t", 7.0)


def test_the_mark_of_the_best_moves_with_its_run(saved, root):
    """After --fresh, --keep-last=1 spared the new run's step of the old best's number, whose score had to be beaten."""
    manager.mark_best("base", "t", 5, 1.25, CPU)
    find_resume(fresh=True)
    (aside,) = root.parent.glob("t-before-*")
    assert manager.read_best(aside) == (5, 1.25) and not (root / "best.json").exists()
    for step in (5, 10):
        save(saved, step, keep_last=1)
    assert manager.saved_steps(root) == [10] and manager.is_best("base", "t", 7.0)


def test_what_was_set_aside_is_not_the_tag_saved_last(saved, tmp_path):
    """Right after --fresh, chat_cli without a tag talked to the run that had just been given up."""
    save(saved, 1, tag="other")
    find_resume(fresh=True)
    assert manager.find_tag("base", None) == "other"


def test_a_copy_of_the_base_directory_has_the_same_default(saved, root, tmp_path, monkeypatch):
    """cp -r gave the files new times, in the order of their names: chat_cli talked to another model."""
    save(saved, 3, tag="a")
    for number, file in enumerate(sorted(tmp_path.rglob("meta.json"))):
        os.utime(file, (1e9 + number, 1e9 + number))
    assert manager.find_tag("base", None) == "a"
    hurt(tmp_path / "base_checkpoints" / "a" / "step_000003" / "meta.json", "cut")
    assert manager.find_tag("base", None) == "a", "a damaged one is as old as its file"
