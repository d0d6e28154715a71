"""Scripts that others wrote for nanochat: what they import from it and call is there and gives what they expect. Those
written for the package rustbpe are in test_rustbpe.py.
"""

import subprocess
import sys

import pytest

from nanochat.common import UserError
from nanochat.dataset import list_parquet_files, parquets_iter_batched
from tests import corpora, tiny

TOKENIZER = """
import os
from nanochat.common import get_base_dir
from nanochat.dataset import list_parquet_files, parquets_iter_batched
from nanochat.tokenizer import RustBPETokenizer

def text_iterator(max_chars, doc_cap=10_000):
    nchars = 0
    for batch in parquets_iter_batched(split="train"):
        for doc in batch:
            doc_text = doc[:doc_cap]
            nchars += len(doc_text)
            yield doc_text
            if nchars > max_chars:
                return

print(f"{len(list_parquet_files())} parquet files")
tokenizer = RustBPETokenizer.train_from_iterator(text_iterator(50_000), 320)
tokenizer_dir = os.path.join(get_base_dir(), "mine")
tokenizer.save(tokenizer_dir)
tokenizer = RustBPETokenizer.from_directory(tokenizer_dir)
text = "The old cat saw 3 birds. 你好"
assert tokenizer.decode(tokenizer(text)) == text
assert tokenizer.encode([text], prepend="<|bos|>", num_threads=8) == [[tokenizer.get_bos_token_id(), *tokenizer(text)]]
assert b"".join(map(tokenizer.decode_single_token_bytes, tokenizer(text))) == text.encode()
assert "<|bos|>" in tokenizer.get_special_tokens() and tokenizer.get_vocab_size() == 320
"""
COUNTING = """
import torch
from nanochat.dataset import parquets_iter_batched
from nanochat.tokenizer import get_token_bytes, get_tokenizer

tokenizer = get_tokenizer()
token_bytes = get_token_bytes(device="cpu")
assert token_bytes.shape == (tokenizer.get_vocab_size(),)
nbytes, world_size = 0, 3
for rank in range(world_size):
    for batch in parquets_iter_batched("val", start=rank, step=world_size):
        for ids in tokenizer.encode(batch, prepend=tokenizer.get_bos_token_id()):
            nbytes += token_bytes[torch.tensor(ids)].sum().item()
assert nbytes == sum(len(doc.encode()) for batch in parquets_iter_batched("val") for doc in batch) > 0
print(f"{nbytes} bytes to validate on")
"""
CHAT = """
from nanochat.tokenizer import get_tokenizer

tokenizer = get_tokenizer()
conversation = {"messages": [
    {"role": "user", "content": "2*3?"},
    {"role": "assistant", "content": [{"type": "python", "text": "2*3"}, {"type": "python_output", "text": "6"}]},
]}
ids, mask = tokenizer.render_conversation(conversation)
assert len(ids) == len(mask) and set(mask) == {0, 1} and all(type(i) is int for i in ids + mask)
assert tokenizer.render_conversation(conversation, max_tokens=7) == (ids[:7], mask[:7])
assistant_end = tokenizer.encode_special("<|assistant_end|>")
assert (ids[-1], mask[-1]) == (assistant_end, 1)
prompt = tokenizer.render_for_completion(conversation)
assert prompt == ids[: len(prompt)] and not any(mask[: len(prompt)])
print("trained:", tokenizer.decode([i for i, m in zip(ids, mask) if m == 1]))
print(tokenizer.visualize_tokenization(ids[:2], [0, 1], with_token_id=True))
print(tokenizer.visualize_tokenization(ids[:2], [0, 1]))
"""
RED, GREEN, GREY, END = "\033[91m", "\033[92m", "\033[90m", "\033[0m"


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (TOKENIZER, "2 parquet files\n"),
        (COUNTING, " bytes to validate on\n"),
        (
            CHAT,
            "trained: <|python_start|>2*3<|python_end|><|assistant_end|>\n"
            f"{RED}<|bos|>{END}{GREY}(311){END}|{GREEN}<|user_start|>{END}{GREY}(312){END}\n"
            f"{RED}<|bos|>{END}|{GREEN}<|user_start|>{END}\n",
        ),
    ],
    ids=["tokenizer", "counting", "chat"],
)
def test_a_script_for_nanochat_runs(own_home, tmp_path, script, says):
    file = tmp_path / "script.py"
    file.write_text(script)
    env = tiny.environment(own_home)
    result = subprocess.run([sys.executable, file], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(says)


def test_parquet_files_are_listed_and_read_in_order(base_dir, tmp_path, monkeypatch):
    """nanochat's last file is its validation; row groups are dealt out to ranks, no document twice."""
    for number in range(3):
        corpora.write_parquet(tmp_path / "in" / f"{number}.parquet", corpora.words(f"{number}", 5))
    corpora.write_parquet(tmp_path / "in" / "val.parquet", corpora.words("val", 4))
    corpus = corpora.run_dataset(monkeypatch, source="folder", path=str(tmp_path / "in"))
    assert list_parquet_files() == [str(path) for path in (*corpus.train, *corpus.val)]
    assert [path.rpartition("/")[2] for path in list_parquet_files(tmp_path / "in")] == [
        *("0.parquet", "1.parquet", "2.parquet"),
        "val.parquet",
    ]
    whole = [text for batch in parquets_iter_batched("train") for text in batch]
    assert whole == corpora.texts_of(corpus.train) and len(whole) == 15
    dealt = [text for rank in range(2) for batch in parquets_iter_batched("train", rank, 2) for text in batch]
    assert sorted(dealt) == sorted(whole)
    assert [len(batch) for batch in parquets_iter_batched("val")] == [4]
    corpora.run_dataset(monkeypatch, source="folder", path=str(tmp_path / "in"), name="more")
    with pytest.raises(UserError, match="several corpora"):
        parquets_iter_batched("train")
    assert len(list(parquets_iter_batched("val", corpus="more"))) == 1


def test_a_script_without_a_corpus_is_told_the_command(base_dir):
    with pytest.raises(UserError, match="get one with: python -m nanochat.dataset"):
        list_parquet_files()
