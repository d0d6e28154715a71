"""What every architecture shares: the loss, parameters and FLOPs, compilation, optimizers, building.

Master weights are fp32; a matmul runs in the dtype of its input, so `forward(..., dtype=torch.bfloat16)` is all that
mixed precision takes. Shapes below: B batch, T time, C width, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import import_module
from itertools import repeat
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanochat.adamw import AdamW
from nanochat.attention import Context
from nanochat.common import UserError
from nanochat.muon import Muon
from nanochat.sharding import Place, compute_device, is_split, local, own_rows, whole_weights

SOFTCAP = 15.0  # logits are squeezed into (-15, 15) by tanh, as in Gemma 2 (arXiv 2408.00118)


# -----------------------------------------------------------------------------
# The loss: head, softcap and cross-entropy in one piece, a slice of tokens at a time


def head_loss_slice(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """For n tokens: their losses in nats (n,) fp32, and d(sum of token_weights * loss)/d(logits) (n, V), or without
    gradient whether the target is the likeliest token (n,). hidden (n, C) and weight (V, C) share a dtype.

    Once compiled, one pass over the logits, 7 ms instead of 22 for 1,024 x 4,096 on two cores: the cap bounds exp() by
    e^15, so no maximum is subtracted; tanh(z) is 2 sigmoid(2z) - 1, which vectorises. The target's own gradient has the
    factor p - 1, which is taken in fp32 and put in last: rounded to bf16 before the subtraction it would be 0 for p
    above 0.998, as most of a chat model's are.
    """

    def squash(logits: Tensor) -> Tensor:
        return 2 * torch.sigmoid(logits.float() * (2 / SOFTCAP)) - 1  # tanh(logits / SOFTCAP)

    logits = F.linear(hidden, weight)  # (n, V)
    tanh = squash(logits)
    exp = torch.exp(SOFTCAP * tanh)
    total = exp.sum(dim=-1, keepdim=True)
    target_tanh = squash(logits.gather(-1, targets[:, None]))  # (n, 1)
    losses = (total.log() - SOFTCAP * target_tanh).squeeze(-1)
    if not with_grad:
        return losses, logits.argmax(dim=-1) == targets
    w = token_weights[:, None]
    grad = (exp * (w / total) * (1 - tanh * tanh)).to(hidden.dtype)
    target_grad = w * (torch.exp(SOFTCAP * target_tanh) / total - 1) * (1 - target_tanh * target_tanh)
    return losses, grad.scatter(-1, targets[:, None], target_grad.to(hidden.dtype))


class HeadLoss(torch.autograd.Function):
    """sum(token_weights * cross_entropy(softcap(hidden @ weight.T), targets)) without ever holding all the logits.

    The loss is a weighted sum, so its gradient with respect to a slice of logits is known as soon as the slice is: both
    gradients are made in the forward pass and nothing of size tokens x vocabulary survives it. (The idea of Liger's and
    Cut Cross-Entropy's kernels, arXiv 2410.10989 and 2411.09009, in plain torch.) Targets below 0 count nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, loss_slice: Callable[..., Any]
    ) -> Any:
        w, counted, with_grad = weight.to(hidden.dtype), targets >= 0, ctx.needs_input_grad[0]
        clamped, token_weights = targets.clamp(min=0), token_weights * counted
        losses, right = torch.empty_like(targets, dtype=torch.float32), torch.zeros_like(counted)
        if with_grad:
            grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
            ctx.save_for_backward(grad_hidden, grad_weight)  # filled below
        for rows in slice_rows(targets.numel(), weight.size(0), hidden.device):
            losses[rows], found = loss_slice(hidden[rows], w, clamped[rows], token_weights[rows], with_grad)
            if with_grad:
                torch.mm(found, w, out=grad_hidden[rows])
                grad_weight += found.t() @ hidden[rows]
            else:
                right[rows] = found
        losses, right = losses * counted, right & counted
        ctx.mark_non_differentiable(losses, right)
        return (losses * token_weights).sum(), losses, right

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Any) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * scale.to(grad_hidden.dtype), grad_weight * scale, None, None, None


def slice_rows(tokens: int, vocab_size: int, device: torch.device) -> list[slice]:
    """Slices of equal length (one compiled shape) but the last, whose fp32 logits take at most about 16 MB on CPU (the
    L3 cache) and 512 MB elsewhere.
    """
    most = max(1, (16 if device.type == "cpu" else 512) * 2**20 // (4 * vocab_size))
    n = math.ceil(tokens / math.ceil(tokens / most))
    return [slice(start, min(start + n, tokens)) for start in range(0, tokens, n)]


# -----------------------------------------------------------------------------
# The model


class Linear(nn.Linear):
    """A matmul in its input's dtype, whatever the weight is stored in."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class LanguageModel(nn.Module):
    """An embedding, blocks and a head; an architecture adds hidden(idx, dtype) -> (B, T, C) and init_weights(seed)."""

    config: Any  # a dataclass of what rebuilds it, with build(), windows() and head_dim
    wte: nn.Embedding
    blocks: Sequence[nn.Module]
    lm_head: Linear | nn.Embedding  # wte itself where the two are tied
    hidden: Callable[..., Tensor]
    init_weights: Callable[[int], None]

    def __init__(self) -> None:
        super().__init__()
        self.loss_slice = head_loss_slice
        self.recompute = False  # blocks keep their input alone, and run again in the backward pass: a third more FLOPs

    @property
    def device(self) -> torch.device:
        return compute_device(self.wte.weight)

    def run_blocks(self, x: Tensor, *inputs: Any, context: Context | None) -> Tensor:
        """x (B, T, C) through all blocks, each of which gets the inputs and its cache."""
        for block, cache in zip(self.blocks, context.caches if context else repeat(None), strict=False):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, *inputs, cache, use_reentrant=False)
            else:
                x = block(x, *inputs, cache)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Capped logits (..., V) in fp32."""
        return SOFTCAP * torch.tanh(self.lm_head(hidden).float() / SOFTCAP)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        loss_reduction: Literal["mean", "sum", "none", "scores"] = "mean",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Logits (B, T, V) of idx (B, T), or with targets (B, T) their cross-entropy in nats, targets below 0 ignored:
        the "mean" of those counted, the losses (B, T) without a gradient ("none"; "scores": and in no_grad whether the
        target is the likeliest token, (2, B, T)), or the "sum" of `weights` (B, T), default 1, times losses. Training
        sums, and divides once by the tokens of the whole step over all ranks.
        """
        hidden = self.hidden(idx, dtype)
        if targets is None:
            return self.logits(hidden)
        flat, head = targets.flatten(), self.lm_head.weight
        token_weights = torch.ones(flat.shape, device=flat.device) if weights is None else weights.flatten().float()
        loss, losses, right = HeadLoss.apply(hidden.flatten(0, 1), head, flat, token_weights, self.loss_slice)
        if loss_reduction == "scores":
            return torch.stack([losses, right.float()]).view(2, *targets.shape)
        if loss_reduction == "none":
            return losses.view(targets.shape)
        return loss if loss_reduction == "sum" else loss / (flat >= 0).sum().clamp(min=1)

    def compile_parts(self) -> None:
        """Compile blocks and loss in place, for fixed shapes; parameters keep their names, gathering stays outside.
        More shapes than dynamo keeps graphs of, 8 for all blocks together, are an error, or it would go on eagerly.
        """
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        for block in self.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)
        self.loss_slice = torch.compile(self.loss_slice, dynamic=False)

    def inference_copy(self, dtype: torch.dtype) -> Self:
        """A separate model with today's weights in `dtype`: whole, eager, without gradients. Collective if sharded."""
        with torch.device("meta"):
            model: Self = self.config.build().to(dtype)
        model.to_empty(device=self.device).eval().requires_grad_(False)
        weights = dict(model.named_parameters())
        for name, weight in whole_weights(self):
            weights[name].copy_(weight)
        return model

    def config_dict(self) -> dict[str, Any]:
        return asdict(self.config)

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def num_matmul_params(self) -> int:
        """Weights that a token is multiplied with: not the embedding table, which is only looked up."""
        return self.lm_head.weight.numel() + sum(p.numel() for p in self.sort_parameters()[0].values())

    def ratio_params(self, counts: str) -> tuple[int, str]:
        """What a horizon in tokens per parameter counts, all or matmuls, and its name in print. The embedding table is
        a third of a d10 with 65,536 tokens and 7 % of a d32, so over depths the ratio of all means different things.
        """
        if counts == "matmuls":
            return self.num_matmul_params(), "parameters in matmuls"
        return self.num_params(), "parameters"

    def estimate_flops(self) -> int:
        """Training FLOPs per token at full context: 6 per matmul weight, and 12 C window per layer for attention (PaLM,
        arXiv 2204.02311, appendix B; not halved for causality).
        """
        return 6 * self.num_matmul_params() + 12 * self.config.n_embd * sum(self.config.windows())

    def sort_parameters(self) -> tuple[dict[str, nn.Parameter], ...]:
        """Every parameter once, by name: the matrices in the blocks; an embedding that is not the head too; the rest,
        which is the head, and where an architecture has them a table of positions, gains and biases.
        """
        rest = dict(self.named_parameters())
        matrices = {name: rest.pop(name) for name in [*rest] if name.startswith("blocks.") and rest[name].ndim == 2}
        embedding = {} if self.lm_head is self.wte else {"wte.weight": rest.pop("wte.weight")}
        return matrices, embedding, rest

    def setup_optimizers(
        self,
        matrix_lr: float = 0.02,
        embedding_lr: float = 0.2,
        unembedding_lr: float = 0.004,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> list[AdamW | Muon]:
        """Muon for the matrices in the blocks, AdamW for the embedding, and at the head's rate for the rest. The AdamW
        rates were tuned at width 768 and scale with (C / 768)^-0.5 (nanochat); Muon's update has a size of its own and
        needs no such rule. `weight_decay` and `dtype` are Muon's.
        """
        scale = (self.config.n_embd / 768) ** -0.5
        matrices, *groups = (list(group.items()) for group in self.sort_parameters())
        rates = embedding_lr * scale, unembedding_lr * scale
        adamw = AdamW([{"params": group, "lr": lr} for group, lr in zip(groups, rates, strict=True)])
        return [adamw, Muon(matrices, matrix_lr, weight_decay=weight_decay, dtype=dtype)]

    def setup_adamw(
        self, lr: float = 6e-4, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.95)
    ) -> list[AdamW | Muon]:
        """One AdamW with one rate for all parameters. As in nanoGPT matrices decay, embeddings among them, and vectors
        (biases, gains of norms) do not.
        """
        named = list(self.named_parameters())
        matrices = {"params": [(name, p) for name, p in named if p.ndim > 1], "weight_decay": weight_decay}
        vectors = {"params": [(name, p) for name, p in named if p.ndim < 2]}
        return [AdamW([{**group, "lr": lr} for group in (matrices, vectors) if group["params"]], betas)]


# -----------------------------------------------------------------------------
# Building one

# The name of a file in nanochat/, and of its dataclass.
ARCHITECTURES = {"gpt": "GPTConfig", "fast": "FastConfig", "gpt2": "GPT2Config", "llama": "LlamaConfig"}


def choose_config(arch: str, depth: int, vocab_size: int, sequence_len: int, **options: Any) -> Any:
    """config_from_depth() of an architecture, with the options that are not None. UserError for one it has not."""
    module = import_module(f"nanochat.{arch}")
    fields = getattr(module, ARCHITECTURES[arch]).__dataclass_fields__
    given = {name: value for name, value in options.items() if value is not None}
    for name in given.keys() - fields - module.config_from_depth.__annotations__.keys():
        raise UserError(f"--{name.replace('_', '-')}={given[name]}: --arch={arch} has no such setting; leave it out")
    return module.config_from_depth(depth, vocab_size, sequence_len, **given)


def load_config(saved: dict[str, Any]) -> Any:
    """The config that a checkpoint holds; a gpt's does not name its architecture."""
    arch = saved.get("arch", "gpt")
    return getattr(import_module(f"nanochat.{arch}"), ARCHITECTURES[arch])(**saved)


def build_model(config: Any, device: torch.device, seed: int | None = None, place: Place | None = None) -> Any:
    """A model on `device`, or where sharding.placement() puts it: initialised from `seed`, or for weights to load."""
    with torch.device("meta"):
        model = config.build()
    if place:
        place(model)
    else:
        model.to_empty(device=device)
    if seed is not None:
        model.init_weights(seed)
    return model


def fill(weight: Tensor, draw: Callable[[Tensor], Tensor]) -> None:
    """Let `draw` write a weight; a split one is drawn whole and cut: the same model on any number of ranks."""
    whole = torch.empty(weight.shape, device=compute_device(weight)) if is_split(weight) else weight
    draw(whole)
    local(weight).copy_(whole[own_rows(weight)])
