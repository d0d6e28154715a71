"""The faster recipe: its table of pairs, in training, in the engine and in CORE."""

import inspect

import pytest
import torch

from nanochat.attention import causal_mask
from nanochat.common import UserError
from nanochat.engine import Engine, Sampling
from nanochat.fast import FastAttention, FastConfig, config_from_depth, to_hf
from nanochat.gpt import norm, rotary_angles
from nanochat.model import build_model, choose_config, load_config
from tests import test_core_eval, test_engine
from tests.reference import attention as slow
from tests.reference.generate import greedy
from tests.test_gpt import CPU, small_model

SMALL = FastConfig(32, 300, 3, 4, 2, 64, "SSL", bigram_rows=2)
IDX = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(0))

tasks = test_core_eval.tasks  # the fixture


def test_each_pair_of_neighbours_has_a_row_of_the_table():
    """Blocks begin as the identity, so what is added to the embedding stays."""
    model = build_model(SMALL, CPU, seed=3)
    model.bigrams.weight.data.normal_()
    found = model.hidden(IDX, torch.float32)
    for row, ids in zip(found, IDX.tolist(), strict=True):
        for t, token in enumerate(ids):
            before = ids[max(0, t - 1)]
            pair = model.bigrams.weight[(before * 36313 ^ token * 27191) % 600]
            torch.testing.assert_close(row[t], norm(norm(model.wte.weight[token]) + 4 * pair))


@pytest.mark.parametrize("window", [32, 5])
def test_half_of_a_key_is_that_of_the_token_before(window):
    """Attention and its gradient, beside the slow twin; the slow half is what rotate() hardly turns."""
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 32, 16), *[(2, 2, 32, 16)] * 3]
    q, k, v, values = (torch.randn(shape, generator=g, requires_grad=True) for shape in shapes)
    found = FastAttention(SMALL, window).attend(q, k, v, values)
    turned = (rotary_angles(torch.tensor(1), 16, 1e5)[0].acos().repeat(2)).tolist()
    slow_half = sorted(range(16), key=lambda channel: turned[channel])[:8]
    keys = k.clone()
    for t in range(32):
        keys[:, :, t, slow_half] = k[:, :, t - 1, slow_half] if t else torch.zeros(2, 2, 8)
    expected = slow.attention(q, keys, v + values, causal_mask(32, 32, window, "cpu"))
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        *(torch.autograd.grad(y.sin().sum(), (q, k, values)) for y in (found, expected)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_it_begins_as_the_plain_model():
    fast = build_model(choose_config("fast", 2, 300, 32, aspect_ratio=32), CPU, seed=3)
    plain = build_model(choose_config("gpt", 2, 300, 32, aspect_ratio=32), CPU, seed=3)
    torch.testing.assert_close(fast(IDX), plain(IDX))
    assert fast.num_matmul_params() == plain.num_matmul_params()
    assert fast.num_params() == plain.num_params() + (fast.config.bigram_rows + 1) * 300 * 64
    assert load_config(fast.config_dict()) == config_from_depth(2, 300, 32, 32)


def test_the_tables_learn_with_the_head():
    model = small_model(SMALL)
    matrices, embedding, rest = model.sort_parameters()
    assert {*rest} == {"bigrams.weight", "values.weight", "lm_head.weight"}
    assert {*embedding} == {"wte.weight"} and len(matrices) == 18
    model(IDX, IDX).backward()
    assert model.bigrams.weight.grad.abs().sum() > 0 and model.values.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_cached_decoding_knows_the_token_before(monkeypatch, chunk):
    """At the first token of a chunk, of an answer and of a text; prompts that share a beginning, in one batch."""
    monkeypatch.setattr("nanochat.engine.CHUNK", chunk)
    monkeypatch.setattr("nanochat.engine.SHARED", 3)
    model = small_model(SMALL)
    prompts = [[7, 3, 250, 9, 11], [5], [7, 3, 250, 9, 12, 40], list(range(100, 120))]
    expected = [greedy(model, prompt, 32 - len(prompt)) for prompt in prompts]
    engine = Engine(model)
    assert engine.generate_batch(prompts, Sampling(temperature=0))[0] == expected
    for prompt, said in zip(prompts, expected, strict=True):
        assert list(engine.generate(prompt, Sampling(temperature=0))) == said


@pytest.mark.parametrize(
    "test",
    [
        test_engine.test_requests_that_join_and_leave_notice_nothing,
        test_engine.test_the_next_turn_of_a_chat_reads_only_what_is_new,
        test_engine.test_a_slot_that_holds_more_than_all_who_decode_poisons_nobody,
        test_engine.test_a_pool_of_any_size_says_the_same,
    ],
)
def test_the_engine_serves_it_as_the_plain_model(monkeypatch, test):
    """A ring that has gone round has a half of a key where the next text's first token has none."""
    known = {"monkeypatch": monkeypatch, "pattern": "SSL", "slots": 2}
    monkeypatch.setattr(
        test_engine, "small_model", lambda config=SMALL: small_model(FastConfig(**config.__dict__ | {"arch": "fast"}))
    )
    test(**{name: known[name] for name in inspect.signature(test).parameters})


def test_core_scores_branches_as_texts_of_their_own(tasks):
    model = test_core_eval.model_of(96)
    config = FastConfig(**model.config_dict())
    for task in tasks:
        test_core_eval.assert_same_as_slow(task, small_model(config), test_core_eval.BYTES, batch_tokens=300)


def test_it_cannot_leave_and_says_so():
    with pytest.raises(UserError, match="trained with --arch=gpt"):
        to_hf(small_model(SMALL))
