"""`nanogpt.py` with a memory of 64 letters in every layer, and rotary positions, which go on over segments."""

import torch
import torch.nn.functional as F
from returning_text import LETTERS, segments
from torch import Tensor, nn

from dsmr import MemoryState, RecurrentAttention, stream


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = RecurrentAttention(width, heads, horizon=64, bias=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.wte = nn.Embedding(LETTERS, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, LETTERS)

    def forward(self, letters: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(letters)
        return F.cross_entropy(self.head(self.ln_f(self.blocks(x))).flatten(0, 1), targets.flatten())


def train(model: GPT, memory: MemoryState, rows: int, steps: int) -> list[float]:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / 50))
    losses = []
    for letters, targets, begins in segments(rows, steps):
        memory.reset(begins)
        loss = model(letters, targets)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        warm_up.step()
        losses.append(loss.item())
    return losses


def main(rows: int = 16, steps: int = 600) -> float:
    torch.manual_seed(0)
    model = GPT()
    with stream(model, rows) as memory:
        losses = train(model, memory, rows, steps)
    last = sum(losses[-48:]) / 48
    print(f"nats a letter, mean of the last 48 segments of {steps}: {last:.2f}")
    return last


if __name__ == "__main__":
    main()
