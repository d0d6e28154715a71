"""The model: its sizes, its parts against slow twins, and the transformers class it claims to be."""

import pytest
import torch

from nanochat import attention
from nanochat.attention import causal_attention, causal_mask
from nanochat.common import UserError
from nanochat.configurator import read_block
from nanochat.gpt import GPT, GPTConfig, config_from_depth
from nanochat.model import ARCHITECTURES, SOFTCAP, HeadLoss, build_model, choose_config, head_loss_slice
from tests.reference import attention as slow
from tests.tiny import ROOT

CPU = torch.device("cpu")
SMALL = GPTConfig(sequence_len=32, vocab_size=300, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SSL")


def small_model(config: GPTConfig = SMALL) -> GPT:
    """A small model with nothing left at zero, so that every weight matters."""
    model = build_model(config, CPU, seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model


@pytest.mark.parametrize(
    ("depth", "width", "heads", "millions"),
    # 2 V C + 12 C^2 per layer, by hand, V = 65,536
    [(4, 256, 4, 36.7), (12, 768, 6, 185.6), (20, 1280, 10, 561.0), (26, 1664, 13, 1082.0), (32, 2048, 16, 1879.0)],
)
def test_published_sizes(depth, width, heads, millions):
    config = config_from_depth(depth, 65536, 2048)
    assert (config.n_embd, config.n_head) == (width, heads)
    with torch.device("meta"):
        model = GPT(config)
    assert model.num_params() == 2 * 65536 * width + 12 * width**2 * depth
    assert model.num_params() / 1e6 == pytest.approx(millions, abs=0.06 if depth < 26 else 0.7)
    assert model.num_matmul_params() == model.num_params() - 65536 * width
    assert model.estimate_flops() == 6 * model.num_matmul_params() + 12 * depth * width * 2048


def test_windows_cost_fewer_flops():
    full, half = (config_from_depth(4, 512, 1024, window_pattern=pattern) for pattern in ("L", "S"))
    assert half.windows() == [512, 512, 512, 1024]  # the last layer always sees everything
    flops = [GPT(config).estimate_flops() for config in (full, half)]
    assert flops[0] - flops[1] == 3 * 12 * full.n_embd * 512


@pytest.mark.parametrize(
    "changes", [{"n_head": 5}, {"n_kv_head": 3}, {"window_pattern": "SX"}, {"window_pattern": ""}, {"n_layer": 0}]
)
def test_impossible_shapes_are_refused_in_one_line(changes):
    with pytest.raises(UserError) as error:
        GPTConfig(**{**SMALL.__dict__, **changes})
    assert "\n" not in str(error.value)


def test_a_setting_that_an_architecture_does_not_have_is_refused():
    assert choose_config("gpt", 2, 300, 32, kv_heads=1, window_pattern=None) == config_from_depth(
        2, 300, 32, kv_heads=1
    )
    with pytest.raises(UserError, match="--no-such=3: --arch=gpt has no such setting"):
        choose_config("gpt", 2, 300, 32, no_such=3)


@pytest.mark.parametrize("script", ["base_train", "plan"])
def test_every_architecture_can_be_asked_for(script):
    assert read_block(ROOT / "scripts" / f"{script}.py").settings["arch"].words == tuple(ARCHITECTURES)


def initialised(config):
    """Build as for a large model (on meta, then empty memory full of NaN): init_weights must write every parameter."""
    with torch.device("meta"):
        model = config.build()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    model.init_weights(seed=0)
    assert all(p.isfinite().all() for p in model.parameters())
    return model


def test_init_leaves_nothing_uninitialised():
    model = initialised(SMALL)
    loss = model(torch.zeros(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long))
    assert loss.item() == pytest.approx(torch.tensor(300.0).log().item(), abs=0.01)


@pytest.mark.parametrize("window", [1, 5, 12])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("block", [4, 5, 128])
def test_attention_equals_the_loop_over_everything(monkeypatch, window, kv_heads, block):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 12, 8, generator=g) for heads in (4, kv_heads, kv_heads))
    expected = slow.attention(q, k, v, causal_mask(12, 12, window, "cpu"))
    torch.testing.assert_close(causal_attention(q, k, v, window), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [300, 200])
def test_attention_in_blocks_equals_torchs_kernel(window):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 300, 16, generator=g) for heads in (4, 2, 2))
    mask = causal_mask(300, 300, window, "cpu")
    kernel = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(causal_attention(q, k, v, window), kernel, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [5, 1024 * 1024 // 64 + 3])  # one slice, and several with a shorter last one
def test_loss_in_slices_equals_the_dense_one(tokens):
    g = torch.Generator().manual_seed(0)
    vocab = 256 * 4
    model = GPT(GPTConfig(sequence_len=8, vocab_size=vocab, n_layer=1, n_head=1, n_kv_head=1, n_embd=8))
    model.init_weights(0)
    weight = (torch.randn(vocab, 8, generator=g) * 3).requires_grad_()
    hidden = (torch.randn(tokens, 8, generator=g) * 3).requires_grad_()
    targets = torch.randint(-1, vocab, (tokens,), generator=g)
    weights = torch.rand(tokens, generator=g)
    loss, losses, _ = HeadLoss.apply(hidden, weight, targets, weights, head_loss_slice)
    (2 * loss).backward()
    h64, w64 = (t.detach().double().requires_grad_() for t in (hidden, weight))
    reference = slow.loss(h64, w64, targets, weights.double())
    (2 * reference).backward()
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close((losses * weights).sum(), loss, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(hidden.grad.double(), h64.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(weight.grad.double(), w64.grad, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_likely_tokens_keep_their_gradient_in_bfloat16(compiled):
    """It was the sum of two halves near 1, rounded to bf16 each: 0 for most tokens above 0.998, so most of a chat."""
    g = torch.Generator().manual_seed(0)
    wanted = torch.tensor([0.5, 0.9, 0.99, 0.999, 0.9999]).repeat_interleave(8)
    n, vocab = len(wanted), 512
    logits = torch.randn(n, vocab, generator=g) - 3
    targets, rows = torch.randint(0, vocab, (n,), generator=g), torch.arange(n)
    logits[rows, targets] = -torch.inf
    odds = wanted / (1 - wanted) * (SOFTCAP * torch.tanh(logits / SOFTCAP)).exp().sum(-1)
    logits[rows, targets] = SOFTCAP * torch.atanh(odds.log() / SOFTCAP)
    hidden, weight = logits.bfloat16(), torch.eye(vocab).bfloat16()
    loss_slice = torch.compile(head_loss_slice) if compiled else head_loss_slice
    _, grad = loss_slice(hidden, weight, targets, torch.ones(n), True)

    exact = hidden.double().requires_grad_()
    capped = SOFTCAP * torch.tanh(exact / SOFTCAP)
    torch.nn.functional.cross_entropy(capped, targets, reduction="sum").backward()
    assert (capped.detach().softmax(-1)[rows, targets] - wanted).abs().max() < 0.02
    error = grad.double() - exact.grad
    assert (error.norm(dim=-1) < 0.01 * exact.grad.norm(dim=-1)).all()
    assert (error.sum(-1).abs() < 0.01 * exact.grad.abs().sum(-1)).all()


def test_reductions_agree_and_ignored_targets_count_nothing():
    model = small_model()
    idx = torch.randint(0, 300, (2, 9))
    inputs, targets = idx[:, :-1], idx[:, 1:].clone()
    targets[0, 3:] = -1
    losses = model(inputs, targets, loss_reduction="none")
    counted = targets >= 0
    assert (losses[~counted] == 0).all() and (losses[counted] > 0).all()
    torch.testing.assert_close(model(inputs, targets, loss_reduction="sum"), losses.sum())
    torch.testing.assert_close(model(inputs, targets), losses.sum() / counted.sum())
    nothing = model(inputs, torch.full_like(targets, -1))
    nothing.backward()
    assert nothing.item() == 0.0  # nanochat: 0 / 0 = NaN
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.soak)])
def test_compiled_parts_equal_eager_ones(dtype):
    torch._dynamo.reset()  # the graphs of tests before it, in the same process, count to the limit of 8
    idx = torch.randint(0, 300, (2, 33), generator=torch.Generator().manual_seed(0))
    results = []
    for compiled in (False, True):
        model = small_model()
        if compiled:
            model.compile_parts()
        model(idx[:, :-1], idx[:, 1:], dtype=dtype).backward()
        results.append([p.grad for p in model.parameters()])
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for eager, compiled in zip(*results, strict=True):
        assert (eager - compiled).norm() <= tolerance * eager.norm()


def test_the_future_does_not_leak():
    model = small_model()
    idx = torch.randint(0, 300, (1, 32))
    changed = idx.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 300
    torch.testing.assert_close(model(idx)[0, :20], model(changed)[0, :20])
    assert not torch.allclose(model(idx)[0, 20:], model(changed)[0, 20:])


def test_default_model_is_transformers_nanochat():
    """The promise that a default checkpoint exports without loss: same logits in transformers' own class."""
    transformers = pytest.importorskip("transformers")
    config = GPTConfig(sequence_len=32, vocab_size=300, n_layer=2, n_head=4, n_kv_head=2, n_embd=64)
    model = small_model(config)
    theirs = transformers.NanoChatForCausalLM(
        transformers.NanoChatConfig(
            vocab_size=300, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            bos_token_id=299, eos_token_id=299, pad_token_id=299,
        )
    ).eval()  # fmt: skip
    names = {"wte": "model.embed_tokens", "blocks": "model.layers", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    names |= {"attn.c_proj": "self_attn.o_proj"} | {f"attn.c_{kind}": f"self_attn.{kind}_proj" for kind in "qkv"}
    state = {}
    for name, tensor in model.state_dict().items():
        for ours, other in names.items():
            name = name.replace(ours, other)
        state[name] = tensor
    theirs.load_state_dict(state)
    idx = torch.randint(0, 300, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(model(idx), theirs(idx).logits, atol=1e-4, rtol=1e-4)
