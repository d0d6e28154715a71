"""Questions about the assistant itself: splits share no wording, answers say what is expected and no more."""

import json
from collections import Counter

import pytest

from dev import gen_identity
from dev.gen_identity import INTENTS, core, plain_rows, split_bar, train_rows
from nanochat.common import UserError
from nanochat.conversation import check_messages
from tasks.common import Split, message_text
from tasks.identity import Identity, says

SPLITS: tuple[Split, ...] = ("train", "dev", "test")
ANSWERS = {name: split_bar(intent.answers) for name, intent in INTENTS.items()}


def questions(rows: list[dict[str, str]]) -> set[str]:
    return {
        core(message["content"]) for row in rows for message in json.loads(row["messages"]) if message["role"] == "user"
    }


def test_questions_of_test_are_not_in_train_or_dev_behind_openers_or_in_other_case():
    train, dev, test = (
        questions(train_rows(6000, 0.3, seed=1)),
        questions(plain_rows("dev")),
        questions(plain_rows("test")),
    )
    assert not train & test
    assert not train & dev
    assert not dev & test
    written = {core(wording) for intent in INTENTS.values() for wording in intent.wordings("train")}
    assert not written & (dev | test)
    assert train <= written


def test_openers_case_and_marks_do_not_make_another_question():
    plain = core("Who are you?")
    assert plain == "who are you"
    for question in (
        "who are you",
        "Hi! Who are you?",
        "Hello, hey there. WHO are you!",
        "please tell me: who are you.",
    ):
        assert core(question) == plain
    assert core("And who are you?") != plain


def test_fifty_test_questions_cover_every_intent():
    counts = Counter(row["intent"] for row in plain_rows("test"))
    assert counts.total() == 50
    assert counts.keys() == INTENTS.keys()
    assert min(counts.values()) >= 2
    assert sum(counts[name] for name in ("name", "who", "what", "maker")) >= 20
    assert len(plain_rows("dev")) == 30


def test_every_intent_has_enough_wordings_and_short_answers():
    for name, intent in INTENTS.items():
        assert len(intent.wordings("train")) >= 25, name
        assert 3 <= len(ANSWERS[name]) <= 5, name
        assert max(len(answer.split()) for answer in ANSWERS[name]) <= 25, name
    assert "Who are you?" in INTENTS["who"].wordings("train")


def test_every_answer_says_what_its_intent_expects():
    for name, intent in INTENTS.items():
        for answer in ANSWERS[name]:
            assert says(answer, intent.expect), (name, answer)


def test_answers_to_other_questions_are_mostly_wrong():
    general = {"name", "who", "what"}  # nearly every answer says nanochat, many that it is a language model
    for name in INTENTS.keys() - general:
        others = [answer for other in INTENTS if other != name for answer in ANSWERS[other]]
        assert sum(says(answer, INTENTS[name].expect) for answer in others) <= 0.15 * len(others), name
    for name in INTENTS.keys() - {"abilities"}:
        assert not any(says(answer, INTENTS["abilities"].expect) for answer in ANSWERS[name])


@pytest.mark.parametrize("answer", ["I don't know.", "", "You can't.", "nanochats"])
def test_a_word_is_not_found_inside_another(answer):
    assert not says(answer, [["no", "can", "nanochat"]])


@pytest.mark.parametrize("answer", ["No.", "NO, I am not", "no\nway", "(no)", "nanochat's", "Yes I can!"])
def test_a_word_is_found_in_any_case_and_before_any_mark(answer):
    assert says(answer, [["no", "can", "nanochat"]])


def test_every_group_must_be_met_and_curly_apostrophes_count():
    assert not says("No.", [["no"], ["nanochat"]])
    assert says("I don\u2019t. I am nanochat.", [["don't"], ["nanochat"]])


def test_the_same_seed_gives_the_same_conversations():
    assert train_rows(700, 0.25, seed=5) == train_rows(700, 0.25, seed=5)
    assert train_rows(700, 0.25, seed=5) != train_rows(700, 0.25, seed=6)


def test_a_greeting_or_another_intent_comes_before_a_second_question():
    rows = train_rows(4000, 0.25, seed=42)
    assert len(rows) == 4000
    assert {row["intent"] for row in rows} == INTENTS.keys()
    longer = 0
    for row in rows:
        messages = json.loads(row["messages"])
        check_messages(messages)
        assert messages[-1]["content"] in ANSWERS[row["intent"]]
        if len(messages) == 4:
            longer += 1
            assert row["intent"] != "greeting"
            assert messages[1]["content"] not in ANSWERS[row["intent"]] + ANSWERS["thanks"] + ANSWERS["goodbye"]
    assert 0.2 < longer / len(rows) < 0.3


def test_the_files_give_the_task_and_its_references_are_right(base_dir, capsys):
    gen_identity.main()
    lengths = {split: len(Identity(split)) for split in SPLITS}
    assert lengths == {"train": 8000, "dev": 30, "test": 50}
    for split in SPLITS:
        task = Identity(split)
        for conversation in task:
            check_messages(conversation["messages"])
            assert task.evaluate(conversation, message_text(conversation["messages"][-1]))
    lines = (base_dir / "identity_conversations.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [conversation["messages"] for conversation in Identity("train")]
    assert "8,000 conversations" in capsys.readouterr().out


def test_missing_rows_name_the_command_that_makes_them(base_dir):
    with pytest.raises(UserError, match=r"python -m dev\.gen_identity"):
        Identity("test")
