"""Lightning with the memory in the checkpoint: training goes on in the middle of a piece. Needs lightning."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from nanogpt_recurrent import GPT
from returning_text import segments
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from dsmr import MemoryState, stream

ROWS = 8


class Streams(IterableDataset):
    """Segments of all rows, from the one that training is at."""

    def __init__(self, done: int, count: int) -> None:
        self.done, self.count = done, count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        yield from list(segments(ROWS, self.count))[self.done :]


class StreamModule(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = GPT(width=32, heads=2)
        self.memory: MemoryState | None = None
        self.opened = contextlib.ExitStack()
        self.saved: dict[str, Any] | None = None

    def on_train_start(self) -> None:
        self.memory = self.opened.enter_context(stream(self.model, ROWS))
        if self.saved is not None:
            self.memory.load_state_dict(self.saved)

    def on_train_end(self) -> None:
        self.opened.close()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.memory is not None:
            checkpoint["memory"] = self.memory.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saved = checkpoint.get("memory")

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        letters, targets, begins = batch
        assert self.memory is not None
        self.memory.reset(begins)
        return self.model(letters, targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(folder: str, done: int, steps: int) -> StreamModule:
    lightning.seed_everything(0, verbose=False)
    module, last = StreamModule(), Path(folder) / "last.ckpt"
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(Streams(done, 30), batch_size=None), ckpt_path=str(last) if done else None)
    trainer.save_checkpoint(last)
    return module


def main() -> tuple[StreamModule, StreamModule]:
    """Trained in one go, and in two, the second in the middle of a passage."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        whole = fit(one, 0, 30)
        fit(other, 0, 10)
        parts = fit(other, 10, 30)
    same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    print(f"the same weights after going on from a checkpoint in the middle of a passage: {same}")
    return whole, parts


if __name__ == "__main__":
    main()
