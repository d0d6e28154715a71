"""Published tasks: the reference answers of every item are right, wrong ones are not, and every mistake is one line."""

import json
import re
import textwrap
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dev import import_task_data
from nanochat.calculator import use_calculator
from nanochat.common import UserError
from tasks import common
from tasks.arc import ARC
from tasks.common import Task, load_rows, message_text, write_rows
from tasks.customjson import EXAMPLE, CustomJSON
from tasks.gsm8k import GSM8K, answer_parts, extract_answer
from tasks.humaneval import HumanEval, answer_program, checker_program
from tasks.mixtures import file_mixture
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking a hub that is not there takes half a minute."""

    def download(dataset: str, subset: str, split: str) -> None:
        raise UserError(f"no {dataset} {subset} {split}")

    monkeypatch.setattr(common, "download_rows", download)


@pytest.fixture(scope="module")
def imported(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory filled from the published files."""
    base_dir = tmp_path_factory.mktemp("imported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base_dir))
        patch.setattr(import_task_data, "folder", str(shared_data))
        import_task_data.main()
    return base_dir


@pytest.fixture
def published(imported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(imported))


def oracle(conversation: dict[str, Any]) -> str:
    return message_text(conversation["messages"][-1])


# -----------------------------------------------------------------------------
# The published items


PUBLISHED: dict[str, tuple[Callable[[], Task], int]] = {
    "GSM8K train": (lambda: GSM8K("train"), 6973),
    "GSM8K dev": (lambda: GSM8K("dev"), 500),
    "GSM8K test": (lambda: GSM8K("test"), 1319),
    "MMLU test": (lambda: MMLU("test"), 7658),  # of 14,042: 29 of the 57 subjects
    "ARC-Easy train": (lambda: ARC("ARC-Easy", "train"), 2251),
    "ARC-Easy dev": (lambda: ARC("ARC-Easy", "dev"), 570),
    "ARC-Easy test": (lambda: ARC("ARC-Easy", "test"), 2376),
    "ARC-Challenge train": (lambda: ARC("ARC-Challenge", "train"), 1056),  # of 1,119
}


@pytest.mark.parametrize(("make", "count"), PUBLISHED.values(), ids=PUBLISHED)
def test_reference_answers_are_right_and_others_are_not(published, make, count):
    task = make()
    assert len(task) == count
    for conversation in task:
        right = oracle(conversation)
        assert task.evaluate(conversation, right), conversation
        assert not any(task.evaluate(conversation, wrong) for wrong in ("", right + "1", "#### 31.4159")), conversation
    assert task[0] == make()[0] and task[count - 1] == conversation


def test_humaneval_reference_answers_are_right_and_others_are_not(published):
    """The four items with a helper in the prompt, and the six that stand first."""
    task = HumanEval()
    assert len(task) == 164
    items = [task[i] for i in (0, 1, 2, 3, 4, 5, 10, 32, 38, 50)]
    for item in items:
        assert task.evaluate(item, oracle(item)), item["task_id"]
        assert task.evaluate(item, f"Here it is:\n\n{oracle(item)}\n\nThat is all."), item["task_id"]
        body = oracle(item).removeprefix("```python\n").removeprefix(item["prompt"].strip()).removesuffix("```")
        assert task.evaluate(item, body), f"{item['task_id']}: the rest of the function alone"
    for wrong in ("", "I do not know.", "    return None", f"def {items[0]['entry_point']}(*args):\n    return None"):
        assert not task.evaluate(items[0], wrong)


def test_a_program_that_exits_before_the_tests_is_wrong(published):
    task = HumanEval(stop=1)
    for code in ("import sys\nsys.exit(0)", "import os\nos._exit(0)", "raise SystemExit"):
        assert not task.evaluate(task[0], f"```python\n{code}\n{task[0]['prompt']}    return True\n```")


def test_arc_letters_are_those_of_the_item(published):
    numbers = {0: 0, 3: 0, 4: 0, 5: 0}
    for conversation in ARC("ARC-Easy", "test"):
        question, letters = conversation["messages"][0]["content"], conversation["letters"]
        assert letters == list("ABCDE"[: len(letters)])
        assert all(f"={letter}\n" in question for letter in letters)
        assert oracle(conversation) in letters
        numbers[len(letters)] += 1
    assert numbers == {0: 0, 3: 7, 4: 2365, 5: 4}


def test_mmlu_has_the_published_number_of_questions_per_subject(published):
    subjects = [row["subject"] for row in MMLU("test")]
    assert len(set(subjects)) == 29
    assert (subjects.count("professional_law"), subjects.count("abstract_algebra")) == (1534, 100)


def test_mmlu_says_that_few_shot_rows_are_not_its_dev_split(published):
    with pytest.raises(UserError, match=r"few-shot rows that are here .* are another split"):
        MMLU("dev")


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_every_gsm8k_annotation_is_a_call_that_the_calculator_answers(published, split):
    for conversation, row in zip(GSM8K(split), published_answers(split), strict=True):
        parts = conversation["messages"][-1]["content"]
        assert message_text(conversation["messages"][-1]) == re.sub("<<[^>]*>>", "", row)
        calls = [part["text"] for part in parts if part["type"] == "python"]
        outputs = [part["text"] for part in parts if part["type"] == "python_output"]
        assert len(calls) == row.count("<<")
        assert [use_calculator(call) for call in calls] == outputs


def published_answers(split: str) -> Iterator[str]:
    rows = load_rows("openai/gsm8k", "main", "test" if split == "test" else "train")
    first = len(rows) - 500
    for i in range(*{"train": (first,), "dev": (first, len(rows)), "test": (len(rows),)}[split]):
        yield rows[i]["answer"]


# -----------------------------------------------------------------------------
# GSM8K


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 5.\n#### 72", "72"),
        ("####10", "10"),
        ("#### $1,000.", "1000"),
        ("#### 1,000.00 dollars", "1000"),
        ("#### 10.", "10"),
        ("#### -5", "-5"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### \u22125", "-5"),
        ("#### .5", "0.5"),
        ("#### 1 #### 2", "2"),
        ("#### 50%", "50"),
        ("#### 7\nSo it is 8.", "7"),
        ("#### 5, as said", "5"),
        ("#### 10 dollars", "10"),
        ("####   10  \n ", "10"),
        ("#### 1\n#### $2.50 #### 3,000", "3000"),
        ("#### 1{,}000", "1000"),
        ("#### 1\\,234{,}000.50", "1234000.5"),
        ("#### **72**", "72"),
        ("**#### 72**", "72"),
        ("#### **$-1,072**.", "-1072"),
        ("#### +72", "72"),
        ("#### \u00a372", "72"),
        ("#### \u20ac 72", "72"),
        ("#### \\$72", "72"),
        ("#### `72`", "72"),
        ("#### $\\boxed{72}$", "72"),
        ("#### 72 (12 * 6)", "72"),
        ("#### 72\n3 of them are red", "72"),
    ],
)
def test_the_number_after_the_last_mark_is_the_answer(text, number):
    assert extract_answer(text) == Decimal(number)


NO_NUMBERS = (
    "#### x|#### 3/4|#### 1/2|#### 1e5|#### 1.2.3|#### --5|#### 1 ####|#### 72 1/2|#### 72-73|#### 72 \u2013 73"
)
NO_NUMBERS += (
    "|#### 5*3=15|#### 5 x 3|#### 10:30|#### 3,14|#### 1,0000|#### 1\\,000-2|#### 72\\frac{1}{2}|#### 1 000|#### -+5"
)
NO_NUMBERS += "|#### 72 or 73|#### $72 to $73|#### 1 million|#### 2 Dozen"
NO_NUMBERS += "|#### 1'000|#### 1\u2019000|#### 1_000|#### 0,001|#### 72\u00bd|#### 72\u00b2"


@pytest.mark.parametrize("text", ["", "72", "####", "#### ", *NO_NUMBERS.split("|")])
def test_what_is_no_number_is_no_answer(text):
    assert extract_answer(text) is None


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        ("So it is $1,072.", False, True),
        ("#### 1,072", True, True),
        ("#### 1{,}072", True, True),
        ("#### 1,072 of 5", True, True),
        ("#### 5, not 1072.", False, True),
        ("1072 or 1073", False, False),
        ("#### 1072 or 1073", False, False),  # a choice counted as the first number
        ("#### 1073 or 1072", False, True),
        ("#### none...", False, False),
        ("", False, False),
    ],
)
def test_the_last_number_anywhere_is_the_flexible_answer(base_dir, answer, strict, flexible):
    """lm-eval's flexible-extract; its strict-match asks for the ####."""
    write_rows("openai/gsm8k", "main", "test", [{"question": "q", "answer": "#### 1072"}], "test")
    task = GSM8K("test")
    assert task.evaluate(task[0], answer) == strict and task.flexible(task[0], answer, strict) == flexible


def test_annotations_become_calls_of_the_calculator():
    assert answer_parts("Half is $<<.5*3=1.50>>1.50 < 2.\n#### 1.5") == [
        {"type": "text", "text": "Half is $"},
        {"type": "python", "text": ".5*3"},
        {"type": "python_output", "text": "1.5"},  # not 1.50: what the tool says when the model asks it
        {"type": "text", "text": "1.50 < 2.\n#### 1.5"},
    ]
    assert [part["text"] for part in answer_parts("<<560//10=56>>56")] == ["560/10", "56", "56"]
    assert [part["text"] for part in answer_parts("<<x+1=y>>")] == ["x+1", "y"]
    assert answer_parts("1 << 2 >> 3") == [{"type": "text", "text": "1 << 2 >> 3"}]


def test_gsm8k_dev_is_the_end_of_the_training_rows(base_dir):
    rows = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(510)]
    write_rows("openai/gsm8k", "main", "train", rows, "test")
    train, dev = GSM8K("train"), GSM8K("dev", start=1, stop=500, step=2)
    assert [message_text(row["messages"][1]) for row in train] == [f"#### {i}" for i in range(10)]
    assert (len(dev), message_text(dev[0]["messages"][1])) == (250, "#### 11")


def test_gsm8k_with_nothing_to_train_on_is_one_line(base_dir):
    """RL divided by the number of problems, 0."""
    write_rows("openai/gsm8k", "main", "train", [{"question": "q", "answer": "#### 1"}] * 500, "test")
    with pytest.raises(UserError, match="500 rows, the last 500 of which are held out; get it again: rm"):
        GSM8K("train")


# -----------------------------------------------------------------------------
# The other tasks


def test_mmlu_train_reads_the_rows_that_the_hub_wraps(base_dir):
    row = {"question": "Which?", "subject": "", "choices": ["a", "b", "c", "d"], "answer": 2}
    write_rows("cais/mmlu", "auxiliary_train", "train", [{"train": row}], "test")
    wrapped = MMLU("train")[0]
    write_rows("cais/mmlu", "auxiliary_train", "train", [row], "test")
    assert wrapped == MMLU("train")[0]
    assert wrapped["messages"][1] == {"role": "assistant", "content": "C"}
    assert "- c=C\n" in wrapped["messages"][0]["content"]


def test_smoltalk_dev_is_the_published_test_split(base_dir):
    chat = [{"content": "Be brief.", "role": "system"}, {"content": "Hi", "role": "user"}]
    chat += [{"content": "Hello", "role": "assistant"}]
    write_rows("HuggingFaceTB/smol-smoltalk", "default", "test", [{"messages": chat, "source": "x"}], "test")
    task = SmolTalk("dev")
    assert list(task) == [{"messages": chat}]
    with pytest.raises(NotImplementedError, match="SmolTalk has no right answers"):
        task.evaluate(task[0], "Hello")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GSM8K("validation"), "GSM8K: split=validation: expected train, dev, test"),
        (lambda: MMLU("auxiliary_train"), "MMLU: split=auxiliary_train: expected train, dev, test"),
        (lambda: ARC("ARC-Easy", "x"), "ARC-Easy: split=x: expected"),
        (lambda: ARC("easy"), "ARC: subset=easy: expected ARC-Easy or ARC-Challenge"),
        (lambda: HumanEval("train"), "HumanEval: split=train: there is only test"),
        (lambda: SmolTalk("test"), "SmolTalk: split=test: expected train or dev"),
    ],
)
def test_wrong_splits_are_one_line(base_dir, make, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make()


DEF = 'def f(x):\n    """Doubles:\n    ```\n    f(2)\n    ```\n    """\n    return 2 * x\n'
PROMPT = "import math\n\ndef helper():\n    return 1\n\ndef f(x):\n    '''Doc'''\n"
ITEM = {"prompt": PROMPT, "entry_point": "f", "test": "def check(f): pass"}
HEAD = "import math\n\ndef helper():\n    return 1\n\n"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("def f(x): return 2", "def f(x): return 2"),
        (f"First\n```python\n{DEF}```\nthen\n```py\nf = abs\n```\nend", "f = abs\n"),
        (f"```\n{DEF}", DEF),
        (f"{DEF}```\nThis doubles.", DEF),
        (f"{DEF}```python\n```", DEF),
        (f"```python\n{DEF}```\nIt is used so:\n```python\nprint(f(2))\n```\nand prints\n```\n4\n```", DEF),
        (f"~~~python\n{DEF}~~~\nf(2)", DEF),
        (f"1. So:\n\n    ```python\n{textwrap.indent(DEF, '    ')}    ```\n", DEF),
        ("```python\ndef f(x): return 2```", "def f(x): return 2"),
        ("```python\ndef f(x): return 2\n```\nor not\n```python\ndef f(x: return 3\n```", "def f(x): return 2\n"),
    ],
)
def test_the_block_that_defines_the_function_is_the_program(answer, code):
    """Stray fences, blocks of usage and output, indented fences, fences in docstrings: right functions were wrong."""
    assert answer_program(ITEM, answer) == HEAD + code


IMPORTS, HELPER = "import re\nfrom os import path\n", "def g(x):\n    return 2 * x\n"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (
            f"```python\n{IMPORTS}```\nThen:\n```\n{HELPER}print(f(3))\n```\nAnd:\n```\ndef f(x): return g(x)\n```",
            IMPORTS,
        ),
        ("Try\n```\nx = f(3)\n```\nfor\n```\ndef f(x): return 2 * x\n```", ""),
    ],
)
def test_imports_and_helpers_of_an_earlier_block_are_part_of_the_program(answer, code):
    """Right functions were wrong for a NameError. What else earlier blocks do is usage, and does not run."""
    program = answer_program(ITEM, answer)
    assert program.startswith(HEAD + code) and "f(3)" not in program
    names: dict[str, Any] = {}
    exec(program, names)
    assert names["f"](4) == 8


def test_an_answer_may_begin_with_an_import_from_the_future():
    """It stood behind the imports of the prompt: a SyntaxError."""
    program = answer_program(ITEM, "```\nfrom __future__ import annotations\ndef f(x: Nothing): return x\n```")
    assert program == f"from __future__ import annotations\n{HEAD}def f(x: Nothing): return x\n"


@pytest.mark.parametrize("head", ["if True:", "try:"])
def test_a_function_may_be_defined_under_if_and_try(head):
    code = f"{head}\n    def f(x): return x\n" + "except ImportError:\n    pass\n" * (head == "try:")
    assert answer_program(ITEM, f"```\n{code}```") == HEAD + code


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("    return 1\n", "    return 1\n"),
        ("```python\n    return 1\n```\n", "    return 1\n"),
        ("    return 1\n```\nThis returns 1.", "    return 1\n"),
        ("def f2(x): return 2", "def f2(x): return 2"),
        ("Use `f`.", "Use `f`."),
        ("(" * 5000 + "f", "(" * 5000 + "f"),
    ],
)
def test_code_without_the_function_continues_the_prompt(answer, code):
    assert answer_program(ITEM, answer) == PROMPT + code


def test_the_tests_have_imports_and_helpers_of_the_prompt():
    assert checker_program(ITEM) == HEAD + "\n\ndef check(f): pass\n\ncheck(f)\n"


def test_a_main_block_does_not_run(published):
    """Nor does it in the official harness: programs that wait for input there were wrong."""
    item = HumanEval(stop=1)[0]
    block = "if __name__ == '__main__':\n    raise ValueError(input())"
    assert HumanEval().evaluate(item, oracle(item).removesuffix("```") + f"\n\n{block}\n```")


# -----------------------------------------------------------------------------
# CustomJSON

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


SYSTEM = {"role": "system", "content": "Be kind."}
PAIR = [USER, ASSISTANT]


def test_custom_conversations_are_read_line_by_line(tmp_path):
    file = tmp_path / "mine.jsonl"
    chats = [PAIR, [SYSTEM, *PAIR, USER]]
    text = "\ufeff" + json.dumps([USER | {"id": 7}, ASSISTANT]) + "\r\n\n" + json.dumps(chats[1])
    file.write_text(text, encoding="utf-8", newline="")
    assert [conversation["messages"] for conversation in CustomJSON(file)] == chats
    assert len(CustomJSON(str(file), stop=1)) == 1


def text_part(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


ANSWER = {"role": "assistant", "content": text_part("Hello")}
FORMS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "OpenAI": ({"messages": [USER | {"name": "x"}, ASSISTANT | {"tool_calls": None, "weight": 1}]}, PAIR),
    "parts": ({"messages": [USER | {"content": text_part("Hi")}, ANSWER], "tools": []}, [USER, ANSWER]),
    "weight 0": ({"messages": [*PAIR, USER, ASSISTANT | {"weight": 0}]}, [*PAIR, USER, ASSISTANT | {"weight": 0}]),
    "train: false": (
        {"messages": [*PAIR, USER, ASSISTANT | {"train": False}]},
        [*PAIR, USER, ASSISTANT | {"weight": 0}],
    ),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, PAIR),
    "a prompt beside": ({"system_prompt": "Be kind.", "messages": PAIR}, [SYSTEM, *PAIR]),
    "a system beside": ({"system": "Be kind.", "conversations": PAIR, "id": "7"}, [SYSTEM, *PAIR]),
    "Alpaca": ({"instruction": "Hi", "input": "", "output": "Hello", "text": "all of it"}, PAIR),
    "Alpaca's input": (
        {"instruction": "Add:", "input": "1 and 2", "output": "3"},
        [USER | {"content": "Add:\n\n1 and 2"}, ASSISTANT | {"content": "3"}],
    ),
    "text in a column": ({"messages": json.dumps(PAIR)}, PAIR),
}


@pytest.mark.parametrize("form", FORMS)
def test_conversations_are_taken_as_the_field_writes_them(tmp_path, form):
    """Files from the hub, of OpenAI's fine-tuning and of Alpaca were refused: "expected a JSON list"."""
    record, messages = FORMS[form]
    (tmp_path / "lines.jsonl").write_text(f"{json.dumps(record)}\n{json.dumps(record)}\n")
    (tmp_path / "one.json").write_text(json.dumps([record, record], indent=2))
    pq.write_table(pa.Table.from_pylist([record, record]), tmp_path / "rows.parquet")
    for file in tmp_path.iterdir():
        assert [conversation["messages"] for conversation in CustomJSON(file)] == [messages, messages], file
    (tmp_path / "alone.json").write_text(json.dumps(record, indent=2))
    assert len(CustomJSON(tmp_path / "alone.json")) == 1
    with pytest.raises(UserError, match="one conversation; give two or more, because every 20th is held out"):
        file_mixture(str(tmp_path / "alone.json"), "train")
    assert list(file_mixture(str(tmp_path / "rows.parquet"), "dev")) == [{"messages": messages}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON in UTF-8"),
        ("[" * 100_000, "not JSON in UTF-8"),
        (b"\xff", "not JSON in UTF-8"),
        (json.dumps({"text": "x"}), "no messages, conversations or instruction and output among text"),
        (json.dumps({"messages": "Hi"}), "Expecting value"),
        (json.dumps(["Hi", "Hello"]), "message 1 is not an object"),
        ("[]", "expected a list of at least one"),
        ("5", "expected a list of at least one"),
        (json.dumps([USER]), "no message is the assistant's"),
        (json.dumps([SYSTEM, USER]), "no message is the assistant's"),
        (json.dumps([USER, ASSISTANT | {"weight": 0}]), "there is nothing to learn"),
        (json.dumps([USER, ASSISTANT | {"weight": 0.5}]), "message 2 has weight 0.5, expected 0 (not learned) or 1"),
        (json.dumps([ASSISTANT, USER]), "message 1 has role 'assistant', expected 'user'"),
        (json.dumps([USER, ASSISTANT, ASSISTANT]), "message 3 has role 'assistant', expected 'user'"),
        (json.dumps([USER, {"role": "bot", "content": "x"}]), "message 2 has role 'bot'"),
        (json.dumps({"conversations": [{"from": "tool", "value": "x"}]}), "message 1 has role 'tool'"),
        (json.dumps([USER, {"role": "assistant"}]), "message 2: the assistant's content is NoneType"),
        (json.dumps([USER, {"role": "assistant", "content": " "}]), "message 2 has content ' '"),
        (json.dumps([USER, {"role": "assistant", "content": 5}]), "message 2: the assistant's content is int"),
        (json.dumps([USER, {"role": "assistant", "content": "\ud800"}]), "message 2 holds half a character"),
        (json.dumps([USER, {"role": "assistant", "content": None, "tool_calls": [1]}]), "message 2 has tool_calls"),
        (json.dumps({"messages": PAIR, "images": ["a.png"]}), "the conversation has images, which cannot be read"),
        (json.dumps([USER | {"content": [{"type": "image_url"}]}, ASSISTANT]), "message 1 has parts that are not text"),
        (json.dumps([USER | {"content": [{"type": "image", "text": "a.png"}]}, ASSISTANT]), "parts that are not text"),
        (json.dumps({"messages": PAIR, "video": "a.mp4"}), "the conversation has video, which cannot be read"),
        (json.dumps([USER, ASSISTANT | {"reasoning_content": "Hm."}]), "message 2 has reasoning_content"),
        (json.dumps({"instruction": "x", "input": ["a"], "output": "y"}), "input are ['x', ['a']], expected text"),
        (json.dumps({"instruction": "x", "output": "y", "history": [["a", "b"]]}), "the conversation has history"),
    ],
)
def test_a_custom_line_that_is_no_conversation_is_named(tmp_path, line, message):
    file = tmp_path / "mine.jsonl"
    file.write_bytes(json.dumps(PAIR).encode() + b"\n" + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(UserError, match=re.escape(f"{file}:2: ") + ".*" + re.escape(message)) as error:
        CustomJSON(file)
    assert "\n" not in str(error.value) and str(error.value).endswith(EXAMPLE)


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_packed_conversations_are_read_and_cut_ones_are_one_line(tmp_path, codec):
    """Corpora took .jsonl.gz, chat files did not: "not JSON in UTF-8"."""
    packed = pa.compress(f"{json.dumps(PAIR)}\n".encode() * 100, codec, asbytes=True)
    file = tmp_path / "chats.jsonl.packed"
    file.write_bytes(packed)
    assert len(CustomJSON(file)) == 100
    file.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=f"not a whole {codec} file"):
        CustomJSON(file)


def test_custom_files_that_are_absent_or_empty_are_mistakes(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        CustomJSON(tmp_path / "none.jsonl")
    for text, message in (("\n\n", "holds no conversations"), ("[]", "holds no"), ("PAR1", "not a whole parquet file")):
        (tmp_path / "empty.jsonl").write_text(text)
        with pytest.raises(UserError, match=message):
            CustomJSON(tmp_path / "empty.jsonl")


@pytest.mark.parametrize("name", ["identity/identity_conversations.jsonl", "chat/sgd_train.jsonl"])
def test_known_conversation_files_are_read(shared_data, name):
    lines = (shared_data / name).read_text(encoding="utf-8").splitlines()
    assert len(CustomJSON(shared_data / name)) == len(lines) > 500
