"""Rows of a table of experiments, made up."""

from typing import Any


def made_up(model: str, seed: int, nats: float, **more: Any) -> dict[str, Any]:
    """A row of a cell that nobody has run."""
    interval = {"mean": 0.01 * nats, "low": 0.0, "high": 0.2}
    return {
        "format": 1,
        "table": "made-up",
        "model": model,
        "title": model,
        "preset": model,
        "our_reading": "",
        "seed": seed,
        "schedule": "none(layers=2)",
        "settings": {},
        "kv_bytes": 1024 * len(model),
        "parameters": 1_500_000,
        "steps": 10,
        "trained_tokens": 1000,
        "corpus": "made up",
        "split": "validation",
        "pieces": 2,
        "tokens": 100,
        "tokenizer_hash": "0" * 64,
        "nats_per_note": nats,
        "perplexity": 2 * nats,
        "krcu": {
            "reset": 8,
            "auc": interval,
            "reset_bin": interval,
            "tail": interval,
            "bins": [
                {"start": 8 + 4 * b, "end": 12 + 4 * b, "pieces": 2, "tokens": 8, "delta": interval} for b in range(3)
            ],
        },
        "retain": [{"k": 1024, "delta": interval, "beyond": interval, "tokens_beyond": 5}],
        "returns": {"by_distance": [{"start": 10, "end": 20, "returns": 3, "saved": 0.5 * nats}]},
        "by_label": [{"label": "elsewhere", "tokens": 90, "nats_per_token": nats / 4}],
        "learning": [[500, nats + 1], [1000, nats]],
        "measured": {"tokens_per_second": 100.0, "peak_bytes": 2**20, "device": "a CPU", "dtype": "float32"},
        **more,
    }
