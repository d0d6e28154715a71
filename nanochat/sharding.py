"""--shard: every parameter lies in parts on all ranks, and so do its gradient and its optimizer state. torch's FSDP2.

Without it each rank holds all weights, all gradients until they are reduced, and 1/N of the optimizer state; with it
1/N of everything (ZeRO-3, arXiv 1910.02054; FSDP, arXiv 2304.11277). A rank keeps ceil(rows / N) rows of each
parameter in fp32. A block's weights are gathered for its forward pass, in the dtype of its matmuls, freed, and gathered
again for its backward pass, whose gradient is summed in fp32 and scattered. Embedding and head are gathered in fp32 and
stay until the end of the micro-batch: the embedding's gradient is added up where it is looked up, and bf16 would lose
the small ones.

On the wire that is 8 bytes per parameter of the blocks and micro-batch in bf16 (two gathers of 2, a sum of 4), where
whole models send 8 per parameter and step: slower, so only for models that do not fit otherwise. All ranks must run the
same number of forward passes, in training and in evaluation.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nanochat.common import UserError, print0
from nanochat.compute import Compute, all_gather, collective, ranks, share_cores

Place = Callable[[nn.Module], None]  # gives a model on "meta" its memory


def placement(compute: Compute, shard: bool, offload: bool) -> Place | None:
    """What --shard and --offload ask for, as build_model takes it: None for a whole model on each rank. Raises
    UserError for --offload without anything to shard.
    """
    sharded = shard and compute.world_size > 1
    if offload and not sharded:
        raise UserError(
            f"--offload --shard={str(shard).lower()} on {compute.world_size} ranks: --offload goes with --shard on at "
            "least 2; torchrun starts them, --recompute saves memory on one",
            everywhere=True,
        )
    if shard and not sharded:
        print0("shard: one rank holds everything anyway")
    return partial(shard_model, compute=compute, offload=offload) if sharded else None


def shard_model(model: Any, compute: Compute, offload: bool) -> None:
    """Wrap every block of a GPT on "meta", then the rest, and allocate this rank's rows, uninitialised."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    cuda = compute.device.type == "cuda"
    options: dict[str, Any] = {
        "mesh": init_device_mesh(compute.device.type, (compute.world_size,)),
        "offload_policy": CPUOffloadPolicy(pin_memory=cuda) if offload else OffloadPolicy(),
    }
    # Not the inputs: cos and sin stay in fp32.
    precision = MixedPrecisionPolicy(compute.dtype, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mp_policy=precision, **options)
    fully_shard(model, **options)
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


def gathering(model: nn.Module) -> AbstractContextManager[None]:
    """Around a forward or backward pass, which for a sharded model is a collective."""
    return collective() if is_sharded(model) else nullcontext()


# -----------------------------------------------------------------------------
# Parameters that may be sharded. Rank r has rows [r * n, (r + 1) * n) with n = ceil(rows / N), as far as there are any.


def is_split(p: Tensor) -> bool:
    """Whether this rank holds only some rows of p (torch's DTensor)."""
    return hasattr(p, "to_local")


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if is_split(tensor) else tensor  # type: ignore[attr-defined]


def own_rows(p: Tensor) -> slice:
    """Which rows of parameter p local(p) are."""
    if not is_split(p):
        return slice(0, p.size(0))
    n = rows_per_rank(p)
    return slice(min(ranks()[0] * n, p.size(0)), min((ranks()[0] + 1) * n, p.size(0)))


def rows_per_rank(p: Tensor) -> int:
    """Rows of a part, the last ones shorter or empty."""
    return -(-p.size(0) // ranks()[1])


def padded_rows(tensor: Tensor, rows: int) -> Tensor:
    """`tensor` with zeros added after its rows; itself where none are missing."""
    missing = rows - tensor.size(0)
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor


def compute_device(p: Tensor) -> torch.device:
    """Where p is computed with: for a parameter that lives in the host's memory not where it is."""
    mesh = getattr(p, "device_mesh", None)
    return torch.device("cuda", torch.cuda.current_device()) if mesh and mesh.device_type == "cuda" else p.device


def held_bytes(model: nn.Module) -> int:
    """Memory of the parameters on this rank, between steps."""
    return sum(local(p).nbytes for p in model.parameters())


def whole(p: Tensor) -> Tensor:
    """All of p. Collective for a sharded one: all ranks ask for the same."""
    if not is_split(p):
        return p
    own = padded_rows(local(p), rows_per_rank(p)).to(compute_device(p))
    return all_gather(own).wait()[: p.size(0)]


def whole_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, whole weight) one at a time. Collective for a sharded model."""
    for name, p in model.named_parameters():
        yield name, whole(p.detach())
