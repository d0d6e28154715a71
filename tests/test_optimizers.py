"""Muon and AdamW against their slow twins, and sharded over 2 and 3 ranks against one."""

import pytest
import torch

from nanochat.adamw import EPS, AdamW
from nanochat.model import LanguageModel
from nanochat.muon import Muon, muon_update, orthogonalize
from tests.reference import optimizers as slow


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32)])
def test_orthogonalize_keeps_directions_and_evens_out_sizes(shape):
    """Polar Express lands singular values near 1; the update points where the exact polar factor does."""
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrices).float()
    for matrix, ours in zip(matrices, result, strict=True):
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        values = (u.mT @ ours @ vt.mT).diagonal()[s > 0.01 * s.norm()]  # what became of each direction that is not tiny
        assert values.min() > 0.6 and values.max() < 1.25
        exact = slow.polar_factor(matrix.double()).float()
        assert torch.nn.functional.cosine_similarity(ours.flatten(), exact.flatten(), dim=0) > 0.98


def test_muon_update_has_the_size_of_an_orthogonal_matrix():
    grad = torch.randn(2, 48, 24, generator=torch.Generator().manual_seed(0)) * 1e-5
    momentum, second = torch.zeros(2, 48, 24), torch.zeros(2, 48, 1)
    update = muon_update(grad, momentum, second, momentum=0.9, beta2=0.9, dtype=torch.bfloat16)
    torch.testing.assert_close(update.norm(dim=(1, 2)), torch.full((2,), 24**0.5), rtol=0.1, atol=0)
    torch.testing.assert_close(momentum, 0.1 * grad)


def test_muon_survives_a_zero_gradient():
    p = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = Muon([("p", p)], lr=0.1)
    assert optimizer.reduce_gradients(1.0) == 0
    optimizer.step()
    assert torch.equal(p.data, torch.ones(4, 4))


def test_cautious_decay_leaves_weights_alone_that_the_update_grows():
    p = torch.nn.Parameter(torch.full((4, 4), 2.0))
    p.grad = -torch.eye(4)  # the step adds to the diagonal; zeros elsewhere count as agreeing
    optimizer = Muon([("p", p)], lr=0.1, momentum=0.0, weight_decay=1.0)
    optimizer.reduce_gradients(1.0)
    optimizer.step()
    assert (p.diagonal() > 2.0).all()
    assert (p.data[~torch.eye(4, dtype=torch.bool)] < 2.0).all()


def test_adamw_matches_the_paper_and_torch():
    g = torch.Generator().manual_seed(0)
    start, grads = torch.randn(5, 7, generator=g), [torch.randn(5, 7, generator=g) for _ in range(6)]
    ours, p = (torch.nn.Parameter(start.clone()) for _ in range(2))
    mine = AdamW([{"params": [("p", ours)], "lr": 0.01, "weight_decay": 0.1}], (0.8, 0.95))
    theirs = torch.optim.AdamW([p], lr=0.01, betas=(0.8, 0.95), eps=EPS, weight_decay=0.1)
    for grad in grads:
        ours.grad, p.grad = grad.clone(), grad
        mine.reduce_gradients(1.0)
        mine.step()
        theirs.step()
    torch.testing.assert_close(ours.data, p.data)
    torch.testing.assert_close(
        ours.detach().double(),
        slow.adamw(start.double(), [x.double() for x in grads], 0.01, 0.8, 0.95, 1e-10, 0.1),
        rtol=1e-5,
        atol=1e-6,
    )


def test_one_adamw_for_everything_is_torchs_step_for_step():
    """Matrices and embedding decay, vectors do not; torch's is given the two groups and our epsilon."""

    def make():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Embedding(9, 6), torch.nn.Linear(6, 4), torch.nn.LayerNorm(4))

    ours, theirs = make(), make()
    (optimizer,) = LanguageModel.setup_adamw(ours, lr=0.01, weight_decay=0.1, betas=(0.9, 0.99))
    decayed, kept = ([p for p in theirs.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False))
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99), eps=EPS, fused=True)
    assert len(decayed) == 2 and len(kept) == 3
    for step in range(20):
        tokens = torch.arange(9).roll(step)[:5]
        for model in (ours, theirs):
            (model(tokens) - tokens[:, None].float().sin()).square().sum().backward()  # a norm alone has no gradient
        optimizer.reduce_gradients(1.0)
        optimizer.step()
        reference.step()
        reference.zero_grad()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_adam_moments_do_not_stall_in_low_precision():
    """nanochat keeps the second moment of bf16 embeddings in bf16: from 1.0 towards 0.5 it stops at 0.89
    (beta2 0.995).
    """
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    optimizer = AdamW([{"params": [("p", p)], "lr": 0.0}], betas=(0.8, 0.995))
    part = optimizer.slices[0]
    assert part.exp_avg_sq.dtype == torch.float32
    part.exp_avg_sq.fill_(1.0)
    for _ in range(2000):
        p.grad = torch.full((4,), 0.5**0.5, dtype=torch.bfloat16)
        optimizer.reduce_gradients(1.0)
        optimizer.step()
    torch.testing.assert_close(part.exp_avg_sq, torch.full((4,), 0.5), rtol=0.01, atol=0)


def test_a_missing_gradient_counts_as_zeros():
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = AdamW([{"params": [("p", p), ("q", q)], "lr": 0.1}])
    p.grad = torch.ones(3)
    assert optimizer.reduce_gradients(1.0) == 3
    optimizer.step()
    assert (p < 1).all() and (q == 1).all() and p.grad is None


def test_state_round_trips():
    def make():
        params = [(f"m{i}", torch.nn.Parameter(torch.randn(4, 6))) for i in range(3)]
        return [Muon(params), AdamW([{"params": [("e", torch.nn.Parameter(torch.randn(5)))]}])]

    def step(optimizers):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.randn_like(p)
            optimizer.reduce_gradients(2.0)
            optimizer.step()

    first, second = make(), make()
    step(first)
    state = {name: tensor.clone() for optimizer in first for name, tensor in optimizer.full_state()}
    for optimizer in second:
        optimizer.load_full_state(state.__getitem__)
    again = {name: tensor for optimizer in second for name, tensor in optimizer.full_state()}
    assert state.keys() == again.keys() and len(state) == 3 * 2 + 1 + 2
    assert all(torch.equal(state[name], again[name]) for name in state)
