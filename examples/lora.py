"""LoRA by PEFT on a model with a memory: learnt segment by segment, heard when it plays, merged in the end. Needs peft.

The model knows sixteen letters alike; what it is adapted to has four of them.
"""

import itertools

import torch
from peft import LoraConfig, get_peft_model
from returning_text import LETTERS, SEGMENT, segments, text

from dsmr import DSMRConfig, DSMRModel
from dsmr.generation.drawing import Sampling

ROWS, FEW = 8, 4
PARTS = ["qkv", "out", "up", "down"]  # a model's projections, by name


def main(steps: int = 60) -> tuple[list[float], list[list[int]]]:
    """The loss of each segment, and what is played by the model alone, with its adapters, and with them merged."""
    torch.manual_seed(0)
    schedule = "two_scale(layers=2, long=256, short=32, n_long=1)"
    model = DSMRModel(DSMRConfig(LETTERS, schedule, d_model=32, n_heads=2, segment_length=SEGMENT, init_std=0.2))
    played = [play(model)]

    adapted = get_peft_model(model, LoraConfig(target_modules=PARTS, r=8))
    learnt = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimiser, losses = torch.optim.AdamW(learnt, lr=3e-2), []
    memory = model.new_state(ROWS, aligned=True)
    for letters, targets, begins in segments(ROWS, steps):
        memory.reset(begins)
        loss = adapted(letters % FEW, memory, targets=targets % FEW).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    played.append(play(model))  # the adapters are in its layers

    merged = adapted.merge_and_unload()
    played.append(play(merged))
    print(f"from {losses[0]:.2f} to {losses[-1]:.2f} nats a letter; merged it plays the same: {played[1] == played[2]}")
    return losses, played


def play(model: DSMRModel) -> list[int]:
    """Forty letters behind a passage."""
    prompt = text(1, 2 * SEGMENT, seed=1)[0] % FEW
    return list(itertools.islice(model.generate(prompt, sampling=Sampling(seed=1)), 40))


if __name__ == "__main__":
    main()
