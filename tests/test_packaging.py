"""Exact versions stand once, in constraints.txt; pyproject.toml must agree with it."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OURS = {"nanochat-rustbpe"}
ONLY_ON_PYTORCH_INDEX = {"triton-rocm"}  # its version is pinned by torch itself


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    matches = [re.fullmatch(r"([A-Za-z0-9._-]+)==([a-z0-9.]+)", line) for line in lines]
    assert all(matches), "constraints.txt holds names and versions only"
    return {normalized(match[1]): match[2] for match in matches if match}


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
