"""Pretraining text: fetched or gathered once into `$NANOCHAT_BASE_DIR/data/<corpus>/`, read back in Arrow arrays.

    python -m nanochat.dataset --source=docs                 # English documentation that is already on this machine
    python -m nanochat.dataset --source=folder --path=DIR    # your own parquet, jsonl and txt files
    python -m nanochat.dataset -n 8                          # web text: the first 8 shards of ClimbMix
    python -m nanochat.dataset --prefetch=all -n 240         # and all that later stages would fetch, see task_data.py
    python -m nanochat.dataset --prefetch=list -n 240        # what of that is here; exit code 2 where something is not

A corpus is `shard_00000.parquet ...` with a `text` column, and `manifest.json`, written last: where the text comes
from, which files train and which validate, and the documents, bytes and sha256 of each. A corpus without a manifest
does not exist.

Promises: the same input gives the same bytes; validation documents are named in the manifest and never trained on;
documents left out are counted and printed; an interrupted download continues where it stopped. Reading holds one row
group in memory. Does not: remove duplicates (docs has none), filter for quality, or shuffle what comes from a hub (it
is published shuffled).
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanochat.common import UserError, get_base_dir, print0, run_main
from nanochat.configurator import configure
from nanochat.files import read_sealed, seal, write_atomic
from nanochat.record import open_record

SHORT = {"n": "num_files", "w": "workers"}

# Corpus
source: Literal["docs", "folder", "climbmix", "fineweb-edu"] = "climbmix"  # where the text comes from
path: str | None = None  # folder: the directory with parquet, jsonl and txt files; prefetch: a copy of the eval bundle
name: str | None = None  # folder: what to call the corpus (None = the directory's name)
val_fraction: float | None = None  # folder: share of documents to validate on (None = files named val*, else 0.01)
# Download
num_files: int | None = None  # climbmix, fineweb-edu: training files to have, about 100 MB each; -1 = all (None = 8)
workers = 4  # files fetched at the same time
# Everything, so that no later stage needs a network
prefetch: Literal["all", "tasks", "eval", "list"] | None = None  # fetch all or a part, or list what is here and missing
settings = configure(__name__)

import pyarrow as pa

from nanochat.docs_corpus import PACKAGES, VALIDATION, collect_docs, find_packages, package_versions
from nanochat.download import fetch_files, list_repository
from nanochat.eval_bundle import bundle_path, fetch_bundle
from nanochat.files import locked
from nanochat.folder_corpus import (
    hash_of,
    highest_validation_hash,
    is_validation_name,
    list_folder,
    read_documents,
)
from nanochat.shards import DocumentIndex, ShardWriter, command_for, describe_shard, iter_text, read_blocks
from nanochat.task_data import (
    DATA_SETS,
    fetch_splits,
    folder_of,
    list_data_set,
    missing_splits,
    rows_path,
    splits_of,
)

__all__ = ["Corpus", "DocumentIndex", "iter_text", "load_corpus", "read_blocks"]

# Hub corpora: repository and number of its last file, which is the validation file.
HUBS = {
    "climbmix": ("karpathy/climbmix-400b-shuffle", 6542),
    "fineweb-edu": ("karpathy/fineweb-edu-100b-shuffle", 1822),
}
MANIFEST = "manifest.json"

# -----------------------------------------------------------------------------
# A corpus on disk


@dataclass(frozen=True)
class Corpus:
    """A corpus on disk whose manifest has been checked against the files. The fingerprint changes when any byte of text
    does.
    """

    name: str
    path: Path
    train_files: tuple[Path, ...]
    val_files: tuple[Path, ...]
    manifest: dict[str, Any]
    fingerprint: str
    hashes: dict[Path, str]  # sha256 of every file; readers check it when they open one


def load_corpus(name: str | None = None) -> Corpus:
    """Find a corpus by name; None takes the only one there is.

    Every file of the manifest exists and has its recorded size. Raises UserError where none or several are found, the
    name is unknown, or a file is missing or has another size. Hashes are not computed here, which would read
    everything: the readers check each file's as they open it.
    """
    folder = get_base_dir() / "data"
    found = sorted(manifest.parent.name for manifest in folder.glob(f"[!.]*/{MANIFEST}"))
    if not found:
        raise UserError(f"no corpus in {folder}; get one with: python -m nanochat.dataset --source=docs")
    if name is None and len(found) > 1:
        raise UserError(f"several corpora in {folder} ({', '.join(found)}); choose one: --corpus={found[0]}")
    name = name or found[0]
    if name not in found:
        raise UserError(
            f"corpus={name}: not in {folder}, which has {', '.join(found)}; get it with: {command_for(name)}"
        )
    manifest = read_manifest(folder / name)
    for entry in manifest["train"] + manifest["validation"]:
        file = folder / name / entry["file"]
        size = file.stat().st_size if file.is_file() else None
        if size != entry["file_bytes"]:
            state = "missing" if size is None else f"{size:,} bytes, not the {entry['file_bytes']:,} of its manifest"
            raise UserError(f"{file}: {state}; mend it with: {command_for(name)}")
    return Corpus(
        name=name,
        path=folder / name,
        train_files=tuple(folder / name / entry["file"] for entry in manifest["train"]),
        val_files=tuple(folder / name / entry["file"] for entry in manifest["validation"]),
        manifest=manifest,
        fingerprint=fingerprint_of(manifest),
        hashes={folder / name / entry["file"]: entry["sha256"] for entry in manifest["train"] + manifest["validation"]},
    )


def read_manifest(corpus: Path) -> dict[str, Any]:
    """The manifest of a corpus directory; UserError where it is not whole."""
    try:
        manifest = read_sealed(corpus / MANIFEST)
        if not manifest["train"] or not manifest["validation"]:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        again = f"rm {corpus / MANIFEST}; {command_for(corpus.name)}"
        raise UserError(f"{corpus / MANIFEST}: damaged; make the corpus again: {again}") from None
    return manifest


def fingerprint_of(manifest: dict[str, Any]) -> str:
    """sha256 over the role and sha256 of every shard, in order."""
    lines = [f"{role} {entry['sha256']}\n" for role in ("train", "validation") for entry in manifest[role]]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_corpus(corpus: Path, documents: Iterable[tuple[bool, str]], about: dict[str, Any]) -> dict[str, Any]:
    """Write (is for validation, text) pairs as a corpus and return its manifest; `about` is read when they are used up.

    The corpus is built beside its place and renamed into it: the one that was there stays until then, also after an
    error.
    """
    building = corpus.with_name(f".{corpus.name}.{os.getpid()}.building")
    replaced = corpus.with_name(f".{corpus.name}.{os.getpid()}.replaced")
    building.mkdir(parents=True)
    try:
        numbers = itertools.count()
        train, validation = ShardWriter(building, numbers), ShardWriter(building, numbers)
        for for_validation, text in documents:
            (validation if for_validation else train).add(text)
        train.flush()
        validation.flush()
        for role, writer in (("training", train), ("validation", validation)):
            if not writer.entries:
                raise UserError(
                    f"{corpus.name}: no document is left for {role}; give it more text, or name a file val.txt"
                )
        manifest = save_manifest(building, {"name": corpus.name, **about}, train.entries, validation.entries)
        if corpus.exists():
            corpus.rename(replaced)
        building.rename(corpus)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        if replaced.exists() and not corpus.exists():
            replaced.rename(corpus)
    return manifest


def save_manifest(
    folder: Path, about: dict[str, Any], train: list[dict[str, Any]], validation: list[dict[str, Any]]
) -> dict[str, Any]:
    """Complete a manifest with files and totals, and write it: from here on the corpus exists."""
    totals = {
        role: {
            "files": len(entries),
            "documents": sum(entry["documents"] for entry in entries),
            "text_bytes": sum(entry["text_bytes"] for entry in entries),
        }
        for role, entries in (("train", train), ("validation", validation))
    }
    versions = {"pyarrow": pa.__version__, **about.pop("versions", {})}
    manifest = {**about, "versions": versions, "totals": totals, "train": train, "validation": validation}
    write_atomic(folder / MANIFEST, seal(json.dumps(manifest, indent=1)))
    return manifest


# -----------------------------------------------------------------------------
# Source: documentation on this machine


def build_docs(corpus: Path) -> dict[str, Any]:
    """Make the docs corpus, or return its manifest when it was made from the same versions and is whole."""
    places = find_packages()
    versions = package_versions(places)
    if (corpus / MANIFEST).exists():
        manifest = read_manifest(corpus)
        whole = len(entries_on_disk(corpus, manifest)) == len(manifest["train"]) + len(manifest["validation"])
        if whole and manifest["versions"] == {"pyarrow": pa.__version__, **versions}:
            print0(f"{corpus}: already made from these versions")
            return manifest
    absent = [package for package in PACKAGES if package not in places]
    print0(f"reading the docs of Python and {len(places) - 1} packages; not installed: {', '.join(absent) or 'none'}")
    sizes: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    about = {"source": "docs", "arguments": {}, "versions": versions, "absent": absent}
    about |= {"validation_packages": VALIDATION, "text_bytes_by_package": sizes, "left_out": left_out}
    manifest = write_corpus(corpus, collect_docs(places, VALIDATION, sizes, left_out), about)
    print0("MB by package: " + ", ".join(f"{package} {size / 1e6:.2f}" for package, size in sizes.most_common()))
    return manifest


# -----------------------------------------------------------------------------
# Source: a folder of parquet, jsonl and txt files


def build_folder(folder: Path, corpus: Path, fraction: float | None) -> dict[str, Any]:
    """Make a corpus of all documents under `folder`: rows of parquet files, lines of jsonl files, whole txt files.

    Validation is what lies in files or directories called val or validation (val_00000.parquet, val/a.txt); where there
    are none, the `fraction` (None = 0.01, at least one) of the documents with the smallest sha256. Null and empty
    documents are counted.
    """
    check_same_origin(corpus, folder)
    files, others = list_folder(folder)
    named = {file for file in files if any(map(is_validation_name, file.relative_to(folder).parts))}
    if named and fraction is not None:
        raise UserError(
            f"val_fraction={fraction}: {folder} names its validation files ({len(named)} of them); leave it out"
        )
    fraction = 0.01 if fraction is None else fraction
    by = f"{len(named)} files named val*" if named else f"the {fraction:g} of the documents with the smallest sha256"
    print0(f"{folder}: {len(files):,} files to read, {others:,} of other kinds left out; validation: {by}")
    highest = 0 if named else highest_validation_hash(files, fraction)
    counts: Counter[str] = Counter()

    def documents() -> Iterator[tuple[bool, str]]:
        for file in files:
            for text in read_documents(file):
                if text.strip():
                    yield (file in named if named else hash_of(text) <= highest), text
                else:
                    counts["empty"] += 1

    about: dict[str, Any] = {"source": "folder", "arguments": {"path": str(folder), "val_fraction": fraction}}
    about |= {"validation_by": by, "other_files": others, "left_out": counts}
    return write_corpus(corpus, documents(), about)


def check_same_origin(corpus: Path, folder: Path) -> None:
    """Refuse to replace a corpus that came from somewhere else."""
    other = f"choose another name: --name={corpus.name}-2"
    if corpus.name == "docs" or corpus.name in HUBS:
        raise UserError(f"name={corpus.name}: the name of another source; {other}")
    if (corpus / MANIFEST).exists():
        origin = read_manifest(corpus)["arguments"].get("path")
        if origin != str(folder):
            raise UserError(f"name={corpus.name}: {corpus} was made from {origin}; {other}")


# -----------------------------------------------------------------------------
# Source: a corpus on the Hugging Face hub, by shard


def fetch_hub(corpus: Path, files: int, workers: int) -> dict[str, Any]:
    """Have the first `files` training shards (-1 = all) and the validation shard of a hub corpus; return the manifest.

    What the manifest already has is not fetched again, nor dropped when fewer are asked for, and more comes from the
    same revision. Every shard is decoded and hashed before it is believed. The old manifest stays in force until all
    new shards are there.
    """
    repository, last = HUBS[corpus.name]
    if files != -1 and not 1 <= files <= last:
        raise UserError(f"num_files={files}: {corpus.name} has 1 to {last:,} training files, or all of them: -n -1")
    count = last if files == -1 else files
    with locked(corpus):
        manifest = read_manifest(corpus) if (corpus / MANIFEST).exists() else None
        if manifest and len(manifest["train"]) > count:
            count = len(manifest["train"])
            print0(f"{corpus} already has {count:,} training files: keeping them, although num_files={files}")
        wanted = [f"shard_{number:05d}.parquet" for number in (*range(count), last)]
        entries = {entry["file"]: entry for entry in entries_on_disk(corpus, manifest)}
        missing = [file for file in wanted if file not in entries]
        if manifest and not missing:
            print0(f"{corpus}: nothing to fetch")
            return manifest
        revision = manifest["revision"] if manifest else None
        revision, fetched = fetch_shards(repository, revision, corpus, missing, workers)
        about = {"name": corpus.name, "source": corpus.name, "arguments": {"num_files": count}}
        about |= {"repository": repository, "revision": revision}
        entries |= fetched
        return save_manifest(corpus, about, [entries[file] for file in wanted[:-1]], [entries[wanted[-1]]])


def entries_on_disk(corpus: Path, manifest: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The manifest's entries whose files are there in their recorded size."""
    entries = manifest["train"] + manifest["validation"] if manifest else []
    files = [corpus / entry["file"] for entry in entries]
    sizes = [file.stat().st_size if file.is_file() else None for file in files]
    return [entry for entry, size in zip(entries, sizes, strict=True) if size == entry["file_bytes"]]


def fetch_shards(
    repository: str, revision: str | None, corpus: Path, shards: Sequence[str], workers: int
) -> tuple[str, dict[str, dict[str, Any]]]:
    """Fetch shards of one commit (None = the newest) and decode all of each; the commit, and their manifest entries."""
    listing = list_repository(repository, revision)
    absent = [shard for shard in shards if shard not in listing.files]
    if absent:
        raise UserError(f"{repository} at {listing.revision} has no {', '.join(absent[:3])} ({len(absent):,} missing)")
    size = sum(listing.files[shard].size or 0 for shard in shards)
    print0(f"{repository} at {listing.revision}: {len(shards):,} files to fetch, {size / 1e6:,.0f} MB")
    entries = {}
    with closing(fetch_files([(listing.files[shard], corpus / shard) for shard in shards], workers)) as fetched:
        for path in fetched:
            entries[path.name] = describe_shard(path)
    return listing.revision, entries


# -----------------------------------------------------------------------------
# Everything that later stages need


def fetch_tasks(workers: int) -> None:
    """Have every published split that a task reads, from one commit per data set."""
    for data_set in DATA_SETS:
        with locked(folder_of(data_set)):
            missing = missing_splits(data_set)
            if missing:
                fetch_splits(list_data_set(data_set), missing, workers)
        print0(f"{folder_of(data_set)}: complete")


def list_needs(data: Path) -> None:
    """Print what is here and what is missing of everything; UserError where something is missing. Asks nobody."""
    places = {data / source / MANIFEST: has_corpus(data / source, 8 if num_files is None else num_files)}
    for data_set in DATA_SETS:
        missing = missing_splits(data_set)
        places |= {rows_path(data_set, *split): split not in missing for split in splits_of(data_set)}
    places[bundle_path() / MANIFEST] = (bundle_path() / MANIFEST).exists()
    for place, here in places.items():
        files = place.parent.rglob("*.*") if place.name == MANIFEST else [place]
        size = sum(file.stat().st_size for file in files) if here else 0
        print0(f"{f'{size / 1e6:>12,.1f} MB' if here else '        missing'}  {place}")
    if not all(places.values()):
        command = f"python -m nanochat.dataset --prefetch=all --source={source}"
        command += "" if num_files is None else f" -n {num_files}"
        raise UserError(f"{list(places.values()).count(False)} of {len(places)} are missing; get them with: {command}")


def has_corpus(corpus: Path, files: int) -> bool:
    """Whether a corpus is there in full, one from the hub with at least that many training files (-1 = all)."""
    if not (corpus / MANIFEST).exists():
        return False
    manifest = read_manifest(corpus)
    shards = len(manifest["train"])
    enough = corpus.name not in HUBS or shards >= (HUBS[corpus.name][1] if files == -1 else files)
    return enough and len(entries_on_disk(corpus, manifest)) == shards + len(manifest["validation"])


# -----------------------------------------------------------------------------
# The command


def check_settings() -> None:
    """Refuse a setting that the chosen source would ignore, and values outside their range."""
    hubs = tuple(HUBS)
    if prefetch is not None and source == "folder":
        raise UserError(f"prefetch={prefetch}: not together with source=folder; run one after the other")
    if prefetch in ("tasks", "eval") and num_files is not None:
        raise UserError(f"num_files={num_files}: means nothing to prefetch={prefetch}, only to all and list")
    for setting, value, sources in (
        ("path", path, ("folder",)),
        ("name", name, ("folder",)),
        ("val_fraction", val_fraction, ("folder",)),
        ("num_files", num_files, hubs),
    ):
        bundle = setting == "path" and prefetch in ("all", "eval")
        if value is not None and source not in sources and not bundle:
            raise UserError(f"{setting}={value}: means nothing to source={source}, only to {' and '.join(sources)}")
    if source == "folder" and path is None:
        raise UserError("source=folder needs the directory with the text: --path=DIR")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise UserError(f"val_fraction={val_fraction}: expected a number between 0 and 1, such as 0.01")
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"name={name}: expected letters, digits, '.', '_' and '-', such as my-books")
    if workers < 1:
        raise UserError(f"workers={workers}: expected 1 or more")


def make_corpus(data: Path) -> dict[str, Any]:
    """Fetch or build the corpus that the settings ask for; its manifest."""
    if source == "folder":
        assert path is not None  # checked
        folder = Path(path).expanduser().resolve()
        named = name or re.sub(r"[^A-Za-z0-9_-]+", "-", folder.name).strip("-") or "folder"
        return build_folder(folder, data / named, val_fraction)
    if source == "docs":
        return build_docs(data / source)
    return fetch_hub(data / source, 8 if num_files is None else num_files, workers)


def main() -> None:
    """Get what the settings ask for; one line where the disk or the rights are wanting."""
    check_settings()
    data = get_base_dir() / "data"
    try:
        data.mkdir(exist_ok=True)
        if prefetch == "list":
            list_needs(data)
        if prefetch in (None, "all"):
            report_corpus(data, time.perf_counter(), make_corpus(data))
        if prefetch in ("all", "tasks"):
            fetch_tasks(workers)
        if prefetch in ("all", "eval"):
            print0(f"{fetch_bundle(path)}: complete")
    except OSError as error:
        raise UserError(
            f"cannot write to {data.parent}: {error.strerror or error}; make room, then run the same command"
        ) from None


def report_corpus(data: Path, started: float, manifest: dict[str, Any]) -> None:
    """Print what a corpus holds, keep a record."""
    seconds = round(time.perf_counter() - started, 1)
    for role, total in manifest["totals"].items():
        size = f"{total['text_bytes'] / 1e6:,.2f} MB of text"
        print0(f"{role:<10} {total['files']:>6,} files {total['documents']:>12,} documents  {size}")
    for reason, count in manifest.get("left_out", {}).items():
        print0(f"left out   {count:,} documents: {reason}")
    print0(f"{data / manifest['name']} in {seconds} s, fingerprint {fingerprint_of(manifest)[:12]}")
    record = open_record("dataset", manifest["name"], settings)
    about = {key: value for key, value in manifest.items() if key not in ("train", "validation")}
    record.write("corpus", seconds_in_all=seconds, fingerprint=fingerprint_of(manifest), **about)
    record.close()


if __name__ == "__main__":
    run_main(main)
