"""Word problems: every template makes sense in numbers, the splits share no question, only the right answer counts."""

import re
from collections import Counter
from fractions import Fraction
from random import Random

import pytest

from nanochat.calculator import use_calculator
from nanochat.common import UserError
from tasks.arithmetic import Arithmetic, draw_values, draw_words, make_conversation, parse_template
from tasks.arithmetic_templates import BOYS, GIRLS, TEMPLATES, WORDS
from tasks.common import Conversation, Split, message_text, split_of

EXPRESSION = re.compile(r"(\d+)([-+*/])(\d+)")
MOST_WORDS = {1: 25, 2: 35, 3: 45, 4: 55}
ALL = range(len(TEMPLATES))


def make(number: int, rng: Random) -> Conversation:
    """One item of a template."""
    template = parse_template(number)
    values, words = draw_values(template, rng), draw_words(template, rng)
    return make_conversation(template.story.format_map(values | words), number, values, words)


def texts(conversation: Conversation, kind: str) -> list[str]:
    """All parts of a kind in the answer."""
    return [part["text"] for part in conversation["messages"][1]["content"] if part["type"] == kind]


def exact(expression: str) -> Fraction:
    """The value of one operation, worked out without the calculator."""
    match = EXPRESSION.fullmatch(expression)
    assert match, expression
    left, right = Fraction(match[1]), Fraction(match[3])
    return {"+": left + right, "-": left - right, "*": left * right, "/": left / right}[match[2]]


def test_there_are_templates_of_every_length_and_with_every_operation():
    counts = Counter(len(parts) - 1 for parts in TEMPLATES)
    assert counts[1] >= 18 and counts[2] >= 18 and counts[3] >= 14 and counts[4] >= 14 and set(counts) == {1, 2, 3, 4}
    assert len({parts[0] for parts in TEMPLATES}) == len(TEMPLATES) >= 64
    for length in (1, 2, 3, 4):
        operators = Counter(s.operator for k in ALL for s in parse_template(k).steps if len(TEMPLATES[k]) - 1 == length)
        assert set(operators) == set("+-*/")
        assert min(operators.values()) * 8 >= sum(operators.values())


def test_words_are_plain_and_listed_once():
    assert not set(GIRLS) & set(BOYS)
    for kind, words in WORDS.items():
        assert len(set(words)) == len(words) >= 4, kind
        assert all(re.fullmatch("[A-Za-z]+", word) for word in words), kind


@pytest.mark.parametrize("number", ALL)
def test_every_template_is_right_in_200_drawings(number):
    rng = Random(number)
    for _ in range(200):
        conversation = make(number, rng)
        expressions, outputs = texts(conversation, "python"), texts(conversation, "python_output")
        assert len(expressions) == len(outputs) == conversation["steps"] == len(TEMPLATES[number]) - 1
        for expression, output in zip(expressions, outputs, strict=True):
            assert use_calculator(expression) == output
            assert exact(expression) == int(output)
            assert 1 <= int(output) <= 999
        assert conversation["answer"] == outputs[-1]
        assert texts(conversation, "text")[-1] == f"{outputs[-1]}.\n#### {outputs[-1]}"


@pytest.mark.parametrize("number", ALL)
def test_a_question_names_all_numbers_that_are_used_and_no_other(number):
    rng = Random(number)
    for _ in range(20):
        conversation = make(number, rng)
        question = conversation["messages"][0]["content"]
        named = re.findall(r"\d+", question)
        taken: set[str] = set()
        results: list[str] = []
        for expression, output in zip(texts(conversation, "python"), texts(conversation, "python_output"), strict=True):
            taken |= set(re.findall(r"\d+", expression))
            assert taken <= {*named, *results}
            results.append(output)
        assert set(named) <= taken
        assert min(map(int, named)) >= 2 and max(map(int, named)) <= 200


def test_every_number_and_every_result_is_needed():
    for number in ALL:
        template = parse_template(number)
        used = {name for step in template.steps for name in (step.left, step.right)}
        needed = {name for name, _, _ in template.ranges} | {f"r{i}" for i in range(1, len(template.steps))}
        assert used == needed, template.story
        for place, step in enumerate(template.steps, 1):
            later = {f"r{i}" for i in range(place, 5)}
            assert not later & {step.left, step.right}, template.story


def test_questions_are_short_sentences():
    rng = Random(0)
    for number in ALL:
        for _ in range(20):
            conversation = make(number, rng)
            question = conversation["messages"][0]["content"]
            assert len(question.split()) <= MOST_WORDS[conversation["steps"]], question
            assert question.endswith("?") and question.count("?") == 1 and "  " not in question
            assert all(sentence[0].isupper() or sentence[0].isdigit() for sentence in re.split(r"(?<=\.) ", question))
            # At three characters to a token, with the special ones: 60 tokens for one step, 170 for four.
            answer = "".join(part["text"] for part in conversation["messages"][1]["content"])
            assert len(question) + len(answer) <= 75 * conversation["steps"] + 75, question


def test_people_are_different_and_keep_their_pronoun():
    rng = Random(0)
    for number in ALL:
        for _ in range(20):
            words = draw_words(parse_template(number), rng)
            people = [word for kind, word in words.items() if kind.startswith("name")]
            assert len(set(people)) == len(people) == len(set(re.findall(r"{(name\d?)}", TEMPLATES[number][0])))
            assert not people or (words["he"], words["He"]) == (("she", "She") if people[0] in GIRLS else ("he", "He"))


def test_the_first_template_reads_as_written():
    values = {"a": 12, "b": 7, "r1": 19}
    words = {"name": "Tom", "things": "pens", "he": "he", "He": "He"}
    question = TEMPLATES[0][0].format_map(values | words)
    assert make_conversation(question, 0, values, words) == {
        "messages": [
            {"role": "user", "content": "Tom has 12 pens. He gets 7 more. How many pens does he have now?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "Pens: "},
                    {"type": "python", "text": "12+7"},
                    {"type": "python_output", "text": "19"},
                    {"type": "text", "text": "19.\n#### 19"},
                ],
            },
        ],
        "steps": 1,
        "template": 0,
        "answer": "19",
    }


def test_splits_share_no_question():
    sizes: dict[Split, int] = {"train": 20000, "dev": 2000, "test": 4000}
    questions = {
        split: {item["messages"][0]["content"] for item in Arithmetic(split, size=size)}
        for split, size in sizes.items()
    }
    assert not questions["train"] & (questions["dev"] | questions["test"]) and not questions["dev"] & questions["test"]
    assert len(questions["train"]) > 19000  # there are millions: few come twice
    assert all(split_of(question) == split for split in questions for question in questions[split])


@pytest.mark.parametrize("steps", [(1,), (2,), (3,), (4,), (1, 2), (3, 4)])
def test_items_have_the_steps_that_were_asked_for(steps):
    items = list(Arithmetic("train", steps=steps, size=1000))
    assert {item["steps"] for item in items} == set(steps)
    assert {item["template"] for item in items} == {k for k in ALL if len(TEMPLATES[k]) - 1 in steps}
    if steps == (4,):
        assert all(len(texts(item, "python")) == 4 for item in items)


def test_an_item_is_the_same_every_time_and_in_every_part():
    task = Arithmetic("test", steps=(3, 4), size=100)
    assert list(task) == list(Arithmetic("test", steps=[4, 3], size=200, stop=100))
    assert task[70] == Arithmetic("test", steps=(3, 4), size=100, start=70)[0]
    assert len(task) == 100
    assert task[0] != Arithmetic("dev", steps=(3, 4))[0] != Arithmetic("dev", steps=(3,))[0]


def test_only_the_right_number_scores():
    task = Arithmetic("test", steps=(1, 2, 3, 4), size=300)
    for item in task:
        answer = message_text(item["messages"][-1])
        right = int(item["answer"])
        assert task.evaluate(item, answer)
        assert not task.evaluate(item, answer.rpartition("####")[0] + f"#### {right + 1}")
        assert not task.evaluate(item, item["answer"])  # the form belongs to the answer


def test_mistakes_are_told_in_one_line():
    with pytest.raises(UserError, match=r"^Arithmetic: steps=\(5,\): expected some of 1, 2, 3, 4"):
        Arithmetic("train", steps=(5,))
    with pytest.raises(UserError, match="steps"):
        Arithmetic("train", steps=())
    with pytest.raises(UserError, match="split=validation"):
        Arithmetic("validation")  # type: ignore[arg-type]
