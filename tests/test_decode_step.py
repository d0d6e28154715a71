"""The compiled decoding step against the eager one, and everything that may keep it from being made."""

import dataclasses
import os
import sys

import pytest
import torch

from nanochat import decode_step
from nanochat.compute import can_compile
from nanochat.decode_step import artefact, check, compile_decoding, dot_products
from nanochat.engine import Engine, KVCache, Sampling
from nanochat.gpt import GPTConfig
from tests import test_fast, test_gpt2, test_llama
from tests.test_gpt import SMALL, small_model

WINDOWS = GPTConfig(**{**SMALL.__dict__, "n_layer": 2, "window_pattern": "SL"})
LLAMA = dataclasses.replace(test_llama.SMALL, sequence_len=32)


def eager(engine: Engine, rows: int, path=None):
    return engine.eager_step


def off_by_one(engine: Engine, rows: int, path=None):
    """A step that feeds the right tokens in the wrong places."""
    return lambda idx, before, positions, keys, values: engine.eager_step(idx, before, positions ^ 1, keys, values)


@pytest.fixture
def compiler(base_dir, monkeypatch):
    """A compiler and a loader that take no time: the "compiled" step is the eager one."""
    monkeypatch.setattr(decode_step, "can_compile", lambda device: True)
    monkeypatch.setattr(decode_step, "run_compiler", lambda engine, rows, path: made(path))
    monkeypatch.setattr(decode_step, "load", eager)


def made(path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"machine code")


@pytest.mark.soak
@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no C++ compiler")
@pytest.mark.parametrize(
    "config",
    [WINDOWS, test_fast.SMALL, test_gpt2.SMALL, test_gpt2.ALIBI, LLAMA],
    ids=lambda config: type(config).__name__,
)
def test_the_compiled_step_equals_the_eager_one(base_dir, monkeypatch, config):
    """A real compilation, a minute on a busy machine. Rows of different lengths, grouped heads, a ring that goes round
    (16 tokens and a chunk of 4, in a context of 32); and a second start compiles nothing.
    """
    monkeypatch.setattr("nanochat.engine.CHUNK", 4)
    model, words = small_model(config), []
    engine = Engine(model)
    compile_decoding(engine, (2,), wait=True, say=words.append)
    assert engine.compiled.keys() == {2}, words
    caches = [KVCache(config, 2, 32, engine.model.device, engine.dtype) for _ in range(2)]
    steps = (engine.compiled[2], engine.eager_step)
    for p in range(30):  # rows of p + 1 and p // 2 + 1 tokens
        fed = torch.tensor([[p + 3, 2 * p], [p + 1, p], [p, p // 2]])
        for cache in caches:
            cache.reserve(p + 1)
        with torch.inference_mode():
            logits = [f(*fed, cache.keys, cache.values) for f, cache in zip(steps, caches, strict=True)]
        torch.testing.assert_close(*logits, atol=1e-4, rtol=0)
    prompts, greedily = [[7, 3, 250, 9, 11], [5]], Sampling(temperature=0)
    assert engine.generate_batch(prompts, greedily) == Engine(model).generate_batch(prompts, greedily)
    monkeypatch.setattr(decode_step, "run_compiler", lambda *asked: pytest.fail("it was compiled again"))
    again = Engine(small_model(config))
    compile_decoding(again, (2,), wait=True, say=words.append)
    assert again.compiled.keys() == {2} and not words


@pytest.mark.parametrize("rows", [1, 8, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dot_products_are_a_linear_layer(rows, dtype):
    x, weight, bias = torch.randn(rows, 1, 16).to(dtype), torch.randn(5, 16).to(dtype), torch.randn(5).to(dtype)
    for b in (None, bias):
        torch.testing.assert_close(
            dot_products(x, weight, b), torch.nn.functional.linear(x, weight, b), atol=0.05, rtol=0.02
        )


def test_steps_come_one_by_one_in_a_new_dict(compiler):
    """The thread that decodes iterates over engine.compiled: a dict that grows meanwhile raises there."""
    engine = Engine(small_model())
    before = engine.compiled
    compile_decoding(engine, (1, 8), wait=True)
    assert engine.compiled.keys() == {1, 8} and not before


def test_a_wrong_step_is_refused_and_made_anew(compiler, monkeypatch):
    """A miscompiled step would say nonsense without an error. Its artefact goes, so that the next start tries again."""
    engine, words = Engine(small_model()), []
    monkeypatch.setattr(decode_step, "load", off_by_one)
    compile_decoding(engine, (4,), wait=True, say=words.append)
    assert not engine.compiled and not artefact(engine, 4).exists()
    assert len(words) == 1 and "differ by" in words[0] and "\n" not in words[0]


def test_a_step_that_leaves_other_keys_is_refused():
    engine = Engine(small_model())

    def forgetful(idx, before, positions, keys, values):
        return engine.eager_step(idx, before, positions, [k.clone() for k in keys], values)

    with pytest.raises(RuntimeError, match="differ by"):
        check(engine, 2, forgetful)


@pytest.mark.parametrize("program", ["/bin/false", "/no/such/python"])
def test_a_compiler_that_dies_leaves_the_eager_step(base_dir, monkeypatch, program):
    engine, words = Engine(small_model()), []
    monkeypatch.setattr(decode_step, "can_compile", lambda device: True)
    monkeypatch.setattr(sys, "executable", program)
    compile_decoding(engine, (1,), wait=True, say=words.append)
    assert not engine.compiled and len(words) == 1 and words[0].startswith("decoding is not compiled")


def test_a_base_directory_that_cannot_be_written_leaves_the_eager_step(tmp_path, compiler, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file"))
    engine, words = Engine(small_model()), []
    compile_decoding(engine, (1,), wait=True, say=words.append)
    assert not engine.compiled and len(words) == 1 and "\n" not in words[0]


def test_without_a_compiler_one_line_says_so(monkeypatch):
    engine, words = Engine(small_model()), []
    monkeypatch.setenv("PATH", os.devnull)
    assert compile_decoding(engine, wait=True, say=words.append) is None
    assert not engine.compiled and len(words) == 1 and "g++" in words[0]


def test_an_artefact_serves_all_weights_of_a_shape_and_nothing_else(base_dir, monkeypatch):
    engine = Engine(small_model())
    other = small_model()
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    assert artefact(Engine(other), 1) == artefact(engine, 1)
    names = {artefact(engine, 1), artefact(engine, 2), artefact(Engine(small_model(), dtype=torch.bfloat16), 1)}
    names.add(artefact(Engine(small_model(WINDOWS)), 1))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    names.add(artefact(engine, 1))
    assert len(names) == 5


def test_a_right_step_passes():
    engine = Engine(small_model(WINDOWS))
    check(engine, 3, engine.eager_step)
