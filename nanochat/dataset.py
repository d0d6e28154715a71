"""The command that gets pretraining text, once, into `$NANOCHAT_BASE_DIR/data/<corpus>/`. Reading it is corpus.py.

    python -m nanochat.dataset --source=docs                 # English documentation that is already on this machine
    python -m nanochat.dataset --source=folder --path=DIR    # your own parquet, jsonl and txt files, also packed
    python -m nanochat.dataset -n 8                          # web text: the first 8 shards of ClimbMix
    python -m nanochat.dataset --source=hf --path=roneneldan/TinyStories -n 2   # any text on the Hugging Face hub
    python -m nanochat.dataset --prefetch=all -n 240         # and all that later stages would fetch, see task_data.py
    python -m nanochat.dataset --prefetch=list -n 240        # what of that is here; exit code 2 where something is not

Promises: the same input gives the same bytes; validation documents are named in the manifest and never trained on;
documents left out are counted and printed; an interrupted download keeps the files that are whole. Does not: remove
duplicates (docs has none), filter for quality, or shuffle what comes from a hub (it is published shuffled).
"""

import importlib
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Literal

from nanochat.common import UserError, get_base_dir, print0, run_main
from nanochat.configurator import Fraction, Interval, Positive, configure
from nanochat.files import locked, one_line
from nanochat.record import open_record

SHORT = {"n": "num_files", "w": "workers"}

# Corpus
source: Literal["docs", "folder", "hf", "climbmix", "fineweb-edu"] = "climbmix"  # where the text comes from
path: str | None = None  # folder: the directory with the files; hf: OWNER/NAME; prefetch: a copy of the eval bundle
name: str | None = None  # folder, hf: what to call the corpus (None = the last part of the path)
val_fraction: Fraction | None = None  # folder, hf: share to validate on (None = files or split named val*, else 0.01)
subset: str | None = None  # hf: configuration of the data set (None = its only or default one)
column: str | None = None  # hf: column that holds the text (None = text)
# Download
num_files: Interval | None = None  # climbmix, fineweb-edu, hf: training files to have, 100 MB each; -1 = all (None = 8)
workers: Positive = 4  # files fetched at the same time
# Everything, so that no later stage needs a network
prefetch: Literal["all", "tasks", "eval", "list"] | None = None  # fetch all or a part, or list what is here and missing
settings = configure(__name__)

from nanochat import corpus_writer, task_data
from nanochat.corpus import MANIFEST, fingerprint_of, load_corpus, read_manifest
from nanochat.download import Listing, fetch_files, list_repository, persist
from nanochat.names import list_parquet_files, parquets_iter_batched  # noqa: F401  # for scripts written for nanochat

# Hub corpora: repository and number of its last file, which is the validation file.
HUBS = {
    "climbmix": ("karpathy/climbmix-400b-shuffle", 6542),
    "fineweb-edu": ("karpathy/fineweb-edu-100b-shuffle", 1822),
}

# -----------------------------------------------------------------------------
# Source: a corpus on the Hugging Face hub, by shard


def fetch_hub(corpus: Path, files: int, workers: int) -> dict[str, Any]:
    """Have the first `files` training shards (-1 = all) and the validation shard of a hub corpus; return the manifest.
    What the manifest already has is not fetched again, nor dropped when fewer are asked for, and more comes from the
    same revision. The old manifest stays in force until all new shards are there.
    """
    repository, last = HUBS[corpus.name]
    if files > last:
        raise UserError(f"num_files={files}: {corpus.name} has 1 to {last:,} training files, or all of them: -n -1")
    count = last if files == -1 else files
    with locked(corpus):
        manifest = read_manifest(corpus) if (corpus / MANIFEST).exists() else {"train": [], "validation": []}
        if len(manifest["train"]) > count:
            count = len(manifest["train"])
            print0(f"{corpus} already has {count:,} training files: keeping them, although num_files={files}")
        wanted = [f"shard_{number:05d}.parquet" for number in (*range(count), last)]
        entries = {entry["file"]: entry for entry in manifest["train"] + manifest["validation"]}
        here = {file.name: file.stat().st_size for file in corpus.glob("*.parquet")}
        missing = [file for file in wanted if file not in entries or here.get(file) != entries[file]["file_bytes"]]
        if not missing:
            print0(f"{corpus}: nothing to fetch")
            return manifest
        listing = list_repository(repository, manifest.get("revision"))
        entries |= fetch_shards(listing, corpus, missing, workers)
        about = {"name": corpus.name, "source": corpus.name, "arguments": {"num_files": count}}
        about |= {"repository": repository, "revision": listing.revision}
        shards = [entries[file] for file in wanted]
        return corpus_writer.save_manifest(corpus, about, {"train": shards[:-1], "validation": shards[-1:]})


def fetch_shards(listing: Listing, corpus: Path, shards: Sequence[str], workers: int) -> dict[str, dict[str, Any]]:
    """Fetch shards and decode all of each; their manifest entries by name."""
    repository = f"{listing.repository} at {listing.revision}"
    absent = [shard for shard in shards if shard not in listing.files]
    if absent:
        raise UserError(f"{repository} has no {', '.join(absent[:3])} ({len(absent):,} missing)")
    size = sum(listing.files[shard].size or 0 for shard in shards)
    print0(f"{repository}: {len(shards):,} files to fetch, {size / 1e6:,.0f} MB")
    with closing(fetch_files(listing, shards, corpus, workers)) as fetched:
        return {path.name: corpus_writer.describe_shard(path) for path in fetched}


# -----------------------------------------------------------------------------
# Source: any data set on the Hugging Face hub, streamed


def build_hf(corpus: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Make a corpus of `num_files` shards (-1 = all) from a column of a data set's split train; return the manifest.
    Validation is up to one shard of the split called val or validation; where there is none, the documents whose sha256
    is in the lowest `val_fraction` (None = 0.01) of all. What was made with the same arguments is not fetched again.
    """
    import datasets

    repository, fraction, files = arguments["path"], arguments["val_fraction"], arguments["num_files"]
    corpus_writer.check_same_origin(corpus, repository)
    if has_corpus(corpus, files) and (manifest := read_manifest(corpus))["arguments"] == arguments:
        print0(f"{corpus}: nothing to fetch")
        return manifest
    revision = list_repository(repository).revision
    load = partial(datasets.load_dataset, repository, arguments["subset"], revision=revision, streaming=True)
    splits = persist(load, repository)
    if "train" not in splits:
        raise UserError(f"path={repository}: no split train, only {', '.join(splits)}; give another data set")
    named = next((split for split in splits if corpus_writer.split_named(split) == "validation"), None)
    if named and fraction is not None:
        raise UserError(f"val_fraction={fraction}: {repository} has a split {named}; leave it out")
    fraction = 0.01 if fraction is None else fraction
    by = f"the split {named}" if named else corpus_writer.BY_HASH.format(fraction)
    print0(f"{repository} at {revision}: validation: {by}")

    def texts(split: str, limit: int) -> Iterator[str]:
        size = 0
        for text in read_column(splits[split], arguments["column"], repository):
            yield text
            size += len(text.encode())
            if limit != -1 and size >= limit * corpus_writer.SHARD_BYTES:
                break

    left_out = Counter[str]()
    highest = -1 if named else int(fraction * 2**64) - 1
    validation = [texts(named, 1)] if named else []
    documents = corpus_writer.split_documents(validation, [texts("train", files)], highest, left_out)
    about: dict[str, Any] = {"source": "hf", "arguments": arguments, "repository": repository, "revision": revision}
    return corpus_writer.write_corpus(corpus, documents, about | {"validation_by": by, "left_out": left_out})


def read_column(rows: Iterable[dict[str, Any]], column: str, repository: str) -> Iterator[str]:
    """Yield a column of text; a null is "". UserError in one line for what is no text or cannot be read."""
    try:
        for row in rows:
            if column not in row:
                raise UserError(f"column={column}: not in {repository}, which has {', '.join(row)}")
            if not isinstance(row[column], str | None):
                raise UserError(f"column={column}: holds {type(row[column]).__name__} in {repository}, expected text")
            yield row[column] or ""
    except UserError:
        raise
    except Exception as error:  # `datasets` lets through the errors of every library under it
        raise UserError(f"cannot read {repository} ({one_line(error)}); run the same command again") from None


# -----------------------------------------------------------------------------
# Source: documentation on this machine


def build_docs(corpus: Path) -> dict[str, Any]:
    """Make the docs corpus with dev/gen_docs.py, which a checkout has and an installed package has not."""
    checkout = Path(__file__).parents[1]
    if not (checkout / "dev" / "gen_docs.py").exists():
        raise UserError("source=docs: made by dev/gen_docs.py, which only a checkout of nanochat has; run it from one")
    sys.path.insert(0, str(checkout))
    return importlib.import_module("dev.gen_docs").build_docs(corpus)


# -----------------------------------------------------------------------------
# Everything that later stages need


def fetch_tasks(workers: int) -> None:
    """Have every published split that a task reads, from one commit per data set."""
    for data_set in task_data.DATA_SETS:
        for split in task_data.splits_of(data_set):
            task_data.download_rows(data_set, *split, workers)
        print0(f"{task_data.folder_of(data_set)}: complete")


def list_needs(data: Path) -> None:
    """Print what is here and what is missing of everything; UserError where something is missing. Asks nobody."""
    places = {data / source / MANIFEST: has_corpus(data / source, 8 if num_files is None else num_files)}
    splits = [(data_set, *split) for data_set in task_data.DATA_SETS for split in task_data.splits_of(data_set)]
    files = [task_data.rows_path(*split) for split in splits]
    places |= {file: file.exists() for file in (*files, task_data.bundle_path() / MANIFEST)}
    for place, here in places.items():
        print0(f"{'here' if here else 'missing':<8}  {place}")
    if not all(places.values()):
        command = f"python -m nanochat.dataset --prefetch=all --source={source}"
        command += "" if num_files is None else f" -n {num_files}"
        raise UserError(f"{list(places.values()).count(False)} of {len(places)} are missing; get them with: {command}")


def has_corpus(corpus: Path, files: int) -> bool:
    """Whether a corpus is there in full, one from the hub with at least that many training files (-1 = all)."""
    try:
        shards = len(load_corpus(corpus.name).train)
    except UserError:
        return False
    return corpus.name not in HUBS or shards >= (HUBS[corpus.name][1] if files == -1 else files)


# -----------------------------------------------------------------------------
# The command


OPTIONAL = ("path", "name", "val_fraction", "subset", "column", "num_files")  # each for some sources alone


def check_settings() -> None:
    """Refuse a setting that the chosen source would ignore."""
    if prefetch is not None and source in ("folder", "hf"):
        raise UserError(f"prefetch={prefetch}: not together with source={source}; run one after the other")
    if prefetch in ("tasks", "eval") and num_files is not None:
        raise UserError(f"num_files={num_files}: means nothing to prefetch={prefetch}, only to all and list")
    uses = {"docs": set(), "folder": {"path", "name", "val_fraction"}, "hf": set(OPTIONAL)}.get(source, {"num_files"})
    uses |= {"path"} if prefetch in ("all", "eval") else set()
    for setting in OPTIONAL:
        if (value := globals()[setting]) is not None and setting not in uses:
            raise UserError(f"{setting}={value}: means nothing to source={source}; leave it out")
    needed = {"folder": "the directory with the text: --path=DIR", "hf": "the name of a data set: --path=OWNER/NAME"}
    if source in needed and path is None:
        raise UserError(f"source={source} needs {needed[source]}")
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"name={name}: expected letters, digits, '.', '_' and '-', such as my-books")


def make_corpus(data: Path) -> dict[str, Any]:
    """Fetch or build the corpus that the settings ask for; its manifest."""
    files = 8 if num_files is None else num_files
    if source == "docs":
        return build_docs(data / source)
    if source in HUBS:
        return fetch_hub(data / source, files, workers)
    assert path is not None  # checked
    folder = Path(path).expanduser().resolve()
    corpus = data / (name or re.sub(r"[^A-Za-z0-9_-]+", "-", folder.name).strip("-") or "folder")
    if source == "folder":
        return corpus_writer.build_folder(folder, corpus, val_fraction)
    arguments = {"path": path, "subset": subset, "column": column or "text"}
    return build_hf(corpus, arguments | {"num_files": files, "val_fraction": val_fraction})


def main() -> None:
    """Get what the settings ask for."""
    check_settings()
    data = get_base_dir() / "data"
    data.mkdir(exist_ok=True)
    if prefetch == "list":
        list_needs(data)
    if prefetch in (None, "all"):
        report_corpus(data, time.perf_counter(), make_corpus(data))
    if prefetch in ("all", "tasks"):
        fetch_tasks(workers)
    if prefetch in ("all", "eval"):
        print0(f"{task_data.fetch_bundle(path)}: complete")


def report_corpus(data: Path, started: float, manifest: dict[str, Any]) -> None:
    """Print what a corpus holds, keep a record."""
    seconds = round(time.perf_counter() - started, 1)
    for role, total in manifest["totals"].items():
        size = f"{total['text_bytes'] / 1e6:,.2f} MB of text"
        print0(f"{role:<10} {total['files']:>6,} files {total['documents']:>12,} documents  {size}")
    for reason, count in manifest.get("left_out", {}).items():
        print0(f"left out   documents, {reason}: {count:,}")
    print0(f"{data / manifest['name']} in {seconds} s, fingerprint {fingerprint_of(manifest)[:12]}")
    record = open_record("dataset", manifest["name"], settings)
    about = {key: value for key, value in manifest.items() if key not in ("train", "validation")}
    record.write("corpus", seconds_in_all=seconds, fingerprint=fingerprint_of(manifest), **about)
    record.close()


if __name__ == "__main__":
    run_main(main)
