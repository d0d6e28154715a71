"""Cached decoding against the full forward pass, and sampling against its definition."""

import dataclasses
import re
from itertools import pairwise

import numpy as np
import pytest
import torch

from nanochat import attention
from nanochat.common import UserError
from nanochat.conversation import decode_parts
from nanochat.engine import Batch, Engine, KVCache, LayerSlots, Request, Sampling, penalise, sample
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


@pytest.mark.parametrize("chunk", [1, 3, 7])
@pytest.mark.parametrize("pattern", ["L", "SSL"])
def test_any_chunking_of_prompts_says_the_same(monkeypatch, chunk, pattern):
    """nanochat's cache is wrong when it is filled a second time. Here prompts of different length are read together,
    chunk by chunk, and the rings of S layers (16 tokens and a chunk of 32) go round.
    """
    monkeypatch.setattr("nanochat.engine.CHUNK", chunk)
    model = small_model(GPTConfig(**{**SMALL.__dict__, "window_pattern": pattern}))
    prompts = [list(range(40, 60)), PROMPT, [5], list(range(100, 128))]
    expected = [greedy(model, prompt, 32 - len(prompt)) for prompt in prompts]
    assert Engine(model).generate_batch(prompts, greedily(None))[0] == expected


def steps(batch: Batch) -> None:
    while len(batch):
        batch.step()


@pytest.mark.parametrize("pattern", ["L", "SSL"])
def test_requests_that_join_and_leave_notice_nothing(monkeypatch, pattern):
    """One more every second step while others end, one is cancelled, and two share what a third has read."""
    monkeypatch.setattr("nanochat.engine.CHUNK", 4)
    monkeypatch.setattr("nanochat.engine.SHARED", 3)
    model = small_model(GPTConfig(**{**SMALL.__dict__, "window_pattern": pattern}))
    prompts = [PROMPT, list(range(20)), [*range(18), 77], [9], list(range(15)), [*range(15), 1, 2], PROMPT, [1, 2]]
    requests = [Request(prompt, greedily(3 + 4 * (i % 3))) for i, prompt in enumerate(prompts)]
    batch = Engine(model).batch(4)
    for i, request in enumerate(requests):
        batch.add(request)
        if i == 5:
            batch.cancel(requests[4])
        batch.step()
        batch.step()
    steps(batch)
    for i, request in enumerate(requests):
        said = greedy(model, prompts[i], 3 + 4 * (i % 3))
        assert request.tokens == (said[: len(request.tokens)] if i == 4 else said)
        assert request.finished == ("cancelled" if i == 4 else "length")


def fed_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each reading pass is given, in a list that grows."""
    fed, feed = [], Batch.feed

    def record(self: Batch, chunks: dict[int, list[int]]) -> None:
        fed.append(sum(map(len, chunks.values())))
        feed(self, chunks)

    monkeypatch.setattr(Batch, "feed", record)
    return fed


def test_a_prompt_is_read_once_for_all_its_samples(monkeypatch):
    fed = fed_tokens(monkeypatch)
    samples, _ = Engine(small_model()).generate_batch([PROMPT, [3, 4]], Sampling(4), num_samples=8)
    assert fed == [4 + 1] and len(set(map(tuple, samples[:8]))) > 1


@pytest.mark.parametrize("pattern", ["L", "SSL"])
def test_the_next_turn_of_a_chat_reads_only_what_is_new(monkeypatch, pattern):
    monkeypatch.setattr("nanochat.engine.CHUNK", 4)
    fed = fed_tokens(monkeypatch)
    model = small_model(GPTConfig(**{**SMALL.__dict__, "window_pattern": pattern}))
    engine, prompt = Engine(model), list(range(18))
    said = list(engine.generate(prompt, greedily(3)))
    assert sum(fed) == 17 and said == greedy(model, prompt, 3)
    longer = [*prompt, *said, 7, 8, 9]
    assert list(engine.generate(longer, greedily(4))) == greedy(model, longer, 4)
    assert sum(fed) == 17 + 3, "the last token of the answer, and what was new but for its end"
    other = [*prompt[:17], 99, 98]  # an edited question: a ring still holds what comes before it, or all is read again
    assert list(engine.generate(other, greedily(4))) == greedy(model, other, 4)


def test_a_cancelled_request_leaves_within_one_step():
    batch = Engine(small_model()).batch(1)
    first, second, third = (Request(PROMPT, greedily(20)) for _ in range(3))
    for request in (first, second, third):
        batch.add(request)
    batch.step()
    batch.cancel(first)
    batch.cancel(third)
    assert [said.request for said in batch.step()] == [second] and len(batch) == 1
    assert (first.finished, len(first.tokens), third.finished, third.tokens) == ("cancelled", 1, "cancelled", [])


def test_a_long_prompt_stalled_those_who_were_waiting_for_their_next_token(monkeypatch):
    """It is read a chunk at a time, and everybody else gets a token with each."""
    monkeypatch.setattr("nanochat.engine.CHUNK", 4)
    fed = fed_tokens(monkeypatch)
    batch = Engine(small_model()).batch(4)
    short = Request([5], greedily(20))
    batch.add(short)
    batch.step()
    batch.add(Request(list(range(20)), greedily(2)))
    steps(batch)
    assert max(fed) == 4 and len(fed) == 5 and len(short.tokens) == 20


def test_a_slot_that_holds_more_than_all_who_decode_poisons_nobody():
    """A window layer of a free slot between them saw nothing at all: NaN, which masked attention multiplies by 0."""
    model = small_model(GPTConfig(**{**SMALL.__dict__, "window_pattern": "SSL"}))
    batch = Engine(model).batch(2)
    batch.add(Request(list(range(28)), greedily(3)))
    late = Request([1, 2], greedily(12))
    batch.add(late)
    steps(batch)
    again = Request([*range(27), 9], greedily(3))
    batch.add(again)
    steps(batch)
    assert late.tokens == greedy(model, [1, 2], 12) and again.tokens == greedy(model, again.prompt, 3)


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
    model, seen, attend = small_model(), set(), LayerSlots.attend
    prompts = [list(range(n, 2 * n)) for n in (1, 2, 3, 5, 7, 8, 10, 12)]
    expected = [greedy(model, prompt, 32 - len(prompt)) for prompt in prompts]

    def record(self, q, k, v):
        seen.add((q.size(0), q.size(2), self.mask.size(3)))
        return attend(self, q, k, v)

    monkeypatch.setitem(attention.LENGTHS, "cpu", 16)
    monkeypatch.setattr(LayerSlots, "attend", record)
    assert Engine(model).generate_batch(prompts, greedily(None))[0] == expected
    assert {batch for batch, _, _ in seen} <= {1, 2, 3, 4, 6, 8}
    assert {(T, S) for _, T, S in seen} == {(16, 48), (1, 48)}  # 32 tokens and one cell more


@pytest.mark.parametrize("pattern", ["L", "SL"])
def test_room_for_keys_grows_with_the_sequences(monkeypatch, pattern):
    """In few steps, also that of a ring before it goes round; what was there stays."""
    monkeypatch.setattr("nanochat.engine.CHUNK", 40)
    model = small_model(dataclasses.replace(SMALL, sequence_len=256, n_layer=2, window_pattern=pattern))
    prompts, sizes, reserve = [list(range(50)), [5, 6, 7]], set(), KVCache.reserve

    def record(self, S):
        reserve(self, S)
        sizes.add(tuple(keys.size(2) for keys in self.keys))

    monkeypatch.setattr(KVCache, "reserve", record)
    said, _ = Engine(model).generate_batch(prompts, greedily(150))
    assert said == [greedy(model, prompt, 150) for prompt in prompts]
    rings = [64, 128, 168, 168] if pattern == "SL" else [64, 128, 192, 201]
    assert sizes == {*zip(rings, [64, 128, 192, 201], strict=True)}


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
    batch = engine.batch(1, capacity=8)
    request = Request(PROMPT, greedily(20))
    batch.add(request)
    steps(batch)
    assert len(request.tokens) == 3 and request.finished == "length"


def test_the_engine_does_not_see_later_training():
    model = small_model()
    engine = Engine(model)
    before = engine.generate_batch([PROMPT], greedily(6))
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    assert engine.generate_batch([PROMPT], greedily(6)) == before


LOGITS = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))


def draw(logits: torch.Tensor = LOGITS, draws: int = 2000, **options: float) -> dict[int, float]:
    """{token: its share} of many draws."""
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(0))
    tokens = sample(logits.expand(draws, -1).clone(), uniform, [Sampling(**options)] * draws)
    return {t: (tokens == t).float().mean().item() for t in tokens.unique().tolist()}


def test_top_k_top_p_and_min_p_keep_what_they_say():
    assert draw(temperature=0.0) == {0: 1.0}
    assert set(draw(top_k=2)) == {0, 1}
    assert set(draw(top_p=0.5)) == {0, 1}  # 0.4 is not yet 0.5, so the next one belongs to it
    assert set(draw(top_p=0.4)) == {0} and set(draw(top_p=1e-9)) == {0}
    assert set(draw(min_p=0.6)) == {0, 1}  # 0.3 is 0.75 of the likeliest one's 0.4, 0.2 is half of it
    assert set(draw(top_k=3, top_p=0.75)) == {0, 1}  # of the three that are left, 0.4 + 0.3 are 0.78
    everything = draw()
    assert everything[0] == pytest.approx(0.4, abs=0.05) and everything[3] == pytest.approx(0.1, abs=0.03)
    assert draw(temperature=0.5)[0] == pytest.approx(0.16 / 0.30, abs=0.05)
    assert draw(top_k=3)[0] == pytest.approx(0.4 / 0.9, abs=0.05)


@pytest.mark.parametrize("temperature", [1e-40, 1e-10])
def test_a_tiny_temperature_gave_nuls(temperature):
    """0 / 0 is no number, and no number is less than a draw."""
    assert draw(temperature=temperature, draws=8) == {0: 1.0}
    assert draw(temperature=temperature, top_k=2, draws=8) == {0: 1.0}


def test_every_request_is_drawn_its_own_way_whatever_its_company():
    """And a row draws the same alone: cut and uncut rows count in different orders."""
    kinds = [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.3}, {"top_k": 9, "temperature": 2.0}]
    samplings = [Sampling(12, seed=seed, **kind) for seed in (1, 2) for kind in kinds]  # type: ignore[arg-type]
    samplings += [Sampling(12, repetition_penalty=1.5), Sampling(12, logprobs=2)]
    engine = Engine(small_model())
    alone = [engine.generate_batch([PROMPT], sampling)[0][0] for sampling in samplings]
    requests = [Request(PROMPT, sampling) for sampling in samplings]
    batch = engine.batch(len(requests))
    for request in requests:
        batch.add(request)
    steps(batch)
    assert [request.tokens for request in requests] == alone


def test_the_repetition_penalty_is_that_of_ctrl():
    """After [0, 1]: 0.9 / 1.5 is less than 0.7, and a negative logit falls too."""
    logits = torch.tensor([0.9, -0.1, 0.7, -0.12])
    penalise(logits, [0, 1, 1], 1.5)
    torch.testing.assert_close(logits, torch.tensor([0.6, -0.15, 0.7, -0.12]))
    said = Engine(small_model()).generate_batch([[7]], Sampling(20, 0, repetition_penalty=1e9))[0][0]
    assert len({7, *said}) == 21, "nothing is said twice"


def test_log_probabilities_are_those_of_the_full_forward():
    """The model's own, whatever the temperature; score() gives the same for a text that is there already."""
    model = small_model()
    engine, request = Engine(model), Request(PROMPT, Sampling(6, temperature=0.5, top_k=3, logprobs=2))
    batch, said = engine.batch(1), []
    batch.add(request)
    while len(batch):
        said += batch.step()
    text = PROMPT + request.tokens
    with torch.no_grad():
        expected = model(torch.tensor([text])).log_softmax(dim=-1)[0]
    scores = engine.score(text, 2)
    assert len(scores) == len(text) - 1 and engine.score([3]) == []
    for place, (logprob, top) in enumerate(scores):
        assert logprob == pytest.approx(expected[place, text[place + 1]].item(), abs=1e-4)
        assert [token for token, _ in top] == expected[place].topk(2).indices.tolist()
    for one, (logprob, top) in zip(said, scores[len(PROMPT) - 1 :], strict=True):
        assert one.logprob == pytest.approx(logprob, abs=1e-4) and [t for t, _ in one.top] == [t for t, _ in top]
    with pytest.raises(UserError, match="takes 32"):
        engine.score([1] * 33)


def test_a_draw_never_takes_a_token_without_probability():
    """Rounding at the upper end once could: the last token's share is 0 here."""
    logits = torch.tensor([[0.3, 0.2, -torch.inf, -torch.inf]]).expand(3, 4)
    assert sample(logits, torch.tensor([0.0, 1 - 2**-24, 0.9999999]), [Sampling()] * 3).tolist() == [0, 1, 1]
    assert sample(torch.tensor([[-torch.inf, 1.0]]), torch.zeros(1), [Sampling()]).tolist() == [1]


def test_ctrl_c_within_a_step_leaves_no_half_of_it_to_the_next_answer(monkeypatch):
    """What a slot was said to hold and did not would have been reused by the next turn of the chat."""
    engine = Engine(small_model())
    expected = list(engine.generate(PROMPT * 4, greedily(6)))
    with monkeypatch.context() as patch:
        decode, calls = engine.decode, []

        def interrupted(*values):
            calls.append(decode(*values))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return calls[-1]

        patch.setattr(engine, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(engine.generate([*PROMPT * 4, 1], greedily(6)))
    assert engine.spare is None and list(engine.generate(PROMPT * 4, greedily(6))) == expected
    assert engine.spare is not None
