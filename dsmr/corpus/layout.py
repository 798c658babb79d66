"""What the files of a corpus are called and what is in them: the one place that writers and readers of either form ask.

tokens.bin       uint16, all pieces one after another, each of them BOS ... EOS
labels.bin       uint8, one per token, only where the pieces carry labels
index.npz        offsets, note counts, seconds and split of each piece
sources.json     the name of the file that each piece came from
tokenizer.json   the `Vocabulary`
manifest.json    counts, sizes and digests of all of these; written last, so that it stands for a finished corpus
"""

import numpy as np

from dsmr.console.schema import Each, Natural, Real

FORMAT = 1
WORK = ".prepare"  # the hidden folder of a `prepare` that is not finished
SPLITS = ("train", "validation", "test")
MANIFEST, TOKENS, LABELS, INDEX, SOURCES, TOKENIZER = (
    "manifest.json",
    "tokens.bin",
    "labels.bin",
    "index.npz",
    "sources.json",
    "tokenizer.json",
)
SHAPE = {
    "name": str,
    "digest": str,
    "vocabulary": str,
    "pieces": Natural,
    "tokens": Natural,
    "notes": Natural,
    "seconds": Real,
    "report?": dict,
    "files": Each({"bytes": Natural, "sha256": str}),
}
"""What a manifest holds (see `dsmr.console.schema`)."""
FILES = (MANIFEST, TOKENS, LABELS, INDEX, SOURCES, TOKENIZER)
ARRAYS = {TOKENS: np.uint16, LABELS: np.uint8}
"""The files that are one long array, and of what."""
INDEXES = {"offsets": np.int64, "n_notes": np.int64, "seconds": np.float64, "split": np.uint8}
"""The arrays of the index, and of what."""
