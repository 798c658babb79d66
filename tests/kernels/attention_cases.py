"""Arguments of `memory_attention` that the tests of every backend share, on a CPU and on a GPU: one entry a promise."""

import torch


def pieces(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


_HUGE = 1 << 40
CASES = {
    "memory full": {"seen": [40, 40], "horizon": 40},
    "memory wrapped": {"seen": [57, 57], "horizon": 40},
    "memory part full": {"seen": [13, 13], "horizon": 40},
    "memory empty": {"seen": [0, 0], "horizon": 40},
    "no memory": {"horizon": 40},
    "rows differ": {"seen": [57, 7], "horizon": 40},
    "one row empty": {"seen": [0, 95], "horizon": 40},
    "horizon 0": {"seen": [57, 57], "horizon": 0},
    "horizon 1": {"seen": [57, 57], "horizon": 1},
    "horizon below capacity": {"seen": [57, 57], "horizon": 17},
    "horizon above capacity": {"seen": [57, 57], "horizon": 100},
    "segments": {"seen": [57, 30], "horizon": 17, "segment_length": 7},
    "segments, horizon spans several": {"seen": [57, 30], "horizon": 40, "segment_length": 5},
    "segment of one": {"seen": [57, 57], "horizon": 3, "segment_length": 1},
    "begins within a segment": {"seen": [57, 30], "horizon": 17, "segment_length": 9, "segment_offset": 4},
    "begins within an endless segment": {"seen": [57, 30], "horizon": 17, "segment_offset": 4},
    "gradients across segments": {"seen": [57, 30], "horizon": 17, "segment_length": 7, "detach_segments": False},
    "sliding": {"seen": [57, 30], "horizon": 17, "visibility": "sliding"},
    "sliding, segments detached": {"seen": [57, 30], "horizon": 17, "visibility": "sliding", "segment_length": 7},
    "sliding, not detached": {
        "seen": [57, 30],
        "horizon": 17,
        "visibility": "sliding",
        "segment_length": 7,
        "detach_segments": False,
    },
    "sliding, horizon 0": {"seen": [57, 30], "horizon": 0, "visibility": "sliding"},
    "sliding, horizon 1": {"seen": [57, 30], "horizon": 1, "visibility": "sliding"},
    "sliding, all": {"seen": [57, 30], "horizon": 200, "visibility": "sliding"},
    "two pieces in a segment": {
        "seen": [57, 30],
        "horizon": 40,
        "piece_start": pieces([-1] * 12 + [12] * 21, [-5] * 33),
    },
    "pieces and segments": {
        "seen": [57, 30],
        "horizon": 20,
        "segment_length": 8,
        "piece_start": pieces([0] * 3 + [3] * 17 + [20] * 13, [-1] * 31 + [31] * 2),
    },
    "pieces, sliding": {
        "seen": [57, 30],
        "horizon": 9,
        "visibility": "sliding",
        "piece_start": pieces([0] * 3 + [3] * 17 + [20] * 13, [-1] * 31 + [31] * 2),
    },
    "more keys than queries": {"seen": [57, 30], "horizon": 17, "queries": 12, "tokens": 33},
    "more keys than queries, segments": {
        "seen": [57, 30],
        "horizon": 17,
        "queries": 12,
        "tokens": 33,
        "segment_length": 10,
        "segment_offset": 3,
    },
    "more keys than queries, not detached": {
        "horizon": 30,
        "queries": 12,
        "tokens": 33,
        "segment_length": 10,
        "detach_segments": False,
    },
    "one query": {"seen": [57, 30], "horizon": 40, "queries": 1},
    "no batch": {"batch": 0, "seen": [], "horizon": 40},
    "no queries": {"seen": [57, 30], "horizon": 40, "queries": 0},
    "multi-head": {"heads": 3, "kv_heads": 3, "seen": [57, 57], "horizon": 40, "segment_length": 20},
    "multi-query": {"heads": 8, "kv_heads": 1, "seen": [57, 30], "horizon": 40, "segment_length": 20},
    "odd head_dim": {"head_dim": 23, "seen": [57, 30], "horizon": 40, "segment_length": 20},
    "own scale": {"seen": [57, 30], "horizon": 40, "scale": 0.3},
    "negative scale": {"seen": [57, 30], "horizon": 17, "scale": -0.2, "segment_length": 7},
    "scale 0": {"seen": [57, 30], "horizon": 17, "scale": 0.0, "segment_length": 7},
    "alibi": {"seen": [57, 30], "horizon": 40, "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
    "alibi, segments": {
        "seen": [57, 30],
        "horizon": 17,
        "segment_length": 7,
        "segment_offset": 2,
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0]),
    },
}

# What else a call may be told, and what else is asked of its backward.
MORE = {
    "gradient of lse": {"seen": [57, 30], "horizon": 17, "segment_length": 7, "lse_gradient": True},
    "gradient of lse, for keys": {"seen": [57, 30], "horizon": 17, "lse_gradient": True, "learning": "k"},
    "queries learn": {"seen": [57, 30], "horizon": 17, "segment_length": 7, "learning": "q"},
    "keys learn": {"seen": [57, 30], "horizon": 17, "segment_length": 7, "learning": "k"},
    "values learn": {"seen": [57, 30], "horizon": 17, "segment_length": 7, "learning": "v"},
    "keys and values learn": {"seen": [57, 30], "horizon": 17, "segment_length": 7, "learning": "kv"},
    "rows at their own offsets": {
        "seen": [57, 30],
        "horizon": 17,
        "segment_length": 7,
        "segment_offset": torch.tensor([5, 2]),
    },
    "rows at their own offsets, sliding": {
        "seen": [57, 30],
        "horizon": 9,
        "visibility": "sliding",
        "segment_length": 7,
        "segment_offset": torch.tensor([0, 3]),
    },
    "rows at their own offsets in an endless segment": {
        "seen": [57, 30],
        "horizon": 17,
        "segment_offset": torch.tensor([4, _HUGE]),
    },
    "rows at their own offsets in huge segments": {
        "seen": [57, 30],
        "horizon": 17,
        "segment_length": _HUGE,
        "segment_offset": torch.tensor([_HUGE - 5, 3]),
    },
    "values narrower": {"seen": [57, 30], "horizon": 40, "segment_length": 20, "head_dim": 40, "v_head_dim": 17},
    "values wider": {"seen": [57, 30], "horizon": 17, "segment_length": 7, "v_head_dim": 70},
    "memory in int8": {"seen": [57, 30], "horizon": 40, "segment_length": 20, "stored": torch.int8},
    "memory in int8, sliding, ALiBi": {
        "seen": [57, 7],
        "horizon": 30,
        "visibility": "sliding",
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0]),
        "stored": torch.int8,
    },
}
