#!/usr/bin/env bash
# Write requirements.lock anew, after constraints.txt or a dependency in pyproject.toml has changed. Needs uv and .venv.
#
#   bash dev/lock.sh
#
# Versions are those of constraints.txt, the sha256 of each file what the package index says, the usual one or UV_INDEX_URL's.
# Where PyTorch's own index answers it adds the sha256 of its builds of torch; elsewhere those that are known already stay.
set -euo pipefail
case "${1:-}" in -h | --help) exec sed -nE '2,${/^#/!q; s/^# ?//p;}' "$0" ;; esac
cd "$(dirname "$0")/.."
command -v uv >/dev/null || { echo "lock: uv is missing; in a venv of its own: pip install uv" >&2; exit 2; }
[ -x .venv/bin/python ] || { echo "lock: .venv is missing; make it with: bash dev/setup.sh dev" >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

resolve() { # NAME ARGUMENTS...: what uv takes, on all platforms
  uv pip compile --quiet --universal --python-version 3.11 --no-sources --output-file "$work/pylock.$1.toml" "${@:2}" >/dev/null
}
printf 'setuptools\nmaturin\n' >"$work/build.txt" # without isolation the build tools are installed like all the rest
echo rustbpe >"$work/oracle.txt"
resolve run --constraints constraints.txt pyproject.toml "$work/build.txt"
resolve dev --constraints constraints.txt --extra dev pyproject.toml "$work/build.txt"
resolve oracle --constraints constraints.txt --no-deps "$work/oracle.txt"
torch=$(grep '^torch==' constraints.txt)
for build in cpu cu126 cu130; do # ROCm brings libraries of its own, which are locked nowhere
  echo "$torch+$build" >"$work/torch.txt"
  index="https://download.pytorch.org/whl/$build"
  UV_HTTP_RETRIES=0 resolve "torch-$build" --no-deps --default-index "$index" "$work/torch.txt" 2>/dev/null || echo "lock: $index does not answer" >&2
done

.venv/bin/python - "$work" <<'PYTHON'
import re, sys, tomllib
from pathlib import Path
from urllib.parse import unquote

from packaging import tags, utils

LOCK = Path("requirements.lock")
OTHER_SYSTEM = re.compile(r"== '(win32|emscripten)'")  # markers
linux = [f"manylinux_2_{glibc}_{cpu}" for glibc in range(41) for cpu in ("x86_64", "aarch64")]
linux += [f"{kind}_{cpu}" for kind in ("manylinux2014", "linux") for cpu in ("x86_64", "aarch64")]
PLATFORMS = [*linux, *tags.mac_platforms((20, 0), "arm64")]
KNOWN = {tag for minor in range(11, 15) for tag in tags.cpython_tags((3, minor), platforms=PLATFORMS)}
KNOWN |= {tag for minor in range(11, 15) for tag in tags.compatible_tags((3, minor), f"cp3{minor}", PLATFORMS)}
CUDA = re.compile(r"(cuda|nvidia)-.*|triton")  # pinned by torch itself


def packages(name):
    """{name: (version, marker, hashes)} of a file that uv wrote."""
    found = {}
    path = Path(sys.argv[1], f"pylock.{name}.toml")
    for package in tomllib.loads(path.read_text())["packages"] if path.exists() else []:
        marker = package.get("marker", "")
        files = {unquote(file["url"].rpartition("/")[2]): file["hashes"]["sha256"] for file in package.get("wheels", [])}
        hashes = {sha for file, sha in files.items() if utils.parse_wheel_filename(file)[3] & KNOWN}
        if not hashes and "sdist" in package:
            hashes = {package["sdist"]["hashes"]["sha256"]}
        if not OTHER_SYSTEM.search(marker):
            assert hashes, f"no file of {package['name']} is for a platform that we know"
            found[package["name"]] = package["version"], marker, hashes
    return found


def section(name, what, chosen):
    lines = [f"# {name}: {what}"]
    for package, (version, marker, hashes) in sorted(chosen.items()):
        requirement = f"{package}=={version}" + f" ; {marker}" * bool(marker)
        lines.append(" \\\n".join([requirement, *(f"    --hash=sha256:{sha}" for sha in sorted(hashes))]))
    return "\n".join(lines) + "\n"


run, dev, oracle = packages("run"), packages("dev"), packages("oracle")
version, marker, hashes = run.pop("torch")
builds = {"default"}
old = re.search(rf"^# torch: (.*)\ntorch=={version} ((?:.*\n)*?)(?=#)", LOCK.read_text() if LOCK.exists() else "", re.M)
if old:
    builds |= set(old[1].split())
    hashes |= set(re.findall("sha256:([0-9a-f]{64})", old[2]))
for build in ("cpu", "cu126", "cu130"):
    if fresh := packages(f"torch-{build}"):
        builds.add(build)
        hashes |= fresh["torch"][2]
cuda = {name: package for name, package in run.items() if CUDA.fullmatch(name)}
text = """# Written by dev/lock.sh, read by dev/setup.sh: what goes into .venv, and the sha256 of every file that may be it, on Linux
# (x86_64, aarch64) and macOS (arm64) with Python 3.11 to 3.14. The versions are those of constraints.txt.
# Of torch the line below names the builds whose files are known; the others are installed by version.
"""
text += section("torch", " ".join(sorted(builds)), {"torch": (version, marker, hashes)})
text += section("cuda", "what torch's default and CUDA 13 builds need besides", cuda)
text += section("run", "what a run needs, and the tools that build rustbpe", {k: v for k, v in run.items() if k not in cuda})
text += section("dev", "what dev/test.sh needs besides", {k: v for k, v in dev.items() if k not in run and k != "torch"})
text += section("oracle", "the rustbpe that tests compare ours with", oracle)
LOCK.write_text(text)
print(f"lock: requirements.lock has {text.count('==') - text.count(' == ')} packages, {text.count('--hash')} files")
PYTHON
