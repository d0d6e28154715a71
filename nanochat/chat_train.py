"""What the chat stages have beside the trunk: rows of whole conversations, their horizon, their validation, samples.

Conversations go through dataloader.stream like documents, 2,048 to a block, rendered with their loss mask and packed
whole. An N-rank run sees together what one rank sees, and a ChatPosition resumes it at any batch, as there.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nanochat.checkpoint_manager import Checkpoint, find_checkpoint
from nanochat.common import UserError, print0
from nanochat.compute import Compute, collective
from nanochat.conversation import (
    Conversations,
    Rendered,
    decode_parts,
    parts_text,
    render_conversations,
    render_for_completion,
)
from nanochat.dataloader import Block, StreamPosition, prefetch, stream, to_device
from nanochat.engine import Engine, Sampling
from nanochat.model import LanguageModel
from nanochat.run import Run
from nanochat.schedule import BatchPlan
from nanochat.sharding import is_sharded
from nanochat.tokenizer import Tokenizer
from nanochat.train import Stream, accumulate, fits, steps_for_minutes

CHAT_BLOCK = 2048  # conversations rendered and packed together

# -----------------------------------------------------------------------------
# Rows


@dataclass(frozen=True)
class ChatPosition(StreamPosition):
    """Where a stream of conversations stands, with counters over all blocks before this one."""

    PLACE = ("conversation",)
    conversation: int = 0  # first one of the current block
    conversations: int = 0  # read,
    conversations_cut: int = 0  # of these, longer than a row and therefore cut at its end,
    tokens_cut: int = 0  # and the tokens that this cost;
    left_out: int = 0  # without a supervised token, such as a question that fills the row
    tokens_padded: int = 0  # places at the ends of rows where nothing fitted

    def describe(self) -> str:
        """One line on how conversations were cut, for the log and the report."""
        return (
            f"epoch {self.epoch + 1}, {self.conversations:,} conversations in finished blocks: "
            f"{self.conversations_cut:,} cut ({self.tokens_cut:,} tokens), {self.left_out:,} left out for want of a "
            f"supervised token, {self.tokens_padded:,} places padded"
        )


def pack_chats(rendered: Sequence[Rendered], sequence_len: int, pad: int, all_tokens: bool) -> np.ndarray:
    """Best fit, whole conversations only: (R, 2, T + 1), the ids and the targets of each row. The longest conversation
    that fits into what is left of a row comes next; what nothing fits into is padding. Targets are the ids where they
    are trained and -1 elsewhere. Conversations must have at most T + 1 tokens.
    """
    T = sequence_len
    waiting = sorted(rendered, key=lambda item: len(item.ids))
    lengths = [len(item.ids) for item in waiting]
    rows: list[np.ndarray] = []
    filled = T + 1  # tokens in the last row
    while waiting:
        fit = bisect_right(lengths, T + 1 - filled) - 1
        if fit < 0:
            rows.append(np.full((2, T + 1), [[pad], [-1]], dtype=np.int32))
            filled = 0
            continue
        item, begin, filled = waiting.pop(fit), filled, filled + lengths.pop(fit)
        ids, targets = rows[-1][:, begin:filled]
        ids[:] = item.ids
        np.copyto(targets, item.ids, where=(item.mask | all_tokens) & ~item.never)
    return np.array(rows, dtype=np.int32).reshape(-1, 2, T + 1)


def chat_blocks(
    conversations: Conversations, tokenizer: Tokenizer, sequence_len: int, all_tokens: bool, start: ChatPosition
) -> Iterator[Block[ChatPosition]]:
    """Blocks of conversations: rows (R, 2, T + 1), ids and targets."""
    after = start
    for number in range(start.conversation, len(conversations), CHAT_BLOCK):
        first = replace(after, rows_used=0, conversation=number)
        numbers = range(number, min(number + CHAT_BLOCK, len(conversations)))
        messages = [conversations[number]["messages"] for number in numbers]
        rendered = render_conversations(messages, tokenizer, sequence_len + 1)
        kept = [item for item in rendered if all_tokens or item.has_target]
        rows = pack_chats(kept, sequence_len, tokenizer.get_bos_token_id(), all_tokens)
        after = replace(
            first,
            conversations=first.conversations + len(rendered),
            conversations_cut=first.conversations_cut + sum(item.tokens_cut > 0 for item in rendered),
            tokens_cut=first.tokens_cut + sum(item.tokens_cut for item in rendered),
            left_out=first.left_out + len(rendered) - len(kept),
            tokens_padded=first.tokens_padded + rows[:, 0].size - sum(len(item.ids) for item in kept),
        )
        yield Block(rows, first, after)


def chat_stream(
    conversations: Conversations,
    tokenizer: Tokenizer,
    batch: BatchPlan,
    compute: Compute,
    all_tokens: bool,
    seed: int = 42,
    start: ChatPosition | None = None,
) -> Iterator[tuple[Tensor, Tensor, ChatPosition]]:
    """Yield (inputs (B, T), targets (B, T), position after them) forever, like training_stream, from conversations:
    anything with len() and [i] that gives {"messages": [...]}. Targets are -1 where nothing is learned: everywhere but
    in what the assistant says, or with all_tokens only in the padding.
    """
    blocks = partial(chat_blocks, conversations, tokenizer, batch.sequence_len, all_tokens)
    too_little = nothing_supervised(conversations, batch.sequence_len)
    batches = stream(blocks, start or ChatPosition(), batch, compute.rank, seed, too_little)
    for rows, position in prefetch(batches, depth=4):
        tokens = to_device(rows, compute)
        yield tokens[:, 0, :-1], tokens[:, 1, 1:], position


def nothing_supervised(conversations: Conversations, sequence_len: int) -> str:
    found = f"no conversation of {len(conversations)} has a supervised token within {sequence_len} tokens"
    return f"{found}; raise --max-seq-len or choose another mixture"


def rows_in_epoch(conversations: Conversations, tokenizer: Tokenizer, sequence_len: int, all_tokens: bool) -> int:
    """How many rows one epoch has: counted where it is a single block, else estimated from the first one. Raises
    UserError where that has none.
    """
    block = next(chat_blocks(conversations, tokenizer, sequence_len, all_tokens, ChatPosition()), None)
    if not block or not len(block.rows):
        raise UserError(nothing_supervised(conversations, sequence_len), everywhere=True)
    return max(1, round(len(block.rows) * max(1.0, len(conversations) / CHAT_BLOCK)))


# -----------------------------------------------------------------------------
# For how long, and how well


def find_start(
    stage: str, source: str, source_tag: str | None, model_tag: str | None, step: int | None
) -> tuple[Checkpoint, str]:
    """The checkpoint that a stage starts from, and the tag of what it makes. Raises UserError where these would be
    steps of one directory: there --fresh would move the start aside, and --resume continue it.
    """
    try:
        start = find_checkpoint(source, source_tag or model_tag, step)
    except UserError as error:
        hint = "; --source-tag names the start" if model_tag and not source_tag else ""
        raise UserError(f"{error}{hint}", error.everywhere) from None
    tag = model_tag or start.tag
    if (source, start.tag) == (stage, tag):
        ways = f"name both: --source-tag={tag} --model-tag=NEW"
        raise UserError(f"--source={source} --model-tag={tag}: this stage would write over its own start; {ways}")
    return start, tag


def plan_chats(
    num_iterations: int | None,
    minutes: float | None,
    rows_in_epoch: int,
    model: LanguageModel,
    stream: Stream,
    batch: BatchPlan,
    compute: Compute,
) -> tuple[int, str]:
    """Steps of a stage that trains on conversations, and where the number comes from: as given, or as many as fit into
    `minutes`, or one epoch.
    """
    if minutes is not None:
        gradients = partial(accumulate, model, stream, batch.grad_accum_steps, compute)
        return steps_for_minutes(minutes, model.setup_optimizers(dtype=compute.dtype), gradients, compute)
    if num_iterations is not None:
        return num_iterations, "as given"
    steps = max(1, round(rows_in_epoch / batch.rows))
    return steps, f"one epoch of about {rows_in_epoch:,} rows / {batch.rows} rows per step"


def row_length(model: LanguageModel, max_seq_len: int | None) -> int:
    """Tokens per row of a chat stage: as asked, at most the model's context. Raises UserError for more."""
    context = model.config.sequence_len
    if max_seq_len is not None and not 2 <= max_seq_len <= context:
        allowed = f"expected 2 to {context}, the context this model was trained with"
        raise UserError(f"--max-seq-len={max_seq_len}: {allowed}")
    return max_seq_len or context


@torch.no_grad()
def evaluate_chats(
    model: LanguageModel,
    conversations: Conversations,
    tokenizer: Tokenizer,
    batch: BatchPlan,
    compute: Compute,
    all_tokens: bool,
    poll: Callable[[], None] | None = None,
) -> float:
    """Nats per supervised token over all conversations, packed as in training, each once; otherwise like evaluate_bpb.
    Batches are padded, so that a compiled model sees one shape. Raises UserError where no token is supervised.
    """
    totals, B = torch.zeros(2, dtype=torch.float64), batch.device_batch_size
    for block in chat_blocks(conversations, tokenizer, batch.sequence_len, all_tokens, ChatPosition()):
        for start in range(0, len(block.rows), B * compute.world_size):
            if poll:
                poll()
            mine = block.rows[start + compute.rank * B :][:B]
            padded = np.full((B, *mine.shape[1:]), [[0], [-1]])
            padded[: len(mine)] = mine
            rows = to_device(padded, compute)
            targets = rows[:, 1, 1:]
            with collective():
                loss = model(rows[:, 0, :-1], targets, loss_reduction="sum", dtype=compute.dtype)
            totals += torch.stack([loss, (targets >= 0).sum()]).double().cpu()
    loss_sum, count = compute.sum(totals).tolist()
    if not count:
        raise UserError(nothing_supervised(conversations, batch.sequence_len), everywhere=True)
    return float(loss_sum / count)


def show_chats(
    questions: Sequence[str], model: LanguageModel, tokenizer: Tokenizer, compute: Compute, run: Run
) -> None:
    """What the model answers to a few questions, the likeliest token each time; from rank 0, called by all."""
    engine = Engine(model, tokenizer, compute.dtype) if compute.is_master or is_sharded(model) else None
    if not engine or not compute.is_master:
        return
    prompts = {q: render_for_completion([{"role": "user", "content": q}], tokenizer) for q in questions}
    prompts = {question: prompt for question, prompt in prompts.items() if fits(prompt, model, question)}
    answers, _ = engine.generate_batch(list(prompts.values()), Sampling(max_tokens=96, temperature=0))
    for question, answer in zip(prompts, answers, strict=True):
        text = parts_text(decode_parts(answer, tokenizer))
        run.record.write("sample", step=run.done, prompt=question, text=text)
        print0(f"  {question!r} -> {text!r}")
