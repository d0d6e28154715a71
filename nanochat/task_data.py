"""Published data sets on disk: `$NANOCHAT_BASE_DIR/task_data/<dataset>/<subset>/<split>.parquet`.

Each data set's folder has a sealed manifest.json: the bytes, sha256, rows and origin of every split, and the commit of
the hub that all of them come from. Files come from the hub as they were published (several parts become one file), or
from write_rows().

Promises: a split is there whole or not at all; a file that is not what its manifest says is refused; several processes
that want the same split fetch it once; what is there is never asked for again. A file without an entry, put there by
hand, is used and said so. Does not: look into the rows.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat.common import UserError, get_base_dir, print0
from nanochat.download import Listing, RemoteFile, fetch_all, list_repository, reason_of
from nanochat.files import flush, locked, read_sealed, seal, sha256_file, write_atomic

# Everything that the tasks read from the hub: repository -> subset -> splits.
DATA_SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "openai/gsm8k": {"main": ("train", "test")},
    "cais/mmlu": {"auxiliary_train": ("train",), "all": ("validation", "test")},
    "allenai/ai2_arc": {
        "ARC-Easy": ("train", "validation", "test"),
        "ARC-Challenge": ("train", "validation", "test"),
    },
    "openai/openai_humaneval": {"openai_humaneval": ("test",)},
    "HuggingFaceTB/smol-smoltalk": {"default": ("train", "test")},
}
WORKERS = 4
MANIFEST = "manifest.json"
IMPORT = "python -m dev.import_task_data FOLDER"
PREFETCH = "python -m nanochat.dataset --prefetch=tasks"

Split = tuple[str, str]  # subset, split


def rows_path(dataset: str, subset: str, split: str) -> Path:
    """Where a split lies; `dataset` may be a hub name with its owner, which is left off."""
    return get_base_dir() / "task_data" / dataset.split("/")[-1] / subset / f"{split}.parquet"


def folder_of(dataset: str) -> Path:
    """Where the splits of a data set and their manifest lie."""
    return get_base_dir() / "task_data" / dataset.split("/")[-1]


def splits_of(dataset: str) -> list[Split]:
    """All (subset, split) of a data set that the tasks read."""
    return [(subset, split) for subset, splits in DATA_SETS[dataset].items() for split in splits]


# -----------------------------------------------------------------------------
# The manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """What is known about the files of a data set; one without splits where there is no manifest."""
    path = folder / MANIFEST
    try:
        manifest = read_sealed(path)
        if not isinstance(manifest["splits"], dict):
            raise ValueError
    except FileNotFoundError:
        return {"splits": {}}
    except (ValueError, KeyError):
        raise UserError(f"{path}: damaged; get the data set again: rm -r {folder}; {PREFETCH}, or {IMPORT}") from None
    return manifest


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


# -----------------------------------------------------------------------------
# Writing


def write_rows(dataset: str, subset: str, split: str, rows: Any, source: str) -> Path:
    """Write a split, whole or not at all: a list of dicts or an Arrow table. `source` says where the rows are from."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(rows) if isinstance(rows, list) else rows
    path = rows_path(dataset, subset, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(table.replace_schema_metadata({"source": source}), temporary, compression="zstd")
        with locked(folder_of(dataset)):
            place_split(dataset, subset, split, temporary, {"source": source})
    finally:
        temporary.unlink(missing_ok=True)
    return path


def place_split(dataset: str, subset: str, split: str, file: Path, about: dict[str, Any], **origin: str) -> None:
    """Enter a finished file into the manifest and move it to its place; the folder is locked by the caller. In this
    order: who sees the file finds its entry.
    """
    import pyarrow.parquet as pq

    folder, path = folder_of(dataset), rows_path(dataset, subset, split)
    entry = {"rows": pq.read_metadata(file).num_rows, "file_bytes": file.stat().st_size, "sha256": sha256_file(file)}
    manifest = {**read_manifest(folder), **origin}
    manifest["splits"][f"{subset}/{split}"] = {**entry, **about}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "rb") as written:
        os.fsync(written.fileno())
    write_atomic(folder / MANIFEST, seal(json.dumps(manifest, indent=1)))
    os.replace(file, path)
    flush(path.parent)


# -----------------------------------------------------------------------------
# From the hub


def missing_splits(dataset: str) -> list[Split]:
    return [split for split in splits_of(dataset) if not rows_path(dataset, *split).exists()]


def list_data_set(dataset: str) -> Listing:
    """The hub's files of a data set, at the commit that what is here came from."""
    manifest = read_manifest(folder_of(dataset))
    try:
        return list_repository(dataset, manifest.get("revision"))
    except UserError as error:
        raise UserError(f"{error} (or, with the original files: {IMPORT})") from None


def parts_of(listing: Listing, subset: str, split: str) -> list[RemoteFile]:
    """The published parquet files of a split, in order: <subset>/<split>-00000-of-00004.parquet, where the subset
    default lies in data/.
    """
    folder = "data" if subset == "default" else re.escape(subset)
    pattern = re.compile(rf"{folder}/{re.escape(split)}-(\d+)-of-(\d+)\.parquet")
    found = sorted((int(match[1]), int(match[2]), path) for path in listing.files if (match := pattern.fullmatch(path)))
    if not found or [number for number, _, _ in found] != list(range(found[0][1])):
        names = ", ".join(path for _, _, path in found) or "none"
        raise UserError(
            f"{listing.repository} at {listing.revision} has not all parquet files of {subset}/{split} ({names}); "
            f"with the original files: {IMPORT}"
        )
    return [listing.files[path] for _, _, path in found]


def download_rows(dataset: str, subset: str, split: str) -> None:
    """Fetch one split from the hub, unless another process has done so by the time it is this one's turn."""
    with locked(folder_of(dataset)):
        if not rows_path(dataset, subset, split).exists():
            fetch_splits(list_data_set(dataset), [(subset, split)], WORKERS)


def fetch_splits(listing: Listing, splits: Sequence[Split], workers: int) -> None:
    """Fetch splits of a data set and enter each into the manifest; its folder is locked by the caller."""
    dataset, folder = listing.repository, folder_of(listing.repository)
    parts = {
        (subset, split): [
            (file, folder / f".{subset}-{split}-{number}.parquet")
            for number, file in enumerate(parts_of(listing, subset, split))
        ]
        for subset, split in splits
    }
    wanted = [pair for pairs in parts.values() for pair in pairs]
    print(f"{dataset} at {listing.revision}: {len(wanted):,} files to fetch", flush=True)
    fetch_all(wanted, workers)
    about = {"source": f"hub {dataset}"}
    origin = {"repository": dataset, "revision": listing.revision}
    for (subset, split), pairs in parts.items():
        files = [target for _, target in pairs]
        joined = files[0] if len(files) == 1 else join_parts(files, folder / f".{subset}-{split}.parquet")
        place_split(dataset, subset, split, joined, about, **origin)
        for file in files:
            file.unlink(missing_ok=True)


def join_parts(files: Sequence[Path], joined: Path) -> Path:
    """Write the rows of several parquet files into one, a row group at a time; UserError where they do not fit."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(files[0])
        with pq.ParquetWriter(joined, schema, compression="zstd") as writer:
            for file in files:
                parquet = pq.ParquetFile(file)
                for group in range(parquet.num_row_groups):
                    writer.write_table(parquet.read_row_group(group).cast(schema))
    except (pa.ArrowException, OSError) as error:
        joined.unlink(missing_ok=True)
        raise UserError(
            f"cannot join {', '.join(map(str, files))} ({reason_of(error)}); run the same command"
        ) from None
    return joined
