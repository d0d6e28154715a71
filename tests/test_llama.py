"""Llama: against transformers' own class, and through the engine."""

import dataclasses

import pytest
import torch

from nanochat import llama
from nanochat.common import UserError
from nanochat.engine import Engine, Sampling
from nanochat.llama import LlamaConfig, from_hf, to_hf
from nanochat.model import build_model
from tests.test_gpt import CPU, initialised, small_model

SIZES = {"sequence_len": 96, "vocab_size": 300, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
SMALL = LlamaConfig(**SIZES, n_hidden=160, rope_base=5000.0)
TIED = dataclasses.replace(SMALL, tied=True)
IDX = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(0))


def theirs_of(config: LlamaConfig):
    """transformers' model of that shape, with random weights."""
    transformers = pytest.importorskip("transformers")
    sizes = {theirs: getattr(config, ours) for ours, theirs in llama.SIZES.items()}
    rope = {"rope_type": "default", "rope_theta": config.rope_base}
    ends = {"bos_token_id": 0, "eos_token_id": None}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, rope_parameters=rope, **ends)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model


def ours_of(theirs):
    """Our model with transformers' weights."""
    config, weights = from_hf(theirs.config.to_dict(), theirs.state_dict())
    model = build_model(config, CPU)
    head = {"lm_head.weight": weights["wte.weight"]} if config.tied else {}
    model.load_state_dict(weights | head)
    return model


@pytest.mark.parametrize("config", [SMALL, TIED], ids=["untied", "tied"])
def test_logits_are_those_of_transformers(config):
    theirs = theirs_of(config)
    ours = ours_of(theirs)
    assert ours.config == config
    with torch.no_grad():
        torch.testing.assert_close(ours(IDX), theirs(IDX).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [SMALL, TIED], ids=["untied", "tied"])
def test_a_model_that_leaves_has_the_same_logits_in_transformers(config):
    ours = small_model(config)
    about, tensors = to_hf(ours)
    theirs = theirs_of(config)
    theirs.load_state_dict(tensors, strict=not config.tied)
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDX).logits, ours(IDX), atol=1e-4, rtol=1e-4)
    again, weights = from_hf(about, tensors)
    assert again == config and weights.keys() == dict(ours.named_parameters()).keys()
    assert all(torch.equal(weights[name], p) for name, p in ours.named_parameters())


def test_generation_is_that_of_transformers():
    theirs = theirs_of(SMALL)
    prompt = [5, 17, 100, 3]
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[0, 4:].tolist()
    assert list(Engine(ours_of(theirs)).generate(prompt, Sampling(max_tokens=64, temperature=0))) == expected


def test_the_engine_says_what_the_full_pass_does():
    model, prompt = small_model(SMALL), IDX[0, :20].tolist()
    said = list(Engine(model).generate(prompt, Sampling(temperature=0)))
    with torch.no_grad():
        assert said == model(torch.tensor([prompt + said]))[0, 19:-1].argmax(-1).tolist()


def test_the_future_does_not_leak():
    model, changed = small_model(SMALL), IDX.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 300
    torch.testing.assert_close(model(IDX)[:, :20], model(changed)[:, :20])


@pytest.mark.parametrize("config", [SMALL, TIED], ids=["untied", "tied"])
def test_every_weight_is_initialised_and_in_one_group(config):
    model = initialised(config)
    matrices, embedding, rest = model.sort_parameters()
    assert len(matrices) == 14 and len(embedding) == (not config.tied) and len(rest) == 6
    head = 300 * 64
    assert model.num_matmul_params() == head + sum(p.numel() for p in matrices.values())


def test_what_cannot_be_built_or_loaded_is_refused():
    with pytest.raises(UserError, match="--kv-heads=3 must divide"):
        dataclasses.replace(SMALL, n_kv_head=3)
    about, _ = to_hf(small_model(SMALL))
    with pytest.raises(UserError, match="rope_type='llama3'; here it can only be 'default'"):
        from_hf({**about, "rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, {})
    with pytest.raises(UserError, match="hidden_act='gelu'; here it can only be 'silu'"):
        from_hf({**about, "hidden_act": "gelu"}, {})
