"""CORE: prompts to the letter, the same answers as one item at a time, one line for what is damaged."""

import csv
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from nanochat import core_eval
from nanochat.common import UserError
from nanochat.compute import Compute
from nanochat.core_eval import CoreTask, GPTScorer, load_tasks, mean_centred, read_items, render_prompts, score_task
from nanochat.gpt import GPT, GPTConfig
from nanochat.hf_model import load_hf, start_token
from nanochat.tokenizer import Tokenizer
from tests.reference import core as slow
from tests.test_conversation import BYTES
from tests.test_gpt import small_model

CPU = Compute(torch.device("cpu"), torch.float32)
ANIMALS = "cat dog hen owl cow fox ant bee elk".split()
COLOURS = "red blue grey green".split()


def write_bundle(folder: Path) -> Path:
    """Three tasks, one of each kind, in the published layout; the texts are of different length."""
    rng = random.Random(3)
    choose, fill, say = [], [], []
    for i in range(16):
        animal, colours = rng.choice(ANIMALS), rng.sample(COLOURS, 4)
        query = f"Question: what does the {animal} " + "really " * (i % 5) + "look like?"
        choose.append({"query": query, "choices": colours[: 2 + i % 3], "gold": i % 2})
        contexts = [f"The {a} saw the {b} because the {a if k else b}" for k in (0, 1) for a, b in [("cat", animal)]]
        fill.append({"context_options": contexts, "continuation": f"was {colours[0]}.", "gold": i % 2})
        say.append({"context": f"Say {colours[0]} {1 + i % 3} times:  \n", "continuation": " ".join(colours[:1] * 2)})
    entries = []
    for label, kind, shots, rows in (
        ("choose", "multiple_choice", 2, choose),
        ("fill", "schema", 0, fill),
        ("say", "language_modeling", 3, say),
    ):
        path = folder / "eval_data" / "words" / f"{label}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        entries.append({"label": label, "dataset_uri": f"words/{label}.jsonl", "num_fewshot": [shots]})
        entries[-1]["icl_task_type"] = kind
    entries[0]["continuation_delimiter"] = "\nAnswer: "
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": entries}), encoding="utf-8")
    (folder / "eval_meta_data.csv").write_text(
        "Eval Task,Task Category,Random baseline\nchoose,words,50\nfill,words,50\nsay,words,0\n", encoding="utf-8"
    )
    return folder


@pytest.fixture
def tasks(tmp_path) -> list[CoreTask]:
    return load_tasks(write_bundle(tmp_path / "bundle"))


def model_of(sequence_len: int = 512, tokenizer: Tokenizer = BYTES, **sizes) -> GPT:
    sizes = {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 64, "window_pattern": "SL"} | sizes
    model = small_model(GPTConfig(sequence_len, tokenizer.get_vocab_size(), **sizes))
    with torch.no_grad():
        model.lm_head.weight *= 10  # choices are to differ by more than rounding
    return model


def train_a_little(model: GPT, tokenizer: Tokenizer, text: str, steps: int = 40) -> None:
    ids = torch.tensor(tokenizer.encode(text))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.stack([ids[i : i + 65] for i in torch.randint(len(ids) - 65, (8,), generator=generator).tolist()])
        model(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same_as_slow(task: CoreTask, model: GPT, tokenizer: Tokenizer, n: int = -1, **options) -> int:
    """Compare all answers; returns how many were right."""
    rows = slow.read_rows(task.path)
    score = score_task(task, GPTScorer(model, tokenizer, CPU, **options), CPU, n)
    for answer in score.answers:
        expected = slow.answer(model, tokenizer, rows, answer.index, task.kind, task.num_fewshot, task.delimiter)
        losses = [np.inf if loss is None else loss for loss in answer.losses]
        np.testing.assert_allclose(losses, expected["losses"], rtol=2e-6, atol=2e-6)
        assert answer.right == expected["right"], (task.label, answer, expected)
    return score.right


# -----------------------------------------------------------------------------
# Items and prompts


def items_of(kind: str, *rows: dict) -> list[core_eval.Item]:
    return [core_eval.parse_item(kind, row, i + 1) for i, row in enumerate(rows)]


def test_prompts_to_the_letter():
    """What nanochat renders: the rules on spaces and blank lines are its templates'."""
    task = CoreTask("t", "multiple_choice", Path(), 1, "\nAnswer: ", 0.5)
    items = items_of(
        task.kind, {"query": " Q1", "choices": ["a", "b "], "gold": 1}, {"query": "Q2\n", "choices": ["c"], "gold": 0}
    )
    assert render_prompts(task, items, 0) == ["Q2\n\nAnswer: c\n\n Q1\nAnswer: a", "Q2\n\nAnswer: c\n\n Q1\nAnswer: b "]
    task = CoreTask("t", "schema", Path(), 1, " ", 0.5)
    one = {"context_options": ["He", "She "], "continuation": "ran.", "gold": 0}
    assert render_prompts(task, items_of(task.kind, one, one), 1) == ["He ran.\n\nHe ran.", "He ran.\n\nShe  ran."]
    task = CoreTask("t", "language_modeling", Path(), 1, " ", 0.0)
    items = items_of(task.kind, {"context": " 1 2 \n", "continuation": "3"}, {"context": "5", "continuation": "6 "})
    assert render_prompts(task, items, 0) == ["5 6 \n\n1 2", "5 6 \n\n1 2 3"]
    assert render_prompts(task, items, 1) == ["1 2 3\n\n5", "1 2 3\n\n5 6 "]


def test_the_beginning_of_an_item_is_computed_once():
    rows = [core_eval.Row(5, i, np.array([7, 8, 9, *tail]), 3) for i, tail in enumerate(([1, 2], [3], [1, 4, 6], []))]
    units = core_eval.make_units(rows, 16, branches=True)
    fed, stem, asked = core_eval.lay_out(units)
    tokens, previous, positions, branches = fed[:, 0]
    assert previous.tolist() == [7, 7, 8, 9, 9, 1], "of a branch's first token it is the stem's last"
    assert stem == 3 and tokens.tolist() == [7, 8, 9, 1, 1, 4]
    assert positions.tolist() == [0, 1, 2, 3, 3, 4] and branches.tolist() == [0, 0, 0, 1, 3, 3]
    line, place, target, item, choice = asked.tolist()
    assert place == [2, 3, 2, 2, 4, 5] and target == [1, 2, 3, 1, 4, 6] and choice == [0, 0, 1, 2, 2, 2]
    assert line == [0] * 6 and item == [5] * 6, "and nothing is asked of the choice without tokens of its own"
    assert [len(unit.rows) for unit in core_eval.make_units(rows, 5, branches=True)] == [2, 1]
    assert [unit.stem for unit in core_eval.make_units(rows, 16, branches=False)] == [4, 3, 5]


# -----------------------------------------------------------------------------
# Answers


@pytest.mark.parametrize("context", [512, 96, 40, 8])
@pytest.mark.parametrize("batch_tokens", [4096, 300])
def test_answers_are_those_of_one_item_at_a_time(tasks, context, batch_tokens):
    """With windows and shared key/value heads; prompts whole, some cut, all cut, and continuations that are cut too."""
    for task in tasks:
        assert_same_as_slow(task, model_of(context), BYTES, batch_tokens=batch_tokens)


@pytest.mark.soak  # compiling takes half a minute
def test_a_compiled_model_gives_the_same_answers_from_few_graphs(tasks):
    """Batches of any shape, windows, and rows alone in their batch: below the limit after which torch stays eager."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = model_of(96)
    for batch_tokens in (1000, 1):
        for task in tasks:
            assert_same_as_slow(task, model, BYTES, batch_tokens=batch_tokens, compile=True)
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= torch._dynamo.config.recompile_limit


def test_cut_prompts_are_counted(tasks):
    for task in tasks:
        lengths = [max(len(p.encode()) for p in render_prompts(task, read_items(task), i)) + 1 for i in range(16)]
        limit = sorted(lengths)[7]
        score = score_task(task, GPTScorer(model_of(limit), BYTES, CPU), CPU)
        assert score.cut == sum(answer.cut for answer in score.answers) == sum(length > limit for length in lengths)


@pytest.fixture(scope="module")
def bundle(shared_data) -> list[CoreTask]:
    return [task for task in load_tasks(shared_data / "eval_bundle") if task.path.is_file()]


@pytest.fixture(scope="module")
def words(bundle) -> Tokenizer:
    return Tokenizer.train([task.path.read_text(encoding="utf-8") for task in bundle], 1024)


@pytest.mark.parametrize("trained", [False, True])
def test_published_tasks_are_answered_as_one_item_at_a_time(bundle, words, trained):
    """All kinds of text, with delimiters and examples as published; a trained model gets some continuations right."""
    model = model_of(384, words, n_layer=1)
    if trained:
        lines = "\n".join("\n".join(render_prompts(task, read_items(task), 0)) for task in bundle)
        train_a_little(model, words, lines)
    right = {task.label: assert_same_as_slow(task, model, words, 3) for task in bundle}
    assert not trained or sum(right.values()) > 0


def ask(folder: Path, model: GPT, *choices: str) -> core_eval.Answer:
    """The answer to one item, of which the second choice is right."""
    path = folder / "t.jsonl"
    path.write_text(json.dumps({"query": "x", "choices": choices, "gold": 1}) + "\n")
    task = CoreTask("t", "multiple_choice", path, 0, " ", 0.5)
    return score_task(task, GPTScorer(model, BYTES, CPU), CPU).answers[0]


def test_a_choice_without_tokens_of_its_own_never_wins(tmp_path):
    """In nanochat the mean of nothing is NaN, and the first choice wins with it."""
    answer = ask(tmp_path, model_of(), "ab", "abc")
    assert answer.losses[0] is None and answer.prediction == 1 and answer.right


def test_equal_choices_go_to_the_first_and_nan_to_none(tmp_path):
    model = model_of()
    answer = ask(tmp_path, model, "b", "a", "a")
    assert answer.prediction in (0, 1) and answer.losses[1] == pytest.approx(answer.losses[2], abs=1e-6)
    with torch.no_grad():
        model.wte.weight.fill_(torch.nan)
    answer = ask(tmp_path, model, "b", "a", "a")
    assert answer.prediction == -1 and not answer.right and answer.losses == [None] * 3


class Fake:
    """A scorer that does not compute: `loss(item, choice)`."""

    context, branches, batch_tokens, bos = 1 << 20, True, 1 << 20, BYTES.get_bos_token_id()

    def __init__(self, loss):
        self.loss, self.encode = loss, BYTES.encode

    def predict(self, batch):
        losses = [self.loss(item, choice) for item, choice in batch.asked[3:].T.tolist()]
        return torch.tensor(losses, dtype=torch.float32), torch.tensor(losses) == 0


def test_the_oracle_is_always_right_and_a_constant_answer_is_worth_nothing(tasks, bundle):
    for task in [*tasks, *bundle]:
        gold = [item.gold for item in read_items(task)]
        score = score_task(task, Fake(lambda i, choice: float(choice != gold[i])), CPU, 40)  # noqa: B023
        assert score.right == score.n == min(40, len(gold)) and score.centered == 1.0, task.label
    for task in tasks:
        assert score_task(task, Fake(lambda i, choice: 1.0 + choice), CPU).centered == 0.0


def test_the_order_of_choices_does_not_matter(tasks):
    task, scorer = tasks[0], GPTScorer(model_of(), BYTES, CPU)
    before = score_task(task, scorer, CPU).answers
    rows = [json.loads(line) for line in task.path.read_text().splitlines()]
    for row in rows:
        row["choices"].reverse()
        row["gold"] = len(row["choices"]) - 1 - row["gold"]
    task.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for a, b in zip(before, score_task(task, scorer, CPU).answers, strict=True):
        assert a.right == b.right and a.losses == pytest.approx(b.losses[::-1], abs=2e-6)


# -----------------------------------------------------------------------------
# The number


@pytest.mark.parametrize(("size", "core"), [("", 0.1139), ("-medium", 0.1849), ("-large", 0.2146), ("-xl", 0.2565)])
def test_published_accuracies_of_gpt2_give_its_published_core(shared_data, size, core):
    folder = shared_data / "eval_bundle"
    with open(folder / f"openai-community-gpt2{size}.csv", newline="") as file:
        rows = {row[0].strip(): row for row in csv.reader(file)}
    tasks = load_tasks(folder)
    scores = [(float(rows[task.label][1]), 0.0, task.baseline) for task in tasks]
    assert len(tasks) == 22 and mean_centred(scores)[0] == pytest.approx(core, abs=5e-5)
    for task, score in zip(tasks, scores, strict=True):
        assert mean_centred([score])[0] == pytest.approx(float(rows[task.label][2]), abs=2e-6)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("core.yaml", "schema", "scheme", "fill: icl_task_type scheme, expected multiple_choice"),
        ("core.yaml", "label: say", "label: sag", "not as published ('sag')"),
        ("core.yaml", "icl_tasks:", "icl_tasks: [", "not as published"),
        ("eval_meta_data.csv", "fill,words,50", "fill,words,half", "half"),
    ],
)
def test_a_damaged_bundle_is_one_line(tmp_path, name, old, new, message):
    path = write_bundle(tmp_path) / name
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError) as error:
        load_tasks(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "q", "choices": ["a"], "gold": 1}', "gold 1 of 1 choices"),
        ('{"query": "q", "choices": [1], "gold": 0}', ":17: no item of a multiple_choice task"),
        ('{"query": "q"', ":17: no item"),
        ('{"choices": ["a"], "gold": 0}', ":17: no item"),
        ("[]", ":17: no item"),
    ],
)
def test_a_damaged_item_is_one_line(tasks, line, message):
    with open(tasks[0].path, "a") as file:
        file.write(line)
    with pytest.raises(UserError) as error:
        read_items(tasks[0])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_bundle_with_byte_order_marks_and_blank_lines_is_read(tasks, tmp_path):
    """Its items were refused as none; the marks are what some editors put at the beginning of a file."""
    before = [item.continuations for item in read_items(tasks[0])]
    tasks[0].path.write_text(tasks[0].path.read_text() + "\n  \n")
    for path in (tasks[0].path, tmp_path / "bundle" / "core.yaml", tmp_path / "bundle" / "eval_meta_data.csv"):
        path.write_text("\ufeff" + path.read_text())
    assert load_tasks(tmp_path / "bundle") == tasks
    assert [item.continuations for item in read_items(tasks[0])] == before


def test_too_few_items_for_the_examples(tasks):
    tasks[2].path.write_text(tasks[2].path.read_text().split("\n")[0] + "\n")
    with pytest.raises(UserError, match="1 items; 3 examples and an item"):
        read_items(tasks[2])


# -----------------------------------------------------------------------------
# Hugging Face models


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def tiny_gpt2(transformers, folder: Path) -> Path:
    """A GPT-2 with random weights and a byte tokenizer, as a model folder."""
    from tokenizers import Tokenizer as Words
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Words(models.BPE({character: i for i, character in enumerate([*alphabet, "<|endoftext|>"])}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    config = transformers.GPT2Config(**sizes, bos_token_id=256, eos_token_id=256)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


class Plain:
    """A model of transformers, called as the reference calls ours."""

    def __init__(self, model):
        self.model, self.parameters = model, model.parameters

    def __call__(self, idx, dtype):
        return self.model(idx).logits


def test_a_model_folder_is_scored_by_the_same_rules(transformers, tasks, tmp_path):
    scorer = load_hf(tiny_gpt2(transformers, tmp_path / "gpt2"), CPU, batch_tokens=200)
    assert scorer.context == 64 and scorer.bos == 256 and scorer.picks
    words = scorer.tokenizer
    tokenizer = SimpleNamespace(
        get_bos_token_id=lambda: words.bos_token_id,
        encode=lambda texts, prepend: [[prepend, *words.encode(text)] for text in texts],
    )
    for task in tasks:
        rows = slow.read_rows(task.path)
        score = score_task(task, scorer, CPU, 9)
        assert score.cut > 0 or task.kind == "schema"
        for answer in score.answers:
            how = (task.kind, task.num_fewshot, task.delimiter, 64)
            expected = slow.answer(Plain(scorer.model), tokenizer, rows, answer.index, *how)
            assert answer.losses == pytest.approx(expected["losses"], abs=1e-5) and answer.right == expected["right"]


def test_a_folder_that_is_no_model_is_one_line(transformers, tmp_path):
    folder = tiny_gpt2(transformers, tmp_path / "gpt2")
    with pytest.raises(UserError, match="no config.json there"):
        load_hf(tmp_path, CPU)
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="transformers cannot open it"):
        load_hf(folder, CPU)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="can hold programs"):
        load_hf(folder, CPU)
    (folder / "config.json").write_text('{"model_type": "none of these"}')
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_hf(folder, CPU)
    assert "\n" not in str(error.value)


def test_a_model_says_how_much_it_takes_and_how_texts_begin():
    assert start_token(SimpleNamespace(bos_token_id=None, eos_token_id=5)) == 5
    with pytest.raises(UserError, match="neither a BOS nor an EOS"):
        start_token(SimpleNamespace(bos_token_id=None, eos_token_id=None))
