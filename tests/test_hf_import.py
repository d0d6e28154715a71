"""--init-from: folders that transformers wrote, what is refused in them, and training from them."""

import dataclasses
import json

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from nanochat.common import UserError
from nanochat.hf_import import open_weights
from nanochat.model import build_model
from tests import test_gpt2, test_llama, tiny
from tests.test_gpt import CPU

VOCAB = test_gpt2.SMALL.vocab_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT-2 with random weights, of the size of the tests' tokenizer."""
    path = tmp_path_factory.mktemp("hf") / "gpt2"
    test_gpt2.theirs_of(dataclasses.replace(test_gpt2.SMALL, vocab_size=320)).save_pretrained(path)
    return path


def open_folder(folder, vocab_size=320, sequence_len=32, **options):
    weights = open_weights(str(folder), vocab_size, sequence_len, **options)
    model = build_model(weights.config, CPU)
    weights.load_into(model)
    return model


@pytest.mark.parametrize("kind", [test_gpt2, test_llama], ids=["gpt2", "llama"])
def test_a_folder_of_several_files_is_the_model_that_was_saved(tmp_path, kind):
    theirs = kind.theirs_of(kind.SMALL)
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model*.safetensors"))) > 1
    ours = open_folder(tmp_path, VOCAB, kind.SMALL.sequence_len)
    with torch.no_grad():
        torch.testing.assert_close(ours(kind.IDX), theirs(kind.IDX).logits, atol=1e-4, rtol=1e-4)


def test_a_shorter_context_reads_short_texts_as_before(folder):
    whole, cut = open_folder(folder), open_folder(folder, sequence_len=16, dropout=0.1)
    assert (cut.config.sequence_len, cut.config.dropout) == (16, 0.1) and len(cut.wpe.weight) == 16
    with torch.no_grad():
        assert torch.equal(cut(test_gpt2.IDX[:, :16]), whole(test_gpt2.IDX[:, :16]))


def test_what_does_not_fit_is_refused_in_one_line(folder, tmp_path):
    for options, line in (
        ({"sequence_len": 64}, "--max-seq-len=64: .* has 32 positions; --max-seq-len=32 or less fits"),
        (
            {"vocab_size": 65},
            "its vocabulary has 320 tokens, the tokenizer has 65; .* --chat-tokens=false --corpus-own",
        ),
        ({"positions": "alibi"}, "--positions=alibi: .* has learned, which its weights are for; leave it out"),
        ({"arch": "llama"}, "--arch=llama: .* has gpt2,"),
        ({"depth": 20}, "--depth=20: .* has 2,"),
        ({"aspect_ratio": 64}, "--aspect-ratio=64: .* has 32,"),
        ({"head_dim": 64}, "--head-dim=64: .* has 16,"),
        ({"kv_heads": 1}, "--kv-heads=1: .* has 4,"),
        ({"window_pattern": "SL"}, "--window-pattern=SL: .* has no such setting,"),
    ):
        with pytest.raises(UserError, match=line):
            open_folder(folder, **options)
    with pytest.raises(UserError, match="no-such is no folder; expected .* gpt2-xl"):
        open_folder("no-such")
    for about in ({"model_type": "bert"}, ["gpt2"], {"model_type": ["gpt2"]}):
        (tmp_path / "config.json").write_text(json.dumps(about))
        with pytest.raises(UserError, match="expected a config.json with a model_type of gpt2, llama"):
            open_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "line"),
    [
        ("transformer.ln_f.bias", None, r"ln_f.bias is not there, its config.json makes it \(64,\)"),
        ("transformer.h.1.mlp.c_fc.weight", (64, 8), r"blocks.1.mlp.c_fc.weight is \(8, 64\), .* \(256, 64\)"),
        ("transformer.extra", (2,), r"extra is \(2,\), its config.json makes it no such tensor"),
    ],
)
def test_a_tensor_that_is_not_the_models_is_refused_by_name(folder, tmp_path, name, change, line):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name, None)
    save_file(tensors | ({name: torch.zeros(change)} if change else {}), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match=line):
        open_folder(tmp_path)


def test_without_a_network_a_published_model_is_one_line(monkeypatch):
    def fail(*_, **__):
        raise LocalEntryNotFoundError("nothing in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="gpt2-medium, or any folder in its place, .nothing in the cache.*"):
        open_folder("gpt2-medium")


def test_what_a_folder_has_may_be_said_again(folder):
    same = {"arch": "gpt2", "depth": 2, "aspect_ratio": 32, "head_dim": 16, "positions": "learned", "bias": True}
    assert open_folder(folder, **same).config == open_folder(folder).config


def test_a_setting_that_was_given_is_not_ignored(faults, folder, tmp_path):
    """--init-from=gpt2 --depth=20 trained 12 layers. 20 is the default, so it is not the value that says it."""
    (tmp_path / "my.py").write_text("depth = 20\n")
    start = ["--init-from", str(folder), "--max-seq-len=16", "--eval-only", "--device-type=cpu"]
    result = tiny.run(faults.base_dir, "scripts.base_train", str(tmp_path / "my.py"), *start, check=False)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"--depth=20: {folder} has 2, which" in result.stderr


def test_training_goes_on_from_a_folder(faults, folder):
    settings = {"init_from": str(folder), "head_dim": None, "max_seq_len": 16, "num_iterations": 20}
    code, output = faults.run("base", {**settings, "eval_only": True})
    assert code == 0 and "2 layers of " in output and " nats per token" in output, output
    before = float(output.split(" nats per token")[0].split()[-1])
    slow = {"matrix_lr": 0.005, "embedding_lr": 0.01, "unembedding_lr": 0.001}
    steps = faults.train("base", {**settings, **slow, "model_tag": "tuned", "shard": True}, ranks=2)["step"]
    assert steps[0]["loss"] == pytest.approx(before, rel=0.1) and steps[-1]["loss"] < 0.9 * steps[0]["loss"]
