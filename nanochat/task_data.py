"""Published data on disk: the rows of task data sets, and the bundle of the CORE tasks.

    task_data/<dataset>/<subset>/<split>.parquet     the same rows as the Hugging Face data set of that name
    eval_bundle/                                     core.yaml, eval_meta_data.csv, eval_data/: CORE as published

Each data set's folder and the bundle have a sealed manifest.json: size, sha256 and origin of every file, and of a data
set the one commit of the hub that all its splits come from.

Promises: a split, or the bundle, is there whole or not at all; what the hub sends is compared with its hashes; a file
that is not what its manifest says is refused; several processes that want the same thing fetch it once; what is there
is never asked for again. A split without an entry, put there by hand, is used and said so. Does not: look into the
rows, nor know whether the zip is the right one (its author publishes no hash; each member's CRC-32 is checked).
"""

import json
import shutil
import zipfile
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, get_base_dir, print0
from nanochat.download import Listing, fetch_files, fetch_url, list_repository, persist
from nanochat.files import locked, one_line, read_sealed, seal, sha256_file, whole, write_atomic

# Everything that the tasks read from the hub: repository -> subset -> splits.
DATA_SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "openai/gsm8k": {"main": ("train", "test")},
    "cais/mmlu": {"auxiliary_train": ("train",), "all": ("validation", "test")},
    "allenai/ai2_arc": dict.fromkeys(("ARC-Easy", "ARC-Challenge"), ("train", "validation", "test")),
    "openai/openai_humaneval": {"openai_humaneval": ("test",)},
    "HuggingFaceTB/smol-smoltalk": {"default": ("train", "test")},
}
MANIFEST = "manifest.json"
IMPORT = "python -m dev.import_task_data FOLDER"
PREFETCH = "python -m nanochat.dataset --prefetch=tasks"
BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"  # about 162 MB
NEEDED = ("core.yaml", "eval_meta_data.csv", "eval_data/**/*.jsonl")


def folder_of(dataset: str) -> Path:
    """Where the splits of a data set and their manifest lie; the owner of a hub name is left off."""
    return get_base_dir() / "task_data" / dataset.split("/")[-1]


def rows_path(dataset: str, subset: str, split: str) -> Path:
    return folder_of(dataset) / subset / f"{split}.parquet"


def splits_of(dataset: str) -> list[tuple[str, str]]:
    """All (subset, split) of a data set that the tasks read."""
    return [(subset, split) for subset, splits in DATA_SETS[dataset].items() for split in splits]


# -----------------------------------------------------------------------------
# Rows on disk


def read_manifest(folder: Path) -> dict[str, Any]:
    """What is known about the files of a data set; one without splits where there is no manifest."""
    path = folder / MANIFEST
    try:
        return read_sealed(path) if path.exists() else {"splits": {}}
    except ValueError:
        raise UserError(f"{path}: damaged; get the data set again: rm -r {folder}; {PREFETCH}, or {IMPORT}") from None


def describe(file: Path) -> dict[str, int | str]:
    """What a manifest says about a file."""
    return {"file_bytes": file.stat().st_size, "sha256": sha256_file(file)}


def checked_path(dataset: str, subset: str, split: str, command: str = PREFETCH) -> Path:
    """The file of a split, after its sha256 was compared with the manifest's (about a second per GB). UserError where
    it differs, with the `command` that makes it again.
    """
    path = rows_path(dataset, subset, split)
    entry = read_manifest(folder_of(dataset))["splits"].get(f"{subset}/{split}")
    if entry is None:
        print0(f"{path}: not in {MANIFEST}, taken as it is")
    elif sha256_file(path) != entry["sha256"]:
        raise UserError(f"{path}: not the file of its {MANIFEST} (sha256 differs); get it again: rm {path}; {command}")
    return path


def write_rows(dataset: str, subset: str, split: str, rows: Any, source: str) -> Path:
    """Write a split, whole or not at all: a list of dicts or an Arrow table. `source` says where the rows are from."""
    with locked(folder_of(dataset)):
        table = pa.Table.from_pylist(rows) if isinstance(rows, list) else rows
        return place_rows(rows_path(dataset, subset, split), table, source, {})


def place_rows(path: Path, table: pa.Table, source: str, origin: dict[str, str]) -> Path:
    """Write the rows of a split; the data set's folder is locked by the caller. Who sees the file finds its entry."""
    folder = path.parents[1]
    manifest = read_manifest(folder) | origin
    with whole(path) as building:
        pq.write_table(table.replace_schema_metadata({"source": source}), building, compression="zstd")
        entry = {"rows": table.num_rows, **describe(building), "source": source}
        manifest["splits"][f"{path.parent.name}/{path.stem}"] = entry
        write_atomic(folder / MANIFEST, seal(json.dumps(manifest, indent=1)))
    return path


# -----------------------------------------------------------------------------
# Rows from the hub


def download_rows(dataset: str, subset: str, split: str, workers: int = 4) -> None:
    """Fetch a split from the hub, from the commit that the data set's other splits came from, unless another process
    has done so by the time it is this one's turn. UserError where it cannot be had.
    """
    folder, path = folder_of(dataset), rows_path(dataset, subset, split)
    with locked(folder):
        if path.exists():
            return
        try:
            listing = list_repository(dataset, read_manifest(folder).get("revision"))
            table = fetch_table(listing, subset, split, folder / ".published", workers)
        except UserError as error:
            raise UserError(f"{error} (or, with the original files: {IMPORT})") from None
        place_rows(path, table, f"hub {dataset}", {"repository": dataset, "revision": listing.revision})
        shutil.rmtree(folder / ".published")


def fetch_table(listing: Listing, subset: str, split: str, arriving: Path, workers: int) -> Any:
    """The rows of a split, whose files are put into a folder. `datasets` finds these files by the repository's own
    configuration, and reads them; in between they are fetched by fetch_files(), because it compares no hashes.
    """
    import datasets

    datasets.disable_progress_bars()
    commit = listing.revision
    what = f"{listing.repository} {subset}/{split}"
    builder = persist(lambda: datasets.load_dataset_builder(listing.repository, subset, revision=commit), what)
    paths = [file.partition(f"@{commit}/")[2] for file in builder.config.data_files.get(split, ())]
    if not paths or not all(path.endswith(".parquet") for path in paths):
        raise UserError(f"{what} at {commit}: there are no parquet files of it")
    print(f"{what} at {commit}: {len(paths):,} files to fetch", flush=True)
    with closing(fetch_files(listing, paths, arriving, workers)) as fetched:
        list(fetched)
    names = [str(arriving / path) for path in paths]
    try:
        return datasets.load_dataset("parquet", data_files=names, split="train", cache_dir=arriving).data.table
    except (datasets.exceptions.DatasetsError, ValueError) as error:
        raise UserError(f"{what}: cannot read its parquet files ({one_line(error)})") from None


# -----------------------------------------------------------------------------
# The CORE tasks


def bundle_path() -> Path:
    return get_base_dir() / "eval_bundle"


def fetch_bundle(source: str | None) -> Path:
    """Have the bundle, from `source` (a zip, a folder, an address; None = where it is published) unless it is there. A
    folder in its place without a manifest, which somebody put there, is taken as it is.
    """
    folder, name = bundle_path(), source or BUNDLE_URL
    arriving = folder.with_name(".eval_bundle") / "eval_bundle.zip"
    with locked(arriving.parent):
        if (folder / MANIFEST).exists():
            print0(f"{folder}: already there")
        elif folder.exists():
            print0(f"{folder}: there without a {MANIFEST}, taken as it is")
            seal_bundle(folder, str(folder))
        else:
            try:
                if "://" in name:
                    fetch_url(name, arriving)
                with whole(folder) as building:
                    copy_bundle(arriving if "://" in name else Path(name).expanduser(), building)
                    seal_bundle(building, name)
            except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
                raise UserError(f"{name}: not a whole zip file ({one_line(error)}); get it again") from None
            finally:
                arriving.unlink(missing_ok=True)
    return folder


def copy_bundle(source: Path, building: Path) -> None:
    """Unpack a zip, or copy a folder. zipfile never writes outside of a folder."""
    if source.is_dir():
        shutil.copytree(source, building)
        return
    if not source.is_file():
        raise UserError(f"path={source}: no such file or folder; give a zip or a folder with {', '.join(NEEDED)}")
    with zipfile.ZipFile(source) as archive:
        for member in archive.infolist():
            member.filename = member.filename.removeprefix("eval_bundle/")
            if member.filename:
                archive.extract(member, building)


def seal_bundle(folder: Path, source: str) -> None:
    """Write the manifest of a folder; UserError where it is no evaluation bundle."""
    missing = [name for name in NEEDED if not any(path.is_file() for path in folder.glob(name))]
    if missing:
        raise UserError(f"{source}: no evaluation bundle, it has no {', '.join(missing)}")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: describe(folder / name) for name in names if name != MANIFEST}
    write_atomic(folder / MANIFEST, seal(json.dumps({"source": source, "files": files}, indent=1)))
