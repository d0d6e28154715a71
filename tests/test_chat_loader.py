"""The stream of conversations: packed whole, cut only where that is counted, resumable, the same on any ranks."""

import json
from dataclasses import asdict
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat import dataloader
from nanochat.common import UserError
from nanochat.compute import Compute
from nanochat.conversation import Rendered, render_conversation
from nanochat.dataloader import ChatPosition, chat_blocks, chat_stream, pack_chats, rows_in_epoch
from nanochat.loss_eval import evaluate_chats
from nanochat.schedule import BatchPlan
from tests.test_conversation import BYTES
from tests.test_gpt import SMALL, small_model

T = 31


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


CHATS = [chat("q" * (i % 7), "a" * (1 + i % 13)) for i in range(100)]


def batches(count, rank=0, world_size=1, rows=2, start=None, all_tokens=False, chats=CHATS):
    compute = Compute(torch.device("cpu"), torch.float32, rank, world_size)
    plan = BatchPlan(rows, T, world_size, 1)
    return list(islice(chat_stream(chats, BYTES, plan, compute, all_tokens, seed=1, start=start), count))


@given(st.lists(st.integers(1, T + 1), max_size=40))
def test_packing_keeps_every_conversation_whole(lengths):
    """Each is found once, unbroken, and best fit leaves no room for one that came later."""
    rendered = [Rendered(np.full(n, 1000 + i), np.ones(n, dtype=bool)) for i, n in enumerate(lengths)]
    rows = pack_chats(rendered, T, pad=0, all_tokens=True)
    found = []
    for ids, targets in rows:
        assert np.array_equal(ids > 0, targets >= 0) and np.array_equal(ids[targets >= 0], targets[targets >= 0])
        runs = [list(run) for run in np.split(ids, np.flatnonzero(np.diff(ids)) + 1)]
        found += [(run[0] - 1000, len(run)) for run in runs if run[0]]
    assert sorted(found) == list(enumerate(lengths))
    room = [T + 1 - np.count_nonzero(ids) for ids, _ in rows]
    firsts = [np.count_nonzero(ids == ids[0]) for ids, _ in rows]
    assert all(first > room[earlier] for row, first in enumerate(firsts) for earlier in range(row))


def test_targets_are_what_the_assistant_says():
    rendered = render_conversation(CHATS[9]["messages"], BYTES)
    ids, targets = pack_chats([rendered], T, BYTES.get_bos_token_id(), all_tokens=False)[0]
    assert BYTES.decode(targets[targets >= 0].tolist()) == "aaaaaaaaaa<|assistant_end|>"
    assert (ids[len(rendered.ids) :] == BYTES.get_bos_token_id()).all()
    ids, targets = pack_chats([rendered], T, BYTES.get_bos_token_id(), all_tokens=True)[0]
    assert np.array_equal(targets[: len(rendered.ids)], rendered.ids) and (targets[len(rendered.ids) :] == -1).all()


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(dataloader, "CHAT_BLOCK", 16)


any_stream = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@any_stream
@given(k=st.integers(0, 60), n=st.integers(1, 20), all_tokens=st.booleans())
def test_a_restart_continues_with_the_very_next_row(small_blocks, k, n, all_tokens):
    """Both masks, over the ends of blocks and of epochs (about 20 batches)."""
    whole = batches(k + n, all_tokens=all_tokens)
    assert whole[-1][2].epoch > 0 or k + n < 30
    start = ChatPosition.from_json(json.loads(json.dumps(asdict(whole[k - 1][2])))) if k else None
    for (x, y, p), (rx, ry, rp) in zip(whole[k:], batches(n, start=start, all_tokens=all_tokens), strict=True):
        assert torch.equal(x, rx) and torch.equal(y, ry) and p == rp


@any_stream
@given(
    k=st.integers(1, 20), before=st.sampled_from([1, 2, 3, 6]), after=st.sampled_from([1, 2, 3, 6]), mid=st.booleans()
)
def test_ranks_may_change_at_any_batch(small_blocks, k, before, after, mid):
    """Six rows a step, dealt to 1, 2, 3 or 6 ranks: the position is the same, and so are the rows after it."""
    alone = batches(k + 3, rows=6, all_tokens=mid)
    stopped = batches(k, before - 1, before, rows=6 // before, all_tokens=mid)[-1][2]
    assert stopped == alone[k - 1][2]
    ranks = [batches(3, rank, after, 6 // after, stopped, mid) for rank in range(after)]
    for step in range(3):
        for part in range(2):
            assert torch.equal(torch.cat([ranks[rank][step][part] for rank in range(after)]), alone[k + step][part])
        assert all(ranks[rank][step][2] == alone[k + step][2] for rank in range(after))


def test_long_conversations_are_cut_and_counted():
    """nanochat's chat_sft with T = 256 fills its buffer with conversations that never fit, and then the loss is NaN."""
    chats = [chat("q", "a" * 5000), chat("q" * 5000, "a"), chat("q", "a")] * 4
    (block,) = chat_blocks(chats, BYTES, T, False, ChatPosition())
    after = block.after.next_epoch()
    assert (after.epoch, after.conversations, after.conversations_cut, after.left_out) == (1, 12, 8, 4)
    assert after.tokens_cut == 4 * sum(len(render_conversation(c["messages"], BYTES).ids) - (T + 1) for c in chats[:2])
    for inputs, targets, _ in batches(6, chats=chats):
        loss = small_model()(inputs, targets)
        assert torch.isfinite(loss) and (targets >= 0).any()


def test_nothing_to_learn_is_an_error_and_not_an_endless_loop():
    with pytest.raises(UserError, match="no conversation of 3 has a supervised token within 31 tokens"):
        batches(1, chats=[chat("q" * 100, "a")] * 3)


def test_an_epoch_is_counted_in_rows(monkeypatch):
    rows = next(chat_blocks(CHATS, BYTES, T, False, ChatPosition())).rows
    assert rows_in_epoch(CHATS, BYTES, T, False) == len(rows)
    monkeypatch.setattr(dataloader, "CHAT_BLOCK", 25)
    assert rows_in_epoch(CHATS, BYTES, T, False) == pytest.approx(len(rows), rel=0.15)


def test_validation_is_the_same_for_any_batch_size_and_any_number_of_ranks():
    model = small_model()
    assert SMALL.sequence_len > T
    one = Compute(torch.device("cpu"), torch.float32, 0, 1)
    loss = evaluate_chats(model, CHATS, BYTES, BatchPlan(4, T, 1, 1), one, False)
    assert evaluate_chats(model, CHATS, BYTES, BatchPlan(7, T, 1, 1), one, False) == pytest.approx(loss, abs=1e-6)

    class Half(Compute):
        """A rank of two without the other: sums are collected instead of reduced."""

        def sum(self, values):
            halves.append(values)
            return values

    halves: list[torch.Tensor] = []
    for rank in range(2):
        evaluate_chats(
            model, CHATS, BYTES, BatchPlan(4, T, 2, 1), Half(torch.device("cpu"), torch.float32, rank, 2), False
        )
    total = sum(halves)
    assert (total[0] / total[1]).item() == pytest.approx(loss, abs=1e-6)
