"""Bits per byte: each byte exactly once, whatever windows, batches and ranks."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.compute import Compute
from nanochat.corpus import Shards
from nanochat.gpt import GPTConfig
from nanochat.loss_eval import (
    BitsPerByte,
    Window,
    document_windows,
    evaluate_bpb,
    ratio_over_documents,
    validation_windows,
)
from nanochat.model import build_model
from nanochat.tokenizer import Tokenizer
from scripts.base_loss import byte_unigram_bpb, xz_bpb
from tests.reference.bpb import bits_and_bytes
from tests.reference.byte_tokenizer import ByteTokenizer

CPU = Compute(torch.device("cpu"), torch.float32)
TEXTS = [pa.array(["a short one", "", "x", "a document that is longer than a window of sixteen tokens, twice over"])]


def model(vocab_size=257):
    config = GPTConfig(sequence_len=16, vocab_size=vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=16)
    model = build_model(config, torch.device("cpu"), seed=0)
    with torch.no_grad():
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model


def score(net, tokenizer, texts, rows, stride=16, max_tokens=None) -> BitsPerByte:
    with TemporaryDirectory() as folder:
        file = Path(folder, "text.parquet")
        pq.write_table(pa.table({"text": pa.chunked_array(texts, pa.string())}), file)
        windows = validation_windows(Shards((file,)), tokenizer, 16, stride, max_tokens)
        return evaluate_bpb(net, windows, tokenizer, CPU, rows)


@given(lengths=st.lists(st.integers(0, 60), max_size=6), length=st.integers(2, 16), stride=st.data())
def test_windows_score_every_token_once(lengths, length, stride):
    stride = stride.draw(st.integers(1, length))
    ids = np.arange(1, sum(lengths) + 1)
    offsets = np.cumsum([0, *lengths])
    scored = []
    for i, tokens, first in document_windows(ids, offsets, 0, length, stride):
        assert len(tokens) <= length + 1 and 0 <= first < len(tokens) - 1
        assert tokens[0] == 0, "a window begins as the rows of training do"
        assert set(tokens[tokens > 0]) <= set(ids[offsets[i] : offsets[i + 1]]), "documents do not see each other"
        scored += tokens[1 + first :].tolist()
    assert scored == ids.tolist()


SPLITTING = Tokenizer.train(["the cat sat on the mat, and the \u00e4\u00f6\u00fc \u4e2d\u6587 too "] * 20, 290)
MODELS = {257: model(), SPLITTING.get_vocab_size(): model(SPLITTING.get_vocab_size())}


@settings(max_examples=25, deadline=None)
@given(data=st.data(), tokenizer=st.sampled_from([ByteTokenizer(), SPLITTING]))
def test_every_byte_is_scored_once_and_the_number_equals_one_window_at_a_time(data, tokenizer):
    """Empty documents beside others, those of many windows, characters of several bytes; in one array or many."""
    piece = st.sampled_from(["the cat", " sat", "\u00e4", "\u4e2d\u6587", "\U0001f600", "x", "\n"])
    documents = ["x", *data.draw(st.lists(st.lists(piece, max_size=25).map("".join), max_size=5))]
    stride, rows, cut = (data.draw(st.integers(low, high)) for low, high in ((1, 16), (1, 5), (0, len(documents))))
    net = MODELS[tokenizer.get_vocab_size()]
    texts = [pa.array(part, pa.string()) for part in (documents[:cut], documents[cut:])]
    result = score(net, tokenizer, texts, rows, stride)
    slow = [bits_and_bytes(net, tokenizer, text, 16, stride) for text in documents]
    assert [size for _, size in slow] == [len(text.encode()) for text in documents]
    assert result.bytes == sum(size for _, size in slow) and result.documents == sum(map(bool, documents))
    assert result.bpb == pytest.approx(sum(bits for bits, _ in slow) / result.bytes, rel=1e-5)


def test_perplexity_accuracy_and_gap_are_those_of_all_logits_at_once():
    net, ids = model(), [256]
    for i in range(15):  # two tokens of three are what the model thinks likeliest
        ids.append(int(net(torch.tensor([ids]))[0, -1].argmax()) if i % 3 else 7)
    nats = torch.nn.functional.cross_entropy(net(torch.tensor([ids[:-1]]))[0], torch.tensor(ids[1:])).item()
    windows = [Window(document, np.array(ids), 0) for document in (0, 1)]
    result = evaluate_bpb(net, windows, ByteTokenizer(), CPU, 3)
    assert (result.right, result.tokens) == (20, 30)
    shares = {"accuracy": 2 / 3, "exact": 0.0}
    expected = {"val_nats": nats, "perplexity": math.exp(nats), **shares, "gap": nats - 2.0}
    assert result.figures(train_loss=2.0) == pytest.approx(expected, rel=1e-5)


def test_a_document_is_exact_when_all_of_its_tokens_in_all_of_its_windows_are_right():
    rows = [[1.0, 5, 4, 4], [1.0, 5, 4, 3], [1.0, 0, 0, 0], [1.0, 5, 1, 1]]  # nats, bytes, tokens, right
    result = ratio_over_documents(np.array(rows))
    assert (result.exact, result.documents, result.right, result.tokens) == (2, 3, 8, 9)
    assert result.figures(train_loss=0.0)["exact"] == 2 / 3


def test_the_standard_error_is_what_documents_scatter_by():
    """Against the spread of the ratio over many draws of 40 documents each from one population."""
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(2000):
        lengths = rng.integers(10, 500, 40)
        bits = lengths * rng.normal(1.5, 0.3, 40)
        drawn.append(ratio_over_documents(np.stack([bits * math.log(2), lengths, lengths], axis=1).astype(float)))
    scatter = np.std([result.bpb for result in drawn])
    assert np.mean([result.stderr for result in drawn]) == pytest.approx(scatter, rel=0.1)
    assert drawn[0].documents == 40
    assert ratio_over_documents(np.ones((1, 3))).stderr is None


@pytest.mark.parametrize(("texts", "rows"), [([], 2), ([pa.array(["", ""])], 2), (TEXTS, 0)])
def test_no_number_comes_of_scoring_nothing(texts, rows):
    """base_loss --device-batch-size=0 said: val bpb 0.0000, 0 bytes."""
    with pytest.raises(UserError, match="no bits per byte of nothing"):
        score(model(), ByteTokenizer(), texts, rows)


def test_a_limit_in_tokens_does_not_score_more_text_with_larger_batches_or_more_ranks():
    """It stopped after a batch, so that three ranks had another val bpb than one."""
    one = score(model(), ByteTokenizer(), TEXTS, rows=1, max_tokens=5)
    many = score(model(), ByteTokenizer(), TEXTS, rows=7, max_tokens=5)
    assert 5 <= one.tokens == many.tokens < sum(len(text) for text in TEXTS[0].to_pylist())
    assert one.bpb == pytest.approx(many.bpb, rel=1e-6)


def test_baselines():
    assert byte_unigram_bpb([pa.array(["abab", "abab"])]) == pytest.approx(1.0)
    text = pa.array(["the cat sat on the mat and looked at the rat" * 20])
    assert xz_bpb([text], [text]) < 0.3  # what was seen before costs nearly nothing
    noise = np.random.default_rng(0).integers(97, 123, 5000).astype(np.uint8).tobytes().decode()
    assert xz_bpb([text], [pa.array([noise])]) > 4.0
