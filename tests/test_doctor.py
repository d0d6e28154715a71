"""The doctor finds what is wrong, names the command that mends it, and never ends in a traceback."""

import json
import math
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from scripts import doctor
from scripts.doctor import Driver, Finding, check_torch_build

ROOT = Path(__file__).parent.parent


def run_doctor(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.doctor", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def fake(folder: Path, name: str, text: str, code: int = 0) -> None:
    """A program on PATH that prints a text."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\necho '{text}'\nexit {code}\n")
    program.chmod(0o755)


def path_with(*folders: Path) -> str:
    return os.pathsep.join([*map(str, folders), os.environ["PATH"]])


# -----------------------------------------------------------------------------
# As a user calls it


@pytest.mark.soak
def test_a_machine_that_is_well_ends_with_0(tmp_path: Path) -> None:
    result = run_doctor(NANOCHAT_BASE_DIR=str(tmp_path / "base"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    for what in (
        "attention in float32: 4 ways",
        "attention in bfloat16: 4 ways",
        "torch.compile works",
        "add up with gloo",
        "packages",
    ):
        assert what in result.stdout
    assert not (tmp_path / "base").exists()  # looking leaves nothing behind


def test_a_sick_machine_ends_with_1_and_names_what_mends_it(tmp_path: Path) -> None:
    """A torch that cannot be imported, a base directory below a file."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object')")
    (tmp_path / "file").write_text("")
    result = run_doctor(NANOCHAT_BASE_DIR=str(tmp_path / "file" / "base"), PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("MEND")]
    assert all(" -> " in line for line in lines)
    assert any("cannot be written" in line and "NANOCHAT_BASE_DIR" in line for line in lines)
    assert {"devices", "compile", "gloo"} <= {line.split()[1] for line in lines if "libcudart" in line}


@pytest.mark.soak
def test_a_torch_and_a_compiler_that_do_not_fit_the_machine(tmp_path: Path) -> None:
    """A torch for CPUs beside a GPU whose driver knows CUDA 12, a compiler that fails."""
    fake(tmp_path / "bin", "nvidia-smi", "| NVIDIA-SMI 550.54  Driver Version: 550.54  CUDA Version: 12.4 |")
    fake(tmp_path / "bin", "g++", "error: out of order", code=1)
    result = run_doctor(NANOCHAT_BASE_DIR=str(tmp_path / "base"), PATH=str(tmp_path / "bin"), CXX="g++")
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("MEND")]
    assert any("torch.compile fails on cpu" in line and "apt-get install g++" in line for line in lines)
    if "+cpu" in metadata.version("torch"):
        assert any("this machine has an NVIDIA GPU -> TORCH_BUILD=cu126 bash dev/setup.sh" in line for line in lines)


def test_without_a_compiler_it_says_what_to_install(tmp_path: Path) -> None:
    result = run_doctor("--probe=compile", PATH=str(tmp_path), CXX="no-such-compiler")
    found = Finding(*json.loads(result.stdout.splitlines()[-1]))
    assert (found.level, found.mend) == ("MEND", "apt-get install g++")


def test_a_probe_that_crashes_or_hangs_ends_the_probe_alone() -> None:
    def probe(program: str, seconds: float) -> list[Finding]:
        command = [sys.executable, "-c", program]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        return list(doctor.results("x", subprocess.Popen(command, **pipes), seconds))  # type: ignore[call-overload]

    say = 'print(\'["ok", "fine", "", "x"]\', flush=True); '
    fine = Finding("ok", "fine", "", "x")
    assert probe(say, 30) == [fine]
    for program, seconds, why in (
        ("import os; os.abort()", 30, "ended by SIGABRT"),
        ("import time; time.sleep(60)", 1, "took more than 1 s"),
        ("import sys; sys.exit(5)", 30, "exit code 5"),
    ):
        kept, failure = probe(say + program, seconds)
        assert kept == fine
        assert failure.level == "MEND" and failure.text.startswith(why)


def test_ranks_that_hang_are_named_as_such_and_do_not_live_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that waits for them longer than it may live is killed without them, and cannot say what hung."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\n"
        "if 'RANK' in os.environ:\n"
        f"    open(r'{tmp_path}/' + str(os.getpid()), 'w').close()\n"
        "    time.sleep(300)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = doctor.check_ranks("gloo", "cpu", "mend it", seconds=3)
    assert found and (found.level, found.mend) == ("MEND", "mend it") and "took more than 3 s" in found.text
    pids = [int(path.name) for path in tmp_path.iterdir() if path.name.isdecimal()]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert doctor.PROBE_SECONDS > 2 * doctor.RANK_SECONDS  # the ranks are waited for one after the other


# -----------------------------------------------------------------------------
# GPUs that are not here


def test_nvidia_driver_by_its_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "nvidia-smi", "CUDA Version: 13.0\nGPU 0: NVIDIA H100\nGPU 1: NVIDIA H100")
    monkeypatch.setenv("PATH", path_with(tmp_path))
    assert doctor.find_driver(tmp_path) == Driver("NVIDIA", 2, (13, 0))


def test_amd_driver_by_its_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "rocm-smi", "GPU[0] : Card series: RX 7900 XTX\nGPU[0] : x\nGPU[1] : Card series: RX 7900 XTX")
    monkeypatch.setenv("PATH", path_with(tmp_path))
    assert doctor.find_driver(tmp_path) == Driver("AMD", 2)


@pytest.mark.parametrize(("node", "vendor"), [("nvidia0", "NVIDIA"), ("kfd", "AMD"), ("null", "")])
def test_driver_by_its_device_node(node: str, vendor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    (tmp_path / node).write_text("")
    assert doctor.find_driver(tmp_path) == Driver(vendor)  # type: ignore[arg-type]


def test_a_driver_program_that_fails_counts_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "nvidia-smi", "NVIDIA-SMI has failed", code=9)
    monkeypatch.setenv("PATH", path_with(tmp_path))
    assert doctor.find_driver(tmp_path) == Driver("")


@pytest.mark.parametrize(
    ("driver", "cuda", "hip", "seen", "level", "mend"),
    [
        (Driver("AMD", 6), "13.0", None, 0, "MEND", "TORCH_BUILD=rocm7.2 bash dev/setup.sh"),
        (Driver("AMD", 6), None, None, 0, "MEND", "TORCH_BUILD=rocm7.2 bash dev/setup.sh"),
        (Driver("AMD", 6), None, "7.2", 6, "ok", ""),
        (Driver("AMD", 6), None, "7.2", 0, "MEND", "rocm-smi must work in this shell"),
        (Driver("NVIDIA", 1, (13, 0)), None, None, 0, "MEND", "TORCH_BUILD=cu130 bash dev/setup.sh"),
        (Driver("NVIDIA", 1, (12, 4)), None, None, 0, "MEND", "TORCH_BUILD=cu126 bash dev/setup.sh"),
        (Driver("NVIDIA"), None, "7.2", 0, "MEND", "TORCH_BUILD=cu130 bash dev/setup.sh"),
        (
            Driver("NVIDIA", 1, (12, 4)),
            "13.0",
            None,
            0,
            "MEND",
            "TORCH_BUILD=cu126 bash dev/setup.sh, or a newer driver",
        ),
        (Driver("NVIDIA", 1, (11, 8)), "12.6", None, 0, "MEND", "a newer driver"),
        (Driver("NVIDIA", 8, (13, 0)), "13.0", None, 8, "ok", ""),
        (Driver("NVIDIA", 8, (13, 0)), "13.0", None, 7, "hint", "look at the driver's log: dmesg"),
        (Driver(""), None, None, 0, "ok", ""),
        (Driver(""), "13.0", None, 0, "ok", ""),
    ],
)
def test_the_torch_build_against_the_machine(
    driver: Driver, cuda: str | None, hip: str | None, seen: int, level: str, mend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    found = check_torch_build(driver, "2.13.0", cuda, hip, seen)
    assert (found.level, found.mend) == (level, mend)


def test_hidden_and_forbidden_gpus_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("HIP_VISIBLE_DEVICES", raising=False)
    assert "usermod" in check_torch_build(Driver("AMD", 6), "2.13.0", None, "7.2", 0, kfd_readable=False).mend
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "")
    assert check_torch_build(Driver("AMD", 6), "2.13.0", None, "7.2", 0).mend == "unset HIP_VISIBLE_DEVICES"


# -----------------------------------------------------------------------------
# Attention


def test_wrong_attention_is_found() -> None:
    import torch

    from nanochat.attention import causal_attention

    shape, cpu = (2, 1, 96, 40), torch.device("cpu")
    assert doctor.attention_error(causal_attention, cpu, torch.float32, shape) < 1e-5
    assert doctor.attention_error(lambda q, k, v, w: causal_attention(q, k, v, w + 1), cpu, torch.float32, shape) > 0.01


def test_the_formula_is_attention() -> None:
    import torch

    from nanochat.attention import causal_mask
    from tests.reference.attention import attention

    q, k, v = (torch.randn(1, heads, 12, 8, dtype=torch.float64) for heads in (4, 2, 2))
    expected = attention(q, k, v, causal_mask(12, 12, 5, "cpu"))
    assert torch.allclose(doctor.attention_by_formula(q, k, v, 5), expected)


# -----------------------------------------------------------------------------
# Machine


def test_an_old_python_is_named() -> None:
    found = doctor.check_python((3, 10, 4))
    assert (found.level, found.mend) == ("MEND", "PYTHON=python3.11 bash dev/setup.sh")


def test_more_threads_than_a_container_may_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert doctor.cpu_quota(tmp_path / "cpu.max") == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert doctor.cpu_quota(tmp_path / "cpu.max") == math.inf
    assert doctor.cpu_quota(tmp_path / "absent") == math.inf
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    found = doctor.check_cpu()
    assert found.level == "hint" and found.mend.startswith("export OMP_NUM_THREADS=")


def test_a_package_that_the_project_names_and_nobody_installed(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["markdown-it-py", "numpy>=2", "no-such-one"]')
    found = doctor.check_python(project=tmp_path)
    assert found.level == "MEND" and found.text.endswith("without no-such-one")


@pytest.mark.skipif(sys.platform != "linux", reason="asks GNU df")
def test_the_file_system_is_named_as_linux_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.file_system(Path("/proc/self")) == "proc"
    monkeypatch.setenv("PATH", "")
    assert doctor.file_system(tmp_path) == ""


@pytest.mark.parametrize(
    ("kind", "mend"), [("nfs4", "prefetch from one machine"), ("tmpfs", "export NANOCHAT_BASE_DIR")]
)
def test_a_disk_that_is_slow_or_does_not_stay(
    kind: str, mend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path / "bin", "df", f"Type\n{kind}")
    monkeypatch.setenv("PATH", path_with(tmp_path / "bin"))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    found = doctor.check_disk()
    assert (found.level, kind in found.text) == ("hint", True) and found.mend.startswith(mend)


def test_a_base_dir_that_no_disk_can_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for it fails, not only writing; that was a finding about the installation."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / ("x" * 300)))
    found = doctor.check_disk()
    assert "cannot be written" in found.text and "NANOCHAT_BASE_DIR" in found.mend


def test_a_hub_that_is_not_there_is_a_hint_and_offline_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for proxy in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    assert doctor.check_hub().level == "hint"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert doctor.check_hub().level == "ok"


def test_a_check_that_fails_in_its_own_way_is_a_finding() -> None:
    def check(key: str) -> Finding:
        return {"a": Finding("ok", "first")}[key]

    assert list(doctor.examine("x", check, "a")) == [Finding("ok", "first", what="x")]
    (finding,) = doctor.examine("x", check, "b")
    assert finding.level == "MEND" and "KeyError" in finding.text
