"""Accuracy of a model on a task, many problems at a time.

Generative tasks: the engine answers, tools included, in one pool in which a new problem takes the place of each answer
that has ended; the task judges the text. Categorical tasks: the letter with the highest logit among the problem's own
letters, in one forward pass of problems of about the same length. Problems are dealt to ranks, and every rank gets all
answers. A prompt that does not fit into the model's context counts as wrong and is counted.
"""

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from nanochat.compute import Compute
from nanochat.conversation import Conversations, decode_parts, parts_text, render_for_completion
from nanochat.engine import Engine
from nanochat.tokenizer import Tokenizer

Conversation = dict[str, Any]


class Judge(Conversations, Protocol):
    """What is needed of a task: see tasks.common.Task."""

    eval_type: Any  # "generative" or "categorical"

    def evaluate(self, conversation: Conversation, answer: str) -> bool: ...


@dataclass
class Answered:
    """A problem by its number in the task, what the model answered, and which answers are right."""

    index: int
    prompt: str  # the last question
    answers: list[str]  # none where the prompt did not fit
    right: list[bool]


@dataclass
class TaskResult:
    """The outcome over all ranks, in the order of the problems."""

    problems: list[Answered]
    num_samples: int  # answers that each problem should have
    seconds: float

    @property
    def n(self) -> int:
        return len(self.problems)

    @property
    def right(self) -> list[int]:
        """How many of each problem's answers are right."""
        return [sum(problem.right) for problem in self.problems]

    @property
    def too_long(self) -> int:
        """Problems whose prompts did not fit: wrong."""
        return sum(not problem.answers for problem in self.problems)

    @property
    def accuracy(self) -> float:
        """The share of right answers, which is pass@1."""
        return sum(self.right) / max(1, self.n * self.num_samples)

    @property
    def stderr(self) -> float:
        """Standard error of the accuracy over problems; with one answer to each, that of a binomial share."""
        return mean_and_error([right / self.num_samples for right in self.right])[1]

    def among(self, indices: Iterable[int]) -> "TaskResult":
        """The outcome on some of the problems."""
        return replace(self, problems=[self.problems[index] for index in indices])


# -----------------------------------------------------------------------------
# Arithmetic of results


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of independent values and its standard error: their standard deviation / sqrt(n). 0, 0 of none."""
    if not values:
        return 0.0, 0.0
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values)) / len(values)


def pass_at_k(right: Sequence[int], n: int) -> dict[int, tuple[float, float]]:
    """{k: (pass@k, its standard error over problems)} for k = 1, 2, 4, ... up to n, where right[i] of the n answers to
    problem i are right. pass@k is the chance that at least one of k answers is right, unbiased: 1 - C(n - c, k) / C(n,
    k) for c right of n (Chen et al. 2021, arXiv:2107.03374, equation 1).
    """
    ks = [2**i for i in range(n.bit_length())]
    return {k: mean_and_error([1 - math.comb(n - c, k) / math.comb(n, k) for c in right]) for k in ks}


def mean_centred(results: Iterable[tuple[float, float, float]]) -> tuple[float, float]:
    """The mean over tasks of (accuracy - baseline) / (1 - baseline), and its standard error, from (accuracy, its
    standard error, baseline) of each: 0 is guessing, 1 is everything right. ChatCORE is this over nanochat's six tasks.
    """
    centred = [((value - base) / (1 - base), error / (1 - base)) for value, error, base in results]
    return sum(value for value, _ in centred) / len(centred), math.hypot(*(error for _, error in centred)) / len(
        centred
    )


# -----------------------------------------------------------------------------
# Asking


def evaluate_task(
    task: Judge,
    engine: Engine,
    tokenizer: Tokenizer,
    compute: Compute,
    batch_size: int = 8,
    max_problems: int | None = None,
    num_samples: int = 1,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 42,
) -> TaskResult:
    """The task's first max_problems. Each rank works on batch_size at a time: prompts of a categorical task, answers of
    a generative one, which gets num_samples to each problem. What is answered does not depend on ranks and batch_size.
    """
    began = time.perf_counter()
    n = len(task) if max_problems is None else min(max_problems, len(task))
    mine = {i: task[i] for i in range(compute.rank, n, compute.world_size)}
    prompts = {i: render_for_completion(mine[i]["messages"], tokenizer) for i in mine}
    fitting = {i: prompt for i, prompt in prompts.items() if len(prompt) < engine.model.config.sequence_len}
    if task.eval_type == "categorical":
        num_samples = 1
        letters = {i: mine[i]["letters"] for i in fitting}
        answers = {i: [letter] for i, letter in choose_letters(engine, tokenizer, fitting, letters, batch_size).items()}
    else:
        options = {"max_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "seed": seed}
        answers = write_answers(engine, tokenizer, fitting, num_samples, slots=batch_size, **options)
    problems = []
    for i, conversation in mine.items():
        right = [bool(task.evaluate(conversation, answer)) for answer in answers.get(i, [])]
        problems.append(Answered(i, last_question(conversation), answers.get(i, []), right))
    return TaskResult(gather(problems, compute), num_samples, time.perf_counter() - began)


def write_answers(
    engine: Engine, tokenizer: Tokenizer, prompts: Mapping[int, Sequence[int]], num_samples: int, **options: Any
) -> dict[int, list[str]]:
    """num_samples texts for each of {number of a problem: prompt}, without tool calls and their output."""
    firsts = [number * num_samples for number in prompts]  # what is drawn depends on the problem, not on the rank
    sequences, _ = engine.generate_batch(list(prompts.values()), num_samples, first=firsts, **options)
    texts = [parts_text(decode_parts(tokens, tokenizer)) for tokens in sequences]
    return {number: texts[i * num_samples :][:num_samples] for i, number in enumerate(prompts)}


@torch.inference_mode()
def choose_letters(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Mapping[int, Sequence[int]],
    letters: Mapping[int, Sequence[str]],
    batch_size: int,
) -> dict[int, str]:
    """The letter that the model would rather begin each answer with than any other letter of the problem."""
    chosen = {}
    letter_ids = {letter: tokenizer.encode(letter)[0] for letter in set().union(*letters.values())}
    numbers = sorted(prompts, key=lambda number: -len(prompts[number]))  # little padding; the largest batch comes first
    for start in range(0, len(numbers), batch_size):
        batch = numbers[start : start + batch_size]
        logits, _ = engine.prefill([prompts[number] for number in batch])  # (B, V)
        for number, row in zip(batch, logits.cpu(), strict=True):
            ids = [letter_ids[letter] for letter in letters[number]]
            chosen[number] = letters[number][int(row[ids].argmax())]
    return chosen


def last_question(conversation: Conversation) -> str:
    return str(next(m["content"] for m in reversed(conversation["messages"]) if m["role"] == "user"))


def gather(problems: Sequence[Answered], compute: Compute) -> list[Answered]:
    """The problems of all ranks on every rank, in the order of their numbers: as JSON, each rank's behind the last."""
    text = json.dumps([asdict(problem) for problem in problems]).encode()
    sizes = torch.zeros(compute.world_size, dtype=torch.int64)
    sizes[compute.rank] = len(text)
    ends = compute.sum(sizes).cumsum(0).tolist()
    everything = torch.zeros(ends[-1], dtype=torch.uint8)
    everything[ends[compute.rank] - len(text) : ends[compute.rank]] = torch.from_numpy(
        np.frombuffer(text, np.uint8).copy()
    )
    joined = compute.sum(everything).numpy().tobytes()
    pieces = [joined[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    found = [Answered(**problem) for piece in pieces for problem in json.loads(piece)]
    return sorted(found, key=lambda problem: problem.index)
