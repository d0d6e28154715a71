"""Write a corpus as token ids: train.bin and val.bin, which nanoGPT reads, and dev.import_bin.

    python -m dev.make_bin --path=FOLDER

Every document begins with BOS. Ids are uint16 where the vocabulary has at most 65,536 tokens, else uint32; the
tokenizer lies beside them.
"""

from nanochat.configurator import configure

SHORT = {"": "path"}

path: str | None = None  # the folder to write
corpus: str | None = None  # directory name in $NANOCHAT_BASE_DIR/data (None = the only one there)
settings = configure(__name__)

from pathlib import Path

import numpy as np

from nanochat.common import UserError, print0, run_main
from nanochat.corpus import iter_text, load_corpus
from nanochat.files import whole
from nanochat.token_files import FILES
from nanochat.tokenizer import get_tokenizer


def main() -> None:
    if path is None:
        raise UserError("where to write is needed: python -m dev.make_bin FOLDER")
    text, folder = load_corpus(corpus), Path(path).expanduser().resolve()
    tokenizer = get_tokenizer(text.path)
    folder.mkdir(parents=True, exist_ok=True)
    for shards, name in zip((text.train, text.val), FILES.values(), strict=True):
        count = 0
        with whole(folder / name) as building, open(building, "wb") as file:
            for texts in iter_text(shards):
                ids, offsets = tokenizer.encode_arrow(texts)
                rows = np.insert(ids, offsets[:-1], tokenizer.get_bos_token_id())
                rows.tofile(file)
                count += len(rows)
        print0(f"{folder / name}: {count:,} ids, {rows.dtype}")
    tokenizer.save(folder)


if __name__ == "__main__":
    run_main(main)
