"""Conversations packed whole and cut only where that is counted. How they resume on any ranks: test_dataloader.py."""

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat import chat_train
from nanochat.chat_train import ChatPosition, chat_blocks, chat_stream, evaluate_chats, pack_chats, rows_in_epoch
from nanochat.common import UserError
from nanochat.compute import Compute
from nanochat.conversation import Rendered, render_conversation
from nanochat.schedule import BatchPlan
from tests.test_conversation import BYTES
from tests.test_gpt import SMALL, small_model

T = 31


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


CPU = Compute(torch.device("cpu"), torch.float32)
CHATS = [chat("q" * (i % 7), "a" * (1 + i % 13)) for i in range(100)]


def batches(count, chats):
    stream = chat_stream(chats, BYTES, BatchPlan(2, T, 1, 1), CPU, all_tokens=False, seed=1)
    return list(islice(stream, count))


@given(st.lists(st.integers(1, T + 1), max_size=40))
def test_packing_keeps_every_conversation_whole(lengths):
    """Each is found once, unbroken, and best fit leaves no room for one that came later."""
    rendered = [
        Rendered(np.full(n, 1000 + i), np.ones(n, dtype=bool), np.zeros(n, dtype=bool)) for i, n in enumerate(lengths)
    ]
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


@pytest.mark.parametrize("all_tokens", [False, True])
def test_an_answer_with_weight_0_is_read_and_never_learned(all_tokens):
    """Fine-tuning data marks bad answers so; midtraining learns all tokens, but not these."""
    messages = CHATS[1]["messages"] + CHATS[9]["messages"]
    messages[1] = messages[1] | {"weight": 0}
    ids, targets = pack_chats([render_conversation(messages, BYTES)], 63, 0, all_tokens)[0]
    asked = "<|bos|><|user_start|>q<|user_end|><|assistant_start|>"
    again = "<|user_start|>qq<|user_end|><|assistant_start|>"
    learned = (asked + again if all_tokens else "") + "aaaaaaaaaa<|assistant_end|>"
    assert BYTES.decode(targets[targets >= 0].tolist()) == learned
    assert BYTES.decode(ids.tolist()).startswith(asked + "aa<|assistant_end|>" + again)


def test_long_conversations_are_cut_and_counted():
    """nanochat's chat_sft with T = 256 fills its buffer with conversations that never fit, and then the loss is NaN."""
    chats = [chat("q", "a" * 5000), chat("q" * 5000, "a"), chat("q", "a")] * 4
    (block,) = chat_blocks(chats, BYTES, T, False, ChatPosition())
    after = block.after.next_epoch()
    assert (after.epoch, after.conversations, after.conversations_cut, after.left_out) == (1, 12, 8, 4)
    assert after.tokens_cut == 4 * sum(len(render_conversation(c["messages"], BYTES).ids) - (T + 1) for c in chats[:2])
    for inputs, targets, _ in batches(6, chats):
        loss = small_model()(inputs, targets)
        assert torch.isfinite(loss) and (targets >= 0).any()


def test_nothing_to_learn_is_an_error_and_not_an_endless_loop():
    chats = [chat("q" * 100, "a")] * 3
    for use in (
        lambda: batches(1, chats),
        lambda: rows_in_epoch(chats, BYTES, T, False),
        lambda: evaluate_chats(small_model(), chats, BYTES, BatchPlan(4, T, 1, 1), CPU, False),
    ):
        with pytest.raises(UserError, match="no conversation of 3 has a supervised token within 31 tokens"):
            use()


def test_an_epoch_is_counted_in_rows(monkeypatch):
    rows = next(chat_blocks(CHATS, BYTES, T, False, ChatPosition())).rows
    assert rows_in_epoch(CHATS, BYTES, T, False) == len(rows)
    monkeypatch.setattr(chat_train, "CHAT_BLOCK", 25)
    assert rows_in_epoch(CHATS, BYTES, T, False) == pytest.approx(len(rows), rel=0.15)


def test_validation_is_the_same_for_any_batch_size_and_any_number_of_ranks():
    model = small_model()
    assert SMALL.sequence_len > T
    loss = evaluate_chats(model, CHATS, BYTES, BatchPlan(4, T, 1, 1), CPU, False)
    assert evaluate_chats(model, CHATS, BYTES, BatchPlan(7, T, 1, 1), CPU, False) == pytest.approx(loss, abs=1e-6)

    class Half(Compute):
        """A rank of two without the other: sums are collected instead of reduced."""

        def sum(self, values):
            halves.append(values)
            return values

    halves: list[torch.Tensor] = []
    for rank in range(2):
        half = Half(torch.device("cpu"), torch.float32, rank, 2)
        evaluate_chats(model, CHATS, BYTES, BatchPlan(4, T, 2, 1), half, False)
    total = sum(halves)
    assert (total[0] / total[1]).item() == pytest.approx(loss, abs=1e-6)
