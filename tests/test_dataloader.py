"""The global stream: nothing lost, nothing twice, the same on any number of ranks, exact after any restart."""

from collections import Counter
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat import dataloader
from nanochat.common import UserError
from nanochat.compute import Compute
from nanochat.dataloader import Position, deal_rows, pack_bos, pack_flat, packed_blocks, prefetch, training_stream
from tests.reference.byte_tokenizer import ByteTokenizer

BOS, T = 256, 8
documents = st.lists(st.lists(st.integers(0, 255), max_size=40), max_size=30)


def as_arrays(texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array([i for text in texts for i in text], dtype=np.uint16)
    return ids, np.cumsum([0] + [len(text) for text in texts])


def without_bos(tokens) -> Counter:
    return Counter(t for t in np.asarray(tokens).ravel().tolist() if t != BOS)


@given(first=documents, second=documents)
def test_bos_packing_loses_and_doubles_nothing(first, second):
    """
    Over two blocks, the second taking up the first one's unfinished row, every token lands in exactly one row or in the
    carry.
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


def test_bos_packing_by_hand():
    """
    Rows of 9: the 20-token document is cut into 8 + 8 + 4; 4 and the 3-token one fill a row of 1 + 4 + 1 + 3 exactly.
    """
    packed = pack_bos(*as_arrays([list(range(20)), [50, 51, 52]]), (), BOS, T)
    assert packed.rows.tolist() == [
        [BOS, 0, 1, 2, 3, 4, 5, 6, 7],
        [BOS, 8, 9, 10, 11, 12, 13, 14, 15],
        [BOS, 16, 17, 18, 19, BOS, 50, 51, 52],
    ] or sorted(packed.rows.tolist()) == sorted(
        [[BOS, *range(8)], [BOS, *range(8, 16)], [BOS, 16, 17, 18, 19, BOS, 50, 51, 52]]
    )
    assert (packed.documents_cut, packed.spans_cropped, packed.carry) == (1, 0, ())


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


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two shards of 40 documents, small row groups and small blocks, so that a few batches cross every border."""
    monkeypatch.setattr(dataloader, "BLOCK_BYTES", 200)
    rng = np.random.default_rng(0)
    paths = []
    for shard in range(2):
        texts = ["".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(0, 60))) for _ in range(40)]
        paths.append(tmp_path / f"shard_{shard}.parquet")
        pq.write_table(pa.table({"text": texts}), paths[-1], row_group_size=9)
    return paths


def batches(files, count, rank=0, world_size=1, rows=2, start=None, packing="bos"):
    compute = Compute(torch.device("cpu"), torch.float32, rank, world_size)
    stream = training_stream(files, ByteTokenizer(), rows, T, compute, packing, seed=1, start=start)
    return list(islice(stream, count))


@pytest.mark.parametrize("packing", ["bos", "flat"])
# The files are only read, so that they need not be new for every example.
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(k=st.integers(0, 250), n=st.integers(1, 60))
def test_a_restart_continues_with_the_very_next_row(files, packing, k, n):
    """nanochat forgets its packing buffer and its place in the row group: 1,000 to 2,000 documents per rank."""
    whole = batches(files, k + n, packing=packing)
    start = Position.from_json(whole[k - 1][2].to_json()) if k else None
    resumed = batches(files, n, start=start, packing=packing)
    for (x, y, p), (rx, ry, rp) in zip(whole[k:], resumed, strict=True):
        assert torch.equal(x, rx) and torch.equal(y, ry) and p == rp


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_see_together_what_one_rank_sees(files, world_size):
    per_rank = [batches(files, 20, rank, world_size, rows=2) for rank in range(world_size)]
    alone = batches(files, 20, rows=2 * world_size)
    for step in range(20):
        assert torch.equal(torch.cat([per_rank[rank][step][0] for rank in range(world_size)]), alone[step][0])
        assert all(per_rank[rank][step][2] == alone[step][2] for rank in range(world_size))


def test_ranks_may_change_at_any_batch(files):
    alone = batches(files, 30, rows=6)
    for rank in range(3):
        resumed = batches(files, 10, rank, 3, rows=2, start=alone[9][2])
        for step in range(10):
            assert torch.equal(resumed[step][0], alone[10 + step][0][2 * rank : 2 * rank + 2])


@pytest.mark.parametrize("packing", ["bos", "flat"])
def test_an_epoch_has_every_token_once(files, packing):
    blocks = packed_blocks(files, ByteTokenizer(), T, packing, 1, Position())
    seen: Counter = Counter()
    for rows, position in blocks:
        if position.epoch == 1:
            break
        seen += without_bos(rows[:, 1:] if packing == "flat" else rows)
        last = position
    texts = [text for file in files for text in pq.read_table(file)["text"].to_pylist()]
    missing = Counter("".join(texts).encode()) - seen
    assert not seen - Counter("".join(texts).encode())
    assert missing.total() <= T + 1  # the unfinished row, which the next epoch begins with
    assert last.documents <= 80


def test_epochs_differ_in_order_only(files):
    blocks = packed_blocks(files, ByteTokenizer(), T, "flat", 1, Position())
    first = [next(blocks) for _ in range(3)]
    while (block := next(blocks))[1].epoch == 0:
        pass
    assert block[0].tolist() != first[0][0].tolist()


def test_too_little_text_is_an_error_and_not_an_endless_loop(tmp_path):
    path = tmp_path / "tiny.parquet"
    pq.write_table(pa.table({"text": ["ab"]}), path)
    with pytest.raises(UserError, match="too little text"):
        batches([path], 1)


def test_unknown_packing_is_refused(files):
    with pytest.raises(UserError, match="--packing=best: expected bos or flat"):
        batches(files, 1, packing="best")


def test_text_of_one_row_repeats_forever(tmp_path):
    path = tmp_path / "small.parquet"
    pq.write_table(pa.table({"text": ["abcdefghijklmnop"]}), path)
    assert batches([path], 9)[-1][2].epoch >= 7


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
    endless = prefetch(iter(int, 1), depth=2)
    next(endless)
    endless.close()  # joins the thread: a stuck one would hang the test
    assert list(prefetch(iter([1, 2]), depth=1)) == [1, 2]


def test_dealing_rows_crosses_blocks():
    blocks = ((np.arange(3 * i, 3 * i + 3)[:, None], Position(row=i)) for i in range(10))
    dealt = list(islice(deal_rows(blocks, Position(), 4, 0, 1), 3))
    assert [rows.ravel().tolist() for rows, _ in dealt] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [(position.row, position.rows_used) for _, position in dealt] == [(1, 1), (2, 2), (3, 3)]
