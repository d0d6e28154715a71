"""The faster recipe: its table of pairs, in training, in the engine and in CORE."""

import pytest
import torch

from nanochat.common import UserError
from nanochat.engine import Engine, Sampling
from nanochat.fast import FastConfig, config_from_depth, to_hf
from nanochat.model import build_model, choose_config, load_config
from tests import test_core_eval
from tests.reference.generate import greedy
from tests.test_gpt import CPU, small_model

SMALL = FastConfig(32, 300, 3, 4, 2, 64, "SSL", bigram_rows=2)
IDX = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(0))

tasks = test_core_eval.tasks  # the fixture


def test_each_pair_of_neighbours_has_a_row_of_the_table():
    model = small_model(SMALL)
    plain = super(type(model), model).embed(IDX, torch.float32, None)
    added = model.embed(IDX, torch.float32, None) - plain
    for row, ids in zip(added, IDX.tolist(), strict=True):
        for t, token in enumerate(ids):
            before = ids[max(0, t - 1)]
            expected = 4 * model.bigrams.weight[(before * 36313 ^ token * 27191) % 600]
            torch.testing.assert_close(row[t], expected)


def test_it_begins_as_the_plain_model():
    fast = build_model(choose_config("fast", 2, 300, 32, aspect_ratio=32), CPU, seed=3)
    plain = build_model(choose_config("gpt", 2, 300, 32, aspect_ratio=32), CPU, seed=3)
    torch.testing.assert_close(fast(IDX), plain(IDX))
    assert fast.num_matmul_params() == plain.num_matmul_params()
    assert fast.num_params() == plain.num_params() + 5 * 300 * 64
    assert load_config(fast.config_dict()) == config_from_depth(2, 300, 32, 32)


def test_the_table_learns_with_the_head():
    model = small_model(SMALL)
    matrices, embedding, rest = model.sort_parameters()
    assert {*rest} == {"bigrams.weight", "lm_head.weight"} and {*embedding} == {"wte.weight"} and len(matrices) == 18
    model(IDX, IDX).backward()
    assert model.bigrams.weight.grad.abs().sum() > 0


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


def test_core_scores_branches_as_texts_of_their_own(tasks):
    model = test_core_eval.model_of(96)
    config = FastConfig(**model.config_dict())
    for task in tasks:
        test_core_eval.assert_same_as_slow(task, small_model(config), test_core_eval.BYTES, batch_tokens=300)


def test_it_cannot_leave_and_says_so():
    with pytest.raises(UserError, match="trained with --arch=gpt"):
        to_hf(small_model(SMALL))
