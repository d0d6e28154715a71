"""Muon for the matrices inside the blocks, on any number of ranks: momentum whose update is made orthogonal.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces a matrix's momentum U S V^T by U V^T, the step of
the steepest descent in the spectral norm: every direction the gradient points to moves equally far. Here with Polar
Express (arXiv 2505.16932) instead of Newton-Schulz, NorMuon's row-wise variance reduction (arXiv 2510.05491) and
cautious weight decay (arXiv 2510.12402).

Ranks: matrices of one shape are stacked, and dealt out whole. Each rank gets the summed gradients of those it owns,
makes their updates, and every rank applies all of them to what it holds (after ZeRO, arXiv 1910.02054). What one stack
sends travels while the next one is prepared or updated. State is about 1/N per rank. --shard changes only the way that
gradients and updates take (sharding.py).
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from nanochat.sharding import UnderWay, all_gather, compute_device, deal_matrices, local

# Five quintic steps x <- a x + b x^3 + c x^5 on the singular values, optimal in sequence for values in [1e-3, 1] (Polar
# Express, with its safety factor of 1.01 and 2 % of cushion). The later ones converge fastest near 1.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """U V^T, in dtype, for each of `matrices` = U S V^T (K, M, N): the nearest semi-orthogonal matrix.

    Approximate on purpose: singular values end between about 0.7 and 1.2, small ones (below 1e-3 of the Frobenius norm)
    lower. Momentum averages this rescaling of directions out; five more digits would cost as much again for nothing.
    """
    tall = matrices.size(-2) > matrices.size(-1)
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT  # (K, M, M) on the short side
        # a x + (b gram + c gram^2) x; baddbmm adds inside the matmul: a quarter less time than written out, on CPU
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def muon_update(
    grad: Tensor, momentum_buffer: Tensor, second_moment: Tensor, momentum: float, beta2: float, dtype: torch.dtype
) -> Tensor:
    """The direction in which matrices (K, M, N) step, in fp32. momentum_buffer (K, M, N) and second_moment are updated:
    NorMuon's running mean square per row (K, M, 1), or per column (K, 1, N) of wide matrices. Dividing by its root
    evens out rows that always move far; the total norm is put back, so the learning rate keeps its meaning.
    """
    momentum_buffer.lerp_(grad, 1 - momentum)
    update = orthogonalize(grad.lerp(momentum_buffer, momentum), dtype).float()  # Nesterov
    reduced = -1 if second_moment.size(-1) == 1 else -2
    second_moment.lerp_(update.square().mean(dim=reduced, keepdim=True), 1 - beta2)
    before = update.norm(dim=(-2, -1), keepdim=True)
    update = update * second_moment.clamp(min=1e-10).rsqrt()
    return update * (before / update.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10))


class Stack:
    """All matrices of one shape (M, N), and this rank's share of their state: that of `per_rank` whole matrices, where
    the last ranks may have zeros for some.
    """

    def __init__(self, members: dict[str, Tensor]):
        self.names, self.params = list(members), list(members.values())
        p = self.params[0]
        self.way, self.device = deal_matrices(p), compute_device(p)
        self.per_rank = -(-len(members) // self.way.world_size)
        self.momentum_buffer = torch.zeros((self.per_rank, *p.shape), device=p.device)
        per_row = self.momentum_buffer[:, :, :1] if p.size(0) >= p.size(1) else self.momentum_buffer[:, :1, :]
        self.second_moment = per_row.clone()  # (per_rank, M, 1) or (per_rank, 1, N)
        self.grad: Tensor | None = None  # (per_rank, M, N), from reduce_gradients() to step()

    def own_names(self) -> list[str]:
        """The matrices that this rank owns."""
        return self.names[self.way.rank * self.per_rank :][: self.per_rank]

    def reduce(self) -> UnderWay:
        """Begin to bring each matrix's gradient to its owner, and drop it here; a missing one counts as zeros."""
        grads = [local(p.grad) if p.grad is not None else torch.zeros_like(local(p)) for p in self.params]
        padding = [torch.zeros_like(grads[0])] * (self.per_rank * self.way.world_size - len(grads))
        stacked = torch.stack(grads + padding)
        for p in self.params:
            p.grad = None  # there is a copy now
        return self.way.reduce(stacked.to(self.device))

    def send(self, momentum: float, beta2: float, dtype: torch.dtype) -> UnderWay:
        """Turn the gradients that this rank owns into updates, and begin to bring these to where they are applied: (all
        matrices and padding, rows held, N).
        """
        assert self.grad is not None, "call reduce_gradients() first"
        momentum_buffer, second_moment = self.momentum_buffer.to(self.device), self.second_moment.to(self.device)
        update = muon_update(self.grad.to(self.device), momentum_buffer, second_moment, momentum, beta2, dtype)
        self.grad = None
        self.momentum_buffer.copy_(momentum_buffer)  # itself, unless the state lives in the host's memory
        self.second_moment.copy_(second_moment)
        return self.way.send(update)

    def apply(self, updates: Tensor, lr: float, weight_decay: float) -> None:
        """Step by lr times the updates, after a cautious decay: only of weights that the update shrinks anyway. A tall
        matrix steps sqrt(rows / columns) further, so that its output changes as much as a square one's.
        """
        rows, columns = self.params[0].shape
        lr *= max(1.0, rows / columns) ** 0.5
        for p, update in zip(map(local, self.params), updates, strict=False):  # the padding comes last
            update = update[: p.size(0)].to(p.device)
            if weight_decay:
                p -= p * (update * p >= 0) * (lr * weight_decay)
            p.sub_(update, alpha=lr)


class Muon(torch.optim.Optimizer):
    """Muon over (name, matrix) pairs. Each step: reduce_gradients(divisor) on every rank, then step().

    The one group's lr, momentum and weight_decay may be set between steps. `dtype` is that of orthogonalize(): bf16 is
    enough, but turns a gradient's last bit into the loss's fifth digit, so a run that computes in fp32 asks for fp32.
    """

    def __init__(
        self,
        named_params: Iterable[tuple[str, Tensor]],
        lr: float = 0.02,
        momentum: float = 0.95,
        beta2: float = 0.9,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ):
        named = list(named_params)
        assert all(p.ndim == 2 for _, p in named), "Muon is for matrices"
        defaults = {"lr": lr, "momentum": momentum, "beta2": beta2, "weight_decay": weight_decay}
        super().__init__([p for _, p in named], defaults)
        shapes = dict.fromkeys(p.shape for _, p in named)
        self.dtype = torch.float32 if dtype == torch.float16 else dtype  # most gradients are too small for fp16
        self.stacks = [Stack({name: p for name, p in named if p.shape == shape}) for shape in shapes]

    @torch.no_grad()
    def reduce_gradients(self, divisor: Tensor | float) -> Tensor:
        """Sum the gradients over ranks in a fixed order, divide once, keep this rank's share; a missing gradient counts
        as zeros. Returns the share's sum of squares (0-d fp32): adding these up over ranks and optimizers gives the
        squared gradient norm.
        """
        squares = torch.zeros((), device=self.stacks[0].device)
        under_way = [stack.reduce() for stack in self.stacks]
        for stack in self.stacks:
            grad = under_way.pop(0).wait().div_(divisor)  # what has arrived is freed with it
            squares += grad.square().sum()
            stack.grad = grad.to(stack.momentum_buffer.device)
        return squares

    def own_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name, reduced gradient) of the matrices that this rank owns, between reduce_gradients() and step()."""
        for stack in self.stacks:
            if stack.grad is not None:
                yield from zip(stack.own_names(), stack.grad, strict=False)  # the padding comes last

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: the gradients are already reduced
        """Update from the reduced gradients; every rank ends with the same parameters."""
        group, sent = self.param_groups[0], dict[Stack, UnderWay]()
        for before, stack in pairwise([None, *self.stacks, None]):  # send one, apply the one before
            if stack:
                sent[stack] = stack.send(group["momentum"], group["beta2"], self.dtype)
            if before:
                before.apply(sent.pop(before).wait(), group["lr"], group["weight_decay"])

    def state_bytes(self) -> int:
        """Memory of this rank's share of the state."""
        return sum(stack.momentum_buffer.nbytes + stack.second_moment.nbytes for stack in self.stacks)

    def full_state(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of all state, one matrix of each rank at a time. Every rank must run through it."""
        for stack in self.stacks:
            for kind in ("momentum_buffer", "second_moment"):
                for i, own in enumerate(getattr(stack, kind).to(stack.device).split(1)):
                    names = stack.names[i :: stack.per_rank]
                    for name, tensor in zip(names, all_gather(own), strict=False):  # the padding comes last
                        yield f"{name}.{kind}", tensor

    def load_full_state(self, read: Callable[[str], Tensor]) -> None:
        """Take over a state saved by any number of ranks; `read` returns the whole tensor of a name."""
        for stack in self.stacks:
            for kind in ("momentum_buffer", "second_moment"):
                for own, name in zip(getattr(stack, kind), stack.own_names(), strict=False):
                    own.copy_(read(f"{name}.{kind}"))
