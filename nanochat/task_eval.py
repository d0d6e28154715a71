"""
Accuracy of a model on a task, many problems at a time.

Generative tasks: the engine answers a batch of prompts, tools included, and the task judges the text. Categorical
tasks: the letter with the highest logit among the problem's own letters, in one forward pass. Problems are dealt to
ranks, and every rank gets the result of all. A prompt that does not fit into the model's context counts as wrong and is
counted.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from nanochat.compute import Compute
from nanochat.conversation import Conversations, decode_parts, parts_text, render_for_completion
from nanochat.engine import Engine
from nanochat.tokenizer import Tokenizer

Conversation = dict[str, Any]


class Judge(Conversations, Protocol):
    """What is needed of a task: see tasks.common.Task."""

    name: str
    eval_type: Any  # "generative" or "categorical"
    baseline: float

    def evaluate(self, conversation: Conversation, answer: str) -> bool: ...


@dataclass
class Answered:
    """A problem, what the model answered, and whether that is right."""

    prompt: str
    answer: str
    correct: bool


@dataclass
class TaskResult:
    """The outcome over all ranks; `answers` are some of this rank's."""

    n: int
    right: int
    too_long: int  # prompts that did not fit, counted as wrong
    seconds: float
    answers: list[Answered] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        return self.right / max(1, self.n)

    @property
    def stderr(self) -> float:
        """Standard error of the accuracy as a binomial share."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / max(1, self.n))


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
    """
    The task's first max_problems, batch_size of them at a time on each rank. With num_samples > 1 a generative problem
    is right when any of its answers is (pass@num_samples).
    """
    began = time.perf_counter()
    n = len(task) if max_problems is None else min(max_problems, len(task))
    limit = engine.model.config.sequence_len
    answers: list[Answered] = []
    right = too_long = 0
    for start in range(0, n, batch_size * compute.world_size):
        first = start + compute.rank * batch_size
        conversations = [task[i] for i in range(first, min(first + batch_size, n))]
        prompts = [render_for_completion(conversation["messages"], tokenizer) for conversation in conversations]
        fits = [i for i, prompt in enumerate(prompts) if len(prompt) < limit]
        too_long += len(prompts) - len(fits)
        if not fits:
            continue
        asked, chosen = [prompts[i] for i in fits], [conversations[i] for i in fits]
        if task.eval_type == "categorical":
            texts = [[letter] for letter in choose_letters(engine, tokenizer, asked, chosen)]
        else:
            texts = write_answers(
                engine, tokenizer, asked, num_samples, max_new_tokens, temperature, top_k, seed, first * num_samples
            )
        for conversation, candidates in zip(chosen, texts, strict=True):
            correct = any(task.evaluate(conversation, text) for text in candidates)
            right += correct
            answers.append(Answered(last_question(conversation), candidates[0], correct))
    counts = torch.tensor([right, too_long], dtype=torch.float64)
    right, too_long = map(int, compute.sum(counts).tolist())
    return TaskResult(n, right, too_long, time.perf_counter() - began, answers)


def write_answers(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    num_samples: int,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    first: int,
) -> list[list[str]]:
    """num_samples texts for each prompt, without tool calls and their output."""
    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "seed": seed}
    sequences, _ = engine.generate_batch(prompts, num_samples, first=first, **options)
    texts = [parts_text(decode_parts(tokens, tokenizer)) for tokens in sequences]
    return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]


@torch.inference_mode()
def choose_letters(
    engine: Engine, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], conversations: Sequence[Conversation]
) -> list[str]:
    """The letter that each model would rather begin its answer with than any other letter of the problem."""
    logits, _ = engine.prefill(prompts, 1, max(map(len, prompts)) + 1)  # (B, V)
    chosen = []
    for row, conversation in zip(logits, conversations, strict=True):
        letters = conversation["letters"]
        ids = [tokenizer.encode(letter)[0] for letter in letters]
        chosen.append(letters[int(row[ids].argmax())])
    return chosen


def last_question(conversation: Conversation) -> str:
    return str(next(m["content"] for m in reversed(conversation["messages"]) if m["role"] == "user"))
