"""What the ranks of a run send each other: the optimizers' collectives, and --shard (torch's FSDP2).

Without --shard a rank holds all weights, all gradients until they are reduced, and 1/N of the optimizer state; with it
1/N of everything (ZeRO-3, arXiv 1910.02054; FSDP, arXiv 2304.11277): ceil(rows / N) rows of each parameter in fp32. A
block's weights are gathered for its forward pass in the dtype of its matmuls, freed, and gathered again for its
backward pass, whose gradient is summed in fp32 and scattered. Embedding and head are gathered in fp32 and stay until
the end of the micro-batch: the embedding's gradient is added up where it is looked up, and bf16 would lose the small
ones. It sends 8 bytes per parameter of the blocks and micro-batch in bf16 (two gathers of 2, a sum of 4), where whole
models send 8 per parameter and step. All ranks must run the same number of forward passes, also in evaluation.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat.common import UserError, print0
from nanochat.compute import Compute, collective, share_cores

Place = Callable[[nn.Module], None]  # gives a model on "meta" its memory


def placement(compute: Compute, shard: bool, offload: bool) -> Place | None:
    """What --shard and --offload ask for: None for a whole model on each rank. Raises UserError for --offload alone."""
    sharded = shard and compute.world_size > 1
    if offload and not sharded:
        allowed = "--offload goes with --shard on at least 2; torchrun starts them, --recompute saves memory on one"
        given = f"--offload --shard={str(shard).lower()} on {compute.world_size} ranks"
        raise UserError(f"{given}: {allowed}", everywhere=True)
    if shard and not sharded:
        print0("shard: one rank holds everything anyway")
    return partial(shard_model, compute=compute, offload=offload) if sharded else None


def shard_model(model: Any, compute: Compute, offload: bool) -> None:
    """Wrap every block of a model on "meta", then the rest, and allocate this rank's rows, uninitialised."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    mesh = init_device_mesh(compute.device.type, (compute.world_size,))
    policy = CPUOffloadPolicy(pin_memory=compute.device.type == "cuda") if offload else OffloadPolicy()
    precision = MixedPrecisionPolicy(compute.dtype, torch.float32, cast_forward_inputs=False)  # cos and sin: fp32
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=precision, offload_policy=policy)
    fully_shard(model, mesh=mesh, offload_policy=policy)
    for module in (model, *model.blocks):
        module.set_gradient_divide_factor(1.0)  # sums: the step divides once, by the tokens that counted
        module.set_force_sum_reduction_for_comms(True)
    model.register_forward_hook(reshard_without_backward)
    model.to_empty(device="cpu" if offload else compute.device)
    if offload:
        share_cores()  # AdamW and the weights' update run where the weights are
    where = " in the host's memory" if offload else ""
    print0(f"shard: {held_bytes(model) / 1e6:,.1f} MB of weights on each of {compute.world_size} ranks{where}")


def reshard_without_backward(model: Any, *_: Any) -> None:
    """Free the whole embedding and head after a validation batch; in training the backward pass does."""
    if not torch.is_grad_enabled():
        model.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass of it takes all ranks."""
    return hasattr(model, "reshard")


# -----------------------------------------------------------------------------
# Parameters that may be split. Rank r has rows [r * n, (r + 1) * n) with n = ceil(rows / N), as far as there are any.


def ranks() -> tuple[int, int]:
    """(rank, world_size) of the process group, (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_split(p: Tensor) -> bool:
    """Whether this rank holds only some rows of p (torch's DTensor)."""
    return hasattr(p, "to_local")


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if is_split(tensor) else tensor  # type: ignore[attr-defined]


def own_rows(p: Tensor) -> slice:
    """Which rows of parameter p local(p) are."""
    rank, world_size = ranks() if is_split(p) else (0, 1)
    n = -(-p.size(0) // world_size)
    return slice(min(rank * n, p.size(0)), min((rank + 1) * n, p.size(0)))


def padded(tensor: Tensor, size: int, dim: int = 0) -> Tensor:
    """`tensor` with zeros at the end of a dimension, `size` in all; itself where none are missing."""
    missing = size - tensor.size(dim)
    return nn.functional.pad(tensor, [0, 0] * (tensor.ndim - dim - 1) + [0, missing]) if missing else tensor


def compute_device(p: Tensor) -> torch.device:
    """Where p is computed with: for a parameter that lives in the host's memory not where it is."""
    mesh = getattr(p, "device_mesh", None)
    return torch.device("cuda", torch.cuda.current_device()) if mesh and mesh.device_type == "cuda" else p.device


def held_bytes(model: nn.Module) -> int:
    """Memory of the parameters on this rank, between steps."""
    return sum(local(p).nbytes for p in model.parameters())


def join_rows(own: Tensor, p: Tensor) -> Tensor:
    """What the ranks have for their ceil(rows / N) rows of p, as one tensor. Collective."""
    n = -(-p.size(0) // ranks()[1])
    return all_gather(padded(own, n).to(compute_device(p)))[: p.size(0)]


def whole_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, whole weight) one at a time. Collective for a sharded model."""
    for name, p in model.named_parameters():
        yield name, join_rows(local(p.detach()), p) if is_split(p) else p.detach()


# -----------------------------------------------------------------------------
# The ways to the ranks that update a parameter, and back. What is dealt out are entries of the first dimension: rank r
# updates [r * n, (r + 1) * n) of world_size * n. torch 2.13 renames two collectives, and warns about the old names.


@dataclass
class UnderWay:
    """A collective that has begun: wait() gives what it brings. Its input must not change until then."""

    received: Tensor
    work: Any = None  # torch's handle; None where there is nothing to wait for
    arrange: Callable[[Tensor], Tensor] = lambda received: received

    def wait(self) -> Tensor:
        if self.work is not None:
            with collective():
                self.work.wait()
        return self.arrange(self.received)


def begin(operation: Callable[..., Any], entries: Tensor, count: int) -> UnderWay:
    """Begin a collective that brings `count` entries."""
    received = entries.new_empty((count, *entries.shape[1:]))
    with collective():
        return UnderWay(received, operation(received, entries.contiguous(), async_op=True))


@dataclass(frozen=True)
class Whole:
    """For what each rank holds whole, with a gradient of its own micro-batches: gradients are summed on their way, and
    what each rank has made comes to all. One rank alone sends nothing.
    """

    rank: int
    world_size: int

    def reduce(self, grads: Tensor) -> UnderWay:
        if self.world_size == 1:
            return UnderWay(grads)
        operation = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return begin(operation, grads, grads.size(0) // self.world_size)

    def send(self, own: Tensor) -> UnderWay:
        if self.world_size == 1:
            return UnderWay(own)
        operation = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return begin(operation, own, own.size(0) * self.world_size)


@dataclass(frozen=True)
class Split:
    """For matrices (M, N) of which each rank holds n = ceil(M / world_size) rows or fewer, with their gradient already
    summed: an all-to-all turns rows of all (K, n, N) into all rows of some (K / world_size, M, N), and back.
    """

    rank: int
    world_size: int
    M: int

    @property
    def n(self) -> int:
        return -(-self.M // self.world_size)

    def reduce(self, grads: Tensor) -> UnderWay:
        rows = padded(grads, self.n, dim=1)
        return replace(begin(dist.all_to_all_single, rows, rows.size(0)), arrange=self.join)

    def join(self, received: Tensor) -> Tensor:
        N = received.size(2)
        parts = received.view(self.world_size, -1, self.n, N).transpose(0, 1)
        return parts.reshape(-1, self.world_size * self.n, N)[:, : self.M]

    def send(self, own: Tensor) -> UnderWay:
        k, _, N = own.shape
        rows = padded(own, self.world_size * self.n, dim=1).view(k, self.world_size, self.n, N)
        rows = rows.transpose(0, 1).reshape(-1, self.n, N)
        return begin(dist.all_to_all_single, rows, rows.size(0))


def deal_matrices(p: Tensor) -> Whole | Split:
    """How matrices like p travel that are dealt out whole."""
    return Split(*ranks(), p.size(0)) if is_split(p) else Whole(*ranks())


def deal_rows(p: Tensor) -> Whole:
    """How p travels when each rank updates its share of the rows: not at all where it holds no others."""
    return Whole(0, 1) if is_split(p) else Whole(*ranks())


def all_gather(own: Tensor) -> Tensor:
    """The entries of all ranks, in rank order."""
    return Whole(*ranks()).send(own).wait()
