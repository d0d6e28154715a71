"""Bits per byte: each byte exactly once, whatever windows, batches and ranks."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.compute import Compute
from nanochat.gpt import GPTConfig, build_model
from nanochat.loss_eval import byte_unigram_bpb, evaluate_bpb, windows, xz_bpb
from tests.reference.byte_tokenizer import ByteTokenizer

CPU = Compute(torch.device("cpu"), torch.float32)
TEXTS = [pa.array(["a short one", "", "x", "a document that is longer than a window of sixteen tokens, twice over"])]


def model():
    config = GPTConfig(sequence_len=16, vocab_size=257, n_layer=1, n_head=1, n_kv_head=1, n_embd=16)
    model = build_model(config, torch.device("cpu"), seed=0)
    with torch.no_grad():
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model


@given(lengths=st.lists(st.integers(0, 60), max_size=6), length=st.integers(2, 16), stride=st.data())
def test_windows_score_every_token_once(lengths, length, stride):
    stride = stride.draw(st.integers(1, length))
    ids = np.arange(1, sum(lengths) + 1)
    offsets = np.cumsum([0, *lengths])
    scored = []
    for tokens, first in windows(ids, offsets, 0, length, stride):
        assert len(tokens) <= length + 1 and 0 <= first < len(tokens) - 1
        scored += tokens[1 + first :].tolist()
    assert scored == ids.tolist()


def test_bpb_equals_the_definition():
    """Sum of -log2 p over the documents' bytes, each from its own full window, divided by the bytes."""
    net, bits, count = model(), 0.0, 0
    for text in TEXTS[0].to_pylist():
        tokens = [256, *text.encode()]
        for i in range(1, len(tokens)):
            begin = (i - 1) // 16 * 16  # stride 16: windows do not overlap
            logits = net(torch.tensor([tokens[begin:i]]))[0, -1]
            bits -= logits.log_softmax(-1)[tokens[i]].item() / math.log(2)
            count += 1
    result = evaluate_bpb(net, ByteTokenizer(), TEXTS, CPU, rows=3)
    assert (result.bytes, result.tokens) == (count, count)
    assert result.bpb == pytest.approx(bits / count, rel=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("stride", [16, 8, 5])
def test_batch_size_does_not_move_the_number(rows, stride):
    expected = evaluate_bpb(model(), ByteTokenizer(), TEXTS, CPU, rows=1, stride=stride)
    result = evaluate_bpb(model(), ByteTokenizer(), TEXTS, CPU, rows=rows, stride=stride)
    assert (result.bytes, result.tokens) == (expected.bytes, expected.tokens)
    assert result.bpb == pytest.approx(expected.bpb, rel=1e-6)


def test_a_limit_stops_after_the_batch_that_reaches_it():
    result = evaluate_bpb(model(), ByteTokenizer(), TEXTS, CPU, rows=2, max_tokens=5)
    assert 5 <= result.tokens < sum(len(text) for text in TEXTS[0].to_pylist())


def test_baselines():
    assert byte_unigram_bpb([pa.array(["abab", "abab"])]) == pytest.approx(1.0)
    text = pa.array(["the cat sat on the mat and looked at the rat" * 20])
    assert xz_bpb([text], [text]) < 0.3  # what was seen before costs nearly nothing
    noise = np.random.default_rng(0).integers(97, 123, 5000).astype(np.uint8).tobytes().decode()
    assert xz_bpb([text], [pa.array([noise])]) > 4.0
