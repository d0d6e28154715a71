"""Exact versions stand once, in constraints.txt; pyproject.toml and requirements.lock must agree with it, and what is
installed with the lock."""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
OURS = {"nanochat-rustbpe"}
ONLY_ON_PYTORCH_INDEX = {"triton-rocm"}  # its version is pinned by torch itself
NOT_IN_SETUP = {"lm-eval"}  # the extra `eval`: it is installed by hand, and what it wants contradicts the rest


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    matches = [re.fullmatch(r"([A-Za-z0-9._-]+)==([a-z0-9.]+)", line) for line in lines]
    assert all(matches), "constraints.txt holds names and versions only"
    return {normalized(match[1]): match[2] for match in matches if match}


def locked() -> dict[str, dict[str, str]]:
    """{section: {name: version}} of requirements.lock, whose every line is one of three kinds."""
    sections: dict[str, dict[str, str]] = {}
    entry = r"([a-z0-9-]+)==([a-z0-9.]+)(?: ; [^\\\n]+)?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n"
    for heading, body in re.findall(r"^# (\w+): .*\n((?:[^#].*\n)+)", LOCK, re.MULTILINE):
        sections[heading] = {match[1]: match[2] for match in re.finditer(entry, body)}
        assert not re.sub(entry, "", body), f"requirements.lock, {heading}"
    return sections


def requirements() -> list[str]:
    extras = PROJECT["project"]["optional-dependencies"].values()
    groups = PROJECT["dependency-groups"].values()
    build = PROJECT["build-system"]["requires"]
    return [*PROJECT["project"]["dependencies"], *sum(extras, []), *sum(groups, []), *build]


def test_every_dependency_is_pinned_once_and_above_its_floor() -> None:
    pinned = pins()
    for requirement in requirements():
        name, floor = re.match(r"([A-Za-z0-9._-]+)(?:>=([0-9.]+))?", requirement).groups()
        if name in OURS | ONLY_ON_PYTORCH_INDEX:
            continue
        version = pinned[normalized(name)]
        assert not floor or [int(n) for n in version.split(".")] >= [int(n) for n in floor.split(".")], requirement
    assert len(pinned) == sum("==" in line for line in (ROOT / "constraints.txt").read_text().splitlines())


def test_lock_has_every_pinned_version_and_nothing_else() -> None:
    sections = locked()
    assert list(sections) == ["torch", "cuda", "run", "dev", "oracle"]
    cuda = sections.pop("cuda")  # pinned by torch itself
    together = {name: version for section in sections.values() for name, version in section.items()}
    assert together == {name: version for name, version in pins().items() if name not in NOT_IN_SETUP}
    assert len(together) == sum(map(len, sections.values())), "a name stands twice"
    assert not set(cuda) & set(together)


def test_lock_covers_what_pyproject_asks_for() -> None:
    sections, extras = locked(), PROJECT["project"]["optional-dependencies"]
    crate = tomllib.loads((ROOT / "rustbpe" / "pyproject.toml").read_text(encoding="utf-8"))
    run = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"], *crate["project"]["dependencies"]]
    for requirement in [*run, *crate["build-system"]["requires"]]:
        assert normalized(re.split("[<>=]", requirement)[0]) in sections["run"] | sections["torch"], requirement
    for requirement in [*extras["dev"], *extras["export"]]:
        assert normalized(re.split("[<>=]", requirement)[0]) in sections["dev"], requirement


def wheel(folder: Path, name: str, version: str) -> str:
    """Write the smallest wheel that can be installed; its sha256."""
    path, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "".join(f"{info}/{name},,\n" for name in ("METADATA", "WHEEL", "RECORD")))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_setup_refuses_a_wheel_that_is_not_in_the_lock(installer: str, tmp_path: Path) -> None:
    """One line, exit code 2, and nothing of it installed; what came before it and is in the lock is."""
    checkout, wheels, tools = tmp_path / "checkout", tmp_path / "wheels", tmp_path / "tools"
    for folder in (checkout / "dev", checkout / "rustbpe", wheels, tools):
        folder.mkdir(parents=True)
    for name in ("dev/setup.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, checkout / name)
    (tools / "cargo").symlink_to("/bin/true")
    if installer == "uv":
        if not (uv := shutil.which("uv")):
            pytest.skip("no uv on this machine; setup.sh uses it where there is one")
        (tools / "uv").symlink_to(uv)
    elif pip := importlib.util.find_spec("pip"):  # half of the seconds of a new .venv go into pip's own installation
        venv.create(checkout / ".venv", symlinks=True)
        (site_packages,) = checkout.glob(".venv/lib/*/site-packages")
        (site_packages / "pip").symlink_to(Path(pip.origin).parent)
        (checkout / ".venv/bin/pip").symlink_to("/bin/true")
    lock = ""
    for section, name, version in [("torch", "torch", pins()["torch"]), ("run", "tiny", "1.0")]:
        sha256 = wheel(wheels, name, version) if name == "torch" else wheel(wheels, name, version)[::-1]
        lock += f"# {section}: of the test\n{name}=={version} \\\n    --hash=sha256:{sha256}\n"
    (checkout / "requirements.lock").write_text(lock)
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(tmp_path), "PYTHON": sys.executable}
    environment |= {"TORCH_BUILD": "default", "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "UV_NO_INDEX": "1"}
    environment |= {"PIP_FIND_LINKS": str(wheels), "UV_FIND_LINKS": str(wheels), "UV_OFFLINE": "1"}
    result = subprocess.run(["bash", checkout / "dev/setup.sh"], env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("setup: tiny==1.0 is not a file that requirements.lock knows: its sha256 differs")
    assert result.stderr.count("\n") == 1
    assert list(checkout.glob(".venv/lib/*/site-packages/torch-*"))
    assert not list(checkout.glob(".venv/lib/*/site-packages/tiny*"))


def test_torch_extras_exclude_each_other_and_have_an_index_each() -> None:
    """`uv sync --extra gpu` must not take the CPU build, and nothing else may come from PyTorch's indexes."""
    uv = PROJECT["tool"]["uv"]
    extras = {"cpu", "gpu", "rocm"}
    assert [{entry["extra"] for entry in group} for group in uv["conflicts"]] == [extras]
    assert {source["extra"] for source in uv["sources"]["torch"]} == extras
    assert {source["index"] for source in uv["sources"]["torch"]} == {index["name"] for index in uv["index"]}
    assert all(index["explicit"] for index in uv["index"])


def test_setup_offers_the_builds_that_pyproject_names() -> None:
    setup = (ROOT / "dev" / "setup.sh").read_text(encoding="utf-8")
    for index in PROJECT["tool"]["uv"]["index"]:
        address, _, build = index["url"].rpartition("/")
        assert f'index="{address}/$build"' in setup
        assert re.search(rf"build={re.escape(build)}\b", setup), build
