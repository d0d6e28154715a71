"""
What on this machine keeps nanochat from running, or from running fast, and the command that mends it.

    python -m scripts.doctor
    python -m scripts.doctor --developer        # also what only the tests need

One line per finding: `ok`, `hint` (works, could be better) or `MEND`, with what to do. Things are tried rather than
asked: the compiler compiles, the attention is compared with its formula, two ranks talk to each other. Ends with 0 when
nothing must be mended, else with 1. What touches torch runs in processes of its own: a broken library ends a probe and
not the doctor.
"""

from typing import Literal

from nanochat.configurator import configure

developer = False  # also look for what only tests need: a browser, node, cargo
probe: Literal["devices", "compile", "ranks", "tokenizer"] | None = None  # one probe alone, its findings as JSON
settings = configure(__name__)

import importlib.util
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
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanochat.common import print0, run_main

MODULES = (
    "cffi datasets fastapi huggingface_hub markdown_it numpy pyarrow safetensors tiktoken torch tqdm uvicorn wandb"
)
NETWORK_DISKS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs", "lustre", "gpfs", "beegfs", "ceph", "9p"}
PROBE_SECONDS = {"devices": 120, "compile": 120, "ranks": 60, "tokenizer": 30}
GB = 1e9


@dataclass(frozen=True)
class Finding:
    """One line."""

    level: Literal["ok", "hint", "MEND"]
    what: str
    text: str
    mend: str = ""  # the command, or what to do

    def __str__(self) -> str:
        return f"{self.level:4}  {self.what:10}  {self.text}" + (f" -> {self.mend}" if self.mend else "")


Findings = Iterator[Finding]


def main() -> None:
    if probe:
        for finding in guarded(probe, PROBES[probe]):
            print(json.dumps(asdict(finding)), flush=True)
        return
    started = time.perf_counter()
    running = {name: start_probe(name) for name in PROBES}
    findings: list[Finding] = []

    def show(found: Findings) -> None:
        for finding in found:
            findings.append(finding)
            print0(finding)

    for name, check in CHECKS.items():
        show(guarded(name, check))
    for name, process in running.items():
        show(results(name, process))
    if developer:
        show(guarded("developer", check_developer))
    to_mend = sum(finding.level == "MEND" for finding in findings)
    print0(f"{to_mend} to mend, {len(findings)} findings, {time.perf_counter() - started:.0f} s")
    sys.exit(1 if to_mend else 0)


def guarded(what: str, check: Callable[[], Findings]) -> Findings:
    """The findings of a check; one that fails in a way nobody thought of is a finding too."""
    try:
        yield from check()
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        yield Finding("MEND", what, f"could not be examined: {type(error).__name__}: {line}", "bash dev/setup.sh")


# -----------------------------------------------------------------------------
# Probes: processes whose findings come back as JSON lines


def start_probe(name: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "scripts.doctor", f"--probe={name}"]
    outer = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, cwd=Path(__file__).parent.parent, env=outer | environment, **pipes)


def finish(process: subprocess.Popen[str], seconds: float) -> tuple[str, str, str]:
    """(stdout, stderr, why it ended badly or nothing) of a probe, which is killed when it takes too long."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        return out, err, f"took more than {seconds:.0f} s"
    if process.returncode < 0:
        return out, err, f"ended by {signal.Signals(-process.returncode).name}"
    return out, err, f"exit code {process.returncode}" if process.returncode else ""


def results(name: str, process: subprocess.Popen[str]) -> Findings:
    out, err, failure = finish(process, PROBE_SECONDS[name])
    for line in out.splitlines():
        if line.startswith("{"):
            yield Finding(**json.loads(line))
    if failure:
        last = (err.strip().splitlines() or ["no message"])[-1]
        yield Finding("MEND", name, f"{failure}: {last[:200]}", f"python -m scripts.doctor --probe={name} shows more")


# -----------------------------------------------------------------------------
# Without torch


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Findings:
    name = ".".join(map(str, version))
    if version < (3, 11):
        yield Finding("MEND", "python", f"{name} is too old", "PYTHON=python3.11 bash dev/setup.sh")
    else:
        yield Finding("ok", "python", f"{name}, {sys.executable}")
    missing = [name for name in MODULES.split() if importlib.util.find_spec(name) is None]
    if missing:
        yield Finding("MEND", "packages", f"missing: {', '.join(missing)}", "bash dev/setup.sh")


def check_cpu() -> Findings:
    """Cores as the scheduler and the container see them, and the threads that torch would start."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(Path("/sys/fs/cgroup/cpu.max"))
    asked = os.environ.get("OMP_NUM_THREADS")
    text = f"{cores} cores" + (f", of which a container may use {quota:g}" if quota else "")
    text += f", OMP_NUM_THREADS={asked}" if asked else ""
    threads = int(asked) if asked and asked.isdigit() else cores
    allowed = max(1, math.floor(min(cores, quota or cores)))
    if threads > allowed:
        yield Finding(
            "hint", "cpu", f"{text}: {threads} threads get in each other's way", f"export OMP_NUM_THREADS={allowed}"
        )
    else:
        yield Finding("ok", "cpu", text)


def cpu_quota(path: Path) -> float | None:
    """Cores that a cgroup may use at a time (its file cpu.max has `quota period` in microseconds); None = all."""
    try:
        quota, period = path.read_text().split()[:2]
        return int(quota) / int(period)
    except (OSError, ValueError):
        return None


def check_files() -> Findings:
    """Open files: shards, sockets of ranks, the web server's connections."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = hard == resource.RLIM_INFINITY
    if soft != resource.RLIM_INFINITY and soft < 1024:
        most = 65536 if unlimited else min(hard, 65536)
        yield Finding("MEND", "ulimit -n", f"{soft} open files, 1,024 are needed", f"ulimit -n {most}")
    else:
        yield Finding("ok", "ulimit -n", "unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,} open files")


def check_base_dir() -> Findings:
    """Where everything goes: may it be written, is there room, will it stay. Leaves nothing behind."""
    base_dir = Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser().absolute()
    place = next((path for path in (base_dir, *base_dir.parents) if path.exists()), Path("/"))
    mend = "export NANOCHAT_BASE_DIR=DIR, a directory of yours on a large disk"
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield Finding("MEND", "base dir", f"{base_dir} cannot be written ({error.strerror})", mend)
        return
    free = shutil.disk_usage(place).free / GB
    kind = file_system(place, Path("/proc/self/mountinfo"))
    text = f"{base_dir}, {free:,.0f} GB free" + (f", {kind}" if kind else "")
    if free < 2:
        yield Finding("MEND", "base dir", f"{text}: the laptop run takes 2 GB", mend)
    elif kind in ("tmpfs", "ramfs"):
        yield Finding("hint", "base dir", f"{text}: it takes memory and is gone after a restart", mend)
    elif kind in NETWORK_DISKS:
        text += ": a network disk; checkpoints take its speed, and locks may not hold between machines"
        yield Finding("hint", "base dir", text, "prefetch from one machine at a time, see docs/how-to/offline.md")
    elif free < 35:
        yield Finding(
            "hint",
            "base dir",
            f"{text}: the speedrun takes 35 GB",
            "python -m scripts.plan --depth=DEPTH says how much a run takes",
        )
    else:
        yield Finding("ok", "base dir", text)


def file_system(path: Path, mounts: Path) -> str:
    """Type of the file system that a path lies on, as Linux names it; empty elsewhere."""
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return ""
    over = [(words[4], words[words.index("-") + 1]) for words in lines if "-" in words]
    real = os.path.realpath(path)
    found = [(mount, kind) for mount, kind in over if real == mount or real.startswith(mount.rstrip("/") + "/")]
    return max(found, key=lambda pair: len(pair[0]), default=("", ""))[1]


def check_hub() -> Findings:
    """Whether data sets can be fetched. Being offline is no fault."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        yield Finding("ok", "hub", "HF_HUB_OFFLINE is set: nothing is fetched")
        return
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(ask(endpoint)), daemon=True)  # a name lookup can hang
    asking.start()
    asking.join(6)
    answer = answers[0] if answers else "no answer in 6 s"
    if answer:
        mend = "export HF_ENDPOINT=MIRROR, or work without: docs/how-to/offline.md"
        yield Finding("hint", "hub", f"{endpoint} cannot be reached ({answer})", mend)
    else:
        yield Finding("ok", "hub", f"{endpoint} answers")


def ask(url: str) -> str:
    """Empty when a server answers, whatever it says; else the reason."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return ""


def check_developer() -> Findings:
    browsers = ("chromium", "chromium-browser", "google-chrome")
    for what, names, why in (
        ("browser", browsers, "tests of the page in a browser are skipped without"),
        ("node", ("node",), "tests of the page's script are skipped without"),
        ("cargo", ("cargo",), "rustbpe cannot be changed and built without"),
    ):
        path = next(filter(None, map(shutil.which, names)), None)
        if path:
            yield Finding("ok", what, path)
        else:
            yield Finding("hint", what, f"not on PATH: {why}", f"install {' or '.join(names)}")


# -----------------------------------------------------------------------------
# GPUs as the system sees them, and whether this torch can use them


@dataclass(frozen=True)
class Driver:
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
) -> Findings:
    """
    This torch (its version, the CUDA or HIP it was built for, the GPUs it sees) against what the machine has.
    """
    build = f"torch {version}"
    hidden = next((name for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES") if name in os.environ), None)
    wanted = "cu126" if driver.cuda and driver.cuda[0] == 12 else "cu130"
    if driver.vendor == "AMD" and not hip:
        text = f"{build} is built for {'CUDA ' + cuda if cuda else 'CPUs'}, and this machine has an AMD GPU"
        yield Finding("MEND", "torch", text, "TORCH_BUILD=rocm7.2 bash dev/setup.sh")
    elif driver.vendor == "NVIDIA" and not cuda:
        text = f"{build} is built for {'ROCm' if hip else 'CPUs'}, and this machine has an NVIDIA GPU"
        yield Finding("MEND", "torch", text, f"TORCH_BUILD={wanted} bash dev/setup.sh")
    elif driver.vendor == "NVIDIA" and cuda and driver.cuda and driver.cuda[0] < int(cuda.split(".")[0]):
        known = ".".join(map(str, driver.cuda))
        mend = "TORCH_BUILD=cu126 bash dev/setup.sh, or a newer driver" if driver.cuda[0] == 12 else "a newer driver"
        yield Finding("MEND", "torch", f"{build} needs a driver for CUDA {cuda}, this one knows {known}", mend)
    elif driver.vendor and not seen and hidden:
        yield Finding("hint", "torch", f"{build} sees no GPU: {hidden}={os.environ[hidden]!r}", f"unset {hidden}")
    elif driver.vendor == "AMD" and not seen and not kfd_readable:
        mend = 'sudo usermod -aG render,video "$USER", then log in again'
        yield Finding("MEND", "torch", f"{build} sees no GPU: /dev/kfd may not be opened", mend)
    elif driver.vendor and not seen:
        mend = "nvidia-smi must work in this shell" if driver.vendor == "NVIDIA" else "rocm-smi must work in this shell"
        yield Finding("MEND", "torch", f"{build} sees no GPU although the machine has one of {driver.vendor}", mend)
    elif driver.devices and seen < driver.devices:
        mend = f"unset {hidden}" if hidden else "look at the driver's log: dmesg"
        yield Finding("hint", "torch", f"{build} sees {seen} of {driver.devices} GPUs", mend)
    else:
        yield Finding("ok", "torch", f"{build}, {seen} GPUs" if driver.vendor else f"{build}, no GPU here")


# -----------------------------------------------------------------------------
# Probe: devices. Build, cards, attention, dtypes.


def probe_devices() -> Findings:
    import torch

    kfd = Path("/dev/kfd")
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    readable = not kfd.exists() or os.access(kfd, os.R_OK | os.W_OK)
    yield from check_torch_build(
        find_driver(), torch.__version__, torch.version.cuda, torch.version.hip, seen, readable
    )
    devices = ["cpu"] + [f"cuda:{i}" for i in range(seen)]
    devices += ["mps"] * torch.backends.mps.is_available() + ["xpu"] * torch.xpu.is_available()
    for device in map(torch.device, devices):
        yield from guarded(str(device), lambda device=device: examine_device(device))
    shm = shutil.disk_usage("/dev/shm").total / GB if Path("/dev/shm").exists() else math.inf
    if seen > 1 and shm < 1:
        yield Finding("hint", "shm", f"/dev/shm has {shm:.2f} GB; NCCL shares memory there", "docker run --shm-size=8g")


def examine_device(device: Any) -> Findings:
    import torch

    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        yield Finding("ok", str(device), f"{about.name}, {about.total_memory / GB:.1f} GB")
    for dtype in (torch.float32, torch.bfloat16):
        yield from guarded(f"{device}", lambda dtype=dtype: examine_attention(device, dtype))
    yield from measure_dtypes(device)


def attention_by_formula(q: Any, k: Any, v: Any, window: int) -> Any:
    """softmax(q k^T / sqrt(D)) v over the window - 1 positions before each and itself, all in fp64 on the CPU."""
    T, groups = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT / math.sqrt(q.shape[3])
    behind = [[t - s for s in range(T)] for t in range(T)]
    allowed = (q.new_tensor(behind) >= 0) & (q.new_tensor(behind) < window)
    return scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v


def examine_attention(device: Any, dtype: Any) -> Findings:
    """Every way that the model's attention goes, forward and backward, against the formula."""
    import torch

    from nanochat.gpt import causal_attention

    # heads, key/value heads, tokens, window. More than 1,024 tokens take torch's kernel on a CPU too.
    ways = {
        "full": (2, 2, 192, 192),
        "grouped": (4, 2, 192, 192),
        "window": (2, 2, 192, 50),
        "long": (1, 1, 1152, 1152),
    }
    tolerance = {torch.float32: 3e-3, torch.bfloat16: 3e-2}[dtype]  # fp32: GPUs multiply in TF32
    name, worst, wrong = str(dtype).removeprefix("torch."), 0.0, []
    for way, (H, G, T, window) in ways.items():
        try:
            error = attention_error(causal_attention, device, dtype, (H, G, T, window))
        except RuntimeError as failure:
            wrong.append(f"{way}: {str(failure).splitlines()[0][:120]}")
            continue
        worst = max(worst, error)
        wrong += [f"{way}: off by {error:.1%}"] if not error <= tolerance else []
    if wrong:
        mend = "train with --dtype=float32" if dtype == torch.bfloat16 else "another torch build: bash dev/setup.sh"
        yield Finding("MEND", str(device), f"attention in {name} is wrong: {'; '.join(wrong)}", mend)
    else:
        yield Finding(
            "ok", str(device), f"attention in {name}: {len(ways)} ways, forward and backward, within {worst:.1e}"
        )
    if device.type == "cuda":
        yield from find_kernel(device, dtype)


def attention_error(attention: Callable[..., Any], device: Any, dtype: Any, shape: tuple[int, int, int, int]) -> float:
    """The largest error of output and three gradients, as a share of the largest value of each."""
    import torch

    H, G, T, window = shape
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, heads, T, 64, generator=generator).to(dtype) for heads in (H, G, G)]
    weight = torch.randn(1, H, T, 64, generator=generator).to(dtype)

    def outputs(function: Callable[..., Any], where: Any, as_dtype: Any) -> list[Any]:
        leaves = [x.to(where, as_dtype).detach().requires_grad_() for x in inputs]
        y = function(*leaves, window)
        y.backward(weight.to(where, as_dtype))
        return [x.detach().cpu().double() for x in (y, *(leaf.grad for leaf in leaves))]

    pairs = zip(outputs(attention, device, dtype), outputs(attention_by_formula, "cpu", torch.float64), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def find_kernel(device: Any, dtype: Any) -> Findings:
    """Whether a fused attention kernel runs on a GPU; without one the scores of all heads are kept."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    works = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        x = torch.randn(1, 2, 256, 64, device=device, dtype=dtype, requires_grad=True)
        try:
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(x, x, x, is_causal=True).sum().backward()
            works.append(backend.name.removesuffix("_ATTENTION").lower())
        except RuntimeError:
            continue
    name = str(dtype).removeprefix("torch.")
    if works:
        yield Finding("ok", str(device), f"fused attention in {name}: {', '.join(works)}")
    elif torch.version.hip and os.environ.get("TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL") != "1":
        mend = "export TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1"
        yield Finding("hint", str(device), f"no fused attention in {name}: slow, and memory grows with context^2", mend)
    elif dtype == torch.bfloat16:
        text = "no fused attention in bfloat16: slow, and memory grows with context^2"
        yield Finding("hint", str(device), text, "a smaller --max-seq-len")


def measure_dtypes(device: Any) -> Findings:
    """Matmuls per second in bf16 and fp32, taken in turns, and whether --dtype=auto takes the faster one."""
    import torch

    from nanochat.compute import choose_dtype, synchronize

    n = 1024 if device.type == "cpu" else 8192
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as training does
    best = {torch.bfloat16: math.inf, torch.float32: math.inf}
    x = torch.randn(n, n, device=device)
    for repeat in range(5):
        for dtype in best:
            a = x.to(dtype)
            synchronize(device)
            started = time.perf_counter()
            a @ a
            (a @ a)[0, 0].item()
            seconds = (time.perf_counter() - started) / 2
            best[dtype] = min(best[dtype], seconds) if repeat else math.inf
    rates = {dtype: 2 * n**3 / seconds / 1e9 for dtype, seconds in best.items()}
    text = ", ".join(f"{str(d).removeprefix('torch.')} {rate:,.0f} GFLOP/s" for d, rate in rates.items())
    faster, chosen = max(rates, key=lambda d: rates[d]), choose_dtype("auto", device)
    name, ours = (str(d).removeprefix("torch.") for d in (faster, chosen))
    ratio = rates[faster] / rates[chosen]
    if ratio > 1.3:
        text += f": {name} is {ratio:.1f} times as fast as {ours}, which --dtype=auto takes"
        yield Finding("hint", str(device), text, f"--dtype={name}")
    else:
        yield Finding("ok", str(device), f"matmuls: {text}; --dtype=auto takes {ours}")


# -----------------------------------------------------------------------------
# Probes: compiler, ranks, tokenizer


def probe_compile() -> Findings:
    """Compile a function of two lines that is in no cache: a number in it is drawn anew."""
    gpu = find_driver().vendor
    compilers = (os.environ.get("CXX") or "g++", "g++", "clang++", "c++")
    if not gpu and not any(map(shutil.which, compilers)):
        text = "no C++ compiler: torch.compile is off, and training at about half the speed"
        yield Finding("MEND", "compiler", text, "apt-get install g++")
        return
    import torch

    number = random.random()

    def function(x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.relu(x).square()
        return y.sin() + y.sum() * number

    device = torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu")
    x, started = torch.linspace(-1, 1, 4096, device=device), time.perf_counter()
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    expected = function(x)
    try:
        off = ((torch.compile(function)(x) - expected).abs().max() / expected.abs().max()).item()
    except Exception as error:
        line = next((line.strip() for line in str(error).splitlines() if "rror" in line), type(error).__name__)
        mend = "apt-get install g++" if device.type == "cpu" else "bash dev/setup.sh"
        mend += "; meanwhile --compile=false"
        yield Finding("MEND", "compiler", f"torch.compile fails on {device.type}: {line[:200]}", mend)
        return
    seconds = time.perf_counter() - started
    if off > 1e-3:
        yield Finding("MEND", "compiler", f"torch.compile gives other numbers (off by {off:.1%})", "--compile=false")
    else:
        yield Finding("ok", "compiler", f"torch.compile works on {device.type} ({seconds:.0f} s for two lines)")


def probe_ranks() -> Findings:
    """Two processes that meet and add a number, over loopback with gloo; two GPUs do it with NCCL too."""
    if "RANK" in os.environ:
        yield from be_rank()
        return
    kinds = {"cpu": "gloo"}
    if find_driver().devices not in (None, 1):
        kinds["cuda"] = "NCCL"
    for kind, backend in kinds.items():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        where = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        pair = [start_probe("ranks", **where, RANK=r, LOCAL_RANK=r, DOCTOR_DEVICE=kind) for r in "01"]
        ends = [finish(process, 40) for process in pair]
        found = [Finding(**json.loads(line)) for out, _, _ in ends for line in out.splitlines() if line.startswith("{")]
        if len(found) == 2 and all(finding.level == "ok" for finding in found):
            yield Finding("ok", "ranks", f"two of them add up with {backend}")
            continue
        reasons = [finding.text for finding in found if finding.level != "ok"]
        reasons += [f"{failure}: {(err.strip().splitlines() or [''])[-1][:160]}" for _, err, failure in ends if failure]
        mend = (
            "export GLOO_SOCKET_IFNAME=lo" if kind == "cpu" else "export NCCL_P2P_DISABLE=1; NCCL_DEBUG=INFO says more"
        )
        why = reasons[0] if reasons else "no answer"
        yield Finding("MEND", "ranks", f"two ranks cannot talk with {backend}: {why}", mend)


def be_rank() -> Findings:
    import torch

    from nanochat.compute import compute_cleanup, compute_init

    compute = compute_init(os.environ["DOCTOR_DEVICE"], "float32")
    total = compute.sum(torch.tensor([1.0 + compute.rank])).item()
    compute_cleanup()
    yield Finding("ok" if total == 3 else "MEND", "ranks", f"1 + 2 = {total:g}")


def probe_tokenizer() -> Findings:
    """Train and use a tokenizer of a few tokens."""
    try:
        from nanochat.tokenizer import Tokenizer
    except ImportError as error:
        yield Finding("MEND", "rustbpe", f"cannot be imported ({error})", "bash dev/setup.sh")
        return
    text = "the cat saw the other cat, \u00e4 \u4f60\U0001f600 " * 20
    tokenizer = Tokenizer.train([text], 280)
    ids = tokenizer.encode(text)
    if tokenizer.decode(ids) != text or len(ids) >= len(text.encode()):
        yield Finding("MEND", "rustbpe", "built, but does not give a text back", "bash dev/setup.sh")
    else:
        yield Finding("ok", "rustbpe", "trains, encodes and decodes")


CHECKS = {
    "python": check_python,
    "cpu": check_cpu,
    "ulimit -n": check_files,
    "base dir": check_base_dir,
    "hub": check_hub,
}
PROBES = {"devices": probe_devices, "compile": probe_compile, "ranks": probe_ranks, "tokenizer": probe_tokenizer}

if __name__ == "__main__":
    run_main(main)
