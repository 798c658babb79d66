"""A loop of accelerate: gradients of two segments at a time, and the memory among what it saves. Needs accelerate."""

import tempfile

import torch
from accelerate import Accelerator
from nanogpt_recurrent import GPT
from returning_text import segments

from dsmr import stream

ROWS = 8


def main(steps: int = 16) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Losses from the half of the way on, and again after going back there with `load_state`."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
    model = GPT(width=32, heads=2)
    model, optimiser = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    read = [tuple(x.to(accelerator.device) for x in part) for part in segments(ROWS, steps)]

    def go_on(begin: int, end: int) -> list[torch.Tensor]:
        losses = []
        for letters, targets, begins in read[begin:end]:
            memory.reset(begins)
            with accelerator.accumulate(model):
                loss = model(letters, targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                optimiser.zero_grad()
            losses.append(loss.detach())
        return losses

    with tempfile.TemporaryDirectory() as folder, stream(model, ROWS) as memory:
        accelerator.register_for_checkpointing(memory)
        go_on(0, steps // 2)
        accelerator.save_state(folder)
        first = go_on(steps // 2, steps)
        accelerator.load_state(folder)
        again = go_on(steps // 2, steps)
    print(f"the same losses after load_state: {all(map(torch.equal, first, again))}")
    return first, again


if __name__ == "__main__":
    main()
