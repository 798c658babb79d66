"""What eight bits cost in quality: nats a note of a run token by token, in PyTorch's precisions and as it is exported.

    dsmr demo --out demo
    python -m benchmarks.export_quality demo/runs/two-scale-memory   # the table, also in benchmarks/results/
    python -m benchmarks.export_quality RUN --torch-only             # PyTorch's pairs of dtypes alone: step-quality.md

Every way of stepping reads the same validation pieces from their beginnings and is asked for the probability of each
next token. Times are no part of it: `python -m benchmarks.decode` measures them.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track

from dsmr.console.files import write_text
from dsmr.corpus.store import Corpus
from dsmr.export.write import export_run
from dsmr.exported.model import ExportedModel
from dsmr.generation.stepping import stepper
from dsmr.model.transformer import DSMRModel
from dsmr.runs.settings import TrainConfig

Step = Callable[[int], npt.NDArray[np.float32]]
"""Shows a token -> the next one's logits (V,)."""

MEMORIES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
IN_TORCH = tuple((weights, memory) for memory in MEMORIES for weights in ("float32", "bfloat16", "int8"))
EXPORTS = (
    ("float32", "float32", False),
    ("int8", "float32", False),
    ("float32", "float16", False),
    ("float32", "int8", False),
    ("int8", "int8", False),
    ("int8", "float32", True),
)


@dataclass(frozen=True)
class Way:
    """A way of stepping by name; `begin` makes one for a stream that has heard nothing."""

    name: str
    weights: str
    memory: str
    begin: Callable[[], Step]


def in_torch(model: DSMRModel, weights: str, memory: str) -> Way:
    def begin() -> Step:
        step = stepper(model, model.new_state(1, dtype=MEMORIES[memory]), weights)
        return lambda token: step(torch.tensor([token]))[0].numpy()

    return Way("PyTorch", weights, memory, begin)


def as_export(run: Path, folder: Path, weights: str, memory: str, portable: bool) -> Way:
    export_run(run, folder, weights=weights, memory_dtype=memory, portable=portable)
    model = ExportedModel.load(folder)

    def begin() -> Step:
        reader = model.reader(model.new_state().streams[0])
        return lambda token: reader(np.array([token], np.int64))

    return Way("export, portable" if portable else "export", weights, memory, begin)


def nats(way: Way, pieces: list[npt.NDArray[np.int64]]) -> list[float]:
    """Of every token of the pieces but each first."""
    found: list[float] = []
    for piece in pieces:
        step = way.begin()
        for token, following in zip(piece[:-1].tolist(), piece[1:].tolist(), strict=True):
            logits = step(token).astype(np.float64)
            largest = logits.max()
            found.append(float(largest + np.log(np.exp(logits - largest).sum()) - logits[following]))
    return found


def pieces_of(corpus: Corpus, tokens: int) -> Iterator[npt.NDArray[np.int64]]:
    """The validation pieces, BOS first, until there are so many tokens."""
    for index in corpus.pieces_of("validation").tolist():
        if tokens <= 0:
            return
        piece = np.concatenate([[corpus.vocabulary.bos_id], np.asarray(corpus.piece(index), np.int64)])[:tokens]
        tokens -= len(piece)
        yield piece


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| played by | weights | memory | nats a note | more than float32 | largest change of a token, nats |",
        "|---|---|---|--:|--:|--:|",
    ]
    lines += [
        f"| {row['name']} | {row['weights']} | {row['memory']} | {row['nats']:.4f} | {row['more']:+.4f} "
        f"| {row['worst']:.4f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--data", type=Path, help="a prepared corpus; the run's own by default")
    parser.add_argument("--tokens", type=int, default=20_000, help="of the validation split")
    parser.add_argument("--torch-only", action="store_true", help="leave exports out, and write step-quality.md")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    corpus = Corpus.open(arguments.data or TrainConfig.of_run(arguments.run).data)
    pieces = list(pieces_of(corpus, arguments.tokens))
    notes = sum(corpus.vocabulary.count_notes(piece) for piece in pieces)
    model = DSMRModel.from_pretrained(arguments.run).eval()
    rows: list[dict[str, Any]] = []
    exact: npt.NDArray[np.float64] | None = None
    with tempfile.TemporaryDirectory() as folder:
        ways = [in_torch(model, *kind) for kind in IN_TORCH]
        exports = () if arguments.torch_only else EXPORTS
        ways += [as_export(arguments.run, Path(folder) / str(i), *kind) for i, kind in enumerate(exports)]
        for way in track(ways, "reading", transient=True):
            found = np.array(nats(way, pieces))
            exact = found if exact is None else exact
            more, worst = (found - exact).sum() / notes, np.abs(found - exact).max()
            row = {"name": way.name, "weights": way.weights, "memory": way.memory}
            rows.append({**row, "nats": found.sum() / notes, "more": more, "worst": worst})
    tokens = sum(len(piece) for piece in pieces)
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    text = (
        f"Measured by `python -m benchmarks.export_quality RUN --tokens {arguments.tokens}"
        f"{' --torch-only' if arguments.torch_only else ''}` on a model of "
        f"{parameters:.1f} M parameters, {model.config.schedule}, width {model.config.d_model}: {len(pieces)} "
        f"validation pieces, {tokens:,} tokens, {notes:,} notes.\n\n"
    )
    Console().print(text + table(rows), soft_wrap=True, highlight=False)
    name = "step-quality" if arguments.torch_only else "export-quality"
    write_text(arguments.out / f"{name}.md", text + table(rows) + "\n")


if __name__ == "__main__":
    main()
