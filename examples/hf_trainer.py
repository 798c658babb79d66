"""Hugging Face `Trainer` on streams: a sampler that keeps them, and a callback that carries their memory.

Batch i holds segment i of every stream, so the model goes on where it was; the memory is saved with every checkpoint
and read back with it. Needs transformers and accelerate, which `Trainer` asks for.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from returning_text import LETTERS, SEGMENT, text
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from dsmr import MemoryState, replace_attention, stream

ROWS, COUNT = 8, 24


class Segments(Dataset):
    """Segment i of row r is item r * COUNT + i."""

    def __init__(self) -> None:
        self.parts = text(ROWS, COUNT * SEGMENT).view(ROWS * COUNT, SEGMENT)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.parts[index], "labels": self.parts[index]}


class StreamSampler(Sampler[int]):
    """Segment 0 of all rows, segment 1 of all rows, ...: a row of every batch goes on where it was."""

    def __len__(self) -> int:
        return ROWS * COUNT

    def __iter__(self) -> Iterator[int]:
        return (row * COUNT + segment for segment in range(COUNT) for row in range(ROWS))


class StreamTrainer(Trainer):
    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataset, batch_size=ROWS, sampler=StreamSampler())


class CarryMemory(TrainerCallback):
    """Opens the stream, forgets where an epoch begins (all pieces do), and keeps the memory beside the checkpoint."""

    def __init__(self) -> None:
        self.memory: MemoryState | None = None
        self.opened = contextlib.ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "memory.safetensors"
        resumed = saved if state.global_step else None
        self.memory = self.opened.enter_context(stream(model, ROWS, state=resumed))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.memory is not None
        if state.global_step % COUNT == 0:  # else training goes on in the middle of one
            self.memory.reset()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.memory is not None
        self.memory.save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / "memory.safetensors")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.opened.close()


def trainer(folder: str, steps: int) -> tuple[StreamTrainer, CarryMemory]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=LETTERS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    replace_attention(model, "two_scale(layers=2, long=128, short=32, n_long=1)")
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=ROWS,
        learning_rate=1e-3,
        warmup_steps=10,
        lr_scheduler_type="constant_with_warmup",
        max_grad_norm=1.0,
        save_steps=10,
        logging_steps=10,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    carry = CarryMemory()
    return StreamTrainer(model=model, args=arguments, train_dataset=Segments(), callbacks=[carry]), carry


def main(steps: int = 30) -> tuple[list[Tensor], list[Tensor], MemoryState]:
    """Weights after training in one go, and after training that stopped at step 10 and went on from its checkpoint."""
    weights = []
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        for folder, stops in ((one, [steps]), (other, [10, steps])):
            for stop in stops:
                training, carry = trainer(folder, stop)
                begun = sorted(Path(folder).glob("checkpoint-*"))
                training.train(resume_from_checkpoint=str(begun[-1]) if begun else None)
            weights.append([parameter.detach().clone() for parameter in training.model.parameters()])
    assert carry.memory is not None
    print(f"the last memory has seen {carry.memory.phase} tokens of each of {carry.memory.batch} streams")
    return weights[0], weights[1], carry.memory


if __name__ == "__main__":
    main()
