"""Tokenizer, chat template and settings of a model as files that transformers reads, and the tokenizer back.

    tokenizer.json           our byte-pair encoding for the `tokenizers` library
    tokenizer_config.json    which special tokens begin, end and pad, and the chat template
    generation_config.json   what ends an answer, and how chat_cli draws one

Promises: text becomes the same ids there (scripts/export_hf.py compares them); from_files(to_files(t)) is t. What
differs: transformers reads the name of a special token in any text as that token, here text never becomes one.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

import rustbpe
from nanochat.common import UserError
from nanochat.files import one_line
from nanochat.hf_tokenizer import HFTokenizer, bytes_by_character, load_hf_tokenizer
from nanochat.tokenizer import Tokenizer

# In the regexes of `tokenizers` (Oniguruma) a + behind braces repeats once more instead of not giving back, which after
# \p{N}{1,3} is never asked for.
REGEXES = {name: regex.replace("{1,3}+", "{1,3}") for name, regex in rustbpe.PATTERNS.items()}

AS_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}

# conversation.segments() in Jinja. Contents may be lists of parts, as OpenAI's clients send them.
TEMPLATE = """\
{{- bos_token }}
{%- set fences = {'python': ['<|python_start|>', '<|python_end|>'],
                  'python_output': ['<|output_start|>', '<|output_end|>']} %}
{%- set chat = namespace(system='', next='user', text='') %}
{%- for message in messages %}
    {%- set chat.text = '' %}
    {%- if message['content'] is string %}
        {%- set chat.text = message['content'] %}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'text' %}
                {%- set chat.text = chat.text + part['text'] %}
            {%- elif part['type'] in fences and message['role'] == 'assistant' %}
                {%- set chat.text = chat.text + fences[part['type']][0] + part['text'] + fences[part['type']][1] %}
            {%- else %}
                {{- raise_exception('no part of type ' + part['type'] + ' in a message of the ' + message['role']) }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {%- if message['role'] == 'system' and loop.first %}
        {%- set chat.system = chat.text + '\\n\\n' %}
    {%- elif message['role'] != chat.next %}
        {{- raise_exception('a message of the ' + message['role'] + ', expected one of the ' + chat.next) }}
    {%- elif message['role'] == 'user' %}
        {{- '<|user_start|>' + chat.system + chat.text + '<|user_end|>' }}
        {%- set chat.system = '' %}
        {%- set chat.next = 'assistant' %}
    {%- else %}
        {{- '<|assistant_start|>' + chat.text + '<|assistant_end|>' }}
        {%- set chat.next = 'user' %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant_start|>' }}
{%- endif %}
"""


# -----------------------------------------------------------------------------
# Out


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a tokenizer.json for `tokenizers`. A text begins with BOS, unless it is told add_special_tokens=
    False. Merges by pair, as there, and by rank, as in tiktoken and here, give the same ids: what is inside a token's
    bytes has been joined in one order only when its own merge comes up. Raises UserError for symbols of one's own.
    """
    names, bos = tokenizer.get_special_tokens(), bos_of(tokenizer)
    if isinstance(tokenizer, HFTokenizer):
        found, added = tokenizer.spec, tokenizer.added
        model, split, known = found["model"], found["pre_tokenizer"], found["added_tokens"]
    elif type(tokenizer) is Tokenizer:
        model, split, known, added = byte_pairs(tokenizer), pre_tokenizer(tokenizer.pattern), [], names
    else:
        raise UserError("a tokenizer of characters cannot leave; take bytes: python -m scripts.tok_train --kind=byte")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text, second = ({"Sequence": {"id": sequence, "type_id": 0}} for sequence in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [*known, *({"id": tokenizer.encode_special(n), "content": n, **flags} for n in added)],
        "normalizer": None,
        "pre_tokenizer": split,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, first, second],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.encode_special(bos)], "tokens": [bos]}},
        },
        "decoder": AS_BYTES,
        "model": model,
    }


def bos_of(tokenizer: Tokenizer) -> str:
    """What BOS is called, in a vocabulary of others too."""
    return tokenizer.bos if isinstance(tokenizer, HFTokenizer) else "<|bos|>"


def pre_tokenizer(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": REGEXES[pattern]}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, AS_BYTES]}


def byte_pairs(tokenizer: Tokenizer) -> dict[str, Any]:
    """Vocabulary and merges, each byte written as GPT-2 does."""
    character = {byte: character for character, byte in bytes_by_character().items()}
    ordinary = range(256 + len(tokenizer.merges))
    names = ["".join(map(character.__getitem__, tokenizer.decode_bytes([token]))) for token in ordinary]
    return {
        "type": "BPE",
        **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
        **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
        "vocab": {name: token for token, name in enumerate(names)},
        "merges": [[names[left], names[right]] for left, right in tokenizer.merges.tolist()],
    }


def settings_files(tokenizer: Tokenizer, sequence_len: int, chats: bool) -> dict[str, dict[str, Any]]:
    """{file name: content} of tokenizer_config.json, with the chat template for a model that `chats`, and of
    generation_config.json. BOS pads, since a model learns to end its answers with what ends them and never says BOS.
    """
    bos = bos_of(tokenizer)
    ends = ["<|assistant_end|>", bos] if chats else [bos]  # as in Engine; base: the next document
    tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": ends[0],
        "pad_token": bos,
        "model_max_length": sequence_len,
        "clean_up_tokenization_spaces": False,
    }
    drawing = {
        "bos_token_id": tokenizer.encode_special(bos),
        "eos_token_id": [tokenizer.encode_special(name) for name in ends],
        "pad_token_id": tokenizer.encode_special(bos),
        "do_sample": True,
        "temperature": 0.6,  # this and top_k as in chat_cli
        "top_k": 50,
        "max_length": sequence_len,
    }
    template = {"chat_template": TEMPLATE} if chats else {}
    return {"tokenizer_config.json": tokens | template, "generation_config.json": drawing}


# -----------------------------------------------------------------------------
# Back


def read_tokenizer(path: Path) -> Tokenizer:
    """Our tokenizer from a tokenizer.json that tokenizer_json() made. Raises UserError where it is of another kind."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        names = sorted(found["model"]["vocab"], key=found["model"]["vocab"].__getitem__)
        ids = {name: token for token, name in enumerate(names)}
        merges = np.array([[ids[left], ids[right]] for left, right in found["model"]["merges"]], np.uint32)
        regex = found["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        pattern = next(name for name, own in REGEXES.items() if own == regex)
        tokenizer = Tokenizer(merges.reshape(-1, 2), [token["content"] for token in found["added_tokens"]], pattern)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    except (ValueError, LookupError, TypeError, StopIteration) as error:
        raise UserError(f"{path} is no tokenizer that export_hf wrote: {one_line(error)}") from None
    if tokenizer_json(tokenizer) != found:
        raise UserError(f"{path} is no tokenizer that export_hf wrote: ours of its merges would have another file")
    return tokenizer


def open_tokenizer(path: Path, chat: bool = True) -> Tokenizer:
    """The tokenizer of a model folder, or of a tokenizer.json: our own where export_hf wrote it, else HFTokenizer, with
    `chat` as load_hf_tokenizer() takes it.
    """
    try:
        return read_tokenizer(path / "tokenizer.json" if path.is_dir() else path)
    except UserError:
        return load_hf_tokenizer(path, chat)
