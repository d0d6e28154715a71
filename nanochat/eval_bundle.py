"""The CORE evaluation tasks as published, `$NANOCHAT_BASE_DIR/eval_bundle/`: core.yaml, eval_meta_data.csv, eval_data/.

They come as one zip from the address below, another address, or a zip or folder on this machine.

Promises: the folder is there whole or not at all, with a sealed manifest of the size and sha256 of each file; nothing
in a zip is written outside it; what is there already is never replaced. Does not: know whether the zip
is the right one (its author publishes no hash; each member's CRC-32 is checked), nor look into the tasks.
"""

import json
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Generator
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from nanochat.common import UserError, get_base_dir, print0
from nanochat.download import describe_url, fetch_all, reason_of
from nanochat.files import flush, locked, read_sealed, seal, sha256_file, write_atomic

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"  # about 162 MB
MANIFEST = "manifest.json"
NEEDED = ("core.yaml", "eval_meta_data.csv")
LARGEST = 4 << 30  # bytes of all files together; the published ones have a tenth of it
LITTER = ("__MACOSX", ".DS_Store")  # what a Mac adds to zips
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)  # what zipfile raises
PREFETCH = "python -m nanochat.dataset --prefetch=eval"


def bundle_path() -> Path:
    return get_base_dir() / "eval_bundle"


def find_bundle() -> Path:
    """The bundle's folder, after every file was compared with the manifest. UserError where that fails."""
    folder = bundle_path()
    again = f"get it again: rm -r {folder}; {PREFETCH}"
    try:
        files = read_sealed(folder / MANIFEST)["files"]
    except FileNotFoundError:
        raise UserError(f"no {folder / MANIFEST}; get the evaluation tasks with: {PREFETCH}") from None
    except (ValueError, KeyError):
        raise UserError(f"{folder / MANIFEST}: damaged; {again}") from None
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or sha256_file(path) != entry["sha256"]:
            raise UserError(f"{path}: {'not as it was' if path.is_file() else 'missing'}; {again}")
    return folder


def fetch_bundle(source: str | None) -> Path:
    """Have the bundle, from `source` (a zip, a folder, an address; None = where it is published) unless it is there. A
    folder in its place without a manifest gets one if it is the `source`, and is left alone otherwise.
    """
    folder = bundle_path()
    with locked(folder.with_name(".eval_bundle")):
        if (folder / MANIFEST).exists():
            print0(f"{folder}: already there")
            return find_bundle()
        place = Path(source).expanduser().resolve() if source and "://" not in source else None
        if folder.exists():
            if place != folder.resolve():
                raise UserError(
                    f"{folder} is there without a {MANIFEST}; to take it as it is: {PREFETCH} --path={folder}"
                )
            seal_bundle(
                folder, {name: describe(folder / name) for name, _ in files_of(folder)}, {"source": source}, folder
            )
            return folder
        zipped = place or fetch_zip(source or URL)
        origin = {"source": source or URL, "source_sha256": sha256_file(zipped) if zipped.is_file() else None}
        try:
            build_bundle(zipped, folder, origin)
        except (UserError, *DAMAGED) as error:
            if place is None:
                zipped.unlink()  # without a published hash, the next run would take it for the right one
            if isinstance(error, UserError):
                raise
            raise UserError(f"{source or URL}: not a whole zip file ({reason_of(error)}); get it again") from None
        if place is None:
            zipped.unlink()
    return folder


def fetch_zip(url: str) -> Path:
    """Fetch the zip from an address, beside its place."""
    target = bundle_path().with_name(".eval_bundle") / "eval_bundle.zip"
    fetch_all([(describe_url(url), target)], workers=1)
    return target


def build_bundle(source: Path, folder: Path, origin: dict[str, str | None]) -> None:
    """Copy the files of a zip or a folder, describe them, and rename the whole into its place."""
    building = folder.with_name(f".{folder.name}.{os.getpid()}.building")
    try:
        files: dict[str, dict[str, int | str]] = {}
        left = LARGEST
        with closing(files_of(source)) as members:
            for name, content in members:
                left -= copy_file(content, building / name, left)
                files[name] = describe(building / name)
        seal_bundle(building, files, origin, source)
        building.rename(folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def describe(file: Path) -> dict[str, int | str]:
    return {"file_bytes": file.stat().st_size, "sha256": sha256_file(file)}


def seal_bundle(
    folder: Path, files: dict[str, dict[str, int | str]], origin: dict[str, str | None], source: Path
) -> None:
    """Write the manifest of a folder with these files; UserError where they are no evaluation bundle."""
    missing = [name for name in NEEDED if name not in files]
    if missing or not any(name.startswith("eval_data/") and name.endswith(".jsonl") for name in files):
        missing = missing or ["eval_data/**/*.jsonl"]
        raise UserError(f"{source}: no evaluation bundle, it has no {', '.join(missing)}")
    write_atomic(folder / MANIFEST, seal(json.dumps({**origin, "files": files}, indent=1)))


def files_of(source: Path) -> Generator[tuple[str, BinaryIO]]:
    """The (path within the bundle, content) of all files in a zip or a folder."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.is_file() and path.relative_to(source).as_posix() != MANIFEST:
                with open(path, "rb") as content:
                    yield path.relative_to(source).as_posix(), content
    elif source.is_file():
        with zipfile.ZipFile(source) as archive:
            for name, member in members_of(archive, source):
                with archive.open(member) as content:
                    yield name, content  # type: ignore[misc]  # reads like a file
    else:
        raise UserError(f"path={source}: no such file or folder; give a zip or a folder with {', '.join(NEEDED)}")


def members_of(archive: zipfile.ZipFile, source: Path) -> list[tuple[str, zipfile.ZipInfo]]:
    """The (path within the bundle, member) of a zip's files. UserError where a member would leave the folder."""
    members, litter = [], 0
    for member in archive.infolist():
        path = PurePosixPath(member.filename)
        parts = path.parts[1:] if path.parts[:1] == ("eval_bundle",) else path.parts
        if path.is_absolute() or ".." in parts or "\\" in member.filename or stat.S_ISLNK(member.external_attr >> 16):
            raise UserError(f"{source}: {member.filename!r} points out of the folder; nothing was unpacked")
        if set(LITTER) & set(parts):
            litter += 1
        elif parts and not member.is_dir() and parts != (MANIFEST,):  # it has one if it was zipped here
            members.append(("/".join(parts), member))
    names = [name for name, _ in members]
    if len(names) != len(set(names)):
        raise UserError(f"{source}: holds files of the same name; nothing was unpacked")
    if litter:
        print0(f"{source}: left out {litter:,} files named {' or '.join(LITTER)}")
    return members


def copy_file(content: BinaryIO, target: Path, allowed: int) -> int:
    """Copy a file of at most `allowed` bytes; how many it has."""
    target.parent.mkdir(parents=True, exist_ok=True)
    size = 0
    with open(target, "xb") as output:
        while chunk := content.read(1 << 20):
            size += len(chunk)
            if size > allowed:
                raise UserError(f"{target.name}: more than {LARGEST:,} bytes in all; this is no evaluation bundle")
            output.write(chunk)
        output.flush()
        os.fsync(output.fileno())
    return size
