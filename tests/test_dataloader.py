"""The global stream: nothing lost, nothing twice, the same on any number of ranks, exact after any restart."""

import json
import threading
from collections import Counter
from dataclasses import asdict, replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat import chat_train, dataloader
from nanochat.chat_train import chat_stream
from nanochat.common import UserError
from nanochat.compute import Compute
from nanochat.dataloader import (
    Block,
    Position,
    pack_bos,
    pack_flat,
    prefetch,
    stream,
    text_blocks,
    training_stream,
)
from nanochat.schedule import BatchPlan
from tests.corpora import flip_bit, sealed, texts_of, write_parquet
from tests.reference.byte_tokenizer import ByteTokenizer
from tests.test_chat_loader import CHATS
from tests.test_conversation import BYTES

BOS, T = 256, 8
documents = st.lists(st.lists(st.integers(0, 255), max_size=40), max_size=30)


def as_arrays(texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array([i for text in texts for i in text], dtype=np.uint16)
    return ids, np.cumsum([0] + [len(text) for text in texts])


def without_bos(tokens) -> Counter:
    return Counter(t for t in np.asarray(tokens).ravel().tolist() if t != BOS)


@given(first=documents, second=documents)
def test_bos_packing_loses_and_doubles_nothing(first, second):
    """Over two blocks, the second taking up the first one's unfinished row, every token lands in exactly one row or in
    the carry.
    """
    a = pack_bos(*as_arrays(first), (), BOS, T)
    b = pack_bos(*as_arrays(second), a.carry, BOS, T)
    assert len(a.carry) < T + 1 and len(b.carry) < T + 1
    for packed in (a, b):
        assert packed.rows.shape[1] == T + 1 and (packed.rows[:, 0] == BOS).all()
    together = without_bos(a.rows) + without_bos(b.rows) + without_bos(b.carry)
    assert together == without_bos([t for text in first + second for t in text])


@given(texts=documents)
def test_bos_packing_keeps_text_in_order(texts):
    """Between two BOS stands a piece of one document, uncut unless it had to be."""
    packed = pack_bos(*as_arrays(texts), (), BOS, T)
    for row in packed.rows:
        starts = np.flatnonzero(row == BOS).tolist()
        for start, end in zip(starts, [*starts[1:], T + 1], strict=True):
            piece = row[start + 1 : end].tolist()
            assert any(piece == text[i : i + len(piece)] for text in texts for i in range(len(text) + 1)) or not piece


def test_bos_packing_by_hand(tmp_path):
    """Rows of 9: the 20-token document is cut into 8 + 8 + 4; 4 and the 3-token one fill a row of 1 + 4 + 1 + 3
    exactly.
    """
    texts = [bytes(range(20)).decode(), bytes([50, 51, 52]).decode()]
    (block,) = text_blocks(
        sealed(write_parquet(tmp_path / "hand.parquet", texts)), ByteTokenizer(), T, "bos", Position()
    )
    expected = [[BOS, *range(8)], [BOS, *range(8, 16)], [BOS, 16, 17, 18, 19, BOS, 50, 51, 52]]
    assert sorted(block.rows.tolist()) == expected
    assert (block.after.documents_cut, block.after.spans_cropped, block.after.carry) == (1, 0, ())


def test_a_row_that_only_a_bos_still_fits_cuts_no_span():
    """It counted as a cropped span, which the log and the report show."""
    packed = pack_bos(*as_arrays([[1, 2, 3, 4, 5, 6, 7], [11, 12, 13, 14, 15, 16, 17]]), (), BOS, T)
    assert packed.rows.tolist() == [[BOS, 11, 12, 13, 14, 15, 16, 17, BOS]] and packed.carry == (
        BOS,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
    )
    assert packed.spans_cropped == 0


@given(first=documents, second=documents)
def test_flat_packing_is_the_stream(first, second):
    a = pack_flat(*as_arrays(first), (), BOS, T)
    b = pack_flat(*as_arrays(second), a.carry, BOS, T)
    stream = [t for text in first + second for t in (BOS, *text)]
    targets = [t for rows in (a.rows, b.rows) for row in rows.tolist() for t in row[:-1]]
    assert targets + list(b.carry) == stream
    for row, following in zip(b.rows, b.rows[1:], strict=False):
        assert row[-1] == following[0]


# -----------------------------------------------------------------------------
# The stream

CPU = Compute(torch.device("cpu"), torch.float32)
PLAN = BatchPlan(2, T, 1, 1)
KINDS = pytest.mark.parametrize("kind", ["bos", "flat", "chats", "chats with all tokens"])
# The files are only read, so that they need not be new for every example.
few_examples = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two shards of 40 documents, small row groups and small blocks, so that a few batches cross every border."""
    monkeypatch.setattr(dataloader, "BLOCK_BYTES", 200)
    monkeypatch.setattr(chat_train, "CHAT_BLOCK", 16)
    rng = np.random.default_rng(0)
    paths = []
    for shard in range(2):
        texts = ["".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(0, 60))) for _ in range(40)]
        paths.append(write_parquet(tmp_path / f"shard_{shard}.parquet", texts, row_group_size=9))
    return sealed(*paths)


def batches(files, count, rank=0, world_size=1, rows=2, start=None, kind="bos"):
    compute = replace(CPU, rank=rank, world_size=world_size)
    if kind in ("bos", "flat"):
        plan = BatchPlan(rows, T, world_size, 1)
        stream = training_stream(files, ByteTokenizer(), plan, compute, kind, 1, start)
    else:
        plan = BatchPlan(rows, 31, world_size, 1)
        stream = chat_stream(CHATS, BYTES, plan, compute, kind != "chats", 1, start)
    return list(islice(stream, count))


def through_json(position):
    return position.from_json(json.loads(json.dumps(asdict(position))))


@KINDS
@few_examples
@given(k=st.integers(0, 250), n=st.integers(1, 60))
def test_a_restart_continues_with_the_very_next_row(files, kind, k, n):
    """nanochat forgets its packing buffer and its place in the row group: 1,000 to 2,000 documents per rank."""
    whole = batches(files, k + n, kind=kind)
    assert whole[-1][2].epoch > 0 or k + n < (30 if "chats" in kind else 200)
    start = through_json(whole[k - 1][2]) if k else None
    resumed = batches(files, n, start=start, kind=kind)
    for (x, y, p), (rx, ry, rp) in zip(whole[k:], resumed, strict=True):
        assert torch.equal(x, rx) and torch.equal(y, ry) and p == rp


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_see_together_what_one_rank_sees(files, world_size):
    per_rank = [batches(files, 20, rank, world_size, rows=2) for rank in range(world_size)]
    alone = batches(files, 20, rows=2 * world_size)
    for step in range(20):
        assert torch.equal(torch.cat([per_rank[rank][step][0] for rank in range(world_size)]), alone[step][0])
        assert all(per_rank[rank][step][2] == alone[step][2] for rank in range(world_size))


@KINDS
@few_examples
@given(k=st.integers(1, 80), before=st.sampled_from([1, 2, 3, 6]), after=st.sampled_from([1, 2, 3, 6]))
def test_ranks_may_change_at_any_batch(files, kind, k, before, after):
    """Six rows a step, dealt to 1, 2, 3 or 6 ranks: the position is the same, and so are the rows after it."""
    alone = batches(files, k + 5, rows=6, kind=kind)
    stopped = batches(files, k, before - 1, before, rows=6 // before, kind=kind)[-1][2]
    assert stopped == alone[k - 1][2]
    start, rows = through_json(stopped), 6 // after
    ranks = [batches(files, 5, rank, after, rows, start, kind) for rank in range(after)]
    for step in range(5):
        for part in range(2):
            assert torch.equal(torch.cat([ranks[rank][step][part] for rank in range(after)]), alone[k + step][part])
        assert all(ranks[rank][step][2] == alone[k + step][2] for rank in range(after))


def test_a_damaged_shard_stops_the_stream_before_its_first_token(files):
    """Also where the run resumes in the middle of that shard; the error comes as it was raised, by name."""
    whole = batches(files, 200)
    assert whole[-1][2].epoch > 0
    inside = next(position for _, _, position in whole if position.shard == 1 and position.row_group > 0)
    flip_bit(files.paths[1], 1 / 3)
    seen = []
    with pytest.raises(UserError, match=f"{files.paths[1]}: changed since"):
        for _, _, position in training_stream(files, ByteTokenizer(), PLAN, CPU, seed=1):
            seen.append(position)
    assert seen == [position for _, _, position in whole[: len(seen)]] and seen[-1].shard == 0
    with pytest.raises(UserError, match=f"{files.paths[1]}: changed since"):
        batches(files, 1, start=inside)


@pytest.mark.parametrize("packing", ["bos", "flat"])
def test_an_epoch_has_every_token_once(files, packing):
    seen: Counter = Counter()
    for block in text_blocks(files, ByteTokenizer(), T, packing, Position()):
        seen += without_bos(block.rows[:, 1:] if packing == "flat" else block.rows)
    text = Counter("".join(texts_of(files)).encode())
    missing = text - seen
    assert not seen - text
    assert missing.total() <= T + 1  # the unfinished row, which the next epoch begins with
    assert block.after.documents == 80


def test_epochs_differ_in_order_only(tmp_path):
    """Every one of 20 documents fills a row."""
    shards = sealed(write_parquet(tmp_path / "even.parquet", [chr(97 + i) * T for i in range(20)]))
    (first, _, _), (second, _, after) = batches(shards, 2, rows=20)
    assert after.epoch == 1
    assert first.tolist() != second.tolist() and sorted(first.tolist()) == sorted(second.tolist())


def test_too_little_text_is_an_error_and_not_an_endless_loop(tmp_path):
    with pytest.raises(UserError, match="too little text"):
        batches(sealed(write_parquet(tmp_path / "tiny.parquet", ["ab"])), 1)


def test_text_of_one_row_repeats_forever(tmp_path):
    assert batches(sealed(write_parquet(tmp_path / "small.parquet", ["abcdefghijklmnop"])), 9)[-1][2].epoch >= 7


def test_targets_are_inputs_shifted(files):
    for inputs, targets, _ in batches(files, 5):
        assert inputs.shape == targets.shape == (2, T) and inputs.dtype == torch.int64
        assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_prefetch_hands_over_errors_and_lets_go_of_its_thread():
    def three_then_fail():
        yield from range(3)
        raise ValueError("shard is damaged")

    items = prefetch(three_then_fail(), depth=2)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="damaged"):
        next(items)
    assert list(items) == []  # raised once
    endless = prefetch(iter(int, 1), depth=2)
    next(endless)
    endless.close()  # joins the thread: a stuck one would hang the test
    assert list(prefetch(iter([1, 2]), depth=1)) == [1, 2]


def test_a_stream_that_is_closed_leaves_no_thread(files):
    """Runs that build a second stream, such as a timed trial before training, kept the first one's thread."""
    stream = training_stream(files, ByteTokenizer(), PLAN, CPU)
    next(stream)
    assert any(thread.name.startswith("prefetch") for thread in threading.enumerate())
    stream.close()
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_batches_cross_blocks():
    """Rows 0 to 29 in blocks of three, which the seed shuffles within themselves."""

    def blocks(start):
        for i in range(start.row, 10):
            first = replace(start, rows_used=0, row=i)
            yield Block(np.arange(3 * i, 3 * i + 3), first, replace(first, row=i + 1))

    dealt = list(islice(stream(blocks, Position(), BatchPlan(4, T, 1, 1), 0, 0, "none"), 3))
    rows = np.concatenate([rows for rows, _ in dealt])
    assert [sorted(rows[i : i + 3]) for i in range(0, 12, 3)] == np.arange(12).reshape(4, 3).tolist()
    assert [(position.row, position.rows_used) for _, position in dealt] == [(1, 1), (2, 2), (3, 3)]
    again = stream(blocks, dealt[0][1], BatchPlan(4, T, 1, 1), 0, 0, "none")
    assert [rows.tolist() for rows, _ in islice(again, 2)] == [rows.tolist() for rows, _ in dealt[1:]]
