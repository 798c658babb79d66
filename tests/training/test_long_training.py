"""What the hour of training by hand would say of a run: `long_training.py`."""

import json
from pathlib import Path

import pytest
from long_training import MOST, judged


def told(run: Path, steps: list[int], losses: tuple[float, float] = (3.0, 2.0)) -> None:
    records = [{"kind": "train", "step": step, "loss": losses[step > 150]} for step in steps]
    records.insert(7, {"kind": "validation", "step": 7, "loss": 2.5})
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records))


def test_a_run_that_keeps_its_promises_passes(tmp_path: Path) -> None:
    told(tmp_path, list(range(1, 301)))
    assert judged(tmp_path, [0, MOST]) == 0


@pytest.mark.parametrize(
    ("steps", "losses", "grown"),
    [
        ([*range(1, 200), *range(201, 301)], (3.0, 2.0), 0),
        ([*range(2, 301)], (3.0, 2.0), 0),
        ([*range(1, 201), *range(200, 301)], (3.0, 2.0), 0),
        ([*range(1, 301)], (3.0, float("nan")), 0),
        ([*range(1, 301)], (3.0, 3.0), 0),
        ([*range(1, 301)], (3.0, 2.0), MOST + 1),
    ],
    ids=["a step is missing", "the first is", "one is told twice", "no number", "nothing is learnt", "it grows"],
)
def test_a_broken_promise_is_found(tmp_path: Path, steps: list[int], losses: tuple[float, float], grown: int) -> None:
    told(tmp_path, steps, losses)
    assert judged(tmp_path, [0, grown]) == 1
