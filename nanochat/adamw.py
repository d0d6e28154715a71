"""AdamW (arXiv 1711.05101) for embedding and head. One class for any number of ranks and any tensor size, moments in
fp32.

Ranks: each rank owns ceil(rows / N) rows of a parameter; gradients are summed by reduce-scatter, each rank updates its
rows, and parameters come back by all-gather (after ZeRO, arXiv 1910.02054), while the next one is prepared or updated.
With one rank the same loop sends nothing. State is 1/N per rank. With --shard a rank holds just those rows, and their
gradient, already summed: nothing is sent at all.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat.compute import UnderWay, all_gather, ranks, reduce_scatter
from nanochat.sharding import compute_device, is_split, local, padded_rows, rows_per_rank


def adamw_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step in place; `step` counts from 1. Decay is decoupled: it scales the weight, not the gradient."""
    beta1, beta2 = betas
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.lerp_(grad.square(), 1 - beta2)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
    param.mul_(1 - lr * weight_decay)
    param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


@dataclass
class Slice:
    """One parameter, and the state of the rows that this rank owns, `per_rank` of them with zeros at the end."""

    name: str
    param: Tensor
    exp_avg: Tensor  # (per_rank, ...)
    exp_avg_sq: Tensor  # (per_rank, ...)
    grad: Tensor | None = None  # (per_rank, ...), from reduce_gradients() to step()

    def padded(self, tensor: Tensor) -> Tensor:
        """A whole tensor with zeros up to a multiple of the ranks; itself where nothing is missing."""
        return padded_rows(tensor, self.exp_avg.size(0) * ranks()[1])

    def own(self, tensor: Tensor) -> Tensor:
        """This rank's rows of a whole tensor, or all that it holds of a split one: a view where none are missing."""
        per_rank = self.exp_avg.size(0)
        held = local(tensor) if is_split(tensor) else tensor[ranks()[0] * per_rank :][:per_rank]
        return padded_rows(held, per_rank)

    def reduce(self, grad: Tensor) -> UnderWay:
        """Begin to sum a gradient over ranks; gives this rank's rows."""
        return UnderWay(self.own(grad)) if is_split(grad) else reduce_scatter(self.padded(grad.float()))

    def send(self, own: Tensor) -> UnderWay:
        """Begin to bring the new rows to whoever holds them; take() sets the parameter to the result."""
        return UnderWay(own) if is_split(self.param) else all_gather(own)

    def take(self, rows: Tensor) -> None:
        """Set what this rank holds of the parameter; nothing to copy where that is what was updated in place."""
        held = local(self.param)
        held.copy_(rows[: held.size(0)])

    def whole(self, own: Tensor) -> Tensor:
        """The whole tensor, from what each rank owns. Collective."""
        return all_gather(own.to(compute_device(self.param))).wait()[: self.param.size(0)]


class AdamW(torch.optim.Optimizer):
    """AdamW over groups of dict(params=[(name, tensor), ...], lr=..., [betas, eps, weight_decay]). Each step:
    reduce_gradients(divisor) on every rank, then step(). A group's lr may be set between steps.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float] = (0.8, 0.95), eps: float = 1e-10):
        names = [[name for name, _ in group["params"]] for group in groups]
        plain = [{**group, "params": [p for _, p in group["params"]]} for group in groups]
        super().__init__(plain, {"lr": 1e-3, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.steps = 0
        self.slices = [
            [self.make_slice(name, p) for name, p in zip(group_names, group["params"], strict=True)]
            for group_names, group in zip(names, self.param_groups, strict=True)
        ]

    @staticmethod
    def make_slice(name: str, param: Tensor) -> Slice:
        zeros = torch.zeros((rows_per_rank(param), *param.shape[1:]), device=param.device)
        return Slice(name, param, zeros, zeros.clone())

    @torch.no_grad()
    def reduce_gradients(self, divisor: Tensor | float) -> Tensor:
        """Sum the gradients over ranks in a fixed order, divide once, keep this rank's share; a missing gradient counts
        as zeros. Returns the share's sum of squares (0-d fp32), as Muon.reduce_gradients does.
        """
        squares = torch.zeros((), device=compute_device(self.slices[0][0].param))
        parts, under_way = [part for group in self.slices for part in group], []
        for part in parts:
            grad = part.param.grad if part.param.grad is not None else torch.zeros_like(part.param)
            under_way.append(part.reduce(grad))
        for part, sent in zip(parts, under_way, strict=True):
            part.grad = sent.wait().div_(divisor)
            squares += part.grad.square().sum().to(squares.device)
        self.zero_grad(set_to_none=True)  # not before: a gradient may be what is sent
        return squares

    def own_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name, this rank's rows of the reduced gradient), between reduce_gradients() and step()."""
        for part in (part for group in self.slices for part in group):
            if part.grad is not None:
                yield part.name, part.grad

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: the gradients are already reduced
        """Update from the reduced gradients; every rank ends with the same parameters."""
        self.steps += 1
        under_way: list[tuple[Slice, UnderWay]] = []
        for group, parts in zip(self.param_groups, self.slices, strict=True):
            options = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
            for part in parts:
                assert part.grad is not None, "call reduce_gradients() first"
                own = part.own(part.param.data).float()
                adamw_update(own, part.grad, part.exp_avg, part.exp_avg_sq, self.steps, **options)
                part.grad = None
                under_way.append((part, part.send(own)))
        for part, sent in under_way:
            part.take(sent.wait())

    def state_bytes(self) -> int:
        """Memory of this rank's share of the state."""
        return sum(part.exp_avg.nbytes + part.exp_avg_sq.nbytes for group in self.slices for part in group)

    def full_state(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of all state, one at a time. Collective: every rank must run through it."""
        yield "adamw.steps", torch.tensor(self.steps)
        for part in (part for group in self.slices for part in group):
            yield f"{part.name}.exp_avg", part.whole(part.exp_avg)
            yield f"{part.name}.exp_avg_sq", part.whole(part.exp_avg_sq)

    def load_full_state(self, read: Callable[[str], Tensor]) -> None:
        """Take over a state saved by any number of ranks; `read` returns the whole tensor of a name."""
        self.steps = int(read("adamw.steps"))
        for part in (part for group in self.slices for part in group):
            part.exp_avg.copy_(part.own(read(f"{part.name}.exp_avg")))
            part.exp_avg_sq.copy_(part.own(read(f"{part.name}.exp_avg_sq")))
