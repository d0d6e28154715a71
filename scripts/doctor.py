"""What on this machine keeps nanochat from running, or from running fast, and the command that mends it.

    python -m scripts.doctor
    python -m scripts.doctor --developer        # also what only the tests need

One line per finding: `ok`, `hint` (works, could be better) or `MEND`, with what to do. Things are tried rather than
asked: the compiler compiles, the attention is compared with its formula, two ranks talk to each other. Ends with 0 when
nothing must be mended, else with 1. What touches torch or the network runs in processes of its own, side by side: a
broken library ends a probe and not the doctor.
"""

from typing import Literal

from nanochat.configurator import configure

developer = False  # also look for what only tests need: a browser, node, cargo
probe: Literal["devices", "compile", "gloo", "nccl", "tokenizer", "hub"] | None = None  # this alone, as JSON
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
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from nanochat.common import print0, run_main

ROOT = Path(__file__).parent.parent
NETWORK_DISKS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs", "lustre", "gpfs", "beegfs", "ceph", "9p"}
RANK_SECONDS = 40  # for each of two ranks
PROBE_SECONDS = 3 * RANK_SECONDS  # outlasts two ranks that hang
SETUP = "bash dev/setup.sh"
GB = 1e9


class Finding(NamedTuple):
    """What a check says."""

    level: Literal["ok", "hint", "MEND"]
    text: str
    mend: str = ""  # the command, or what to do
    what: str = ""  # was looked at


def main() -> None:
    if probe:
        for finding in examine_devices() if probe == "devices" else examine(probe, PROBES[probe]):
            print(json.dumps(finding), flush=True)
        return
    started = time.perf_counter()
    running = {name: start_probe(name) for name in ("devices", *PROBES)}
    found = [examine(what, check) for what, check in CHECKS.items()]
    found += [results(name, process, PROBE_SECONDS) for name, process in running.items()]
    found += [examine(what, check) for what, check in PROGRAMS.items() if developer]
    levels = []
    for level, text, mend, what in itertools.chain(*found):
        print0(f"{level:4}  {what:10}  {text}" + (f" -> {mend}" if mend else ""))
        levels.append(level)
    seconds = time.perf_counter() - started
    print0(f"{levels.count('MEND')} to mend, {len(levels)} findings, {seconds:.0f} s")
    sys.exit(1 if "MEND" in levels else 0)


def examine(what: str, check: Callable[..., Finding | None], *arguments: Any) -> Iterator[Finding]:
    """What a check says, if anything. One that fails in a way nobody thought of is a finding too."""
    try:
        finding = check(*arguments)
    except Exception as error:
        finding = Finding("MEND", f"could not be examined: {type(error).__name__}: {first_line(error)}", SETUP)
    if finding:
        yield finding._replace(what=what)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


# -----------------------------------------------------------------------------
# Probes: processes whose findings come back as JSON lines


def start_probe(name: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "scripts.doctor", f"--probe={name}"]
    outer = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, cwd=ROOT, env=outer | environment, **pipes)


def results(name: str, process: subprocess.Popen[str], seconds: float) -> Iterator[Finding]:
    """What a probe found, and how it ended if badly. One that takes too long is killed with what it started."""
    late = ""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        late = f"took more than {seconds:.0f} s"
    for line in out.splitlines():
        if line.startswith('["'):  # and not what a library prints
            yield Finding(*json.loads(line))
    if code := process.returncode:
        last = (err.strip().splitlines() or ["no message"])[-1]
        failure = late or (f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}")
        mend = f"{SETUP}; python -m scripts.doctor --probe={name} shows more"
        yield Finding("MEND", f"{failure}: {last[:200]}", mend, name)


# -----------------------------------------------------------------------------
# Without torch


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3]), project: Path = ROOT) -> Finding:
    """Python, and the packages that the project names."""
    name = ".".join(map(str, version))
    if version < (3, 11):
        return Finding("MEND", f"{name} is too old", f"PYTHON=python3.11 {SETUP}")
    import tomllib  # new in 3.11

    lines = tomllib.loads((project / "pyproject.toml").read_text())["project"]["dependencies"]
    packages = [re.split("[<>=]", line)[0] for line in lines]
    missing = [name for name in packages if not any(importlib.metadata.distributions(name=name))]
    if missing:
        return Finding("MEND", f"{name} without {', '.join(missing)}", SETUP)
    return Finding("ok", f"{name}, {sys.executable}, {len(packages)} packages")


def check_cpu() -> Finding:
    """Cores as the scheduler and the container see them, and the threads that torch would start."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed = max(1, int(min(cores, cpu_quota(Path("/sys/fs/cgroup/cpu.max")))))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(asked) if asked.isdecimal() else cores
    text = f"{cores} cores, {allowed} of them at a time; threads: {threads}"
    if threads > allowed:
        return Finding("hint", f"{text}, which get in each other's way", f"export OMP_NUM_THREADS={allowed}")
    return Finding("ok", text)


def cpu_quota(path: Path) -> float:
    """Cores that a cgroup may use at a time: its file cpu.max has `quota period` in microseconds, or `max`."""
    try:
        quota, period = path.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf


def check_files() -> Finding | None:
    """Open files: shards, sockets of ranks, the web server's connections."""
    if sys.platform == "win32":
        return None
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (math.inf if limit == resource.RLIM_INFINITY else limit for limit in limits)
    if soft < 1024:
        return Finding("MEND", f"{soft} open files, 1,024 are needed", f"ulimit -n {min(hard, 65536)}")
    return Finding("ok", "unlimited" if soft == math.inf else f"{soft:,} open files")


def check_disk() -> Finding:
    """Where everything goes: may it be written, is there room, will it stay. Leaves nothing behind."""
    base_dir = Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser().absolute()
    mend = "export NANOCHAT_BASE_DIR=DIR, a directory of yours on a large disk"
    try:
        place = next(path for path in (base_dir, *base_dir.parents) if path.exists())
        with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Finding("MEND", f"{base_dir} cannot be written ({error.strerror})", mend)
    free, kind = shutil.disk_usage(place).free / GB, file_system(place)
    text = f"{base_dir}, {free:,.0f} GB free" + (f", {kind}" if kind else "")
    if free < 2:
        return Finding("MEND", f"{text}: the laptop run takes 2 GB", mend)
    if kind in ("tmpfs", "ramfs"):
        return Finding("hint", f"{text}: it takes memory and is gone after a restart", mend)
    if kind in NETWORK_DISKS:
        text += ": a network disk; checkpoints take its speed, and locks may not hold between machines"
        return Finding("hint", text, "prefetch from one machine at a time, see docs/how-to/offline.md")
    if free < 35:
        mend = "python -m scripts.plan --depth=DEPTH says how much a run takes"
        return Finding("hint", f"{text}: the speedrun takes 35 GB", mend)
    return Finding("ok", text)


def file_system(path: Path) -> str:
    """Type of the file system that a path lies on, as Linux names it; empty where df does not say."""
    return output_of("df", "--output=fstype", str(path)).removeprefix("Type").strip()


def check_hub() -> Finding:
    """Whether data sets can be fetched. Being offline is no fault, and a refusal is an answer."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return Finding("ok", "HF_HUB_OFFLINE is set: nothing is fetched")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=3).close()
    except Exception as error:
        if not isinstance(error, urllib.error.HTTPError):
            mend = "export HF_ENDPOINT=MIRROR, or work without: docs/how-to/offline.md"
            return Finding("hint", f"{endpoint} cannot be reached ({getattr(error, 'reason', error)})", mend)
    return Finding("ok", f"{endpoint} answers")


def check_program(names: str, why: str) -> Finding:
    path = next(filter(None, map(shutil.which, names.split())), None)
    if path:
        return Finding("ok", path)
    return Finding("hint", f"not on PATH: {why} without", f"install {names.replace(' ', ' or ')}")


def check_tokenizer() -> Finding:
    """Train and use a tokenizer of a few tokens."""
    from nanochat.tokenizer import Tokenizer

    text = "the cat saw the other cat, \u00e4 \u4f60\U0001f600 " * 20
    tokenizer = Tokenizer.train([text], 280)
    ids = tokenizer.encode(text)
    if tokenizer.decode(ids) != text or len(ids) >= len(text.encode()):
        return Finding("MEND", "rustbpe is built, but does not give a text back", SETUP)
    return Finding("ok", "rustbpe trains, encodes and decodes")


# -----------------------------------------------------------------------------
# GPUs as the system sees them, and whether this torch can use them


class Driver(NamedTuple):
    """What the machine has, found without torch."""

    vendor: Literal["NVIDIA", "AMD", ""]
    devices: int | None = None  # None = not known
    cuda: tuple[int, int] | None = None  # the newest CUDA that NVIDIA's driver knows


def find_driver(dev: Path = Path("/dev")) -> Driver:
    smi = output_of("nvidia-smi")
    if smi or (dev / "nvidia0").exists():
        known = re.search(r"CUDA Version: (\d+)\.(\d+)", smi)
        listed = len(re.findall(r"^GPU \d+:", output_of("nvidia-smi", "-L"), re.MULTILINE))
        return Driver("NVIDIA", listed or None, (int(known[1]), int(known[2])) if known else None)
    if shutil.which("rocm-smi") or (dev / "kfd").exists():
        listed = len(set(re.findall(r"GPU\[(\d+)\]", output_of("rocm-smi", "--showproductname"))))
        return Driver("AMD", listed or None)
    return Driver("")


def output_of(*command: str) -> str:
    """What a program prints; empty where it is missing, fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return ""


def check_torch_build(
    driver: Driver, version: str, cuda: str | None, hip: str | None, seen: int, kfd_readable: bool = True
) -> Finding:
    """This torch (its version, the CUDA or HIP it was built for, the GPUs it sees) against what the machine has."""
    amd, known, build = driver.vendor == "AMD", driver.cuda, f"torch {version}"
    if not driver.vendor:
        return Finding("ok", f"{build}, no GPU here")
    if not (hip if amd else cuda):
        wheel = "rocm7.2" if amd else "cu126" if known and known[0] == 12 else "cu130"
        text = f"{build} is built for {f'CUDA {cuda}' if cuda else 'ROCm' if hip else 'CPUs'}"
        text += f", and this machine has an {driver.vendor} GPU"
        return Finding("MEND", text, f"TORCH_BUILD={wheel} {SETUP}")
    if cuda and known and known[0] < int(cuda.split(".")[0]):
        mend = f"TORCH_BUILD=cu126 {SETUP}, or a newer driver" if known[0] == 12 else "a newer driver"
        return Finding("MEND", f"{build} needs a driver for CUDA {cuda}, this one knows {known[0]}.{known[1]}", mend)
    hidden = next((name for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES") if name in os.environ), None)
    text = f"{build} sees {seen} of {driver.devices or 'the'} {driver.vendor} GPUs"
    if seen >= (driver.devices or 1):
        return Finding("ok", text)
    if hidden:
        return Finding("hint", f"{text}: {hidden}={os.environ[hidden]!r}", f"unset {hidden}")
    if seen:
        return Finding("hint", text, "look at the driver's log: dmesg")
    if amd and not kfd_readable:
        mend = 'sudo usermod -aG render,video "$USER", then log in again'
        return Finding("MEND", f"{text}: /dev/kfd may not be opened", mend)
    return Finding("MEND", text, f"{'rocm' if amd else 'nvidia'}-smi must work in this shell")


# -----------------------------------------------------------------------------
# With torch: build, attention, dtypes, compiler, ranks


def examine_devices() -> Iterator[Finding]:
    import torch

    kfd, shm = Path("/dev/kfd"), Path("/dev/shm")
    readable = not kfd.exists() or os.access(kfd, os.R_OK | os.W_OK)
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    build = torch.__version__, torch.version.cuda, torch.version.hip
    yield from examine("torch", check_torch_build, find_driver(), *build, seen, readable)
    devices = ["cpu"] + [f"cuda:{i}" for i in range(seen)]
    devices += ["mps"] * torch.backends.mps.is_available() + ["xpu"] * torch.xpu.is_available()
    for device in devices:
        for dtype in ("float32", "bfloat16"):
            yield from examine(device, check_attention, torch.device(device), dtype)
        yield from examine(device, measure_dtypes, torch.device(device))
    if seen > 1 and shm.exists() and (size := shutil.disk_usage(shm).total / GB) < 1:
        yield Finding("hint", f"{size:.2f} GB; NCCL shares memory there", "docker run --shm-size=8g", "/dev/shm")


def check_attention(device: Any, dtype: str) -> Finding:
    """Every way that the model's attention goes and, on a GPU, every fused kernel that torch may take for it: forward
    and backward, against the formula. Without a fused kernel the scores of all heads are kept.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from nanochat.attention import causal_attention

    # heads, key/value heads, tokens, window. More than 1,024 tokens take torch's kernel on a CPU too.
    full = (2, 2, 192, 192)
    ways = {"full": full, "grouped": (4, 2, 192, 192), "window": (2, 2, 192, 50), "long": (1, 1, 1152, 1152)}
    tries = [(way, shape, contextlib.nullcontext()) for way, shape in ways.items()]
    if device.type == "cuda":
        kernels = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")
        tries += [(kernel, full, sdpa_kernel(getattr(SDPBackend, kernel))) for kernel in kernels]
    tolerance = {"float32": 3e-3, "bfloat16": 3e-2}[dtype]  # fp32: GPUs multiply in TF32
    errors, wrong = {}, []
    for name, shape, chosen in tries:
        try:
            with chosen:
                errors[name] = attention_error(causal_attention, device, getattr(torch, dtype), shape)
        except RuntimeError as failure:  # not every card has every kernel
            wrong += [f"{name}: {first_line(failure)}"] if name in ways else []
    wrong += [f"{name}: off by {error:.1%}" for name, error in errors.items() if not error <= tolerance]
    if wrong:
        mend = "train with --dtype=float32" if dtype == "bfloat16" else f"another torch build: {SETUP}"
        return Finding("MEND", f"attention in {dtype} is wrong: {'; '.join(wrong)}", mend)
    text = f"attention in {dtype}: {len(ways)} ways, forward and backward, within {max(errors.values()):.1e}"
    fused = [name for name in errors if name not in ways]
    if device.type != "cuda" or fused:
        return Finding("ok", ", ".join([text, *fused]))
    text += ", none of them fused: slow, and memory grows with context^2"
    if torch.version.hip and os.environ.get("TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL") != "1":
        return Finding("hint", text, "export TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1")
    return Finding("hint", text, "a smaller --max-seq-len")


def attention_error(attention: Callable[..., Any], device: Any, dtype: Any, shape: tuple[int, int, int, int]) -> float:
    """The largest error of output and three gradients, as a share of the largest value of each."""
    import torch

    H, G, T, window = shape
    generator = torch.Generator().manual_seed(0)
    rounded = [torch.randn(1, heads, T, 64, generator=generator).to(dtype) for heads in (H, G, G, H)]

    def outputs(function: Callable[..., Any], device: Any, dtype: Any) -> list[Any]:
        *qkv, gradient = (x.to(device, dtype, copy=True).requires_grad_() for x in rounded)
        y = function(*qkv, window)
        return [x.detach().cpu().double() for x in (y, *torch.autograd.grad(y, qkv, gradient))]

    pairs = zip(outputs(attention, device, dtype), outputs(attention_by_formula, "cpu", torch.float64), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def attention_by_formula(q: Any, k: Any, v: Any, window: int) -> Any:
    """softmax(q k^T / sqrt(D)) v over each position and the window - 1 before it."""
    T, groups = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    allowed = q.new_ones(T, T).tril().triu(1 - window) > 0
    return (q @ k.mT / math.sqrt(q.shape[3])).masked_fill(~allowed, -math.inf).softmax(-1) @ v


def measure_dtypes(device: Any) -> Finding:
    """The device, its matmuls in bf16 and fp32, taken in turns, and whether --dtype=auto takes the faster one."""
    import torch
    from torch.utils.benchmark import Timer

    from nanochat.compute import choose_dtype, device_name

    name, n = device_name(device), 1024 if device.type == "cpu" else 8192
    if device.type == "cuda":
        name += f", {torch.cuda.get_device_properties(device).total_memory / GB:.1f} GB"
        torch.set_float32_matmul_precision("high")  # as training does
    best: dict[str, float] = {}
    x, threads = torch.randn(n, n, device=device), torch.get_num_threads()
    for dtype in ("bfloat16", "float32") * 3:
        there = {"a": x.to(getattr(torch, dtype))}
        seconds = Timer("(a @ a)[0, 0].item()", globals=there, num_threads=threads).timeit(2).mean
        best[dtype] = min(best.get(dtype, math.inf), seconds)
    auto = str(choose_dtype("auto", device)).removeprefix("torch.")
    faster = min(best, key=lambda dtype: best[dtype])
    rates = ", ".join(f"{dtype} {2 * n**3 / seconds / 1e9:,.0f} GFLOP/s" for dtype, seconds in best.items())
    text = f"{name}: matmuls in {rates}; --dtype=auto takes {auto}"
    if best[auto] > 1.3 * best[faster]:
        return Finding("hint", f"{text}, {best[auto] / best[faster]:.1f} times as slow", f"--dtype={faster}")
    return Finding("ok", text)


def check_compiler() -> Finding:
    """Compile a function of one line that is in no cache: a number in it is drawn anew."""
    import torch

    from nanochat.compute import can_compile

    number = random.random()

    def function(x: torch.Tensor) -> torch.Tensor:
        return x.relu().sin() + x.square().sum() * number

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not can_compile(device):
        return Finding("MEND", "no C++ compiler: no torch.compile, half the speed in training", "apt-get install g++")
    x, started = torch.linspace(-1, 1, 4096, device=device), time.perf_counter()
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    expected = function(x)
    try:
        off = ((torch.compile(function)(x) - expected).abs().max() / expected.abs().max()).item()
    except Exception as error:
        line = next((line.strip() for line in str(error).splitlines() if "rror" in line), type(error).__name__)
        mend = "apt-get install g++" if device.type == "cpu" or "C compiler" in line else SETUP
        text = f"torch.compile fails on {device.type}: {line[:200]}"
        return Finding("MEND", text, f"{mend}; meanwhile --compile=false")
    if off > 1e-3:
        return Finding("MEND", f"torch.compile gives other numbers (off by {off:.1%})", "--compile=false")
    seconds = time.perf_counter() - started
    return Finding("ok", f"torch.compile works on {device.type} ({seconds:.0f} s for one line)")


def check_ranks(backend: str, device: str, mend: str, seconds: float = RANK_SECONDS) -> Finding | None:
    """Two processes that meet over loopback and add their numbers; called again in each of them."""
    if "RANK" in os.environ:
        return be_rank(device)
    if device == "cuda" and find_driver().devices in (None, 1):
        return None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pair = [start_probe(backend, **where, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    found = [finding for process in pair for finding in results(backend, process, seconds)]
    why = next((finding.text for finding in found if finding.level == "MEND"), None)
    if why:
        return Finding("MEND", f"two ranks cannot talk with {backend}: {why}", mend)
    return Finding("ok", f"two ranks add up with {backend}")


def be_rank(device: str) -> Finding:
    import torch

    from nanochat.compute import compute_cleanup, compute_init

    compute = compute_init(device, "float32")
    total = compute.sum(torch.tensor([1.0 + compute.rank])).item()
    compute_cleanup()
    return Finding("ok" if total == 3 else "MEND", f"1 + 2 = {total:g}")


CHECKS = {"python": check_python, "cpu": check_cpu, "ulimit -n": check_files, "disk": check_disk}
PROBES = {
    "compile": check_compiler,
    "gloo": partial(check_ranks, "gloo", "cpu", "export GLOO_SOCKET_IFNAME=lo"),
    "nccl": partial(check_ranks, "nccl", "cuda", "export NCCL_P2P_DISABLE=1; NCCL_DEBUG=INFO says more"),
    "tokenizer": check_tokenizer,
    "hub": check_hub,
}
BROWSERS = "chromium chromium-browser google-chrome"
PROGRAMS = {
    "browser": partial(check_program, BROWSERS, "tests of the page in a browser are skipped"),
    "node": partial(check_program, "node", "tests of the page's script are skipped"),
    "cargo": partial(check_program, "cargo", "rustbpe cannot be changed and built"),
}

if __name__ == "__main__":
    run_main(main)
