"""GPT-2 and ALiBi: against transformers' own class, against slow twins, and through the engine."""

import dataclasses
import math

import pytest
import torch

from nanochat import gpt2
from nanochat.attention import causal_attention
from nanochat.common import UserError
from nanochat.engine import Engine, Sampling
from nanochat.gpt2 import GPT2Config, alibi_channels, alibi_slopes, append, from_hf, plain_loss_slice, to_hf
from nanochat.model import HeadLoss, build_model
from tests.test_gpt import CPU, initialised, small_model

SMALL = GPT2Config(sequence_len=32, vocab_size=300, n_layer=2, n_head=4, n_embd=64)
ALIBI = dataclasses.replace(SMALL, positions="alibi")
IDX = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(0))


def theirs_of(config: GPT2Config):
    """transformers' model of that shape, with random weights, biases too."""
    transformers = pytest.importorskip("transformers")
    sizes = {"n_positions": config.sequence_len, "vocab_size": config.vocab_size, "n_embd": config.n_embd}
    ends = {"bos_token_id": 0, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, n_layer=config.n_layer, n_head=config.n_head, **ends)
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model


def ours_of(theirs):
    """Our model with transformers' weights."""
    config, weights = from_hf(theirs.config.to_dict(), theirs.state_dict())
    model = build_model(config, CPU)
    model.load_state_dict({**weights, "lm_head.weight": weights["wte.weight"]})
    return model


@pytest.mark.parametrize(
    ("name", "count"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_published_sizes(name, count):
    layers, heads, width = gpt2.SIZES[name]
    with torch.device("meta"):
        model = GPT2Config(n_layer=layers, n_head=heads, n_embd=width).build()
    assert model.num_params() == count
    assert model.num_matmul_params() == 50257 * width + 12 * layers * width**2
    matrices, embedding, rest = model.sort_parameters()
    assert len(matrices) == 6 * layers and not embedding and {"wte.weight", "wpe.weight"} <= rest.keys()


def test_the_dial_gives_gpt2_at_depth_12():
    assert gpt2.config_from_depth(12, 50257, 1024) == GPT2Config()


def test_logits_are_those_of_transformers():
    theirs = theirs_of(SMALL)
    ours = ours_of(theirs)
    assert ours.config == SMALL
    with torch.no_grad():
        torch.testing.assert_close(ours(IDX), theirs(IDX).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_a_model_that_leaves_has_the_same_logits_in_transformers(bias):
    ours = small_model(dataclasses.replace(SMALL, bias=bias))
    config, tensors = to_hf(ours)
    theirs = theirs_of(SMALL)
    assert theirs.load_state_dict(tensors, strict=False).missing_keys == ["lm_head.weight"]  # tied
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDX).logits, ours(IDX), atol=1e-4, rtol=1e-4)
    again, weights = from_hf(config, tensors)
    assert again == SMALL
    assert all(torch.equal(weights[name], p) for name, p in ours.named_parameters())


def test_what_is_not_gpt2_is_refused_by_name():
    with pytest.raises(UserError, match="activation_function='relu'; here it can only be 'gelu_new'"):
        from_hf({"activation_function": "relu"}, {})
    with pytest.raises(UserError, match="alibi cannot leave"):
        to_hf(small_model(ALIBI))


def test_generation_is_that_of_transformers():
    theirs = theirs_of(dataclasses.replace(SMALL, sequence_len=96))
    prompt = [5, 17, 100, 3]
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[0, 4:].tolist()
    assert list(Engine(ours_of(theirs)).generate(prompt, Sampling(max_tokens=64, temperature=0))) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_loss_is_cross_entropy(dtype):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=g) * 2 for n in (40, 50))
    targets, weights = torch.randint(-1, 50, (40,), generator=g), torch.rand(40, generator=g)
    hidden, weight = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    loss, losses, _ = HeadLoss.apply(hidden, weight, targets, weights, plain_loss_slice)
    loss.backward()
    h64, w64 = (x.detach().double().requires_grad_() for x in (hidden, weight))
    each = torch.nn.functional.cross_entropy(h64 @ w64.T, targets, ignore_index=-1, reduction="none")
    (each * weights).sum().backward()
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.15}
    torch.testing.assert_close(losses.double(), each.detach(), **close)
    torch.testing.assert_close(hidden.grad.double(), h64.grad, **close)
    torch.testing.assert_close(weight.grad.double(), w64.grad, **close)


@pytest.mark.parametrize(
    "config", [SMALL, ALIBI, dataclasses.replace(SMALL, bias=False)], ids=["gpt2", "alibi", "bare"]
)
def test_init_leaves_nothing_uninitialised(config):
    model = initialised(config)
    assert model.blocks[0].attn.c_proj.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert model(IDX[:, :-1], IDX[:, 1:]).item() == pytest.approx(math.log(300), abs=0.1)


def test_dropout_is_there_only_where_gradients_are_wanted():
    model = small_model(dataclasses.replace(SMALL, dropout=0.5))
    assert not torch.equal(model(IDX), model(IDX))
    with torch.no_grad():
        assert torch.equal(model(IDX), model(IDX))


# -----------------------------------------------------------------------------
# ALiBi


def test_slopes_are_the_papers():
    """Its figures for 8 heads, and those of the authors' code for numbers that are no power of two."""
    powers = {
        8: [1, 2, 3, 4, 5, 6, 7, 8],
        6: [2, 4, 6, 8, 1, 3],
        12: [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5],
    }
    for heads, expected in powers.items():
        assert alibi_slopes(heads, CPU).tolist() == pytest.approx([2**-power for power in expected], rel=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 0.06)])
def test_channels_are_the_bias_at_position_4096(dtype, tolerance):
    """The additive bias, up to what is the same for all keys of a query, of queries whose keys are far from the start;
    in bf16 as far as weights are more than e^-8 of the largest.
    """
    config = dataclasses.replace(ALIBI, sequence_len=4096, n_head=8)
    queries, keys = alibi_channels(torch.arange(4096), config, dtype)
    scores = (queries[:, -4:].float() @ keys.float().mT) * config.head_dim**-0.5  # (H, 4, 4096)
    ahead = torch.arange(4092, 4096)[:, None] - torch.arange(4096)
    expected = -alibi_slopes(8, CPU)[:, None, None] * ahead
    error = scores - expected
    error -= error[:, torch.arange(4), torch.arange(4092, 4096)][..., None]  # of the query's own key
    assert error[(expected > -8) & (ahead >= 0)].abs().max() < tolerance


def test_attention_is_that_with_an_additive_mask():
    """The slow twin adds -m (i - j) to each score."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 32, 16, generator=g) for _ in range(3))
    channels = alibi_channels(torch.arange(32), ALIBI, torch.float32)
    scaled = append(q * (ALIBI.head_dim / 16) ** 0.5, channels[0])
    ahead = torch.arange(32)[:, None] - torch.arange(32)
    bias = (-alibi_slopes(4, CPU)[:, None, None] * ahead).masked_fill(ahead < 0, -torch.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    padded = torch.nn.functional.pad(v, (0, 8))
    ours = causal_attention(scaled, append(k, channels[1]), padded, 32)
    torch.testing.assert_close(ours[..., :16], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [SMALL, ALIBI], ids=["learned", "alibi"])
def test_the_future_does_not_leak(config):
    model, changed = small_model(config), IDX.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 300
    torch.testing.assert_close(model(IDX)[:, :20], model(changed)[:, :20])
    assert not torch.allclose(model(IDX)[:, 20:], model(changed)[:, 20:])


@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(ALIBI, sequence_len=64)], ids=["learned", "beyond"])
def test_the_engine_says_what_the_full_pass_does(config):
    """With alibi also beyond the 32 tokens that the model could have been trained with: there is no table to end."""
    model = small_model(config)
    prompt = IDX[0, :20].tolist()
    said = list(Engine(model).generate(prompt, Sampling(temperature=0)))
    assert len(said) == config.sequence_len - 20
    with torch.no_grad():
        logits = model(torch.tensor([prompt + said]))[0, 19:-1]
    assert said == logits.argmax(-1).tolist()


def test_learned_positions_end_and_alibi_does_not():
    long = torch.randint(0, 300, (1, 48))
    with pytest.raises(UserError, match="48 tokens: this model has learned 32 positions"):
        small_model(SMALL).hidden(long, torch.float32)
    short, longer = small_model(ALIBI), dataclasses.replace(ALIBI, sequence_len=48)
    assert "wpe.weight" not in short.state_dict()
    model = build_model(longer, CPU)
    model.load_state_dict(short.state_dict())
    torch.testing.assert_close(model(long)[:, :32], short(long[:, :32]))
