"""A checkpoint exists whole or not at all, and says what is wrong with it."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from nanochat import checkpoint_manager as manager
from nanochat.common import NotFinite, UserError
from nanochat.compute import Compute
from nanochat.files import read_sealed, seal
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

    monkeypatch.setattr(manager, "save_tensors", full_disk)
    with pytest.raises(
        UserError, match=r"step 000015 could not be saved \(No space left on device\): .* needs 1,0\d\d,\d{3} bytes"
    ):
        save(saved, 15)
    assert manager.saved_steps(tmp_path / "base_checkpoints" / "t") == [5, 10]
    assert not list((tmp_path / "base_checkpoints" / "t").glob(".*"))


def test_a_small_disk_is_refused_before_writing(saved, monkeypatch):
    monkeypatch.setattr(manager.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    monkeypatch.setattr(manager, "save_tensors", None)
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
    with pytest.raises(UserError, match=r"has no tensor blocks\.1\.attn\.c_k\.weight"):
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
    path.write_text(seal(json.dumps({**read_sealed(path), "format": 99})))
    with pytest.raises(UserError, match="format 99"):
        manager.find_checkpoint("base", "t")


# -----------------------------------------------------------------------------
# What is damaged is passed over, and kept


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "optim.safetensors", "tokenizer.json", "meta.json"])
def test_resume_falls_back_to_the_newest_whole_checkpoint(saved, tmp_path, capsys, name):
    root = tmp_path / "base_checkpoints"
    damage(root / "t" / "step_000010" / name)
    assert find_resume(resume=True).step == 5
    assert f"{name} is damaged" in capsys.readouterr().out
    assert [manager.saved_steps(path) for path in root.glob("t-before-*")] == [[10]]  # kept, for whoever wants to look


def test_resume_from_a_damaged_step_is_refused(saved, tmp_path):
    for step in (5, 10):
        damage(tmp_path / "base_checkpoints" / "t" / f"step_{step:06d}" / "meta.json")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole; start over with --fresh"):
        find_resume(resume_from_step=10)
    with pytest.raises(UserError, match="is whole"):
        find_resume(resume=True)


def test_every_bit_of_meta_json_counts(saved, tmp_path):
    path = tmp_path / "base_checkpoints" / "t" / "step_000010" / "meta.json"
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 97):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"meta.json is damaged .*; use another step: --step=5"):
            manager.find_checkpoint("base", "t")


def test_a_damaged_checkpoint_in_the_place_of_a_new_one_is_kept(saved, tmp_path):
    root = tmp_path / "base_checkpoints" / "t"
    damage(root / "step_000010" / "model.safetensors")
    save(saved, 10)
    assert manager.is_verified(root / "step_000010") and len(list(root.glob("step_000010-damaged-*"))) == 1
    assert manager.saved_steps(root) == [5, 10]


def test_what_a_killed_save_left_is_swept_up(saved, tmp_path):
    root = tmp_path / "base_checkpoints" / "t"
    (root / ".step_000015.99.tmp").mkdir()
    (root / ".step_000015.99.tmp" / "model.safetensors").write_bytes(b"half")
    find_resume(resume=True)
    assert sorted(path.name for path in root.iterdir()) == ["step_000005", "step_000010"]


def test_one_run_at_a_time_writes_under_a_tag(saved, tmp_path):
    """A job that Slurm had started twice wrote over its own checkpoints."""
    root = tmp_path / "base_checkpoints" / "t"
    code = f"import fcntl, os, time; fcntl.flock(os.open({str(root)!r}, 0), 2); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="another run is writing to"):
            find_resume(resume=True)
        other.kill()
    assert find_resume(resume=True).step == 10


def test_weights_that_are_not_finite_are_not_saved(saved, tmp_path):
    """Such a checkpoint would be the newest one, and the one to go on from."""
    with torch.no_grad():
        saved.blocks[0].mlp.c_fc.weight[1, 2] = torch.nan
    with pytest.raises(NotFinite, match=r"blocks.0.mlp.c_fc.weight .*: step 15 is not saved"):
        save(saved, 15)
    assert manager.saved_steps(tmp_path / "base_checkpoints" / "t") == [5, 10]


def test_old_checkpoints_are_deleted_but_not_the_best(saved, tmp_path):
    root = tmp_path / "base_checkpoints" / "t"
    manager.mark_best("base", "t", 5, 1.25, CPU)
    for step in (15, 20):
        save_keeping(saved, step, 2)
    assert manager.saved_steps(root) == [5, 15, 20] and manager.read_best(root) == (5, 1.25)
    manager.mark_best("base", "t", 20, 1.0, CPU)
    save_keeping(saved, 25, 1)
    assert manager.saved_steps(root) == [20, 25]
    assert not list(root.glob(".*"))
    assert manager.is_best("base", "t", 0.9) and not manager.is_best("base", "t", 1.0)


def save_keeping(model, step, keep_last):
    meta = {"model_config": model.config_dict()}
    optimizers = model.setup_optimizers()
    manager.save_checkpoint("base", "t", step, model, optimizers, FakeTokenizer(), meta, CPU, keep_last)


def test_the_mark_of_a_step_that_is_gone_means_nothing(saved, tmp_path):
    manager.mark_best("base", "t", 10, 1.0, CPU)
    find_resume(resume_from_step=5)
    assert manager.is_best("base", "t", 7.0)
    damage(tmp_path / "base_checkpoints" / "t" / "best.json")
    assert manager.is_best("base", "t", 7.0)


def test_what_was_set_aside_is_not_the_tag_saved_last(saved, tmp_path):
    """Right after --fresh, chat_cli without a tag talked to the run that had just been given up."""
    save(saved, 1, tag="other")
    find_resume(fresh=True)
    assert manager.find_tag("base", None) == "other"


def test_random_numbers_go_on_where_they_were(saved):
    """No stage draws from torch's default generator; an experiment with dropout does."""
    states = manager.find_checkpoint("base", "t").meta["rng"]
    before = torch.get_rng_state()
    manager.restore_rng(states)
    first = torch.rand(3)
    manager.restore_rng(states)
    assert torch.equal(first, torch.rand(3))
    torch.set_rng_state(before)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"n_layer": 10**9}, "1000000000 layers"), ({"n_embd": 10**6}, "shape"), ({"speed": 3}, "model_config")],
)
def test_a_model_of_another_size_than_its_weights_takes_no_memory(saved, tmp_path, change, said):
    path = tmp_path / "base_checkpoints" / "t" / "step_000010" / "meta.json"
    meta = read_sealed(path)
    path.write_text(seal(json.dumps({**meta, "model_config": {**meta["model_config"], **change}})))
    with pytest.raises(UserError, match=said):
        manager.load_model("base", CPU.device, model_tag="t")
