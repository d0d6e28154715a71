"""Everything that crosses the border to Rust once, for valgrind (dev/soak.sh). Small: it runs fifty times slower."""

import random

import numpy as np
import pyarrow as pa

import rustbpe

TEXTS = ["".join(random.Random(i).choices("ab cé\n中1'", k=i % 300)) for i in range(200)]

if __name__ == "__main__":
    trainer = rustbpe.Trainer("nanochat", 2)
    trainer.feed(TEXTS)
    trainer.feed(pa.chunked_array([pa.array(TEXTS[:9], pa.large_string()), pa.array(TEXTS[9:], pa.large_string())[3:]]))
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in trainer.train(200).tolist():
        tokens.append(tokens[left] + tokens[right])
    encoder = rustbpe.Encoder(tokens)
    ids, offsets = encoder.encode_batch(pa.array(TEXTS), 2)
    assert encoder.decode_bytes(ids) == "".join(TEXTS).encode() and offsets[-1] == len(ids)
    assert encoder.encode_lists(TEXTS)[17] == ids[offsets[17] : offsets[18]].tolist()
    assert "".join(rustbpe.split(TEXTS[250 % 200])) == TEXTS[50]
    for wrong in (pa.array(["a", None]), ["\ud800"]):
        try:
            encoder.encode_batch(wrong)
        except ValueError:
            continue
        raise AssertionError(wrong)
    assert np.array_equal(encoder.encode("a" * 5000), rustbpe.Encoder(tokens).encode("a" * 5000))
