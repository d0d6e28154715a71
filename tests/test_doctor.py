"""The doctor finds what is wrong, names the command that mends it, and never ends in a traceback."""

import importlib.metadata
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import doctor
from scripts.doctor import check_torch_build, run_probe

ROOT = Path(__file__).parent.parent
FINE = ["x", "ok", "fine", ""]


def run_doctor(**environment: object) -> tuple[int, list[str]]:
    """Exit code and lines of a whole run. Nothing of it is a traceback, and what must be mended says how."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in environment.items()}}
    command = [sys.executable, "-m", "scripts.doctor"]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert all(" -> " in line for line in lines if line.startswith("MEND"))
    return result.returncode, lines


def fake(folder: Path, name: str, text: str, code: int = 0) -> str:
    """A program that prints a text; returns a PATH on which it comes first."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\necho '{text}'\nexit {code}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def patch(folder: Path, program: str) -> dict[str, str]:
    """The environment in which every Python begins with a program."""
    (folder / "sitecustomize.py").write_text(program)
    return {"PYTHONPATH": str(folder)}


# -----------------------------------------------------------------------------
# As a user calls it


@pytest.mark.soak
def test_a_machine_that_is_well_ends_with_0(tmp_path):
    code, lines = run_doctor(NANOCHAT_BASE_DIR=tmp_path / "base")
    assert code == 0, lines
    for what in ("in float32: 4 ways", "in bfloat16: 4 ways", "torch.compile works", "add up with gloo", "packages"):
        assert any(what in line for line in lines), what
    assert not (tmp_path / "base").exists()  # looking leaves nothing behind


def test_a_sick_machine_ends_with_1_and_names_what_mends_it(tmp_path):
    """A torch that cannot be imported, a base directory below a file."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object')")
    (tmp_path / "file").write_text("")
    code, lines = run_doctor(NANOCHAT_BASE_DIR=tmp_path / "file" / "base", PYTHONPATH=tmp_path)
    assert code == 1
    assert any("cannot be written" in line and "NANOCHAT_BASE_DIR" in line for line in lines)
    assert {"devices", "compile", "gloo"} <= {line.split()[1] for line in lines if "libcudart" in line}


@pytest.mark.soak
def test_a_torch_and_a_compiler_that_do_not_fit_the_machine(tmp_path):
    """A torch for CPUs beside a GPU whose driver knows CUDA 12, a compiler that fails."""
    fake(tmp_path / "bin", "nvidia-smi", "| NVIDIA-SMI 550.54  Driver Version: 550.54  CUDA Version: 12.4 |")
    fake(tmp_path / "bin", "g++", "error: out of order", code=1)
    code, lines = run_doctor(NANOCHAT_BASE_DIR=tmp_path / "base", PATH=tmp_path / "bin", CXX="g++")
    assert code == 1
    assert any("torch.compile fails on cpu" in line and "apt-get install g++" in line for line in lines)
    if "+cpu" in importlib.metadata.version("torch"):
        assert any("this machine has an NVIDIA GPU -> TORCH_BUILD=cu126 bash dev/setup.sh" in line for line in lines)


def test_without_a_compiler_it_says_what_to_install(tmp_path):
    ((what, level, _, mend),) = run_probe("compile", PATH=str(tmp_path), CXX="no-such-compiler")
    assert (what, level, mend) == ("compile", "MEND", "apt-get install g++")


@pytest.mark.parametrize(
    ("program", "seconds", "why"),
    [
        ("import os; os.abort()", 30, "ended by SIGABRT"),
        ("import time; time.sleep(60)", 3, "took more than 3 s"),
        ("import os; os._exit(5)", 30, "exit code 5"),
    ],
)
def test_a_probe_that_crashes_or_hangs_ends_the_probe_alone(program, seconds, why, tmp_path):
    say = """print('["x", "ok", "fine", ""]', flush=True)\n"""
    kept, (what, level, text, _) = run_probe("cpu", seconds, **patch(tmp_path, say + program))
    assert kept == FINE
    assert (what, level) == ("cpu", "MEND") and text.startswith(why)


def test_a_check_that_fails_in_its_own_way_is_a_finding(tmp_path):
    ((what, level, text, _),) = run_probe("cpu", **patch(tmp_path, "import os; os.sched_getaffinity = None"))
    assert (what, level) == ("cpu", "MEND") and "could not be examined: TypeError" in text


def test_ranks_that_hang_are_named_as_such_and_do_not_live_on(tmp_path, monkeypatch):
    """A probe that waits for them longer than it may live is killed without them, and cannot say what hung."""
    mark = f"open(r'{tmp_path}/' + str(os.getpid()), 'w').close()"
    hang = f"import os, time\nif 'RANK' in os.environ:\n    {mark}\n    time.sleep(300)\n"
    monkeypatch.setenv(*patch(tmp_path, hang).popitem())
    found = doctor.check_ranks("gloo", "cpu", "mend it", seconds=3)
    assert (found.level, found.mend) == ("MEND", "mend it") and "took more than 3 s" in found.text
    pids = [int(path.name) for path in tmp_path.iterdir() if path.name.isdecimal()]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert doctor.PROBE_SECONDS > doctor.RANK_SECONDS


# -----------------------------------------------------------------------------
# GPUs that are not here


@pytest.mark.parametrize(
    ("program", "text", "code", "found"),
    [
        ("nvidia-smi", "CUDA Version: 13.0\nGPU 0: NVIDIA H100\nGPU 1: NVIDIA H100", 0, ("NVIDIA", 2, 13)),
        ("rocm-smi", "GPU[0] : Card series: RX\nGPU[0] : x\nGPU[1] : Card series: RX", 0, ("AMD", 2, 0)),
        ("nvidia-smi", "NVIDIA-SMI has failed", 9, ("", 0, 0)),
    ],
)
def test_drivers_by_their_programs(program, text, code, found, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", fake(tmp_path, program, text, code))
    assert doctor.find_driver(tmp_path) == found


@pytest.mark.parametrize(("node", "vendor"), [("nvidia0", "NVIDIA"), ("kfd", "AMD"), ("null", "")])
def test_drivers_by_their_device_nodes(node, vendor, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    (tmp_path / node).write_text("")
    assert doctor.find_driver(tmp_path) == (vendor, 0, 0)


@pytest.mark.parametrize(
    ("driver", "cuda", "hip", "seen", "level", "mend"),
    [
        (("AMD", 6, 0), "13.0", None, 0, "MEND", "TORCH_BUILD=rocm7.2 bash dev/setup.sh"),
        (("AMD", 6, 0), None, None, 0, "MEND", "TORCH_BUILD=rocm7.2 bash dev/setup.sh"),
        (("AMD", 6, 0), None, "7.2", 6, "ok", ""),
        (("AMD", 6, 0), None, "7.2", 0, "MEND", "rocm-smi must work in this shell"),
        (("NVIDIA", 1, 13), None, None, 0, "MEND", "TORCH_BUILD=cu130 bash dev/setup.sh"),
        (("NVIDIA", 1, 12), None, None, 0, "MEND", "TORCH_BUILD=cu126 bash dev/setup.sh"),
        (("NVIDIA", 0, 0), None, "7.2", 0, "MEND", "TORCH_BUILD=cu130 bash dev/setup.sh"),
        (("NVIDIA", 1, 12), "13.0", None, 0, "MEND", "TORCH_BUILD=cu126 bash dev/setup.sh, or a newer driver"),
        (("NVIDIA", 1, 11), "12.6", None, 0, "MEND", "a newer driver"),
        (("NVIDIA", 8, 13), "13.0", None, 8, "ok", ""),
        (("NVIDIA", 8, 13), "13.0", None, 7, "hint", "look at the driver's log: dmesg"),
        (("", 0, 0), None, None, 0, "ok", ""),
        (("", 0, 0), "13.0", None, 0, "ok", ""),
    ],
)
def test_the_torch_build_against_the_machine(driver, cuda, hip, seen, level, mend, monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    found = check_torch_build(driver, cuda, hip, seen, ROOT / "no-kfd")
    assert (found.level, found.mend) == (level, mend)


def test_hidden_and_forbidden_gpus_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("HIP_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may open everything
    (tmp_path / "kfd").touch()
    assert "usermod" in check_torch_build(("AMD", 6, 0), None, "7.2", 0, tmp_path / "kfd").mend
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "")
    assert check_torch_build(("AMD", 6, 0), None, "7.2", 0).mend == "unset HIP_VISIBLE_DEVICES"


def test_matmuls_were_measured_beside_a_compiler(monkeypatch):
    """72 GFLOP/s, where training then made 216: the speed is that of a machine on which nothing else runs."""
    running, seen = [], {}

    def probe(name):
        running.append(name)
        time.sleep(0.02)
        seen[name] = list(running)
        running.remove(name)
        return [[name, "ok", "fine", ""]]

    monkeypatch.setattr(doctor, "run_probe", probe)
    with pytest.raises(SystemExit, match="0"):
        doctor.main()
    assert seen.keys() == {*doctor.CHECKS, "devices", "speed"} and seen["speed"] == ["speed"]


def test_wrong_attention_is_found(monkeypatch):
    import torch

    from nanochat import attention

    right, shape = attention.causal_attention, (2, 1, 96, 40)
    assert doctor.attention_error(torch.device("cpu"), "float32", *shape) < 1e-5
    monkeypatch.setattr(
        attention, "causal_attention", lambda q, k, v, w: right(q, k, v, w + (q.dtype == torch.float32))
    )
    assert doctor.attention_error(torch.device("cpu"), "float32", *shape) > 0.01
    assert doctor.check_attention(torch.device("cpu"), "float32").level == "MEND"


@pytest.mark.parametrize("queries", [1, 192])
def test_the_kernel_that_torch_takes_has_a_name(queries):
    import torch

    assert doctor.kernel_taken(torch.device("cpu"), "float32", queries).endswith(("_ATTENTION", "MATH"))


# -----------------------------------------------------------------------------
# Machine


def test_more_threads_than_a_container_may_run(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    for text, allowed in (("150000 100000\n", 1), ("400000 100000\n", 4), ("max 100000\n", 8)):
        (tmp_path / "cpu.max").write_text(text)
        monkeypatch.setenv("OMP_NUM_THREADS", str(allowed + 1))
        assert doctor.check_cpu(tmp_path / "cpu.max").mend == f"export OMP_NUM_THREADS={allowed}"
        monkeypatch.setenv("OMP_NUM_THREADS", str(allowed))
        assert doctor.check_cpu(tmp_path / "cpu.max").level == "ok"
    assert "8 of them at a time" in doctor.check_cpu(tmp_path / "absent").text


def test_a_package_that_the_project_names_and_nobody_installed(monkeypatch):
    names = ["markdown-it-py", "numpy>=2", "no-such-one", 'mypy; extra == "dev"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: names)
    found = doctor.check_python()
    assert found.level == "MEND" and found.text.endswith("3 packages, without no-such-one")


@pytest.mark.parametrize(("kind", "why"), [("nfs4", "prefetch from one machine"), ("tmpfs", "gone after a restart")])
def test_a_disk_that_is_slow_or_does_not_stay(kind, why, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", fake(tmp_path / "bin", "df", f"Type\n{kind}"))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    found = doctor.check_disk()
    assert found.level == "hint" and kind in found.text and why in found.text
    assert found.mend.startswith("export NANOCHAT_BASE_DIR")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / ("x" * 300)))  # which no disk can name
    found = doctor.check_disk()
    assert "cannot be written" in found.text and "NANOCHAT_BASE_DIR" in found.mend
