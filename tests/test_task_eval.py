"""Accuracy: the oracle is always right, letters are compared by their logits, and any number of ranks agrees."""

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from nanochat import core_eval, task_eval
from nanochat.common import UserError
from nanochat.compute import Compute
from nanochat.conversation import render_conversation
from nanochat.engine import Engine, Sampling
from nanochat.gpt import GPTConfig
from scripts import chat_eval
from tasks.arithmetic import Arithmetic
from tasks.common import Task, TaskMixture, TaskSequence, assistant, message_text, render_choices, split_of, user
from tasks.mixtures import EVALUATIONS, OFFLINE
from tasks.spellingbee import SimpleSpelling, SpellingBee, words_of
from tests.test_conversation import BYTES
from tests.test_gpt import small_model

T = TypeVar("T")
ONE = Compute(torch.device("cpu"), torch.float32, 0, 1)
GREEDY = Sampling(512, temperature=0)


class Letters(Task):
    """Which letter is right depends on the number of the question."""

    name, eval_type, baseline = "Letters", "categorical", 0.25

    def num_examples(self) -> int:
        return 23

    def get_example(self, index: int) -> dict:
        question = render_choices("x" * (index % 9), "ABCD", ["p", "q", "r", "s"])
        return {"messages": [user(question), assistant("ABCD"[index % 4])], "letters": tuple("ABCD")}

    def evaluate(self, conversation: dict, answer: str) -> bool:
        return answer == conversation["messages"][-1]["content"]


@pytest.fixture
def engine() -> Engine:
    config = GPTConfig(sequence_len=128, vocab_size=BYTES.get_vocab_size(), n_layer=2, n_head=2, n_kv_head=2, n_embd=64)
    return Engine(small_model(config), BYTES)


def test_letters_are_chosen_by_their_logits_alone(engine):
    """Against the full forward pass, one problem at a time; the batch holds prompts of different length."""
    result = task_eval.evaluate_task(Letters(), engine, ONE, GREEDY, batch_size=5)
    assert [answered.index for answered in result.problems] == list(range(23))
    for i, answered in enumerate(result.problems):
        rendered = render_conversation(Letters()[i]["messages"], BYTES)
        prompt = rendered.ids[: np.flatnonzero(rendered.mask)[0]].astype(np.int64)
        with torch.no_grad():
            logits = engine.model(torch.from_numpy(prompt)[None])[0, -1]
        assert answered.answers == ["ABCD"[logits[[ord(letter) for letter in "ABCD"]].argmax()]]
        assert answered.right == [answered.answers[0] == "ABCD"[i % 4]]
    assert (result.n, sum(result.right)) == (23, sum(answered.right[0] for answered in result.problems))
    assert result.stderr == pytest.approx((result.accuracy * (1 - result.accuracy) / 23) ** 0.5)


def test_letters_that_tie_in_bfloat16_are_told_apart():
    """Of equal logits the first letter won, whatever the model preferred."""
    head = torch.zeros(256, 2)
    head[ord("A"), 0] = head[ord("B"), 0] = 8
    head[ord("B"), 1] = 1 / 64
    states = torch.ones(1, 2, dtype=torch.bfloat16)
    assert torch.nn.functional.linear(states, head[[ord("A"), ord("B")]].bfloat16()).diff().item() == 0
    model = SimpleNamespace(lm_head=SimpleNamespace(weight=head.bfloat16()))
    engine: Any = SimpleNamespace(model=model, tokenizer=BYTES, last_states=lambda prompts: states)
    assert task_eval.choose_letters(engine, {0: [1]}, {0: "AB"}, 1) == {0: ["B"]}


def on_ranks(count: int, work: Callable[[Compute], T]) -> list[T]:
    """What work(compute) returns on each of so many ranks, which are threads."""
    shared: list[Any] = [None] * count
    meeting = threading.Barrier(count, timeout=60)

    class Rank(Compute):
        def gather(self, value: Any) -> list[Any]:
            shared[self.rank] = value
            meeting.wait()
            values = list(shared)
            meeting.wait()
            return values

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: work(Rank(torch.device("cpu"), torch.float32, rank, count)), range(count)))


@pytest.mark.parametrize("task", [Letters(), Arithmetic("test", size=7)], ids=["categorical", "generative"])
def test_answers_do_not_depend_on_ranks_or_batches(engine, task):
    """Also sampled ones; and every rank has them all, in the order of the problems."""

    def evaluate(compute: Compute, batch_size: int = 3) -> task_eval.TaskResult:
        return task_eval.evaluate_task(task, engine, compute, Sampling(max_tokens=5), batch_size, num_samples=2)

    one = evaluate(ONE).problems
    assert [problem.index for problem in one] == list(range(len(task)))
    for other in [evaluate(ONE, 100), *on_ranks(2, evaluate), *on_ranks(3, evaluate)]:
        assert other.problems == one


def test_pass_at_k_equals_its_definition():
    """The share of all choices of k answers that hold a right one."""
    n = 6
    for c in range(n + 1):
        answers = [i < c for i in range(n)]
        for k, (value, error) in task_eval.pass_at_k([c], n).items():
            choices = list(itertools.combinations(answers, k))
            assert value == pytest.approx(sum(map(any, choices)) / len(choices)) and error == 0
    assert list(task_eval.pass_at_k([1], 6)) == [1, 2, 4] and list(task_eval.pass_at_k([1], 1)) == [1]
    value, error = task_eval.pass_at_k([0, 4, 4, 4], 4)[2]
    assert (value, error) == (0.75, pytest.approx((0.75 * 0.25 / 4) ** 0.5))


def test_chatcore_is_centred_on_guessing():
    value, error = core_eval.mean_centred([(0.25, 0.03, 0.25), (1.0, 0.0, 0.25), (0.5, 0.04, 0.0)])
    assert value == pytest.approx(0.5) and error == pytest.approx(((0.04) ** 2 + 0.04**2) ** 0.5 / 3)


def test_prompts_that_do_not_fit_count_as_wrong_and_are_counted(engine):
    task = TaskSequence([Letters(), Long()])
    task.eval_type, task.evaluate = "categorical", lambda conversation, answer: True
    result = task_eval.evaluate_task(task, engine, ONE, GREEDY, batch_size=4)
    assert (result.n, sum(result.right), result.too_long) == (26, 23, 3)
    assert result.among([0, 25]).accuracy == 0.5


def test_an_accuracy_of_no_problem_is_refused_by_the_library_too(engine):
    """0.0 % of 0: the script refused it, its function divided by zero."""
    with pytest.raises(UserError, match="nothing to answer: 0 of 23"):
        task_eval.evaluate_task(Letters(), engine, ONE, GREEDY, max_problems=0)


class Long(Letters):
    def num_examples(self) -> int:
        return 3

    def get_example(self, index: int) -> dict:
        return {**super().get_example(index), "messages": [user("x" * 500), assistant("A")]}


# -----------------------------------------------------------------------------
# Tasks


def test_a_part_of_a_task_and_its_end():
    """nanochat's tasks give something beyond their end, and a stop beyond it overstates the length."""
    whole = Letters()
    assert len(whole) == 23 and len(Letters(start=3, stop=100, step=4)) == 5
    assert Letters(3, 100, 4)[1] == whole[7]
    with pytest.raises(IndexError):
        whole[23]
    with pytest.raises(UserError, match="start=5 stop=3"):
        Letters(5, 3)


def test_mixtures_hold_everything_once():
    tasks = [Letters(), Letters(stop=2), Letters(stop=2)]
    sequence, mixture = TaskSequence(tasks), TaskMixture(tasks)
    assert [sequence[i] for i in (0, 22, 23, 25)] == [tasks[0][0], tasks[0][22], tasks[1][0], tasks[2][0]]
    assert len(mixture) == 27 and [*mixture] != [*sequence]
    assert sorted(map(str, mixture)) == sorted(map(str, sequence)) and [*mixture] == [*TaskMixture(tasks)]


@pytest.fixture
def words(base_dir):
    from tasks.common import write_rows

    made = sorted({f"{a}{b}{c}{d}" for a in "bcdf" for b in "aeiou" for c in "lmnrst" for d in "aeioy"})
    write_rows("words", "default", "all", [{"word": word} for word in made], "test")
    words_of.cache_clear()
    return made


def test_spelling_splits_share_no_word_and_the_oracle_is_right(words):
    seen: dict[str, set[str]] = {}
    for split in ("train", "dev", "test"):
        task = SimpleSpelling(split, size=1500)
        seen[split] = {conversation["word"] for conversation in task}
        assert seen[split] == {word for word in words if split_of(word) == split}
        assert all(task.evaluate(conversation, message_text(conversation["messages"][-1])) for conversation in task)
        for conversation in task:
            word = conversation["word"]
            assert task.evaluate(conversation, "-".join(word.upper()) + ".")
            assert not task.evaluate(conversation, word), "to repeat a word is not to spell it"
            assert not task.evaluate(conversation, " ".join(word[1:]))
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["dev"] and not seen["dev"] & seen["test"]


def test_the_bee_counts_by_hand_and_with_the_tool(words):
    from nanochat.calculator import use_calculator

    task, present = SpellingBee("test", size=300), 0
    for conversation in task:
        text, call, output, final = conversation["messages"][-1]["content"]
        assert use_calculator(call["text"]) == output["text"] == conversation["answer"]
        by_hand = text["text"].splitlines()[1]
        assert by_hand.split()[-1] == (conversation["answer"] if conversation["answer"] != "0" else "none")
        assert task.evaluate(conversation, message_text(conversation["messages"][-1]))
        assert not task.evaluate(conversation, f"#### {int(conversation['answer']) + 1}")
        present += conversation["answer"] != "0"
    assert present > 260


def test_a_missing_word_list_names_the_command(base_dir):
    words_of.cache_clear()
    with pytest.raises(UserError, match=r"make it with: python -m dev\.gen_words"):
        SimpleSpelling("test")


def test_tasks_are_chosen_by_name(base_dir, monkeypatch, capsys):
    """An unknown name lists them all; nothing is downloaded for that."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read on import, by another test perhaps
    assert chat_eval.chosen_tasks("all") == list(EVALUATIONS) and chat_eval.chosen_tasks("offline") == list(OFFLINE)
    assert chat_eval.chosen_tasks("GSM8K|MMLU|GSM8K") == ["GSM8K", "MMLU"]
    with pytest.raises(UserError, match=r"-a GSM9K: expected all, offline, list, or some of ARC-Easy\|"):
        chat_eval.chosen_tasks("GSM9K")
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(EVALUATIONS)
    assert lines[0].split(maxsplit=1)[1] == "not here  get it with: python -m nanochat.dataset --prefetch=tasks"
    assert lines[-1].split()[1:] == ["500", "generative", "0%", "test"]
