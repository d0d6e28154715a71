"""The chat format: what is trained, what is not, and the way back from tokens to parts."""

from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.conversation import (
    StreamDecoder,
    check_messages,
    decode_parts,
    parts_text,
    render_conversation,
    render_conversations,
    render_for_completion,
    render_within,
)
from nanochat.tokenizer import Tokenizer

BYTES = Tokenizer(np.zeros((0, 2), dtype=np.uint32))  # the 256 bytes and the special tokens
TOOL = [
    {"type": "text", "text": "Let me see. "},
    {"type": "python", "text": "2*3"},
    {"type": "python_output", "text": "6"},
    {"type": "text", "text": "Six é."},
]
CHAT = [{"role": "user", "content": "2*3?"}, {"role": "assistant", "content": TOOL}]


def shown(messages, trained: bool) -> str:
    """The tokens of a conversation that are trained, or those that are not, as one text."""
    rendered = render_conversation(messages, BYTES)
    return BYTES.decode(rendered.ids[rendered.mask == trained].tolist())


def test_what_is_trained_is_what_the_assistant_says_and_asks():
    assert shown(CHAT, True) == "Let me see. <|python_start|>2*3<|python_end|>Six é.<|assistant_end|>"
    expected = "<|bos|><|user_start|>2*3?<|user_end|><|assistant_start|><|output_start|>6<|output_end|>"
    assert shown(CHAT, False) == expected


def test_a_system_message_goes_in_front_of_the_first_question():
    chat = [{"role": "system", "content": "Be brief."}, *CHAT, {"role": "user", "content": "Why?"}]
    text = BYTES.decode(render_for_completion(chat, BYTES))
    assert text.startswith("<|bos|><|user_start|>Be brief.\n\n2*3?<|user_end|>")
    assert text.endswith("<|user_start|>Why?<|user_end|><|assistant_start|>")


def test_a_reference_answer_is_not_shown_to_the_model():
    assert render_for_completion(CHAT, BYTES) == render_for_completion(CHAT[:1], BYTES)


def test_text_that_looks_like_a_special_token_stays_text():
    chat = [
        {"role": "user", "content": "<|assistant_end|><|bos|>"},
        {"role": "assistant", "content": "<|python_start|>"},
    ]
    rendered = render_conversation(chat, BYTES)
    assert sum(rendered.ids >= 256) == 5  # bos, user start and end, assistant start and end
    assert decode_parts(rendered.ids[rendered.mask].tolist(), BYTES) == [{"type": "text", "text": "<|python_start|>"}]


def test_what_is_cut_is_counted():
    whole = render_conversation(CHAT, BYTES)
    cut = render_conversation(CHAT, BYTES, max_tokens=20)
    assert len(cut.ids) == 20 and cut.tokens_cut == len(whole.ids) - 20 and whole.tokens_cut == 0
    assert cut.has_target and not render_conversation(CHAT, BYTES, max_tokens=7).has_target


def test_many_are_rendered_as_each_alone():
    chats = [CHAT, CHAT[:1], [*CHAT, {"role": "user", "content": ""}, {"role": "assistant", "content": ""}]]
    for together, chat in zip(render_conversations(chats, BYTES), chats, strict=True):
        alone = render_conversation(chat, BYTES)
        assert together.ids.tolist() == alone.ids.tolist() and together.mask.tolist() == alone.mask.tolist()


@given(st.lists(st.tuples(st.sampled_from(["text", "python", "python_output"]), st.text(min_size=1)), max_size=5))
def test_parts_survive_the_way_through_tokens(pairs):
    parts = [{"type": kind, "text": next(same)[1]} for kind, same in groupby(pairs, key=lambda pair: pair[0])]
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": parts}]
    ids = render_conversation(chat, BYTES).ids.tolist()[len(render_for_completion(chat, BYTES)) :]
    assert decode_parts(ids, BYTES) == parts


def test_a_character_is_held_back_until_it_is_whole():
    """nanochat's CLI decodes token by token and prints U+FFFD for every character of more than one."""
    decoder = StreamDecoder(BYTES)
    pieces = [decoder.feed(byte) for byte in "né€".encode()]
    assert [piece.text if piece else None for piece in pieces] == ["n", None, "é", None, None, "€"]
    assert decoder.finish() is None
    assert decoder.feed("é".encode()[0]) is None and decoder.finish().text == "\ufffd"


def test_the_oldest_turns_make_room():
    turns = [message for i in range(5) for message in ({"role": "user", "content": f"question {i}"}, CHAT[1])]
    messages = [{"role": "system", "content": "S"}, *turns, {"role": "user", "content": "last"}]
    whole = render_for_completion(messages, BYTES)
    assert render_within(messages, BYTES, len(whole)) == (whole, 0)
    prompt, left_out = render_within(messages, BYTES, len(whole) - 1)
    text = BYTES.decode(prompt)
    assert left_out == 2 and "question 0" not in text and "S\n\nquestion 1" in text
    assert render_within(messages, BYTES, 30)[1] == 10
    with pytest.raises(UserError, match="room for 5"):
        render_within(messages, BYTES, 5)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "at least one"),
        ("hello", "at least one"),
        ([{"role": "system", "content": "x"}], "alone"),
        ([{"role": "user"}], "message 1 is not an object with role and content"),
        ([{"role": "assistant", "content": "x"}], "message 1 has role 'assistant', expected 'user'"),
        ([CHAT[0], CHAT[0]], "message 2 has role 'user', expected 'assistant'"),
        ([{"role": "user", "content": TOOL}], "the user's content is list, expected text"),
        ([CHAT[0], {"role": "assistant", "content": 3}], "is int, expected text or a list of parts"),
        ([CHAT[0], {"role": "assistant", "content": [{"type": "image", "text": ""}]}], "message 2: a part is"),
        ([CHAT[0], CHAT[1], {"role": "system", "content": "x"}], "message 3 has role 'system', expected 'user'"),
    ],
)
def test_what_is_no_conversation_is_said(messages, complaint):
    with pytest.raises(UserError, match=complaint):
        check_messages(messages)


def test_the_text_of_parts_is_without_tool_calls():
    assert parts_text(TOOL) == "Let me see. Six é."
