"""Cached decoding against the full forward pass, and sampling against its definition."""

import re
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanochat import attention
from nanochat.common import UserError
from nanochat.conversation import decode_parts
from nanochat.engine import Engine, KVCache, Sampling, sample
from nanochat.gpt import GPT, GPTConfig
from nanochat.model import build_model
from nanochat.tokenizer import Tokenizer
from tests.reference.generate import greedy
from tests.test_gpt import SMALL, small_model

PROMPT = [7, 3, 250, 9, 11]


def greedily(max_tokens: int | None) -> Sampling:
    return Sampling(max_tokens, temperature=0)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("pattern", ["L", "SSL"])
def test_cached_greedy_equals_the_full_forward(kv_heads, pattern):
    """24 tokens: beyond the 16-token windows of the S layers, up to nearly the whole context."""
    model = small_model(GPTConfig(**{**SMALL.__dict__, "n_kv_head": kv_heads, "window_pattern": pattern}))
    assert Engine(model).generate_batch([PROMPT], greedily(24))[0][0] == greedy(model, PROMPT, 24)


@pytest.mark.parametrize("cuts", [[1] * 20, [7, 13], [19, 1], [3, 1, 9, 7]])
def test_any_chunking_of_a_prompt_gives_the_same_logits(cuts):
    """nanochat's cache is wrong when it is filled a second time."""
    model = small_model()
    ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(3))
    engine, cache = Engine(model), KVCache(SMALL, 2, 20, torch.device("cpu"), torch.float32)
    start = 0
    for cut in cuts:
        with torch.no_grad():
            logits = engine.model.logits(engine.forward(ids[:, start : start + cut], cache))
        start += cut
        torch.testing.assert_close(logits, model(ids[:, :start])[:, -1], atol=1e-4, rtol=1e-4)


def test_rows_of_different_length_decode_together():
    """A slot's own position decides what it sees: shorter rows must not see the padding of longer ones."""
    model = small_model()
    engine = Engine(model)
    ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(4))
    cache = KVCache(SMALL, 2, 16, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        engine.forward(ids[:, :8], cache)
        cache.lengths[1] = 5  # the second row forgets its last three tokens
        logits = engine.model.logits(engine.forward(ids[:, 8:9], cache))
        alone = torch.cat([ids[1:, :5], ids[1:, 8:9]], dim=1)
        torch.testing.assert_close(logits[0], model(ids[:1, :9])[0, -1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits[1], model(alone)[0, -1], atol=1e-4, rtol=1e-4)


def test_samples_do_not_share_their_first_token():
    """nanochat once drew the first token once and gave it to all samples. At temperature 1 over 300 nearly equal
    tokens, 32 samples agree by chance with probability below 300^-31.
    """
    samples, _ = Engine(small_model()).generate_batch([PROMPT], Sampling(1), num_samples=32)
    assert len({tokens[0] for tokens in samples}) > 1


def test_several_samples_equal_single_ones_when_greedy():
    engine = Engine(small_model())
    single = engine.generate_batch([PROMPT], greedily(10))[0][0]
    assert engine.generate_batch([PROMPT], greedily(10), num_samples=3)[0] == [single] * 3


def test_same_seed_same_text_other_seed_other_text():
    engine = Engine(small_model())
    a, b, c = (engine.generate_batch([PROMPT], Sampling(12, seed=seed), 4) for seed in (1, 1, 2))
    assert a == b and a != c


def test_a_stop_token_ends_its_row_and_leaves_the_others():
    """A finished row is dropped from the cache; the rows that go on must not notice."""
    model = small_model()
    free = Engine(model).generate_batch([PROMPT], greedily(12))[0][0]
    stop = free[4]
    stopped, _ = Engine(model, stop_tokens=[stop]).generate_batch([PROMPT], greedily(12), 2)
    assert stopped == [free[: free.index(stop) + 1]] * 2
    sampled, _ = Engine(model).generate_batch([PROMPT], Sampling(8), 6)
    stop = sampled[0][0]
    ended, _ = Engine(model, stop_tokens=[stop]).generate_batch([PROMPT], Sampling(8), 6)
    assert ended == [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in sampled]


def test_prompts_of_different_length_together_equal_each_alone():
    """Shorter prompts are padded when they are read, and sequences end at different times."""
    engine = Engine(small_model())
    prompts = [[5], PROMPT, list(range(40, 60)), [9, 8], list(range(31))]
    alone = [engine.generate_batch([prompt], greedily(15))[0][0] for prompt in prompts]
    assert engine.generate_batch(prompts, greedily(15))[0] == alone
    assert [len(tokens) for tokens in alone] == [15, 15, 12, 15, 1]


def test_what_a_sequence_says_does_not_depend_on_its_company():
    """Each draws its own numbers; `first` says which, so that two ranks together say what one would."""
    engine = Engine(small_model())
    prompts = [PROMPT, [3, 4, 5, 6], [7]]
    together, _ = engine.generate_batch(prompts, Sampling(10, seed=5), 2)
    for i, prompt in enumerate(prompts):
        assert engine.generate_batch([prompt], Sampling(10, seed=5), 2, first=[2 * i])[0] == together[2 * i :][:2]


@pytest.mark.parametrize("slots", [1, 4])
def test_a_pool_of_any_size_says_the_same(slots):
    """New sequences take the slots of those that ended, whose keys and values they must not see."""
    model = small_model()
    prompts = [PROMPT, [3, 4, 5, 6], [7], list(range(40, 60)), [9, 8], list(range(31)), [250] * 9]
    free, _ = Engine(model).generate_batch(prompts, Sampling(10, seed=5), 2)
    stop = max(range(300), key=lambda token: sum(token in tokens for tokens in free))
    expected = [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in free]
    assert len({len(tokens) for tokens in expected}) > 3, "they end at different times"
    engine = Engine(model, stop_tokens=[stop])
    assert engine.generate_batch(prompts, Sampling(10, seed=5), 2, slots)[0] == expected


def test_decoding_on_hopper_waited_for_a_plan_at_each_step(monkeypatch):
    """Attention sees few shapes: keys by the multiple, and batches of few sizes while sequences end one by one."""
    model, seen, kernel = small_model(), set(), F.scaled_dot_product_attention
    prompts = [list(range(n, 2 * n)) for n in (1, 2, 3, 5, 7, 8, 10, 12)]
    expected = [greedy(model, prompt, 32 - len(prompt)) for prompt in prompts]

    def record(q, k, *rest, **options):
        seen.add((q.size(0), q.size(2), k.size(2)))
        return kernel(q, k, *rest, **options)

    monkeypatch.setitem(attention.LENGTHS, "cpu", 16)
    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    assert Engine(model).generate_batch(prompts, greedily(None))[0] == expected
    assert {batch for batch, _, _ in seen} <= {1, 2, 3, 4, 6, 8}
    assert {(T, S) for _, T, S in seen} == {(16, 16), (1, 16), (1, 32)}


def test_no_prompts_and_no_room_say_nothing():
    engine = Engine(small_model())
    assert engine.generate_batch([], Sampling()) == ([], [])
    assert engine.generate_batch([PROMPT, [1]], Sampling(0), 2) == ([[]] * 4, [[]] * 4)


def tool_model(script: str) -> tuple[GPT, Tokenizer]:
    """A model that says `script` after any prompt: with an identity for a body, each token calls for the next one."""
    tokenizer = Tokenizer(np.zeros((0, 2), dtype=np.uint32))
    names = {name: tokenizer.encode_special(name) for name in tokenizer.get_special_tokens()}
    pieces = re.split(r"(<\|\w+\|>)", script)
    ids = [i for piece in pieces for i in ([names[piece]] if piece in names else tokenizer.encode(piece))]
    assert len(set(ids)) == len(ids), "each token calls for one other"
    config = GPTConfig(
        sequence_len=64, vocab_size=tokenizer.get_vocab_size(), n_layer=1, n_head=1, n_kv_head=1, n_embd=320
    )
    model = build_model(config, torch.device("cpu"), seed=0)  # new blocks add nothing
    with torch.no_grad():
        model.wte.weight.copy_(torch.eye(config.vocab_size, config.n_embd))
        model.lm_head.weight.zero_()
        for token, following in pairwise([names["<|assistant_start|>"], *ids]):
            model.lm_head.weight[following, token] = 1
    return model, tokenizer


def test_the_calculator_answers_a_tool_call():
    model, tokenizer = tool_model("<|python_start|>7*8<|python_end|>")
    with torch.no_grad():  # after the answer, and only then, the model ends
        model.lm_head.weight[
            tokenizer.encode_special("<|assistant_end|>"), tokenizer.encode_special("<|output_end|>")
        ] = 1
    prompt = [tokenizer.encode_special("<|assistant_start|>")]
    (tokens,), (mask,) = Engine(model, tokenizer).generate_batch([prompt], greedily(40))
    assert decode_parts(tokens, tokenizer) == [
        {"type": "python", "text": "7*8"},
        {"type": "python_output", "text": "56"},
    ]
    assert mask == [1, 1, 1, 1, 1, 0, 0, 0, 0, 1]  # call sampled; output with its fences forced; the end sampled
    assert tokens[-1] == tokenizer.encode_special("<|assistant_end|>")


def test_a_failed_call_is_answered_too():
    """Left alone, the model would go on to invent a result."""
    model, tokenizer = tool_model("<|python_start|>7*(<|python_end|>")
    prompt = [tokenizer.encode_special("<|assistant_start|>")]
    (tokens,), _ = Engine(model, tokenizer).generate_batch([prompt], greedily(12))
    assert decode_parts(tokens, tokenizer)[1] == {"type": "python_output", "text": "error"}


def test_a_full_context_is_an_error_and_not_a_frozen_cache():
    """nanochat ran 61 tokens past a 32-slot cache without a word."""
    engine = Engine(small_model())
    assert len(engine.generate_batch([PROMPT], greedily(None))[0][0]) == 32 - len(PROMPT)
    with pytest.raises(UserError, match="1 to 31"):
        engine.generate_batch([[1] * 32], Sampling())
    cache = KVCache(SMALL, 1, 4, torch.device("cpu"), torch.float32)
    with pytest.raises(AssertionError, match="overflows"):
        engine.forward(torch.zeros(1, 5, dtype=torch.long), cache)


def test_the_engine_does_not_see_later_training():
    model = small_model()
    engine = Engine(model)
    before = engine.generate_batch([PROMPT], greedily(6))
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    assert engine.generate_batch([PROMPT], greedily(6)) == before


def test_top_k_and_top_p_keep_what_they_say():
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]])).expand(2000, 4)
    g = torch.Generator().manual_seed(0)

    def drawn(**options: float) -> dict[int, float]:
        tokens = sample(logits, torch.rand(2000, generator=g), Sampling(**options))
        return {t: (tokens == t).float().mean().item() for t in tokens.unique().tolist()}

    assert drawn(temperature=0.0) == {0: 1.0}
    assert set(drawn(top_k=2)) == {0, 1}
    assert set(drawn(top_p=0.5)) == {0, 1}  # 0.4 is not yet 0.5, so the next one belongs to it
    assert set(drawn(top_p=0.4)) == {0}
    everything = drawn()
    assert everything[0] == pytest.approx(0.4, abs=0.05) and everything[3] == pytest.approx(0.1, abs=0.03)
    assert drawn(temperature=0.5)[0] == pytest.approx(0.16 / 0.30, abs=0.05)


def test_a_draw_never_takes_a_token_without_probability():
    """Rounding at the upper end once could: the last token's share is 0 here."""
    logits = torch.tensor([[0.3, 0.2, -torch.inf, -torch.inf]]).expand(3, 4)
    assert sample(logits, torch.tensor([0.0, 1 - 2**-24, 0.9999999]), Sampling()).tolist() == [0, 1, 1]
    assert sample(torch.tensor([[-torch.inf, 1.0]]), torch.zeros(1), Sampling()).tolist() == [1]
