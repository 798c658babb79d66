"""What the files of a corpus are called and what is in them: the one place that writers and readers of either form ask.

tokens.bin       uint16, all pieces one after another, each of them BOS ... EOS
labels.bin       uint8, one per token, only where the pieces carry labels
index.npz        offsets, note counts, seconds and split of each piece
sources.json     the name of the file that each piece came from
tokenizer.json   the `Vocabulary`
manifest.json    counts, sizes and digests of all of these; written last, so that it stands for a finished corpus
"""

import numpy as np

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
FILES = (MANIFEST, TOKENS, LABELS, INDEX, SOURCES, TOKENIZER)
ARRAYS = {TOKENS: np.uint16, LABELS: np.uint8}
"""The files that are one long array, and of what."""
