"""What a model is and needs, in numbers: shape, parameters, FLOPs, memory, the batch that fits. No torch.

The memory is that of base_train on one rank: what the allocator hands out at the fullest moment of a step, in bytes.
Every coefficient counts tensors that the code keeps; tests/test_plan.py holds the sum against the CPU allocator's own
count. Not in it: the interpreter and torch itself (0.5 GB of a CPU process), a GPU's driver and kernels, NCCL's
buffers, fragments. Those are what the margin is for.
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import NamedTuple

from nanochat.common import UserError
from nanochat.schedule import BatchPlan, plan_batches


class Card(NamedTuple):
    """One device as torch sees it, by its vendor's data sheet."""

    name: str  # part of the device's own name
    gb: float
    tflops: float  # dense, in bf16; of a V100, which has no bf16, in fp32
    dollars: float | None = None  # for an hour, as nanochat reckons; None where no price is known


# Longer names first: find_card takes the first that a device's name holds.
CARDS = (
    Card("GB200", 186, 2500), Card("B200", 180, 2250), Card("H200", 141, 989), Card("H100 PCIe", 80, 756, 3.00),
    Card("H100 NVL", 94, 835, 3.00), Card("H100", 80, 989, 3.00), Card("H800", 80, 989), Card("A100", 80, 312, 1.79),
    Card("A800", 80, 312), Card("V100", 16, 15.7, 0.55), Card("L40S", 48, 362), Card("L4", 24, 121),
    Card("A40", 48, 149.7), Card("A10", 24, 125), Card("A6000", 48, 154.8), Card("6000 Ada", 48, 364),
    Card("RTX 5090", 32, 209.5), Card("RTX 4090", 24, 165.2), Card("RTX 4080", 16, 97.5), Card("RTX 3090", 24, 71),
    Card("MI355X", 288, 2500), Card("MI325X", 256, 1307), Card("MI300X", 192, 1307), Card("MI300A", 128, 981),
    Card("MI250X", 64, 191.5), Card("MI210", 64, 181), Card("7900 XTX", 24, 122.8), Card("7900 XT", 20, 103.2),
    Card("9070 XT", 16, 195),
)  # fmt: skip

MARGIN = 0.1  # of the memory, left free
TOTAL_TOLERANCE = 0.03  # how far a step may be from the tokens asked for, to take fewer micro-batches


@dataclass(frozen=True)
class GPTConfig:
    """What is needed to rebuild the model, stored in every checkpoint. Raises UserError for shapes that cannot be
    built.
    """

    sequence_len: int = 2048  # training context in tokens; also half of it is the window of an "S" layer
    vocab_size: int = 65536
    n_layer: int = 20
    n_head: int = 10
    n_kv_head: int = 10
    n_embd: int = 1280
    window_pattern: str = "L"  # tiled over the layers: L full context, S half of it; the last layer is always L
    rope_base: float = 100_000.0

    def __post_init__(self) -> None:
        if min(self.n_layer, self.n_head, self.n_kv_head, self.n_embd, self.vocab_size, self.sequence_len) < 1:
            raise UserError(f"every size of a model must be at least 1: {asdict(self)}")
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise UserError(
                f"width {self.n_embd} does not split into {self.n_head} heads of even size; choose another --head-dim"
            )
        if self.n_head % self.n_kv_head:
            raise UserError(f"--kv-heads={self.n_kv_head} must divide the {self.n_head} query heads")
        if not self.window_pattern or set(self.window_pattern) - set("LS"):
            raise UserError(
                f"--window-pattern={self.window_pattern}: expected a word of the letters L and S, such as SSSL"
            )

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def windows(self) -> list[int]:
        """How many tokens each layer sees, itself included."""
        pattern = self.window_pattern
        letters = [pattern[i % len(pattern)] for i in range(self.n_layer - 1)] + ["L"]
        return [self.sequence_len if letter == "L" else max(1, self.sequence_len // 2) for letter in letters]


def config_from_depth(
    depth: int,
    vocab_size: int,
    sequence_len: int,
    aspect_ratio: int = 64,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    window_pattern: str = "L",
) -> GPTConfig:
    """The one dial: width = depth * aspect_ratio, rounded up to whole heads. Heads have 128 channels where the width is
    at least 512 and a multiple of 128, else 64: a 256-wide model with two heads is worse than one with four.
    """
    if depth < 1 or aspect_ratio < 1 or (head_dim is not None and head_dim < 2):
        raise UserError(
            f"--depth={depth} --aspect-ratio={aspect_ratio} --head-dim={head_dim}: expected at least 1, 1 and 2"
        )
    width = depth * aspect_ratio
    if head_dim is None:
        head_dim = 128 if width >= 512 and width % 128 == 0 else 64
    n_head = math.ceil(width / head_dim)
    return GPTConfig(sequence_len, vocab_size, depth, n_head, kv_heads or n_head, n_head * head_dim, window_pattern)


def find_card(device_name: str) -> Card | None:
    """The card of a device, by the device's own name in any case; None when it is not in the table."""
    return next((card for card in CARDS if card.name.lower() in device_name.lower()), None)


# -----------------------------------------------------------------------------
# Parameters and FLOPs. C width, L layers, V vocabulary, G key/value channels.


def count_parameters(config: GPTConfig) -> dict[str, int]:
    """{part: parameters}."""
    C, L, G = config.n_embd, config.n_layer, config.n_kv_head * config.head_dim
    return {
        "embedding": config.vocab_size * C,
        "attention": L * (2 * C * C + 2 * C * G),
        "mlp": L * 8 * C * C,
        "head": config.vocab_size * C,
    }


def flops_per_token(config: GPTConfig) -> int:
    """Training FLOPs per token at full context, forward and backward: 6 per matmul weight, and 12 H D min(window, T)
    per layer for the attention scores and their sums (PaLM, arXiv 2204.02311, appendix B; not halved for causality).
    """
    parameters = count_parameters(config)
    attention = sum(12 * config.n_embd * window for window in config.windows())
    return 6 * (sum(parameters.values()) - parameters["embedding"]) + attention


# -----------------------------------------------------------------------------
# Memory


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a run computes, as far as its memory depends on it."""

    world_size: int = 1
    size: int = 2  # of a number in the matmuls' dtype: 2 for bfloat16, 4 for float32
    compiled: bool = True
    cpu: bool = False
    shard: bool = False  # --shard on several ranks
    offload: bool = False  # its parts in the host's memory, of which this counts nothing
    recompute: bool = False

    @property
    def untried(self) -> str:
        """The settings that would need less memory."""
        saving = {"--recompute": self.recompute, "--shard on several": self.shard, "--offload": self.offload}
        return ", ".join([name for name, used in saving.items() if not used] + ["a smaller --depth or --max-seq-len"])

    @property
    def parts(self) -> int:
        """Into how many parts weights and gradients are divided."""
        return self.world_size if self.shard else 1


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by what they hold."""

    weights: int  # fp32 master weights: all, or this rank's part
    optimizer: int  # Muon's momentum and AdamW's two moments, fp32: this rank's share
    gradients: int  # fp32: all until they are reduced, or this rank's part
    copies: int  # the blocks' weights in the dtype of the matmuls, kept for the backward pass; or what is gathered
    activations: int  # what the backward pass needs of every row
    head: int  # one slice of logits and what is made of it, the head's gradient, its weights in the matmuls' dtype
    update: int  # what reducing the gradients and the optimizers need while they run; activations are gone by then

    @property
    def total(self) -> int:
        """At the fullest moment of a step."""
        lasting = self.weights + self.optimizer + self.gradients
        return lasting + max(self.copies + self.activations + self.head, self.update)


def matrix_shapes(config: GPTConfig) -> Counter[tuple[int, int]]:
    """{(rows, columns): how many} of the matrices in the blocks, as Muon stacks them."""
    C, G = config.n_embd, config.n_kv_head * config.head_dim
    one_layer = [(C, C)] * 2 + [(G, C)] * 2 + [(4 * C, C), (C, 4 * C)]
    return Counter(one_layer * config.n_layer)


def optimizer_bytes(config: GPTConfig, world_size: int) -> int:
    """State of one rank. AdamW: 8 bytes per parameter of embedding and head, by rows. Muon: 4 per parameter of the
    matrices, dealt out whole among those of one shape, and 4 per row (or column) of each.
    """
    muon = sum(
        math.ceil(count / world_size) * (rows * columns + max(rows, columns))
        for (rows, columns), count in matrix_shapes(config).items()
    )
    return 4 * muon + 2 * 8 * math.ceil(config.vocab_size / world_size) * config.n_embd


def part_bytes(config: GPTConfig, parts: int) -> int:
    """All parameters in fp32, or of each matrix the rows that one of `parts` ranks keeps."""
    matrices = sum(n * math.ceil(rows / parts) * columns for (rows, columns), n in matrix_shapes(config).items())
    return 4 * (matrices + 2 * math.ceil(config.vocab_size / parts) * config.n_embd)


def update_bytes(config: GPTConfig, how: Setup) -> int:
    """The most of three: a stack of matrices copied before it is reduced; AdamW's intermediates, 4 bytes per number of
    its rows; Muon's, 12 per number of a stack's share (20 in an fp32 run) beside the reduced gradients, when all others
    are freed. With several ranks also what arrives from the others.
    """
    parameters, world_size = count_parameters(config), how.world_size
    stack = max(count * rows * columns for (rows, columns), count in matrix_shapes(config).items())
    matrices, embedding = parameters["attention"] + parameters["mlp"], parameters["embedding"]
    several, muon_bytes = world_size > 1, 4 + 4 * how.size
    if how.shard:
        return (8 * matrices + muon_bytes * stack) // world_size
    reducing = 4 * stack + several * 4 * sum(parameters.values()) // world_size
    adamw = 4 * embedding // world_size + several * (8 * embedding + 8 * embedding // world_size)
    muon = (4 * matrices + muon_bytes * stack) // world_size + several * 8 * stack - 4 * sum(parameters.values())
    return max(reducing, adamw, muon)


def written_attention_keys(sequence_len: int, window: int) -> tuple[float, float]:
    """For the attention that gpt.causal_attention writes out, in blocks of 128 queries: (keys that a query's score row
    has, copies of a key that the blocks hold), both on average.
    """
    blocks = [(min(128, sequence_len - start), start) for start in range(0, sequence_len, 128)]
    keys = [rows + min(start, window - 1) for rows, start in blocks]
    scores = sum(rows * n for (rows, _), n in zip(blocks, keys, strict=True))
    return scores / sequence_len, sum(keys) / sequence_len


def saved_per_token(config: GPTConfig, window: int, size: int, compiled: bool, written: bool) -> float:
    """Bytes that one layer keeps for the backward pass, per token. `size` is that of a number in the matmuls' dtype.

    In width C and key/value width G, compiled: both norms' inputs and outputs 4 C; queries and keys before and after
    their norm, and values 2 C + 3 G; attention's output C; MLP 4 C before and 4 C after ReLU squared. Eager norms keep
    their inputs in fp32. Attention by a kernel keeps no scores; written out, it keeps them in fp32 and in the matmuls'
    dtype, and keys and values as often as blocks hold them.
    """
    C, H, G = config.n_embd, config.n_head, config.n_kv_head * config.head_dim
    saved = size * (15.0 * C + 3 * G) if compiled else 4 * (3 * C + G) + size * (12 * C + 2 * G)
    if written:
        keys, copies = written_attention_keys(config.sequence_len, window)
        saved += H * keys * (4 if size == 4 else 4 + size)
        saved += size * (2 * C * copies - 2 * G)
    return saved


def head_bytes(config: GPTConfig, tokens: int, size: int, compiled: bool, cpu: bool) -> int:
    """What the loss holds at its fullest: per logit of a slice its value and intermediates (compiled: 12 bytes, eager:
    20 and the logit), the slice before; the head's gradient and weights.
    """
    slice_tokens = math.ceil(tokens / slice_count(tokens, config.vocab_size, cpu))
    per_logit = (12 if compiled else 20 + size) + (size if slice_tokens < tokens else 0)
    weights = config.vocab_size * config.n_embd * (4 + (size if size != 4 else 0))
    return slice_tokens * config.vocab_size * per_logit + weights


def slice_count(tokens: int, vocab_size: int, cpu: bool) -> int:
    """Slices of the loss: their fp32 logits stay near 16 MB on CPU (the L3 cache) and 512 MB elsewhere."""
    return math.ceil(tokens / max(1, (16 if cpu else 512) * 2**20 // (4 * vocab_size)))


def memory(config: GPTConfig, rows: int, how: Setup) -> Memory:
    """Memory of a training step with `rows` rows per micro-batch on each rank; the fullest moment is mostly the last
    loss, when all activations are there. With recompute it may also come when one layer's are made again, after the
    loss.
    """
    tokens, size = rows * config.sequence_len, how.size
    written = how.cpu and config.sequence_len <= 1024
    layers = [saved_per_token(config, window, size, how.compiled, written) for window in config.windows()]
    head = head_bytes(config, tokens, size, how.compiled, how.cpu)
    inputs = config.n_layer * size * config.n_embd
    blocks = inputs + max(0, max(layers) - head / tokens) if how.recompute else sum(layers)
    around = config.n_embd * (8 + 3 * size)  # inputs of the first and last norm, the final states and their gradient
    here = 0 if how.offload else 1
    return Memory(
        weights=here * part_bytes(config, how.parts),
        optimizer=here * optimizer_bytes(config, how.world_size),
        gradients=here * part_bytes(config, how.parts),
        copies=copied_bytes(config, how),
        activations=round(tokens * (blocks + around)),
        head=head,
        update=update_bytes(config, how),
    )


def copied_bytes(config: GPTConfig, how: Setup) -> int:
    """Weights beside the master weights: of all blocks in the matmuls' dtype, if it is another one. Sharded: embedding
    and head whole in fp32, and three blocks (the one at work, its buffer, and the next).
    """
    parameters = count_parameters(config)
    blocks = how.size * (parameters["attention"] + parameters["mlp"])
    if how.shard:
        return 4 * (parameters["embedding"] + parameters["head"]) + 3 * blocks // config.n_layer
    if how.recompute:
        blocks //= config.n_layer
    return 0 if how.size == 4 else blocks


# -----------------------------------------------------------------------------
# The batch


def most_rows(config: GPTConfig, budget: float, how: Setup) -> int:
    """The most rows per micro-batch whose memory stays within `budget` bytes; 0 where not even one does."""
    low, high = 0, 1
    while memory(config, high, how).total <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = memory(config, middle, how).total <= budget
        low, high = (middle, high) if fits else (low, middle)
    return low


def choose_batch(total_batch_size: int, most: int, sequence_len: int, world_size: int) -> BatchPlan:
    """With at most `most` rows per micro-batch: the fewest micro-batches whose step is within TOTAL_TOLERANCE of the
    tokens asked for, and of these the nearest; where none is that close, the nearest of all.
    """

    def off(plan: BatchPlan) -> float:
        return abs(plan.tokens / total_batch_size - 1)

    plans = [plan_batches(total_batch_size, rows, sequence_len, world_size) for rows in range(most, 0, -1)]
    near = [plan for plan in plans if off(plan) <= TOTAL_TOLERANCE]
    return min(near, key=lambda plan: (plan.grad_accum_steps, off(plan))) if near else min(plans, key=off)
