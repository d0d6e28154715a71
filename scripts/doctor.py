"""What on this machine keeps nanochat from running, or from running fast, and the command that mends it.

    python -m scripts.doctor

One line per finding: `ok`, `hint` (works, could be better) or `MEND`, with what to do. Things are tried rather than
asked: the compiler compiles, the attention is compared with the CPU's in fp64, two ranks talk to each other. Ends with
0 when nothing must be mended, else with 1. Checks run in processes of their own: a broken library ends a probe and not
the doctor. They run side by side, but for the speed of matmuls, which is measured when the others are done.
"""

from nanochat.configurator import configure

probe = ""  # this check alone, as JSON: devices, speed, or one of those in CHECKS
settings = configure(__name__)

import contextlib
import importlib.metadata
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nanochat.common import get_base_dir, print0, run_main
from nanochat.files import one_line

ROOT = Path(__file__).parent.parent
NETWORK = "a network disk, whose speed checkpoints take; prefetch from one machine at a time (docs/how-to/offline.md)"
WARNINGS = dict.fromkeys("nfs nfs4 cifs smb3 fuse.sshfs lustre gpfs beegfs ceph 9p".split(), NETWORK)
WARNINGS |= dict.fromkeys(("tmpfs", "ramfs"), "it takes memory and is gone after a restart")
RANK_SECONDS, PROBE_SECONDS = 40, 120  # a probe outlasts its two ranks when they hang
SETUP = "bash dev/setup.sh"
GB = 1e9


class Finding(NamedTuple):
    level: Literal["ok", "hint", "MEND"]
    text: str
    mend: str = ""  # the command, or what to do


def main() -> None:
    if probe:
        several = {"devices": device_checks, "speed": speed_checks}
        for what, check in several[probe]() if probe in several else [(probe, CHECKS[probe])]:
            try:
                finding = check()
            except Exception as error:  # one that nobody thought of is a finding too
                finding = Finding("MEND", f"could not be examined: {type(error).__name__}: {one_line(error)}", SETUP)
            print(json.dumps([what, *finding]), flush=True)
        return
    started, levels = time.perf_counter(), []
    with ThreadPoolExecutor(len(CHECKS) + 1) as pool:
        found = itertools.chain(pool.map(run_probe, (*CHECKS, "devices")), map(run_probe, ["speed"]))
        for what, level, text, mend in itertools.chain.from_iterable(found):
            print0(f"{level:4}  {what:10}  {text}" + (f" -> {mend}" if mend else ""))
            levels.append(level)
    print0(f"{levels.count('MEND')} to mend, {len(levels)} findings, {time.perf_counter() - started:.0f} s")
    sys.exit(1 if "MEND" in levels else 0)


def run_probe(name: str, seconds: float = PROBE_SECONDS, **environment: str) -> list[list[str]]:
    """[what, level, text, mend] of all that a probe found. One that takes too long is killed with what it started."""
    command = [sys.executable, "-m", "scripts.doctor", f"--probe={name}"]
    outer = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=outer | environment, start_new_session=True, **pipes)
    late = ""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        late = f"took more than {seconds:.0f} s"
    found = [json.loads(line) for line in out.splitlines() if line.startswith('["')]  # and not what a library prints
    if code := process.returncode:
        failure = late or (f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}")
        text = f"{failure}: {(err.strip().splitlines() or ['no message'])[-1][:200]}"
        found.append([name, "MEND", text, f"{SETUP}; python -m scripts.doctor --probe={name} shows more"])
    return found


# -----------------------------------------------------------------------------
# Without torch


def check_python() -> Finding:
    """The packages that the project names."""
    lines = [line for line in importlib.metadata.requires("nanochat") or [] if "extra ==" not in line]
    names = [re.split("[<>=;]", line)[0] for line in lines]
    missing = [name for name in names if not any(importlib.metadata.distributions(name=name))]
    text = f"{sys.version.split()[0]}, {sys.executable}, {len(names)} packages"
    return Finding("MEND", f"{text}, without {', '.join(missing)}", SETUP) if missing else Finding("ok", text)


def check_cpu(cgroup: Path = Path("/sys/fs/cgroup/cpu.max")) -> Finding:
    """Cores as the scheduler and the container see them, and the threads that torch would start."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed = cores
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or `max 100000`: no limit
        quota, period = map(int, cgroup.read_text().split())  # microseconds
        allowed = max(1, min(cores, quota // period))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(asked) if asked.isdecimal() else cores
    text = f"{cores} cores, {allowed} of them at a time; threads: {threads}"
    if threads > allowed:
        return Finding("hint", f"{text}, which get in each other's way", f"export OMP_NUM_THREADS={allowed}")
    return Finding("ok", text)


def check_disk() -> Finding:
    """Where everything goes: may it be written, is there room, will it stay. Leaves nothing behind."""
    base_dir = get_base_dir(create=False)
    mend = "export NANOCHAT_BASE_DIR=DIR, a directory of yours on a large disk"
    try:
        place = next(path for path in (base_dir, *base_dir.parents) if path.exists())
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(1 << 20))
            file.flush()
    except OSError as error:
        return Finding("MEND", f"{base_dir} cannot be written ({error.strerror})", mend)
    free = shutil.disk_usage(place).free / GB
    kind = output_of("df", "--output=fstype", str(place)).removeprefix("Type").strip()  # empty where df is not GNU's
    text = f"{base_dir}, {free:,.0f} GB free {kind}"
    if free < 2:
        return Finding("MEND", f"{text}: the laptop run takes 2 GB", mend)
    if kind in WARNINGS:
        return Finding("hint", f"{text}: {WARNINGS[kind]}", mend)
    if free < 35:
        return Finding("hint", f"{text}: the speedrun takes 35 GB", "python -m scripts.plan says what a run takes")
    return Finding("ok", text)


def output_of(*command: str) -> str:
    """What a program prints; empty where it is missing, fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return ""


def check_tokenizer() -> Finding:
    """Train and use a tokenizer of a few tokens."""
    from nanochat.tokenizer import Tokenizer

    text = "the cat saw the other cat, \u00e4 \u4f60\U0001f600 " * 20
    tokenizer = Tokenizer.train([text], 280)
    if tokenizer.decode(tokenizer.encode(text)) != text:
        return Finding("MEND", "rustbpe is built, but does not give a text back", SETUP)
    return Finding("ok", "rustbpe trains, encodes and decodes")


# -----------------------------------------------------------------------------
# GPUs as the system sees them, and whether this torch can use them


def find_driver(dev: Path = Path("/dev")) -> tuple[str, int, int]:
    """What the machine has, found without torch: vendor, GPUs, newest CUDA that the driver knows (0 = not known)."""
    smi = output_of("nvidia-smi")
    if smi or (dev / "nvidia0").exists():
        known = re.search(r"CUDA Version: (\d+)", smi)
        listed = re.findall(r"^GPU \d+:", output_of("nvidia-smi", "-L"), re.MULTILINE)
        return "NVIDIA", len(listed), int(known[1]) if known else 0
    if shutil.which("rocm-smi") or (dev / "kfd").exists():
        return "AMD", len(set(re.findall(r"GPU\[\d+\]", output_of("rocm-smi", "--showproductname")))), 0
    return "", 0, 0


def check_torch_build(
    driver: tuple[str, int, int], cuda: str | None, hip: str | None, seen: int, kfd: Path = Path("/dev/kfd")
) -> Finding:
    """This torch (the CUDA or HIP that it was built for, the GPUs it sees) against what the machine has."""
    vendor, count, known = driver
    build = f"torch for {f'CUDA {cuda}' if cuda else f'ROCm {hip}' if hip else 'CPUs'}"
    if not vendor:
        return Finding("ok", f"{build}, no GPU here")
    if not (hip if vendor == "AMD" else cuda):
        wheel = "rocm7.2" if vendor == "AMD" else "cu126" if known == 12 else "cu130"
        return Finding("MEND", f"{build}, and this machine has an {vendor} GPU", f"TORCH_BUILD={wheel} {SETUP}")
    if cuda and 0 < known < int(cuda.split(".")[0]):
        mend = f"TORCH_BUILD=cu126 {SETUP}, or a newer driver" if known == 12 else "a newer driver"
        return Finding("MEND", f"{build}, and the driver knows CUDA {known}", mend)
    text = f"{build} sees {seen} of {count or 'the'} {vendor} GPUs"
    if seen >= max(count, 1):
        return Finding("ok", text)
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if name in os.environ:
            return Finding("hint", f"{text}: {name}={os.environ[name]!r}", f"unset {name}")
    if seen:
        return Finding("hint", text, "look at the driver's log: dmesg")
    if kfd.exists() and not os.access(kfd, os.R_OK | os.W_OK):
        mend = 'sudo usermod -aG render,video "$USER", then log in again'
        return Finding("MEND", f"{text}: {kfd} may not be opened", mend)
    return Finding("MEND", text, f"{'rocm' if vendor == 'AMD' else 'nvidia'}-smi must work in this shell")


# -----------------------------------------------------------------------------
# With torch: build, attention, dtypes, compiler, ranks


def device_checks() -> Iterator[tuple[str, Callable[[], Finding]]]:
    import torch

    shm = Path("/dev/shm")
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield "torch", lambda: check_torch_build(find_driver(), torch.version.cuda, torch.version.hip, seen)
    for device in find_devices():
        for dtype in ("float32", "bfloat16"):
            yield device, partial(check_attention, torch.device(device), dtype)
    if seen > 1 and shm.exists() and (size := shutil.disk_usage(shm).total / GB) < 1:
        finding = Finding("hint", f"{size:.2f} GB; NCCL shares memory there", "docker run --shm-size=8g")
        yield "/dev/shm", lambda: finding


def speed_checks() -> Iterator[tuple[str, Callable[[], Finding]]]:
    import torch

    for device in find_devices():
        yield device, partial(measure_dtypes, torch.device(device))


def find_devices() -> list[str]:
    """All that torch can compute on."""
    import torch

    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    return ["cpu", *gpus, *["mps"] * torch.backends.mps.is_available(), *["xpu"] * torch.xpu.is_available()]


def check_attention(device: Any, dtype: str) -> Finding:
    """Every way that the model's attention goes; on a GPU, which fused kernels do it and which one torch takes. Without
    one all scores stay.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # heads, key/value heads, tokens, window. More than 1,024 tokens take torch's kernel on a CPU too.
    ways = {"full": (2, 2, 192, 192), "GQA": (4, 2, 192, 192), "window": (2, 2, 192, 50), "long": (1, 1, 1152, 1152)}
    errors = {name: attention_error(device, dtype, *shape) for name, shape in ways.items()}
    fused, kernels = "", ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")
    for kernel in kernels if device.type == "cuda" else ():
        with contextlib.suppress(RuntimeError), sdpa_kernel(getattr(SDPBackend, kernel)):  # not every card has each
            errors[kernel] = attention_error(device, dtype, *ways["full"])
            fused += f", {kernel}"
    if fused:
        training, decoding = (kernel_taken(device, dtype, queries) for queries in (192, 1))
        fused += f"; torch takes {training} in training, {decoding} in decoding"
    tolerance = {"float32": 3e-3, "bfloat16": 3e-2}[dtype]  # fp32: GPUs multiply in TF32
    wrong = [f"{name}: off by {error:.1%}" for name, error in errors.items() if not error <= tolerance]
    if wrong:
        mend = "train with --dtype=float32" if dtype == "bfloat16" else f"another torch build: {SETUP}"
        return Finding("MEND", f"attention in {dtype} is wrong: {'; '.join(wrong)}", mend)
    text = f"attention in {dtype}: {len(ways)} ways, forward and backward, within {max(errors.values()):.1e}{fused}"
    if device.type != "cuda" or fused:
        return Finding("ok", text)
    mend = "a smaller --max-seq-len, or on AMD: export TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1"
    return Finding("hint", f"{text}, not fused: slow, and memory grows with context^2", mend)


def kernel_taken(device: Any, dtype: str, queries: int) -> str:
    """What torch computes attention over 192 keys with: causal, or of a few queries under a mask."""
    import torch
    from torch.nn.attention import SDPBackend

    from nanochat.attention import causal_mask

    q, k = (torch.zeros(1, 2, n, 64, device=device, dtype=getattr(torch, dtype)) for n in (queries, 192))
    mask = causal_mask(queries, 192, 192, device) if queries < 192 else None
    return SDPBackend(torch._fused_sdp_choice(q, k, k, mask, is_causal=mask is None)).name


def attention_error(device: Any, dtype: str, heads: int, kv_heads: int, tokens: int, window: int) -> float:
    """The largest difference from fp64 on a CPU, of output and three gradients, as a share of each's largest value."""
    import torch

    from nanochat.attention import causal_attention

    generator = torch.Generator().manual_seed(0)
    shapes = [(1, n, tokens, 64) for n in (heads, kv_heads, kv_heads, heads)]
    rounded = [torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for shape in shapes]

    def outputs(*where: Any) -> list[Any]:
        *qkv, gradient = (x.to(*where, copy=True).requires_grad_() for x in rounded)
        y = causal_attention(*qkv, window)
        return [x.detach().cpu().double() for x in (y, *torch.autograd.grad(y, qkv, gradient))]

    pairs = zip(outputs(device), outputs("cpu", torch.float64), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def measure_dtypes(device: Any) -> Finding:
    """The device, its matmuls in bf16 and fp32, 20 taken in turns, and whether --dtype=auto takes the faster one."""
    import torch

    from nanochat.compute import choose_dtype, device_name

    name, n = device_name(device), 1024 if device.type == "cpu" else 8192
    if device.type == "cuda":
        name += f", {torch.cuda.get_device_properties(device).total_memory / GB:.1f} GB"
        torch.set_float32_matmul_precision("high")  # as training does
    x, best = torch.randn(n, n, device=device), {"bfloat16": math.inf, "float32": math.inf}
    for dtype in [*best] * 20:
        a = x.to(getattr(torch, dtype))
        a[0, 0].item()  # waits
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best[dtype] = min(best[dtype], time.perf_counter() - started)
    auto, faster = str(choose_dtype("auto", device)).removeprefix("torch."), min(best, key=best.__getitem__)
    rates = ", ".join(f"{dtype} {2 * n**3 / seconds / 1e9:,.0f} GFLOP/s" for dtype, seconds in best.items())
    text = f"{name}: matmuls in {rates}; --dtype=auto takes {auto}"
    if best[auto] > 1.3 * best[faster]:
        return Finding("hint", f"{text}, {best[auto] / best[faster]:.1f} times as slow", f"--dtype={faster}")
    return Finding("ok", text)


def check_compiler() -> Finding:
    """Compile a function of one line that is in no cache: a number in it is drawn anew."""
    import torch

    from nanochat.compute import can_compile

    device, number, started = "cuda" if torch.cuda.is_available() else "cpu", random.random(), time.perf_counter()
    if not can_compile(torch.device(device)):
        return Finding("MEND", "no C++ compiler: no torch.compile, half the speed in training", "apt-get install g++")
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    x = torch.linspace(-1, 1, 4096, device=device)
    function = lambda x: x.relu().sin() + x.square().sum() * number  # noqa: E731
    try:
        off = ((torch.compile(function)(x) - function(x)).abs().max() / function(x).abs().max()).item()
    except Exception as error:
        line = next((line.strip() for line in str(error).splitlines() if "rror" in line), type(error).__name__)
        mend = "apt-get install g++" if device == "cpu" or "C compiler" in line else SETUP
        return Finding("MEND", f"torch.compile fails on {device}: {line[:200]}", f"{mend}; meanwhile --compile=false")
    if off > 1e-3:
        return Finding("MEND", f"torch.compile gives other numbers (off by {off:.1%})", "--compile=false")
    return Finding("ok", f"torch.compile works on {device} ({time.perf_counter() - started:.0f} s for one line)")


def check_ranks(backend: str, device: str, mend: str, seconds: float = RANK_SECONDS) -> Finding:
    """Two processes that meet over loopback and add their numbers; called again in each of them."""
    if "RANK" in os.environ:
        import torch

        from nanochat.compute import compute_cleanup, compute_init

        compute = compute_init(device, "float32")
        total = compute.sum(torch.tensor([1.0 + compute.rank])).item()
        compute_cleanup()
        return Finding("ok" if total == 3 else "MEND", f"1 + 2 = {total:g}")
    if device == "cuda" and find_driver()[1] < 2:
        return Finding("ok", "not tried: there are no two GPUs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with ThreadPoolExecutor(2) as pool:
        pair = pool.map(lambda rank: run_probe(backend, seconds, **where, RANK=rank, LOCAL_RANK=rank), "01")
    for _, level, text, _ in itertools.chain(*pair):
        if level == "MEND":
            return Finding("MEND", f"two ranks cannot talk with {backend}: {text}", mend)
    return Finding("ok", f"two ranks add up with {backend}")


CHECKS: dict[str, Callable[[], Finding]] = {
    "python": check_python,
    "cpu": check_cpu,
    "disk": check_disk,
    "tokenizer": check_tokenizer,
    "compile": check_compiler,
    "gloo": partial(check_ranks, "gloo", "cpu", "export GLOO_SOCKET_IFNAME=lo"),
    "nccl": partial(check_ranks, "nccl", "cuda", "export NCCL_P2P_DISABLE=1; NCCL_DEBUG=INFO says more"),
}

if __name__ == "__main__":
    run_main(main)
