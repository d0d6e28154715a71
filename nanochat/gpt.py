"""The Transformer. One dial: `depth` decides width, heads and (with the vocabulary) everything else.

What it is, exactly: token embedding, RMSNorm, then `n_layer` blocks of `x += attn(norm(x)); x += mlp(norm(x))`,
RMSNorm, an untied head, logits softly capped at +-15. Rotary positions, QK-norm after them, ReLU squared, grouped-query
attention, no biases and no learned norms anywhere. transformers knows this model as NanoChatForCausalLM, so a
checkpoint exports without loss while every layer sees the full context (window pattern "L").

Master weights are fp32; a matmul runs in the dtype of its input, so `forward(..., dtype=torch.bfloat16)` is all that
mixed precision takes. Shapes below: B batch, T time, C width, H heads, G key/value heads, D head size, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanochat.adamw import AdamW
from nanochat.muon import Muon
from nanochat.sharding import Place, compute_device, is_split, local, own_rows, whole_weights
from nanochat.sizing import GPTConfig, config_from_depth, flops_per_token, slice_count

__all__ = ["GPT", "GPTConfig", "build_model", "config_from_depth"]

SOFTCAP = 15.0  # logits are squeezed into (-15, 15) by tanh, as in Gemma 2 (arXiv 2408.00118)


# -----------------------------------------------------------------------------
# The parts


def norm(x: Tensor) -> Tensor:
    """RMSNorm without a learned gain, over the last dimension."""
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def rotary_angles(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE (arXiv 2104.09864) in fp32, shape (*positions.shape, D/2)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[..., None] * base**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+D/2}) of x (B, T, H, D) by minus its angle; computed in fp32, returned in x's dtype."""
    left, right = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (T, 1, D/2) or (B, T, 1, D/2)
    return torch.cat([left * cos + right * sin, right * cos - left * sin], dim=-1).to(x.dtype)


QUERY_BLOCK = 128


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Softmax attention of q (B, H, T, D) over k, v (B, G, T, D): each position sees itself and the window - 1 before
    it.

    When training on CPU, contexts up to 1,024 are written out in blocks of 128 queries, each with just the keys it may
    see: two batched bf16 matmuls and a fused softmax take 8.5 ms where torch's flash kernel takes 19 (forward and
    backward, 16 rows of 256 tokens, 3 heads of 64, two Zen 5 cores). Elsewhere it is torch's kernel (forward alone 3.5
    ms to the blocks' 22), with a dense mask where the window is shorter than the context.
    """
    H, T, D = q.shape[1:]
    G = k.shape[1]
    if not torch.is_grad_enabled() or q.device.type != "cpu" or T > 1024:
        mask = causal_mask(T, T, window, q.device) if window < T else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=H != G)
    if H != G:
        k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
    outputs = []
    for start in range(0, T, QUERY_BLOCK):
        end, first = min(start + QUERY_BLOCK, T), max(0, start - window + 1)
        scores = (q[:, :, start:end] @ k[:, :, first:end].mT).float() * D**-0.5  # (B, H, <= 128, keys)
        mask = causal_mask(end - start, end - first, window, q.device)
        weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1).to(q.dtype)
        outputs.append(weights @ v[:, :, first:end])
    return torch.cat(outputs, dim=2)


def causal_mask(T: int, S: int, window: int, device: torch.device | str) -> Tensor:
    """(T, S) bool: query t stands at position S - T + t and sees itself and the window - 1 positions before it."""
    ahead = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)[None, :]
    return (ahead >= 0) & (ahead < window)


class LayerCache(Protocol):
    """What a layer's queries look at, if not simply at the tokens before them: engine.KVCache, core_eval.Branches."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention (B, H, T, D) of q (B, H, T, D), where k, v (B, G, T, D) are the same tokens' keys and values."""


class Linear(nn.Linear):
    """A matmul in its input's dtype, whatever the weight is stored in; no bias."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    """Causal self-attention with rotary positions, QK-norm and grouped key/value heads."""

    def __init__(self, config: GPTConfig, window: int):
        super().__init__()
        self.config, self.window = config, window
        C, D = config.n_embd, config.head_dim
        self.c_q = Linear(C, config.n_head * D)
        self.c_k = Linear(C, config.n_kv_head * D)
        self.c_v = Linear(C, config.n_kv_head * D)
        self.c_proj = Linear(C, C)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None) -> Tensor:
        B, T, C = x.shape
        D = self.config.head_dim
        q = self.c_q(x).view(B, T, self.config.n_head, D)
        k = self.c_k(x).view(B, T, self.config.n_kv_head, D)
        v = self.c_v(x).view(B, T, self.config.n_kv_head, D)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or G, T, D)
        y = causal_attention(q, k, v, self.window) if cache is None else cache.attend(q, k, v)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """C -> 4C -> C with ReLU squared (Primer, arXiv 2109.08668)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """One layer. The unit of torch.compile: all layers share one compiled graph, which keeps compilation to seconds."""

    def __init__(self, config: GPTConfig, window: int):
        super().__init__()
        self.attn = Attention(config, window)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None) -> Tensor:
        x = x + self.attn(norm(x), cos, sin, cache)
        return x + self.mlp(norm(x))


# -----------------------------------------------------------------------------
# The loss: head, softcap and cross-entropy in one piece, a slice of tokens at a time


def head_loss_slice(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """For n tokens: their losses in nats (n,) fp32 and, if asked, d(sum of token_weights * loss)/d(logits) (n, V).
    hidden (n, C) and weight (V, C) share a dtype.

    Written for one pass over the logits once compiled: the cap bounds exp() by e^15, so no maximum is subtracted;
    tanh(z) is 2 sigmoid(2z) - 1, which vectorises; the target's own share is added afterwards. 7 ms instead of 22 for
    1,024 x 4,096 on two cores.
    """
    logits = F.linear(hidden, weight)  # (n, V)
    tanh = 2 * torch.sigmoid(logits.float() * (2 / SOFTCAP)) - 1
    exp = torch.exp(SOFTCAP * tanh)
    total = exp.sum(dim=-1, keepdim=True)
    target_tanh = torch.tanh(logits.gather(-1, targets[:, None]).float() / SOFTCAP)  # (n, 1)
    losses = (total.log() - SOFTCAP * target_tanh).squeeze(-1)
    if not with_grad:
        return losses, None
    w = token_weights[:, None]
    grad = (exp * (w / total) * (1 - tanh * tanh)).to(hidden.dtype)
    return losses, grad.scatter_add(-1, targets[:, None], (w * (target_tanh * target_tanh - 1)).to(hidden.dtype))


class HeadLoss(torch.autograd.Function):
    """sum(token_weights * cross_entropy(softcap(hidden @ weight.T), targets)) without ever holding all the logits.

    The loss is a weighted sum, so its gradient with respect to a slice of logits is known as soon as the slice is: both
    gradients are made in the forward pass and nothing of size tokens x vocabulary survives it. (The idea of Liger's and
    Cut Cross-Entropy's kernels, arXiv 2410.10989 and 2411.09009, in plain torch.) Targets below 0 count nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_weights: Tensor,
        with_grad: bool,
        slice_fn: Callable[..., tuple[Tensor, Tensor | None]],
    ) -> Any:
        w = weight.to(hidden.dtype)
        losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if with_grad else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if with_grad else None
        clamped, token_weights = targets.clamp(min=0), token_weights * (targets >= 0)
        for rows in slice_rows(targets.numel(), weight.size(0), hidden.device):
            losses[rows], grad = slice_fn(hidden[rows], w, clamped[rows], token_weights[rows], with_grad)
            if grad is not None and grad_hidden is not None and grad_weight is not None:
                torch.mm(grad, w, out=grad_hidden[rows])
                grad_weight += grad.t() @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        losses = losses * (targets >= 0)
        ctx.mark_non_differentiable(losses)
        return (losses * token_weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        return grad_hidden * scale.to(grad_hidden.dtype), grad_weight * scale, None, None, None, None


def slice_rows(tokens: int, vocab_size: int, device: torch.device) -> list[slice]:
    """Slices of equal length (one compiled shape), as many as sizing.slice_count says."""
    n = math.ceil(tokens / slice_count(tokens, vocab_size, device.type == "cpu"))
    return [slice(start, min(start + n, tokens)) for start in range(0, tokens, n)]


# -----------------------------------------------------------------------------


class GPT(nn.Module):
    """The model. Weights are uninitialised until init_weights(): build on "meta" and `to_empty(device=...)` for large
    ones.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks: list[Block] = nn.ModuleList([Block(config, window) for window in config.windows()])  # type: ignore[assignment]
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        self.loss_slice = head_loss_slice
        self.recompute = False  # blocks keep their input alone, and run again in the backward pass: a third more FLOPs

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """All initialisation in one place, from its own generator; a sharded model gets the rows of the same weights. U
        is uniform in (-a, a) with the standard deviation given.

            wte                  N(0, 0.8)
            attn.c_q c_k c_v     U, std C^-0.5
            mlp.c_fc             U, std 0.4 C^-0.5
            attn.c_proj          0     each block starts as the identity
            mlp.c_proj           0
            lm_head              N(0, 0.001)    the first loss is ln V
        """
        generator = torch.Generator(device=self.device).manual_seed(seed)
        bound = math.sqrt(3) * self.config.n_embd**-0.5  # a uniform in (-a, a) has standard deviation a / sqrt(3)

        def draw(weight: Tensor, fill: Callable[..., Tensor], *values: float) -> None:
            """Of a split weight the whole is drawn and this rank's rows are kept: the same model on any ranks."""
            whole = torch.empty(weight.shape, device=self.device) if is_split(weight) else weight
            fill(whole, *values, generator=generator)
            local(weight).copy_(whole[own_rows(weight)])

        draw(self.wte.weight, Tensor.normal_, 0, 0.8)
        for block in self.blocks:
            attn, mlp = block.attn, block.mlp
            for linear in (attn.c_q, attn.c_k, attn.c_v):
                draw(linear.weight, Tensor.uniform_, -bound, bound)
            draw(mlp.c_fc.weight, Tensor.uniform_, -0.4 * bound, 0.4 * bound)
            local(attn.c_proj.weight).zero_()
            local(mlp.c_proj.weight).zero_()
        draw(self.lm_head.weight, Tensor.normal_, 0, 0.001)

    @property
    def device(self) -> torch.device:
        return compute_device(self.wte.weight)

    def hidden(
        self, idx: Tensor, dtype: torch.dtype, positions: Tensor | None = None, caches: list[LayerCache] | None = None
    ) -> Tensor:
        """The final normalised states (B, T, C) of tokens idx (B, T), which stand at `positions` (T,) or (B, T),
        default 0..T-1.
        """
        if positions is None:
            positions = torch.arange(idx.size(1), device=idx.device)
        cos, sin = rotary_angles(positions, self.config.head_dim, self.config.rope_base)
        x = norm(self.wte(idx).to(dtype))
        for i, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin, caches[i] if caches else None)
        return norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Capped logits (..., V) in fp32."""
        return SOFTCAP * torch.tanh(self.lm_head(hidden).float() / SOFTCAP)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        loss_reduction: str = "mean",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Logits (B, T, V) of idx (B, T); with targets (B, T) their cross-entropy in nats instead, targets below 0
        ignored.

        loss_reduction "sum" weighs each token's loss by `weights` (B, T) (default 1) and adds up: what training uses,
        dividing once by the number of tokens in the whole step over all ranks. "mean" divides by the tokens counted
        here. "none" gives the losses (B, T), without a gradient.
        """
        hidden = self.hidden(idx, dtype)
        if targets is None:
            return self.logits(hidden)
        flat = hidden.view(-1, hidden.size(-1))
        token_weights = (
            torch.ones_like(flat[:, 0], dtype=torch.float32) if weights is None else weights.reshape(-1).float()
        )
        with_grad = torch.is_grad_enabled() and loss_reduction != "none"
        head = (flat, self.lm_head.weight, targets.reshape(-1), token_weights)
        loss, losses = HeadLoss.apply(*head, with_grad, self.loss_slice)
        if loss_reduction == "sum":
            return loss
        if loss_reduction == "mean":
            return loss / (targets >= 0).sum().clamp(min=1)
        assert loss_reduction == "none", loss_reduction
        return losses.view(targets.shape)

    def compile_parts(self) -> None:
        """Compile the block and the loss slice in place, for fixed shapes. Parameter names do not change. What gathers
        a sharded block's weights stays outside of the compiled graph.
        """
        for block in self.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)  # type: ignore[method-assign]
        self.loss_slice = torch.compile(head_loss_slice, dynamic=False)

    def inference_copy(self, dtype: torch.dtype) -> "GPT":
        """A separate model with the same weights in `dtype`, whole, eager and without gradients. Later training does
        not reach it. Collective for a sharded model.
        """
        model = build_model(self.config, self.device, dtype=dtype)
        weights = dict(model.named_parameters())
        with torch.no_grad():
            for name, weight in whole_weights(self):
                weights[name].copy_(weight)
        return model.eval().requires_grad_(False)

    # -------------------------------------------------------------------------
    # Accounting

    def config_dict(self) -> dict[str, Any]:
        return asdict(self.config)

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def num_matmul_params(self) -> int:
        """Weights that a token is multiplied with: all but the embedding table, which is only looked up."""
        return self.num_params() - self.wte.weight.numel()

    def estimate_flops(self) -> int:
        """Training FLOPs per token, see sizing.flops_per_token."""
        return flops_per_token(self.config)

    # -------------------------------------------------------------------------
    # Optimizers

    def setup_optimizers(
        self,
        matrix_lr: float = 0.02,
        embedding_lr: float = 0.2,
        unembedding_lr: float = 0.004,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> list[AdamW | Muon]:
        """Muon for the matrices inside the blocks, AdamW for embedding and head. The AdamW rates were tuned at width
        768 and scale with (C / 768)^-0.5 (nanochat); Muon's update has a size of its own and needs no such rule.
        `weight_decay` and `dtype` are Muon's.
        """
        scale = (self.config.n_embd / 768) ** -0.5
        named = dict(self.named_parameters())
        embedding = {"params": [("wte.weight", named.pop("wte.weight"))], "lr": embedding_lr * scale}
        head = {"params": [("lm_head.weight", named.pop("lm_head.weight"))], "lr": unembedding_lr * scale}
        return [AdamW([embedding, head]), Muon(list(named.items()), matrix_lr, weight_decay=weight_decay, dtype=dtype)]


def build_model(
    config: GPTConfig,
    device: torch.device,
    seed: int | None = None,
    place: Place | None = None,
    dtype: torch.dtype = torch.float32,
) -> GPT:
    """A model on `device`, or where sharding.placement() puts it: initialised from `seed`, or with memory only when
    weights are about to be loaded.
    """
    with torch.device("meta"):
        model = GPT(config).to(dtype)
    if place:
        place(model)
    else:
        model.to_empty(device=device)
    if seed is not None:
        model.init_weights(seed)
    return model
