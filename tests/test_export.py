"""A model that leaves answers in transformers as it does here, or it does not leave; and it comes back bit for bit."""

import json
import random
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rustbpe
from nanochat import gpt_hf, hf_export
from nanochat.char_byte import SymbolTokenizer, byte_tokenizer
from nanochat.checkpoint_manager import checkpoint_path, save_checkpoint
from nanochat.common import UserError
from nanochat.compute import Compute
from nanochat.conversation import check_messages, render_conversation, render_for_completion
from nanochat.files import seal
from nanochat.gpt import GPT, GPTConfig
from nanochat.hf_import import open_weights
from nanochat.model import LanguageModel, build_model, choose_config
from nanochat.tokenizer import Tokenizer
from scripts import export_hf
from tests import corpora
from tests.tiny import ROOT, run_here

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
CPU = Compute(torch.device("cpu"), torch.float32)
CONFIG = GPTConfig(sequence_len=96, vocab_size=400, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, rope_base=10_000.0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([path.read_text(encoding="utf-8") for path in sorted((ROOT / "nanochat").glob("*.py"))], 400)


def random_model(config: GPTConfig = CONFIG) -> GPT:
    """With weights that are nowhere zero, and logits that the softcap bends."""
    return randomized(build_model(config, CPU.device, seed=0))


def randomized(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data.normal_(0, 0.5, generator=generator)
    return model


@pytest.fixture
def saved(base_dir: Path, tokenizer: Tokenizer) -> GPT:
    """A checkpoint sft d3 in step 7, and its model."""
    model = random_model()
    meta = {"step": 7, "model_config": model.config_dict()}
    save_checkpoint(checkpoint_path("sft", "d3", 7), model, [], tokenizer, meta, CPU)
    return model


def export(monkeypatch: pytest.MonkeyPatch, out: Path | None, **values: Any) -> None:
    run_here(monkeypatch, export_hf, {"out": out and str(out), "model_tag": "d3", **values})


def refusal(monkeypatch: pytest.MonkeyPatch, out: Path | None, **values: Any) -> str:
    """The one line of an export that leaves nothing behind."""
    before = sorted(out.parent.iterdir()) if out else []
    with pytest.raises(UserError) as caught:
        export(monkeypatch, out, **values)
    assert "\n" not in str(caught.value)
    assert out is None or sorted(out.parent.iterdir()) == before
    return str(caught.value)


# -----------------------------------------------------------------------------
# Out


def test_an_exported_model_answers_as_ours(saved, tokenizer, tmp_path, monkeypatch, capsys):
    """And nothing is asked of a network."""
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("it asked the network"))
    folder = tmp_path / "d3-hf"
    export(monkeypatch, folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(theirs).__name__ == "NanoChatForCausalLM" and theirs.dtype == torch.float32
    idx = torch.randint(400, (2, 96), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        ours, logits = saved(idx), theirs(idx).logits
    assert ours.abs().max() > 12 and (ours - logits).abs().max() < 1e-4
    said = capsys.readouterr().out
    assert "greedy tokens by generate() and by our engine: 64 of 64 the same" in said
    assert "chat template on 500 conversations" in said and "the source files of this program" in said
    drawing = theirs.generation_config
    ends = [tokenizer.encode_special(name) for name in ("<|assistant_end|>", "<|bos|>")]
    assert drawing.eos_token_id == ends and drawing.do_sample and drawing.top_k == 50
    assert all(f"- {line}\n" in (folder / "README.md").read_text() for line in said.splitlines()[-5:-1])


def scaled_head(found: Any) -> Any:
    config, tensors = found
    return config, {**tensors, "lm_head.weight": tensors["lm_head.weight"] * 1.01}


def without_last_merge(found: Any) -> Any:
    return found | {"model": found["model"] | {"merges": found["model"]["merges"][:-1]}}


@pytest.mark.parametrize(
    ("module", "name", "change", "words"),
    [
        (gpt_hf, "to_hf", scaled_head, "logits differ by"),
        (gpt_hf, "to_hf", lambda found: (found[0] | {"rms_norm_eps": 0.1}, found[1]), "logits differ by"),
        (export_hf, "tokenizer_json", without_last_merge, "a text becomes other tokens"),
        (hf_export, "TEMPLATE", lambda text: text.replace("\\n\\n", "\\n"), "the chat template"),
        (hf_export, "TEMPLATE", lambda text: text.replace("<|output_end|>", "<|python_end|>"), "the chat template"),
    ],
)
def test_a_folder_that_would_answer_otherwise_never_appears(saved, tmp_path, monkeypatch, module, name, change, words):
    right = getattr(module, name)
    monkeypatch.setattr(export_hf, "CHATS", 50)
    wrong = change(right) if isinstance(right, str) else lambda *values: change(right(*values))
    monkeypatch.setattr(module, name, wrong)
    assert words in refusal(monkeypatch, tmp_path / "d3-hf")


def test_greedy_tokens_are_compared_too(saved, tokenizer, tmp_path, monkeypatch):
    """With logits that are not looked at: a model whose tokens differ is refused all the same."""
    monkeypatch.setattr(export_hf, "same_logits", lambda *_: "")
    export(monkeypatch, tmp_path / "right")
    wrong = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "right")
    wrong.lm_head.weight.data = wrong.lm_head.weight.data.flip(0)
    with pytest.raises(UserError, match="greedy tokens differ"):
        export_hf.same_tokens(saved, wrong, ["def main()"], tokenizer)


def test_a_model_with_windows_is_refused_before_anything_is_written(base_dir, tokenizer, tmp_path, monkeypatch):
    model = random_model(GPTConfig(96, 400, 3, 4, 2, 64, window_pattern="SL"))
    meta = {"step": 7, "model_config": model.config_dict()}
    save_checkpoint(checkpoint_path("sft", "d3", 7), model, [], tokenizer, meta, CPU)
    assert refusal(monkeypatch, tmp_path / "d3-hf").startswith("window_pattern=SL: this model cannot leave")


def save_relative(tokenizer: Tokenizer, arch: str, **options: Any) -> LanguageModel:
    config = choose_config(arch, 2, 400, 96, aspect_ratio=32, head_dim=16, **options)
    model: LanguageModel = randomized(build_model(config, CPU.device, seed=0))
    meta = {"step": 7, "model_config": model.config_dict()}
    save_checkpoint(checkpoint_path("sft", "d3", 7), model, [], tokenizer, meta, CPU)
    return model


@pytest.mark.parametrize("arch", ["gpt", "gpt2", "llama"])
def test_every_architecture_leaves_and_comes_back_bit_for_bit(base_dir, tokenizer, tmp_path, monkeypatch, arch):
    ours = Tokenizer(tokenizer.merges, pattern="gpt2")
    model = save_relative(ours, arch)
    export(monkeypatch, tmp_path / "out")
    weights = open_weights(str(tmp_path / "out"), 400, 96)
    there, here = weights.config.build(), dict(model.named_parameters())
    weights.load_into(there)
    assert weights.config == model.config and weights.tensors.keys() == here.keys()
    assert all(torch.equal(p, here[name]) for name, p in there.named_parameters())
    if arch == "gpt":
        assert "llama.cpp has no nanochat" in refusal(monkeypatch, tmp_path / "m.gguf", to="gguf")
    else:
        export(monkeypatch, tmp_path / "m.gguf", to="gguf")
        assert (tmp_path / "m.gguf").read_bytes()[:4] == b"GGUF"


def test_a_gpt2_without_biases_leaves_and_one_with_alibi_stays(base_dir, tokenizer, tmp_path, monkeypatch):
    save_relative(tokenizer, "gpt2", positions="alibi")
    assert "alibi cannot leave" in refusal(monkeypatch, tmp_path / "out")
    shutil.rmtree(checkpoint_path("sft", "d3", 7))
    save_relative(tokenizer, "gpt2", bias=False)
    export(monkeypatch, tmp_path / "out")  # the gate compares


def test_text_of_a_corpus_is_compared_where_there_is_one(base_dir, tmp_path, monkeypatch):
    corpora.write_parquet(tmp_path / "in" / "a.parquet", corpora.words("train", 5))
    corpora.write_parquet(tmp_path / "in" / "val.parquet", corpora.words("val", 4))
    corpus = corpora.run_dataset(monkeypatch, source="folder", path=str(tmp_path / "in"))
    both = [*corpora.texts_of(corpus.val), *corpora.texts_of(corpus.train)]
    assert export_hf.real_text() == (both, "the corpus in") and len(both) == 9
    monkeypatch.setattr(export_hf, "TEXT_BYTES", 10)
    assert export_hf.real_text()[0] == both[:1]


def test_mistakes_are_one_line(saved, tmp_path, monkeypatch):
    assert refusal(monkeypatch, None) == "--out=None: name what to write"
    (tmp_path / "here").mkdir()
    assert "it exists; choose another name" in refusal(monkeypatch, tmp_path / "here")
    assert "no corpus" in refusal(monkeypatch, tmp_path / "new", corpus="other")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'transformers>=5'" in refusal(monkeypatch, tmp_path / "new")


def test_the_model_card_has_the_figures_of_these_weights_alone(saved, base_dir, tmp_path, monkeypatch):
    def write(stage: str, tag: str, time: float, *events: dict[str, Any], **settings: Any) -> None:
        start = {"event": "start", "stage": stage, "tag": tag, "settings": settings, "argv": ["/x/scripts/chat_sft.py"]}
        start |= {"git": "abc", "python": "3.12", "platform": "Linux", "cpu": "a CPU", "cpu_count": 2, "versions": {}}
        lines = [json.dumps({"time": time, **event}) for event in (start, *events)]
        (base_dir / "records").mkdir(exist_ok=True)
        (base_dir / "records" / f"{stage}-{tag}-{time}.jsonl").write_text("\n".join(lines) + "\n")

    def graded(accuracy: float) -> dict[str, Any]:
        about = {"source": "sft", "task": "Spelling", "stderr": 0.01, "n": 100, "baseline": 0.25}
        return {"event": "task", **about, "accuracy": accuracy}

    write("sft", "d3", 1.0, {"event": "plan", "first_step": 0, "num_steps": 9}, *(
        {"event": "eval", "step": step, "val_loss": loss} for step, loss in ((7, 2.125), (9, 1.5))
    ), max_seq_len=96)  # fmt: skip
    write("chat_eval", "sft-d3", 4e9, graded(0.625), source="sft", step=None)
    write("chat_eval", "sft-d3", 5e9, graded(0.125), source="sft", step=5)  # of another step
    write("chat_eval", "sft-d4", 6e9, graded(0.25), source="sft", step=None)  # of another model
    write("chat_eval", "sft-d3", 2.0, graded(0.375), source="sft", step=None)  # of what had this name before
    export(monkeypatch, tmp_path / "d3-hf")
    card = (tmp_path / "d3-hf" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "# d3-hf\n" in card
    assert "chatsft_checkpoints/d3/step_000007 sha256" in card and "- logits in fp32" in card
    assert "| - | - | 2.1250 | - |" in card and "62.5 ± 1.0" in card and "max_seq_len=96" in card
    assert not any(figure in card for figure in ("1.5000", "12.5", "25.0 ±", "37.5"))


# -----------------------------------------------------------------------------
# The tokenizer and the template


@pytest.mark.parametrize("pattern", ["nanochat", "rustbpe", "gpt4", "gpt2"])
def test_text_is_split_there_as_here(pattern):
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(hf_export.REGEXES[pattern]), "isolated")
    letters = list(" \n\t\r  aZé'sll tre1234٣.,!?_-$€\u00a0\u2028\u200d😀\u0300ſK\x0b\x0c\x85\x1c")
    letters += ["'s", "'LL", "12345", " \n ", "\r\n", "   ", "<|bos|>"]
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choices(letters, k=rng.randint(1, 14)))
        assert [piece for piece, _ in split.pre_tokenize_str(text)] == rustbpe.split(text, pattern), repr(text)


@pytest.mark.parametrize("pattern", ["nanochat", "gpt2"])
def test_a_tokenizer_comes_back_with_its_fingerprint(tmp_path, pattern, tokenizer):
    there = Tokenizer(tokenizer.merges, pattern=pattern)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(hf_export.tokenizer_json(there)), encoding="utf-8")
    assert hf_export.read_tokenizer(path).fingerprint == there.fingerprint


@pytest.mark.parametrize("kind", ["bytes", "merges"])
def test_the_folder_gives_tok_train_our_own_tokenizer_back(tmp_path, tokenizer, kind):
    ours = byte_tokenizer() if kind == "bytes" else tokenizer
    (tmp_path / "tokenizer.json").write_text(json.dumps(hf_export.tokenizer_json(ours)), encoding="utf-8")
    back = hf_export.open_tokenizer(tmp_path)
    assert type(back) is Tokenizer and back.fingerprint == ours.fingerprint


def test_anothers_tokenizer_leaves_as_it_came_with_our_special_tokens(tmp_path, tokenizer):
    """GPT-2's kind: its own end of a document is BOS, and the tokens of chats stand behind its vocabulary."""
    spec = hf_export.tokenizer_json(tokenizer)
    spec["added_tokens"] = [spec["added_tokens"][0] | {"content": "<|endoftext|>"}]
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    ours = hf_export.open_tokenizer(tmp_path)
    files = {"tokenizer.json": hf_export.tokenizer_json(ours), **hf_export.settings_files(ours, 96, chats=True)}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    back = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert back.bos_token == "<|endoftext|>" and back("the cat").input_ids == ours.encode("the cat", prepend="<|bos|>")
    chat = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    assert back.apply_chat_template(chat, return_dict=False) == render_conversation(chat, ours).ids.tolist()


def test_characters_stay():
    with pytest.raises(UserError, match="a tokenizer of characters cannot leave"):
        hf_export.tokenizer_json(SymbolTokenizer(["a", "b"]))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": {"vocab": {}, "merges": [["a", "b"]]}}', seal('{"a": 1}')])
def test_another_tokenizer_is_refused_by_its_path(tmp_path, text):
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(UserError, match="tokenizer.json is no tokenizer that export_hf wrote"):
        hf_export.read_tokenizer(path)
    with pytest.raises(UserError, match="cannot read"):
        hf_export.read_tokenizer(tmp_path / "none.json")


@pytest.fixture(scope="module")
def theirs(tokenizer, tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    files = {
        "tokenizer.json": hf_export.tokenizer_json(tokenizer),
        **hf_export.settings_files(tokenizer, 96, chats=True),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_a_text_begins_with_bos_there_and_every_byte_comes_back(theirs, tokenizer):
    assert theirs("cat").input_ids == tokenizer.encode("cat", prepend="<|bos|>")
    text = "a\u0300 \x00😀\n\ttail "
    assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text


def test_contents_may_be_lists_of_parts_and_disorder_is_refused(theirs, tokenizer):
    said = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in said]
    expected = render_conversation(said, tokenizer).ids.tolist()
    assert theirs.apply_chat_template(parts, return_dict=False) == expected
    asked = theirs.apply_chat_template(parts[:2], add_generation_prompt=True, return_dict=False)
    assert asked == render_for_completion(said, tokenizer)
    image, call = {"type": "image", "image": "x"}, {"type": "python", "text": "1"}
    for wrong in ([said[2]], [said[1], said[1]], [said[1], said[0]], [{"role": "user", "content": [image]}],
                  [{"role": "user", "content": [call]}], [said[1], {"role": "tool", "content": "x"}]):  # fmt: skip
        with pytest.raises(Exception, match="no part of type|expected one of the"):
            theirs.apply_chat_template(wrong)
        with pytest.raises(UserError):
            check_messages(wrong)


# -----------------------------------------------------------------------------
# Back


def test_a_model_comes_back_bit_for_bit():
    model = random_model()
    config, tensors = gpt_hf.to_hf(model)
    assert gpt_hf.from_hf(config, tensors)[0] == CONFIG
    back = gpt_hf.from_hf(config, tensors)[1]
    weights = model.state_dict()
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)


def test_a_model_that_transformers_made_has_the_same_logits_here():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.NanoChatConfig(vocab_size=300, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    theirs = transformers.NanoChatForCausalLM(config).eval()
    for p in theirs.parameters():
        p.data.normal_(0, 0.3)
    ours, tensors = gpt_hf.from_hf(config.to_dict(), theirs.state_dict())
    model = ours.build()
    model.load_state_dict(tensors)
    idx = torch.randint(300, (2, 64))
    with torch.inference_mode():
        assert (model(idx) - theirs(idx).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "silu"}, "config.json has hidden_act='silu'"),
        ({"intermediate_size": 128}, "intermediate_size=128"),
        ({"final_logit_softcapping": None}, "final_logit_softcapping=None"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type='yarn'"),
    ],
)
def test_what_our_gpt_does_not_have_is_refused_by_name(changes, words):
    config, tensors = gpt_hf.to_hf(random_model())
    with pytest.raises(UserError, match=words):
        gpt_hf.from_hf(config | changes, tensors)
