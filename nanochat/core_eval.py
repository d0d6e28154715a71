"""The CORE metric of DCLM (arXiv 2406.11794): 22 tasks that a base model answers without being asked to chat.

A task's items are shuffled, once and for all, and each is put to the model behind `num_fewshot` solved examples.
multiple_choice: the continuation with the lowest mean loss per token; schema: the context after which the same
continuation has the lowest; language_modeling: every token of the continuation must be the likeliest. An accuracy is
centred, so that guessing is 0 and perfection 1, and CORE is the mean over the tasks. Prompts, seeds and rules are those
of Andrej Karpathy's nanochat, so the numbers can be compared with its and with GPT-2's published ones.

The common beginning of an item's choices, their stem, is computed once: the choices hang on it as branches of one
sequence. Stems take the kernel of causal attention; only the branches' tails have a mask.

Promises: the same answers as tests/reference/core.py, which takes one item at a time; the same on any number of ranks.
A prompt longer than the context loses its beginning, as nanochat cuts it for models with a limit, and is counted.
Differs from nanochat: examples are drawn from all items also when only some are scored, so an item's prompt does not
depend on how many; choices nearer than TIE count as equal, and the first of them wins; a choice that is the beginning
of another has no tokens of its own and never wins (a few of piqa's 1,838 items).
"""

import csv
import json
import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
import yaml  # type: ignore[import-untyped]
from torch import Tensor

from nanochat.attention import Context, LayerCache, causal_attention
from nanochat.common import UserError, get_base_dir
from nanochat.compute import Compute
from nanochat.files import one_line, read_sealed, sha256_file
from nanochat.model import LanguageModel, slice_rows
from nanochat.tokenizer import Tokenizer

PREFETCH = "python -m nanochat.dataset --prefetch=eval"
KINDS = ("multiple_choice", "schema", "language_modeling")
SHUFFLE_SEED = 1337  # the order of a task's items
FEWSHOT_SEED = 1234  # plus an item's place in that order: the seed of its examples
TIE = 1e-5  # nats per token; fp32 rounding is a tenth of it, and bf16 is far coarser


# -----------------------------------------------------------------------------
# Tasks and their items


@dataclass(frozen=True)
class CoreTask:
    """A task of core.yaml. `baseline` is the accuracy of guessing, from eval_meta_data.csv, as a fraction."""

    label: str
    kind: str
    path: Path
    num_fewshot: int
    delimiter: str  # between a context and its continuation
    baseline: float


@dataclass(frozen=True)
class Item:
    """Contexts and continuations, pair by pair, the number of the right pair, and the line of the file."""

    contexts: list[str]
    continuations: list[str]
    gold: int
    line: int


def find_bundle() -> Path:
    """The folder of the CORE tasks, after every file was compared with its manifest; UserError where that fails."""
    folder = get_base_dir() / "eval_bundle"
    manifest = folder / "manifest.json"
    again = f"get it again: rm -r {folder}; {PREFETCH}"
    try:
        files = read_sealed(manifest)["files"]
    except FileNotFoundError:
        raise UserError(f"no {manifest}; get the evaluation tasks with: {PREFETCH}") from None
    except ValueError:
        raise UserError(f"{manifest}: damaged; {again}") from None
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or sha256_file(path) != entry["sha256"]:
            raise UserError(f"{path}: {'not as it was' if path.is_file() else 'missing'}; {again}")
    return folder


def load_tasks(bundle: Path) -> list[CoreTask]:
    """The tasks that core.yaml names, in its order; their files may be missing. UserError for a damaged bundle."""
    tasks = []
    try:
        with open(bundle / "eval_meta_data.csv", encoding="utf-8-sig", newline="") as file:
            percent = {row["Eval Task"]: float(row["Random baseline"]) for row in csv.DictReader(file)}
        for entry in yaml.safe_load((bundle / "core.yaml").read_text(encoding="utf-8-sig"))["icl_tasks"]:
            label, kind = entry["label"], entry["icl_task_type"]
            if kind not in KINDS:
                raise ValueError(f"{label}: icl_task_type {kind}, expected {', '.join(KINDS)}")
            path = bundle / "eval_data" / entry["dataset_uri"]
            num_fewshot, delimiter = int(entry["num_fewshot"][0]), entry.get("continuation_delimiter", " ")
            tasks.append(CoreTask(label, kind, path, num_fewshot, delimiter, percent[label] / 100))
    except FileNotFoundError as error:
        raise UserError(f"no {error.filename}; get the evaluation tasks with: {PREFETCH}") from None
    except (ValueError, TypeError, KeyError, IndexError, yaml.YAMLError) as error:
        raise UserError(f"{bundle}: core.yaml or eval_meta_data.csv is not as published ({one_line(error)})") from None
    return tasks


def read_items(task: CoreTask) -> list[Item]:
    """All items of a task, shuffled. Raises UserError with the line that is none."""
    items = []
    with open(task.path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            try:
                items += [] if line.isspace() else [parse_item(task.kind, json.loads(line), number)]
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise UserError(f"{task.path}:{number}: no item of a {task.kind} task ({error!r})") from None
    if len(items) <= task.num_fewshot:
        raise UserError(f"{task.path}: {len(items)} items; {task.num_fewshot} examples and an item to score are needed")
    random.Random(SHUFFLE_SEED).shuffle(items)
    return items


def parse_item(kind: str, row: dict[str, Any], line: int) -> Item:
    if kind == "language_modeling":  # the published contexts end in stray spaces
        return Item([row["context"].strip()], ["" + row["continuation"]], 0, line)
    if kind == "schema":
        contexts = ["" + context for context in row["context_options"]]
        continuations = ["" + row["continuation"]] * len(contexts)
    else:
        continuations = ["" + choice for choice in row["choices"]]
        contexts = ["" + row["query"]] * len(continuations)
    if type(row["gold"]) is not int or not 0 <= row["gold"] < len(contexts):
        raise ValueError(f"gold {row['gold']!r} of {len(contexts)} choices")
    return Item(contexts, continuations, row["gold"], line)


def draw_examples(index: int, n: int, k: int) -> list[int]:
    """The k of n items that are shown, solved, before item `index`, which is never among them."""
    others = random.Random(FEWSHOT_SEED + index).sample(range(n - 1), k)
    return [other + (other >= index) for other in others]


def render_prompts(task: CoreTask, items: Sequence[Item], index: int) -> list[str]:
    """The texts of one item, one for each choice; for language_modeling that without its continuation, and without the
    spaces before it, which belong to the continuation's first token, and that with it.
    """
    item = items[index]
    examples = [items[i] for i in draw_examples(index, len(items), task.num_fewshot)]
    solved = [e.contexts[e.gold] + task.delimiter + e.continuations[e.gold] + "\n\n" for e in examples]
    beginnings = ["".join(solved) + context + task.delimiter for context in item.contexts]
    prompts = [beginning + text for beginning, text in zip(beginnings, item.continuations, strict=True)]
    return [beginnings[0].strip(), *prompts] if task.kind == "language_modeling" else prompts


# -----------------------------------------------------------------------------
# Tokens: what is computed, and what is asked of it


class Row(NamedTuple):
    """One choice of an item: its tokens, of which those from `start` on are scored."""

    item: int
    choice: int
    tokens: np.ndarray
    start: int


class Unit(NamedTuple):
    """Rows of one item that are computed together: the `stem` tokens that all begin with once, then the rest of each,
    its branch. The last token of a row is never fed.
    """

    rows: list[Row]
    stem: int

    @property
    def tail(self) -> int:
        """Tokens of all branches."""
        return sum(len(row.tokens) - 1 - self.stem for row in self.rows)


class Batch(NamedTuple):
    """Units as a model is fed them, one to a line of T places: stems, padded to the longest, then branches."""

    fed: Tensor  # (4, B, T): tokens, those before them, positions in their own row, branches (0 = stem; -1 = padding)
    stem: int  # places for the stems
    asked: Tensor  # (5, N): from this line and place to predict this target, for this item and choice


def shared_prefix(rows: Sequence[np.ndarray]) -> int:
    """How many tokens all rows begin with."""
    length = min(map(len, rows))
    differs = np.any([row[:length] != rows[0][:length] for row in rows], axis=0)
    return int(differs.argmax()) if differs.any() else length


def scored_rows(kind: str, item: int, encoded: Sequence[np.ndarray]) -> list[Row]:
    """The choices of an item and where their scored tokens begin. What is scored is told from the tokens, not the text:
    all after the common prefix, or the common suffix. A choice may have none; it then never wins.
    """
    shared = shared_prefix([tokens[::-1] for tokens in encoded] if kind == "schema" else encoded)
    choices = encoded[1:] if kind == "language_modeling" else encoded  # the first is the context alone
    return [
        Row(item, i, tokens, len(tokens) - shared if kind == "schema" else shared) for i, tokens in enumerate(choices)
    ]


def make_units(rows: Sequence[Row], context: int, branches: bool) -> list[Unit]:
    """The units of an item's rows, without those of which nothing is asked. Rows longer than `context` lose their
    beginning, and share a unit with those that lost equally much; without `branches` only with those that are fed the
    same tokens, which are all but the last of a row.
    """
    groups: dict[int | bytes, list[Row]] = {}
    for row in rows:
        if row.start < len(row.tokens):
            crop = max(0, len(row.tokens) - context)
            tokens, start = row.tokens[crop:], max(1, row.start - crop)
            groups.setdefault(crop if branches else tokens[:-1].tobytes(), []).append(
                row._replace(tokens=tokens, start=start)
            )
    return [Unit(group, shared_prefix([row.tokens[:-1] for row in group])) for group in groups.values()]


def batch_units(units: Iterable[Unit], max_tokens: int) -> Iterator[Batch]:
    """Batches of at most max_tokens with their padding (one unit may have more). Longest first, so that too large a
    batch shows at once; units with branches apart from those without, which need no mask.
    """
    batch: list[Unit] = []
    stem = tail = 0
    for unit in sorted(units, key=lambda unit: (not unit.tail, -unit.stem - unit.tail)):
        stem, tail = max(stem, unit.stem), max(tail, unit.tail)
        if batch and ((len(batch) + 1) * (stem + tail) > max_tokens or bool(unit.tail) != bool(batch[0].tail)):
            yield lay_out(batch)
            batch, stem, tail = [], unit.stem, unit.tail
        batch.append(unit)
    if batch:
        yield lay_out(batch)


def lay_out(units: Sequence[Unit]) -> Batch:
    """Stems and branches get at least 2 places each, if there are any: torch.compile makes a graph of its own for 1."""
    stem, tail = max(2, *(unit.stem for unit in units)), max(unit.tail for unit in units)
    fed = np.full((4, len(units), stem + (max(2, tail) if tail else 0)), [[[0]], [[0]], [[0]], [[-1]]])
    asked = []
    for line, unit in enumerate(units):
        end = stem  # of the branches so far
        for branch, (item, choice, tokens, start) in enumerate(unit.rows, 1):
            position = np.arange(len(tokens) - 1)
            is_stem = position < unit.stem
            place = np.where(is_stem, position, position - unit.stem + end)
            before = tokens[np.maximum(position - 1, 0)]
            fed[:, line, place] = tokens[:-1], before, position, np.where(is_stem, 0, branch)
            asked.append(np.stack(np.broadcast_arrays(line, place[start - 1 :], tokens[start:], item, choice)))
            end += len(tokens) - 1 - unit.stem
    return Batch(torch.from_numpy(fed), stem, torch.from_numpy(np.concatenate(asked, axis=1)))


# -----------------------------------------------------------------------------
# Models


class Scorer(Protocol):
    """What is needed of a model: GPTScorer, or hf_model.HFScorer."""

    context: int  # tokens that it takes at most
    branches: bool  # whether predict() takes units with tails
    batch_tokens: int  # of one batch, padding included
    bos: int

    def encode(self, text: list[str], prepend: int, /) -> list[list[int]]: ...

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of everything asked, in order: the loss in nats, and whether the target is the likeliest token; (N,) each."""


@dataclass(frozen=True)
class Branches:
    """In place of a layer's cache: nothing is remembered, only who looks at whom is said, by a mask for the last n of
    the T tokens. Those before them are stems, which are causal and need none.
    """

    window: int
    mask: Tensor  # (B, 1, n, T): 0, or -inf where a token must not look
    before: Tensor  # (B, T): the place of the token before, or -1

    def attend(self, q: Tensor, k: Tensor, v: Tensor, late: Tensor | None = None) -> Tensor:
        start = q.size(2) - self.mask.size(2)
        if late is not None:
            places = self.before[:, None, :, None].expand_as(k)
            k = torch.where(late, k.gather(2, places.clamp(min=0)) * (places >= 0), k)
        stems = causal_attention(q[:, :, :start], k[:, :, :start], v[:, :, :start], self.window)
        gqa = q.size(1) != k.size(1)
        branches = F.scaled_dot_product_attention(q[:, :, start:], k, v, attn_mask=self.mask, enable_gqa=gqa)
        return torch.cat([stems, branches], dim=2)


class GPTScorer:
    """A frozen copy of a GPT in compute.dtype; later changes of the model are not seen. Compiled, it takes 10 to 20 s
    to begin with, and then 0.6 of the time (d4 on one core, bf16, context 1,024: 5.4 times as fast as one item at a
    time, eager 3.3).
    """

    branches = True

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        compute: Compute,
        batch_tokens: int | None = None,
        compile: bool = False,
    ):
        self.model, self.compiled = model.inference_copy(compute.dtype), compile
        for block in self.model.blocks if compile else ():
            block.compile(dynamic=True)
        self.device, self.dtype, self.context = compute.device, compute.dtype, model.config.sequence_len
        self.batch_tokens = batch_tokens or default_batch_tokens(compute.device)
        self.bos, self.encode = tokenizer.get_bos_token_id(), tokenizer.encode

    @torch.inference_mode()
    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        fed, (lines, places, targets, *_) = batch.fed.to(self.device), batch.asked.to(self.device)
        if self.compiled and fed.size(1) == 1:  # one line is a case of its own for torch.compile: spare it a graph
            fed = fed.expand(-1, 2, -1)
        tokens, previous, positions, branches = fed
        caches = self.caches(positions, branches, batch.stem)
        states = self.model.hidden(tokens, self.dtype, Context(positions, previous, caches))[lines, places]
        losses, hits = [], []
        for part in slice_rows(len(targets), self.model.config.vocab_size, self.device):
            logits = self.model.logits(states[part])
            losses.append(F.cross_entropy(logits, targets[part], reduction="none"))
            hits.append(logits.argmax(dim=-1) == targets[part])
        return torch.cat(losses).cpu(), torch.cat(hits).cpu()

    def caches(self, positions: Tensor, branches: Tensor, stem: int) -> Sequence[LayerCache | None]:
        """What each layer looks at: a branch at itself and the stem, as far back as the window goes. Padding is a
        branch of its own. The masks have the model's dtype, or attention would make such copies in every layer.
        """
        if stem == positions.size(1):  # no branches
            return [None] * len(self.model.blocks)
        ahead = positions[:, stem:, None] - positions[:, None, :]
        seen = (ahead >= 0) & ((branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, stem:, None]))
        same, place = branches[:, 1:] == branches[:, :-1], torch.arange(positions.size(1) - 1, device=self.device)
        before = F.pad(torch.where(same, place, positions[:, 1:] - 1), (1, 0), value=-1)
        windows = self.model.config.windows()
        masks = {w: torch.where(seen & (ahead < w), 0.0, -torch.inf).to(self.dtype)[:, None] for w in set(windows)}
        return [Branches(window, masks[window], before) for window in windows]


def default_batch_tokens(device: torch.device) -> int:
    """Tokens per batch: on CPU what stays in the cache; elsewhere what a d20 computes in 5 GB."""
    return 4096 if device.type == "cpu" else 32768


# -----------------------------------------------------------------------------
# Scoring a task


@dataclass(frozen=True)
class Answer:
    """The answer to one item. For language_modeling there is no prediction and no gold."""

    index: int  # in the shuffled order
    line: int  # in the file
    right: bool
    prediction: int | None  # -1 where no choice has a finite loss
    gold: int | None
    losses: list[float | None]  # each choice's mean, in nats per token (None: not finite)
    cut: bool


@dataclass(frozen=True)
class TaskScore:
    """The outcome of a task over all ranks."""

    task: str
    n: int
    right: int
    cut: int  # items with a prompt longer than the context
    baseline: float
    seconds: float
    answers: list[Answer]

    @property
    def accuracy(self) -> float:
        return self.right / self.n

    @property
    def stderr(self) -> float:
        """Standard error of the accuracy as a binomial share."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.n)

    @property
    def centered(self) -> float:
        return mean_centred([(self.accuracy, self.stderr, self.baseline)])[0]


def mean_centred(results: Iterable[tuple[float, float, float]]) -> tuple[float, float]:
    """The mean over tasks of (accuracy - baseline) / (1 - baseline), and its standard error, from (accuracy, its
    standard error, baseline) of each: 0 is guessing, 1 is everything right.
    """
    pairs = [((value - baseline) / (1 - baseline), error / (1 - baseline)) for value, error, baseline in results]
    values, errors = zip(*pairs, strict=True)
    return sum(values) / len(values), math.hypot(*errors) / len(values)


def score_task(
    task: CoreTask, scorer: Scorer, compute: Compute, max_items: int | None = None, items: Sequence[Item] | None = None
) -> TaskScore:
    """Score the first max_items (None or -1: all) of a task's shuffled `items` (None: read them). Collective: items are
    dealt to the ranks, and every rank gets the answers to all.
    """
    began = time.perf_counter()
    items = read_items(task) if items is None else items
    n = len(items) if max_items in (None, -1) else min(max_items, len(items))
    mine = range(compute.rank, n, compute.world_size)
    units, cut = [], np.zeros(n, dtype=bool)
    for i in mine:
        encoded = scorer.encode(render_prompts(task, items, i), scorer.bos)
        rows = scored_rows(task.kind, i, [np.array(ids) for ids in encoded])
        units += make_units(rows, scorer.context, scorer.branches)
        cut[i] = any(len(row.tokens) > scorer.context for row in rows)
    sums = torch.zeros(n, max(len(item.contexts) for item in items), 3, dtype=torch.float64)  # loss, tokens, hits
    for batch in batch_units(units, scorer.batch_tokens):
        losses, hits = scorer.predict(batch)
        each = torch.stack([losses, torch.ones_like(losses), hits], dim=-1).double()
        sums.index_put_(tuple(batch.asked[3:]), each, accumulate=True)
    answers = [judge(task.kind, i, items[i], sums[i].numpy(), bool(cut[i])) for i in mine]
    answers = sorted(chain(*compute.gather(answers)), key=lambda answer: answer.index)
    right, was_cut = sum(answer.right for answer in answers), sum(answer.cut for answer in answers)
    return TaskScore(task.label, n, right, was_cut, task.baseline, time.perf_counter() - began, answers)


def judge(kind: str, index: int, item: Item, sums: np.ndarray, cut: bool) -> Answer:
    """The answer to an item, from the sums (choices, 3) of loss, tokens and tokens that were the likeliest."""
    loss, tokens, hits = sums[: len(item.contexts)].T
    means = np.where((tokens > 0) & np.isfinite(loss), loss / np.maximum(tokens, 1), np.inf)
    logged = [float(mean) if mean < np.inf else None for mean in means]
    if kind == "language_modeling":
        return Answer(index, item.line, bool(hits[0] == tokens[0] > 0), None, None, logged, cut)
    prediction = int((means <= means.min() + TIE).argmax()) if means.min() < np.inf else -1
    return Answer(index, item.line, prediction == item.gold, prediction, item.gold, logged, cut)
