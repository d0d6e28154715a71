"""A compiled decoding step for CPUs: one call per token, no Python per operator.

The model's own code is traced, whatever its architecture, and compiled ahead of time by AOTInductor in a process of its
own. The artefact, 2 MB in cache/ of the base directory, holds no weights and no lengths: one serves every checkpoint of
a shape, at every context. Only one that agrees with the eager step on random data is used.

Per core (Zen 3, AVX2, fp32), where reading memory once, at 15 GB/s, bounds what one row can do: up to eight rows a
matmul is written out as dot products, so that a weight is read once for all. Inductor makes 16 GB/s of it for one row,
MKL 9 to 11; for 8 rows of a d6 38 GFLOPS, MKL 22. From 16 rows on it is MKL's matmul.
"""

import ctypes
import hashlib
import inspect
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanochat.common import get_base_dir, print0
from nanochat.compute import can_compile
from nanochat.engine import Engine, KVCache, LayerSlots, Step
from nanochat.files import one_line, whole
from nanochat.model import load_config

DOT_ROWS = 8  # matmuls of at most so many rows are written out as dot products

# -----------------------------------------------------------------------------
# What is traced, in a process of its own


class DecodingStep(nn.Module):
    """Engine.eager_step."""

    def __init__(self, model: Any, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, idx: Tensor, previous: Tensor, positions: Tensor, keys: Any, values: Any) -> Tensor:
        return Engine.eager_step(self, idx, previous, positions, keys, values)  # type: ignore[arg-type]


def dot_products(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, written out for few rows; see above."""
    rows = x.reshape(-1, x.size(-1))
    if len(rows) > DOT_ROWS:
        y = rows @ weight.t()
    else:
        # A barrier: without it the norm before is computed again for each output, 12 ms for 3.7 with 8 rows of a d4.
        rows = rows.as_strided(rows.shape, (rows.size(1), 1))
        y = torch.stack([(row.float() * weight.float()).sum(dim=-1) for row in rows.unbind()]).to(x.dtype)
    return (y if bias is None else y + bias).view(*x.shape[:-1], len(weight))


@torch.no_grad()
def build(config: Any, dtype: torch.dtype, rows: int, threads: int, path: Path) -> None:
    """Write an artefact. Weights and keys are never touched here, so they take no memory."""
    torch.set_num_threads(threads)  # the loops are cut for that many
    with torch.device("meta"):
        model = config.build().to(dtype)
    model.to_empty(device="cpu").eval().requires_grad_(False)
    cache = KVCache(config, rows, config.sequence_len, torch.device("cpu"), dtype)
    cache.reserve(config.sequence_len)
    lengths = {window: torch.export.Dim(f"R{window}", min=2) for window in config.windows()}
    layers = [{2: lengths[window]} for window in config.windows()]
    program = torch.export.export(
        DecodingStep(model, dtype),
        (*torch.zeros(3, rows, dtype=torch.long), cache.keys, cache.values),
        dynamic_shapes=(None, None, None, layers, layers),
        prefer_deferred_runtime_asserts_over_guards=True,
    ).run_decompositions({torch.ops.aten.linear.default: dot_products})
    options = {"aot_inductor.package_constants_in_so": False}
    with tempfile.TemporaryDirectory() as scratch, whole(path) as building:
        made = f"{scratch}/step.pt2"  # a name that ends otherwise is refused
        torch._inductor.aoti_compile_and_package(program, package_path=made, inductor_configs=options)
        shutil.copyfile(made, building)


def build_asked() -> None:
    """The compiling process: what build() takes comes on stdin. Niced, so that whoever chats meanwhile goes first."""
    os.nice(10)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: who asked may be killed, and then nobody waits
    config, dtype, rows, threads, path = json.load(sys.stdin)
    build(load_config(config), getattr(torch, dtype), rows, threads, Path(path))


# -----------------------------------------------------------------------------
# What the engine's process does


def artefact(engine: Engine, rows: int) -> Path:
    """Where the step of that many rows lies, or will. The name has a hash of all that the machine code depends on."""
    classes = {cls for module in engine.model.modules() for cls in type(module).__mro__}
    traced = {Path(inspect.getfile(cls)) for cls in [*classes, LayerSlots] if cls.__module__.startswith("nanochat.")}
    cpuinfo = Path("/proc/cpuinfo")
    processor = cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
    flags = next((line for line in processor.splitlines() if line.startswith(("flags", "Features"))), processor)
    machine = (torch.__version__, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(), flags)
    known = repr((machine, engine.model.config, engine.dtype, rows)).encode()
    files = b"".join(path.read_bytes() for path in [Path(__file__), *sorted(traced)])
    return get_base_dir() / "cache" / f"decode-{rows}-{hashlib.sha256(known + files).hexdigest()[:16]}.pt2"


def run_compiler(engine: Engine, rows: int, path: Path) -> None:
    """build() in a process of its own, which on Linux ends with this one. Raises RuntimeError with its last words."""
    root, command = str(Path(__file__).parent.parent), "from nanochat.decode_step import build_asked; build_asked()"
    process = subprocess.Popen(
        [sys.executable, "-c", command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C stops an answer, not this
    )
    config, dtype = engine.model.config, str(engine.dtype).removeprefix("torch.")
    asked = json.dumps([asdict(config), dtype, rows, torch.get_num_threads(), str(path)]).encode()
    words = process.communicate(asked)[1].decode(errors="replace").strip().splitlines()
    if process.returncode:
        raise RuntimeError(words[-1] if words else f"the compiling process ended with {process.returncode}")


def load(engine: Engine, rows: int, path: Path) -> Step:
    """The step in an artefact. It reads the engine's weights where they are."""
    loaded: Any = torch._inductor.aoti_load_package(str(path))
    weights = {f"model.{name}": weight for name, weight in engine.model.state_dict().items()}
    constants = {name: weights[name] for name in loaded.get_constant_fqns()}
    loaded.load_constants(constants, check_full_update=True, user_managed=True)

    def step(idx: Tensor, previous: Tensor, positions: Tensor, keys: list[Tensor], values: list[Tensor]) -> Any:
        return loaded.loader.boxed_run([idx, previous, positions, *(x[:rows] for x in (*keys, *values))])[0]

    return step


@torch.inference_mode()
def check(engine: Engine, rows: int, step: Step) -> None:
    """Raises RuntimeError where a step and the eager one differ in logits, or in what they leave in the cache."""
    config, generator = engine.model.config, torch.Generator().manual_seed(rows)
    steps: list[Step] = [step, engine.eager_step]
    tokens = torch.randint(config.vocab_size, (2, rows), generator=generator)
    for S in sorted({2, min(33, config.sequence_len), min(64, config.sequence_len)}):
        caches = [KVCache(config, rows, S, engine.model.device, engine.dtype) for _ in steps]
        for cache in caches:
            cache.reserve(S)
        for one, other in zip(*([*cache.keys, *cache.values] for cache in caches), strict=True):
            other.copy_(one.normal_(generator=generator))
        positions = torch.randint(S, (rows,), generator=generator)
        logits = [f(*tokens, positions, cache.keys, cache.values) for f, cache in zip(steps, caches, strict=True)]
        pairs = zip(*([x, *cache.keys, *cache.values] for x, cache in zip(logits, caches, strict=True)), strict=True)
        apart = max(float((a.float() - b.float()).abs().max()) for a, b in pairs)
        if not apart <= (1e-3 if engine.dtype == torch.float32 else 0.5):
            raise RuntimeError(f"compiled and eager step differ by {apart:.2g} at {rows} rows and {S} tokens")


def fill(engine: Engine, rows: Sequence[int], say: Callable[[str], None]) -> None:
    """Put compiled steps into the engine, each as it is ready; whatever fails, decoding goes on."""
    try:
        for n in rows:
            path = artefact(engine, n)
            if not path.exists():
                run_compiler(engine, n, path)
            if path.stat().st_uid != os.getuid():
                raise RuntimeError(f"{path} is somebody else's, and machine code is not taken from others")
            try:
                check(engine, n, step := load(engine, n, path))
            except Exception:
                path.unlink(missing_ok=True)  # the next start makes another
                raise
            engine.compiled = {**engine.compiled, n: step}  # a dict that grows would fail under who iterates over it
    except Exception as error:
        say(f"decoding is not compiled, and slower: {one_line(error)}")


def compile_decoding(
    engine: Engine, rows: Sequence[int] = (1, 8, 32), wait: bool = False, say: Callable[[str], None] = print0
) -> threading.Thread | None:
    """Make compiled steps of so many rows for an engine on a CPU, in the background or before returning (`wait`). The
    first start compiles, 20 to 40 s of a core for each; later ones find the artefacts. What fails is said in one line
    and leaves the eager step in its place. Elsewhere than on a CPU nothing happens; returns None where nothing does.
    """
    if engine.model.device.type != "cpu":
        return None
    if not can_compile(engine.model.device):
        say("decoding is not compiled, and slower: there is no C++ compiler (apt install g++)")
        return None
    thread = threading.Thread(target=fill, args=(engine, rows, say), daemon=True)
    thread.start()
    if wait:
        thread.join()
    return thread
