"""Accuracy of a model on a task, many problems at a time.

Generative tasks: the engine answers, tools included, and the task judges the text. Categorical tasks: the letter with
the highest logit among the problem's own letters, in one forward pass of problems of about the same length. Problems
are dealt to ranks, and every rank gets all answers. A prompt that does not fit into the model's context counts as wrong
and is counted.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol

import torch

from nanochat.common import UserError
from nanochat.compute import Compute
from nanochat.conversation import Conversations, decode_parts, parts_text, render_for_completion
from nanochat.engine import Engine, Sampling

Conversation = dict[str, Any]


class Judge(Conversations, Protocol):
    """What is needed of a task: see tasks.common.Task."""

    eval_type: Any  # "generative" or "categorical"

    def evaluate(self, conversation: Conversation, answer: str) -> bool: ...

    def flexible(self, conversation: Conversation, answer: str, right: bool) -> bool: ...


@dataclass
class Answered:
    """A problem, what the model answered, and which answers are right."""

    index: int  # in the task
    prompt: str  # the last question
    answers: list[str]  # none where the prompt did not fit
    right: list[bool]
    flexible: list[bool]  # by a rule of the task that forgives more, if it has one


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
        """Problems whose prompts did not fit."""
        return sum(not problem.answers for problem in self.problems)

    @property
    def accuracy(self) -> float:
        """The share of right answers, which is pass@1."""
        return sum(self.right) / (self.n * self.num_samples)

    @property
    def stderr(self) -> float:
        """Standard error of the accuracy over problems; with one answer to each, that of a binomial share."""
        return mean_and_error([right / self.num_samples for right in self.right])[1]

    def among(self, indices: Iterable[int]) -> "TaskResult":
        return replace(self, problems=[self.problems[index] for index in indices])

    def flexible(self) -> "TaskResult":
        return replace(self, problems=[replace(problem, right=problem.flexible) for problem in self.problems])


# -----------------------------------------------------------------------------
# Arithmetic of results


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of independent values and its standard error: their standard deviation / sqrt(n)."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values)) / len(values)


def pass_at_k(right: Sequence[int], n: int) -> dict[int, tuple[float, float]]:
    """{k: (pass@k, its standard error over problems)} for k = 1, 2, 4, ... up to n, where right[i] of the n answers to
    problem i are right. pass@k is the chance that at least one of k answers is right, unbiased: 1 - C(n - c, k) / C(n,
    k) for c right of n (Chen et al. 2021, arXiv:2107.03374, equation 1).
    """
    ks = [2**i for i in range(n.bit_length())]
    return {k: mean_and_error([1 - math.comb(n - c, k) / math.comb(n, k) for c in right]) for k in ks}


# -----------------------------------------------------------------------------
# Asking


def evaluate_task(
    task: Judge,
    engine: Engine,
    compute: Compute,
    sampling: Sampling,
    batch_size: int = 8,
    max_problems: int | None = None,
    num_samples: int = 1,
) -> TaskResult:
    """The task's first max_problems. Each rank works on batch_size at a time: prompts of a categorical task, answers of
    a generative one, which gets num_samples to each problem. What is answered does not depend on ranks and batch_size.
    Raises UserError where there is no problem to answer.
    """
    began = time.perf_counter()
    assert engine.tokenizer, "an engine without a tokenizer knows no chats"
    n = len(task) if max_problems is None else min(max_problems, len(task))
    if n < 1:
        raise UserError(f"nothing to answer: {max_problems} of {len(task)} problems", everywhere=True)
    mine = {i: task[i] for i in range(compute.rank, n, compute.world_size)}
    prompts = {i: render_for_completion(mine[i]["messages"], engine.tokenizer) for i in mine}
    fitting = {i: prompt for i, prompt in prompts.items() if len(prompt) < engine.model.config.sequence_len}
    if task.eval_type == "categorical":
        num_samples = 1
        answers = choose_letters(engine, fitting, {i: mine[i]["letters"] for i in fitting}, batch_size)
    else:
        firsts = [i * num_samples for i in fitting]  # what is drawn depends on the problem, not on the rank
        sequences, _ = engine.generate_batch(list(fitting.values()), sampling, num_samples, batch_size, firsts)
        texts = [parts_text(decode_parts(tokens, engine.tokenizer)) for tokens in sequences]
        answers = {i: texts[place * num_samples :][:num_samples] for place, i in enumerate(fitting)}
    problems = []
    for i, conversation in mine.items():
        question = [message["content"] for message in conversation["messages"] if message["role"] == "user"][-1]
        said = answers.get(i, [])
        right = [bool(task.evaluate(conversation, answer)) for answer in said]
        flexible = [task.flexible(conversation, *judged) for judged in zip(said, right, strict=True)]
        problems.append(Answered(i, question, said, right, flexible))
    everyone = sorted(chain(*compute.gather(problems)), key=lambda problem: problem.index)
    return TaskResult(everyone, num_samples, time.perf_counter() - began)


@torch.inference_mode()
def choose_letters(
    engine: Engine, prompts: Mapping[int, Sequence[int]], letters: Mapping[int, Sequence[str]], batch_size: int
) -> dict[int, list[str]]:
    """The one letter that the model would rather begin each answer with than any other letter of the problem. They are
    compared in fp32: in bf16 two of similar logits are often equal, which the first would win.
    """
    assert engine.tokenizer
    chosen = {}
    head = engine.model.lm_head.weight
    letter_ids = {letter: engine.tokenizer.encode(letter)[0] for letter in set().union(*letters.values())}
    numbers = sorted(prompts, key=lambda number: -len(prompts[number]))  # little padding; the largest batch comes first
    for batch in [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]:
        states = engine.last_states([prompts[number] for number in batch])  # (B, C)
        for number, state in zip(batch, states.float().cpu(), strict=True):
            ids = [letter_ids[letter] for letter in letters[number]]
            chosen[number] = [letters[number][int((head[ids].float().cpu() @ state).argmax())]]
    return chosen
