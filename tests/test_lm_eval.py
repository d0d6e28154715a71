"""lm-eval's three questions, answered as our own code answers them."""

import json
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from dev.lm_eval_adapter import Adapter, as_lm, cut_at
from nanochat.common import UserError
from nanochat.compute import Compute
from nanochat.engine import Engine, Sampling
from nanochat.gpt import GPTConfig
from nanochat.task_eval import evaluate_task
from nanochat.tokenizer import Tokenizer
from tests.reference.bpb import bits_and_bytes
from tests.test_gpt import small_model
from tests.test_task_eval import GREEDY, Letters

ONE = Compute(torch.device("cpu"), torch.float32)
TOKENIZER = Tokenizer.train(["the cat sat on the mat, and the dog too. Which? A B C D"] * 20, 285)
CONFIG = {"vocab_size": TOKENIZER.get_vocab_size(), "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 64}
MODEL = small_model(GPTConfig(sequence_len=96, **CONFIG))


class Request(NamedTuple):
    args: tuple[Any, ...]


@pytest.fixture
def adapter() -> Adapter:
    return Adapter(MODEL, TOKENIZER, ONE)


@pytest.mark.parametrize(
    ("context", "continuation"),
    [
        ("the cat", " sat on the mat"),
        ("the cat ", "sat"),
        ("", "the dog"),
        ("x", ""),
        ("the\n", "A"),
        ("the cat" * 60, " A"),
        ("dog" * 30, " mat" * 28),
    ],
)
def test_the_likelihood_of_a_continuation_equals_the_full_forward_pass(adapter, context, continuation):
    """Spaces at the end of a context belong to the continuation; a long context loses its beginning, counted."""
    stem = context.rstrip()
    whole = TOKENIZER.encode(context + continuation, prepend="<|bos|>")
    n = len(whole) - 1 - len(TOKENIZER.encode(stem))
    fed = whole[-97:]
    with torch.no_grad():
        log_p = MODEL(torch.tensor([fed[:-1]]))[0].log_softmax(-1)
    asked = range(len(fed) - n, len(fed))
    expected = sum(log_p[place - 1, fed[place]].item() for place in asked)
    greedy = all(log_p[place - 1].argmax() == fed[place] for place in asked)
    (value, is_greedy), again = adapter.loglikelihood([Request((context, continuation))] * 2)
    assert value == pytest.approx(expected, abs=1e-4) and is_greedy == greedy
    assert again == pytest.approx((value, is_greedy)) and adapter.cut == 2 * (len(whole) > 97)


def test_rolling_likelihoods_are_the_honest_bits_per_byte(adapter):
    texts = ["the cat sat", "", "and the dog too, " * 40]
    values = adapter.loglikelihood_rolling([Request((text,)) for text in texts])
    for text, value in zip(texts, values, strict=True):
        assert value == pytest.approx(
            -math.log(2) * bits_and_bytes(MODEL, TOKENIZER, text, 96, 48)[0], rel=1e-5, abs=1e-9
        )


def test_texts_end_at_the_first_stop_string(adapter):
    assert (
        cut_at("a, b.\nc", ["\n", ". ", "b"]) == "a, " and cut_at("abc", []) == "abc" and cut_at("abc", [""]) == "abc"
    )
    prompts = ["the cat", "and the dog too " * 20, "x"]
    options = {"until": ["\n"], "max_gen_toks": 12}
    requests = [Request((prompt, options if i else {**options, "max_gen_toks": 5})) for i, prompt in enumerate(prompts)]
    answers = adapter.generate_until(requests)
    assert adapter.cut == 1
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens, limit = TOKENIZER.encode(prompt, prepend="<|bos|>"), 12 if i else 5
        engine = Engine(MODEL, stop_tokens=[TOKENIZER.get_bos_token_id()])
        (said,), _ = engine.generate_batch([tokens[-(96 - limit) :]], Sampling(limit, 0))
        specials = {TOKENIZER.encode_special(name) for name in TOKENIZER.get_special_tokens()}
        assert specials.isdisjoint(said), "this model writes text alone"
        assert answer == cut_at(TOKENIZER.decode(said), ["\n"])


def chat_answers(adapter: Adapter) -> list[str]:
    """The letter with the highest likelihood, in a chat, of each problem."""
    answers = []
    for conversation in Letters():
        context = adapter.apply_chat_template(conversation["messages"][:-1])
        values = adapter.loglikelihood([Request((context, letter)) for letter in "ABCD"])
        answers.append("ABCD"[int(np.argmax([value for value, _ in values]))])
    return answers


def test_letters_in_a_chat_are_those_that_chat_eval_takes(adapter):
    ours = evaluate_task(Letters(), Engine(MODEL, TOKENIZER), ONE, GREEDY)
    assert [problem.answers for problem in ours.problems] == [[letter] for letter in chat_answers(adapter)]
    with pytest.raises(UserError, match="gen_prefix"):
        adapter.apply_chat_template([{"role": "user", "content": "x"}], add_generation_prompt=False)


def test_a_missing_lm_eval_names_the_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[eval\]'"):
        as_lm(MODEL, TOKENIZER, ONE)


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_finds_the_accuracy_that_chat_eval_finds(tmp_path, monkeypatch):
    """A task of lm-eval's own kind, made of the same questions, through all of its machinery."""
    pytest.importorskip("lm_eval", reason="pip install -e '.[eval]' first", exc_type=ImportError)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"q": item["messages"][0]["content"], "gold": "ABCD".index(item["messages"][1]["content"])}
        for item in Letters()
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "letters.yaml").write_text(
        f"""
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: [A, B, C, D]
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    lm = as_lm(MODEL, TOKENIZER, ONE)
    outcome = simple_evaluate(lm, tasks=["letters"], task_manager=manager, apply_chat_template=True, bootstrap_iters=0)
    ours = evaluate_task(Letters(), Engine(MODEL, TOKENIZER), ONE, GREEDY)
    assert outcome["results"]["letters"]["acc,none"] == pytest.approx(ours.accuracy)
    assert outcome["n-samples"]["letters"]["effective"] == len(rows) == ours.n
