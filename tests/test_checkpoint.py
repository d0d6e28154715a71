"""A checkpoint exists whole or not at all, and says what is wrong with it."""

import json
from types import SimpleNamespace

import pytest
import torch

from nanochat import checkpoint_manager as manager
from nanochat.common import UserError
from nanochat.compute import Compute
from nanochat.gpt import GPTConfig, build_model

CPU = Compute(torch.device("cpu"), torch.float32)
CONFIG = GPTConfig(sequence_len=8, vocab_size=50, n_layer=1, n_head=1, n_kv_head=1, n_embd=16)


class FakeTokenizer:
    def save(self, directory):
        (directory / "tokenizer.json").write_text("{}")


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A model at steps 5 and 10 under the tag `t`."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    model = build_model(CONFIG, CPU.device, 0)
    for step in (5, 10):
        save(model, step)
    return model


def save(model, step, tag="t", **meta):
    meta = {"model_config": model.config_dict(), "seed": 1, **meta}
    return manager.save_checkpoint("base", tag, step, model, model.setup_optimizers(), FakeTokenizer(), meta, CPU)


def test_weights_and_optimizer_state_round_trip(saved):
    checkpoint = manager.find_checkpoint("base", "t")
    assert checkpoint.step == 10
    other = build_model(CONFIG, CPU.device, 1)
    manager.restore_model(other, checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), other.parameters(), strict=True))
    optimizers = saved.setup_optimizers()
    manager.restore_optimizers(optimizers, checkpoint)
    assert optimizers[0].steps == 0


def test_only_whole_directories_count(saved, tmp_path):
    """nanochat takes the highest number it finds in a file name, complete or not."""
    root = tmp_path / "base_checkpoints" / "t"
    (root / "step_000099").mkdir()  # a crash before meta.json
    (root / ".step_000098.1.tmp").mkdir()
    (root / "step_77").mkdir()
    (root / "step_77" / "meta.json").write_text("{}")
    assert manager.saved_steps(root) == [5, 10]
    assert manager.find_checkpoint("base").step == 10
    assert manager.find_checkpoint("base", "t", 5).step == 5


@pytest.mark.parametrize("name", ["model.safetensors", "optim.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_and_named(saved, tmp_path, name, damage):
    path = tmp_path / "base_checkpoints" / "t" / "step_000010" / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    with pytest.raises(UserError, match=f"{name} is damaged"):
        manager.find_checkpoint("base", "t").verify()


def test_a_failed_save_leaves_what_was_there(saved, tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manager, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save(saved, 15)
    assert manager.saved_steps(tmp_path / "base_checkpoints" / "t") == [5, 10]
    assert not list((tmp_path / "base_checkpoints" / "t").glob(".*"))


def test_a_small_disk_is_refused_before_writing(saved, monkeypatch):
    monkeypatch.setattr(manager.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(UserError, match="needs .* bytes and .* has 10 free"):
        save(saved, 15)


def test_a_verified_checkpoint_is_not_written_again(saved, tmp_path):
    path = tmp_path / "base_checkpoints" / "t" / "step_000010"
    before = (path / "meta.json").stat().st_mtime_ns
    save(saved, 10)
    assert (path / "meta.json").stat().st_mtime_ns == before
    (path / "model.safetensors").write_bytes(b"damaged")
    save(saved, 10)
    manager.open_checkpoint(path).verify()


def find_resume(**options):
    options = {"resume": False, "resume_from_step": None, "fresh": False, **options}
    return manager.find_resume("base", "t", {"seed": 1}, compute=CPU, **options)


def test_a_start_over_existing_work_needs_a_word(saved, tmp_path):
    with pytest.raises(UserError, match="--resume"):
        find_resume()
    assert find_resume(resume=True).step == 10
    with pytest.raises(UserError, match="exclude"):
        find_resume(resume=True, fresh=True)
    assert find_resume(fresh=True) is None
    root = tmp_path / "base_checkpoints"
    assert manager.saved_steps(root / "t") == []
    assert [manager.saved_steps(path) for path in root.glob("t-before-*")] == [[5, 10]]  # kept


def test_going_back_sets_later_steps_aside(saved, tmp_path):
    """Otherwise the step-10 checkpoint of the first attempt would stand in the place of the second one's."""
    assert find_resume(resume_from_step=5).step == 5
    root = tmp_path / "base_checkpoints"
    assert manager.saved_steps(root / "t") == [5]
    assert [manager.saved_steps(path) for path in root.glob("t-before-*")] == [[10]]


def test_another_setting_is_refused_by_name(saved):
    with pytest.raises(UserError, match="seed = 1, this run has 2"):
        manager.find_resume("base", "t", {"seed": 2}, True, None, False, CPU)


def test_another_shape_is_refused_by_name(saved):
    other = build_model(GPTConfig(**{**CONFIG.__dict__, "n_layer": 2}), CPU.device, 1)
    with pytest.raises(UserError, match=r"blocks\.1\.attn\.c_k\.weight has shape None"):
        manager.restore_model(other, manager.find_checkpoint("base", "t"))


def test_missing_checkpoints_name_the_command(tmp_path, monkeypatch, saved):
    with pytest.raises(UserError, match="no base checkpoint d20 .*there is t"):
        manager.find_checkpoint("base", "d20")
    with pytest.raises(UserError, match="no step 7 .*5, 10"):
        manager.find_checkpoint("base", "t", 7)
    with pytest.raises(UserError, match=r"python -m scripts\.chat_sft"):
        manager.find_checkpoint("sft")
    with pytest.raises(UserError, match="expected one of base, mid, sft, rl"):
        manager.load_model("best", CPU.device)


def test_another_format_is_refused(saved, tmp_path):
    path = tmp_path / "base_checkpoints" / "t" / "step_000010" / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        manager.find_checkpoint("base", "t")
