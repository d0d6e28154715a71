"""The evaluation as a whole: who is always right scores 100 %, guessing scores 0, and a part is called a part."""

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat.configurator import parse_args, read_block
from nanochat.conversation import render_for_completion
from nanochat.core_eval import mean_centred
from nanochat.engine import Sampling
from nanochat.gpt import GPTConfig
from nanochat.report import read_record
from nanochat.task_eval import evaluate_task
from scripts import chat_eval
from tasks.arc import ARC
from tasks.arithmetic import Arithmetic
from tasks.common import Task, TaskSequence, message_text, render_choices, user, write_rows
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mixtures import CATEGORICAL, CHATCORE
from tasks.mmlu import GROUPS, MMLU
from tasks.spellingbee import SimpleSpelling, SpellingBee, words_of
from tests.test_conversation import BYTES
from tests.test_gpt import small_model
from tests.test_published_tasks import imported, no_hub, published  # noqa: F401  # fixtures
from tests.test_task_eval import GREEDY, ONE

ROOT = Path(__file__).parent.parent
Prompt = Sequence[int]


class Says:
    """An engine that answers by a rule, whatever the task is."""

    def __init__(self, rule: Callable[[Prompt], str]):
        self.rule = rule
        head = SimpleNamespace(weight=torch.eye(BYTES.get_vocab_size()))
        self.model = SimpleNamespace(config=SimpleNamespace(sequence_len=10**9), lm_head=head)
        self.tokenizer = BYTES

    def generate_batch(
        self, prompts: Sequence[Prompt], sampling: Sampling, num_samples: int, *_: object
    ) -> tuple[list[list[int]], None]:
        return [BYTES.encode(self.rule(prompt)) for prompt in prompts for _ in range(num_samples)], None

    def last_states(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        states = torch.zeros(len(prompts), BYTES.get_vocab_size())
        for row, prompt in zip(states, prompts, strict=True):
            row[BYTES.encode(self.rule(prompt))[0]] = 1
        return states


def accuracy(task: Any, rule: Callable[[Prompt], str]) -> float:
    return evaluate_task(task, Says(rule), ONE, GREEDY, batch_size=64).accuracy


def oracle(task: Task) -> Callable[[Prompt], str]:
    """The rule that knows the reference answer to every prompt of a task."""
    known = {}
    for conversation in task:
        messages = conversation["messages"]
        known[tuple(render_for_completion(messages, BYTES))] = message_text(messages[-1])
    return lambda prompt: known[tuple(prompt)]


TASKS = {
    "ARC-Easy": lambda: ARC("ARC-Easy", "test"),
    "MMLU": lambda: MMLU("test", step=5),
    "GSM8K": lambda: GSM8K("test"),
    "HumanEval": lambda: HumanEval("test", stop=4),
    "SpellingBee": lambda: SpellingBee("test", size=256),
    "SimpleSpelling": lambda: SimpleSpelling("test", size=200),
    "Arithmetic": lambda: Arithmetic("test", size=200),
}


@pytest.mark.parametrize("make", TASKS.values(), ids=TASKS)
def test_the_oracle_is_always_right_and_silence_never(published, make):  # noqa: F811
    words_of.cache_clear()
    task = make()
    assert accuracy(task, oracle(task)) == 1
    if task.eval_type == "generative":
        assert accuracy(task, lambda prompt: "") == 0


@pytest.mark.parametrize("make", [TASKS["ARC-Easy"], TASKS["MMLU"]], ids=["ARC-Easy", "MMLU"])
def test_always_the_same_letter_is_guessing(published, make):  # noqa: F811
    """Within four standard errors of 0 after centring, for every letter."""
    task = make()
    for letter in "ABCD":
        share = accuracy(task, lambda prompt, letter=letter: letter)
        value, error = mean_centred([(share, (share * (1 - share) / len(task)) ** 0.5, task.baseline)])
        assert abs(value) < max(0.05, 4 * error), (letter, value)


class Shuffled(TaskSequence):
    """A task of choices with these in another order."""

    eval_type = "categorical"

    def get_example(self, index: int) -> dict[str, Any]:
        conversation = super().get_example(index)
        question, *lines = conversation["messages"][0]["content"].split("\n- ")
        letters, gold = conversation["letters"], conversation["messages"][1]["content"]
        lines[-1] = lines[-1].split("\n\n")[0]
        choices = [line.rpartition("=")[0] for line in lines]
        right = choices[letters.index(gold)]
        random.Random(index).shuffle(choices)
        answer = {"role": "assistant", "content": letters[choices.index(right)]}
        return {**conversation, "messages": [user(render_choices(question, letters, choices)), answer]}

    def evaluate(self, conversation: dict[str, Any], answer: str) -> bool:
        return answer == conversation["messages"][1]["content"]


def test_the_order_of_the_choices_changes_nothing(published):  # noqa: F811
    """Who takes the longest choice is right as often in any order: the letters that are judged move along."""

    def longest(prompt: Prompt) -> str:
        lines = [line for line in BYTES.decode(prompt).splitlines() if line.startswith("- ") and line[-2:-1] == "="]
        return max(lines, key=lambda line: (len(line), line[:-2]))[-1]

    task = ARC("ARC-Easy", "test")
    shuffled = Shuffled([task])
    assert sum(a != b for a, b in zip(task, shuffled, strict=True)) > 0.9 * len(task)
    assert accuracy(shuffled, oracle(shuffled)) == 1
    assert 0.2 < accuracy(shuffled, longest) == pytest.approx(accuracy(task, longest), abs=1e-3)


# -----------------------------------------------------------------------------
# The script


@pytest.fixture
def few_rows(base_dir: Path) -> None:
    """Every task of ChatCORE with a few rows."""
    choices = {"text": ["p", "q", "r", "s"], "label": ["A", "B", "C", "D"]}
    for subset in ("ARC-Easy", "ARC-Challenge"):
        rows = [{"id": str(i), "question": f"q{i}", "choices": choices, "answerKey": "ABCD"[i % 4]} for i in range(8)]
        write_rows("allenai/ai2_arc", subset, "test", rows, "test")
    subjects = ["astronomy", "astronomy", "virology", "prehistory"]
    rows = [{"question": f"{s}?", "subject": s, "choices": [*"pqrs"], "answer": i} for i, s in enumerate(subjects)]
    write_rows("cais/mmlu", "all", "test", rows, "test")
    write_rows("openai/gsm8k", "main", "test", [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(3)], "test")
    code = {"task_id": "t", "prompt": "def f():\n", "canonical_solution": "    return 1\n", "entry_point": "f"}
    code["test"] = "def check(f):\n    assert f() == 1\n"
    write_rows("openai/openai_humaneval", "openai_humaneval", "test", [code] * 2, "test")
    words = [f"{a}{b}{c}" for a in "bcdfgh" for b in "aeiou" for c in "lmnrst"]
    write_rows("words", "default", "all", [{"word": word} for word in words], "test")
    words_of.cache_clear()


@pytest.fixture
def run(few_rows, base_dir, monkeypatch, capsys):
    """Run main() on a small random model; returns what it printed and the events of its record."""
    config = GPTConfig(sequence_len=256, vocab_size=BYTES.get_vocab_size(), n_layer=1, n_head=1, n_kv_head=1, n_embd=32)
    model = small_model(config)
    monkeypatch.setattr(chat_eval, "find_checkpoint", lambda *_: SimpleNamespace(tag="tiny"))
    monkeypatch.setattr(chat_eval, "open_model", lambda *_: (model, BYTES))

    def evaluate(**changes: object) -> tuple[str, list[dict[str, Any]], Path]:
        values = {"max_new_tokens": 4, "device_type": "cpu", "dtype": "float32", **changes}
        for name, value in values.items():
            monkeypatch.setattr(chat_eval, name, value)
        chat_eval.main()
        path = max((base_dir / "records").glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
        return capsys.readouterr().out, read_record(path), path

    return evaluate


def test_every_short_form_is_known():
    """Half of them once were not: the settings block was read up to its first statement about SHORT."""
    block = read_block(ROOT / "scripts" / "chat_eval.py")
    given = parse_args(block, "-i rl -a GSM8K -g d20 -s 9 -t 1 -m 64 -n 8 -k 0 -b 32 -x 100".split())
    assert {name: value for name, (value, _) in given.items()} == {
        **{"source": "rl", "task_name": "GSM8K", "model_tag": "d20", "step": 9, "temperature": 1.0},
        **{"max_new_tokens": 64, "num_samples": 8, "top_k": 0, "device_batch_size": 32, "max_problems": 100},
    }


def test_a_part_of_the_published_problems_is_called_partial(run):
    printed, events, _ = run(task_name="|".join(CHATCORE))
    tasks = {event["task"]: event for event in events if event["event"] == "task"}
    sizes = {"ARC-Easy": 2376, "ARC-Challenge": 1172, "MMLU": 14042, "GSM8K": 1319, "HumanEval": 164}
    for name, size in sizes.items():
        n = tasks[name]["n"]
        assert (tasks[name]["of"], tasks[name]["partial"], tasks[name]["split"]) == (size, True, "test")
        assert f" of {n:,} of {size:,} (partial)" in printed
    assert not tasks["SpellingBee"]["partial"] and " of 256, " in printed
    for kind, members in (("chatcore", CHATCORE), ("chatcore_cat", CATEGORICAL)):
        (event,) = [event for event in events if event["event"] == kind]
        scores = [(tasks[name]["accuracy"], tasks[name]["stderr"], tasks[name]["baseline"]) for name in members]
        assert (event["value"], event["stderr"]) == pytest.approx(mean_centred(scores))
        assert (event["partial"], event["tasks"]) == (True, list(members))
    assert "\nChatCORE: " in printed and "\nChatCORE-cat: " in printed and printed.count("(partial)\n") == 2


def test_fewer_problems_than_there_are_is_partial_too(run):
    printed, events, _ = run(task_name="Arithmetic", max_problems=5)
    assert " of 5 of 500 (partial), " in printed and events[1]["partial"]


@pytest.mark.parametrize(("answer", "strict", "flexible"), [("It is 1.", "0.0%", "33.3%"), ("#### 1", "33.3%", None)])
def test_gsm8k_is_told_by_both_rules_where_they_differ(run, monkeypatch, answer, strict, flexible):
    monkeypatch.setattr(chat_eval, "Engine", lambda *_: Says(lambda prompt: answer))
    printed, events, _ = run(task_name="GSM8K")
    assert f"GSM8K: {strict} +- " in printed
    if flexible:
        assert f"\n    flexible, by the last number anywhere: {flexible} +- " in printed
        assert events[1]["flexible"]["accuracy"] == pytest.approx(1 / 3)
    else:
        assert "flexible" not in printed and "flexible" not in events[1]


def test_mmlu_is_told_by_group_and_subject(run):
    printed, events, _ = run(task_name="MMLU")
    parts = events[1]["parts"]
    assert {name: part["n"] for name, part in parts.items()} == {
        **{"STEM": 2, "astronomy": 2, "other": 1, "virology": 1, "humanities": 1, "prehistory": 1}
    }
    assert sum(parts[name]["accuracy"] * parts[name]["n"] for name in GROUPS if name in parts) == pytest.approx(
        events[1]["accuracy"] * 4
    )
    groups = [line.strip().split(":")[0] for line in printed.splitlines() if line.startswith("    ")]
    assert groups[:3] == ["STEM", "humanities", "other"]


def test_all_57_subjects_have_a_group():
    assert {name: len(subjects.split()) for name, subjects in GROUPS.items()} == {
        **{"STEM": 19, "humanities": 13, "social sciences": 12, "other": 13}
    }


def test_several_answers_give_pass_at_k_and_a_log_has_them_all(run):
    sampled = {"num_samples": 4, "temperature": 1.0, "log_answers": True, "max_problems": 3}
    printed, events, path = run(task_name="GSM8K|ARC-Easy", **sampled)
    assert "pass@1 " in printed and "pass@4 " in printed and list(events[1]["pass_at"]) == ["1", "2", "4"]
    lines = [json.loads(line) for line in (path.parent / "answers" / path.name).read_text().splitlines()]
    problems = [(name, i) for name in ("GSM8K", "ARC-Easy") for i in range(3)]
    assert [(line["task"], line["index"]) for line in lines] == problems
    assert [len(line["answers"]) for line in lines] == [4, 4, 4, 1, 1, 1] == [len(line["right"]) for line in lines]
    assert [line["prompt"] for line in lines[:3]] == ["0?", "1?", "2?"]


# -----------------------------------------------------------------------------
# Test splits


def test_no_other_script_reads_a_test_split():
    """What is trained on or chosen by is never what is reported."""
    for path in (ROOT / "scripts").glob("*.py"):
        source = path.read_text()
        assert path.stem == "chat_eval" or not ("EVALUATIONS" in source or '"test"' in source), path


def test_mixtures_take_the_split_that_they_are_asked_for():
    """Several tasks have test for a default, so that each must be told."""
    mixtures = (ROOT / "tasks" / "mixtures.py").read_text().partition("class Every")[2]
    tasks = "ARC|Arithmetic|DocsQA|GSM8K|HumanEval|Identity|MMLU|SmolTalk|SimpleSpelling|SpellingBee"
    calls = re.findall(rf"\b(?:{tasks})\(\s*(.*)", mixtures)
    assert len(calls) > 20 and all("split" in arguments for arguments in calls), calls
