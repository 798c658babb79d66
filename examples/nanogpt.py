"""A character model in the style of nanoGPT, trained segment by segment. `nanogpt_recurrent.py` is the same with a
memory; what differs between the two files is what the change takes.
"""

import torch
import torch.nn.functional as F
from returning_text import LETTERS, SEGMENT, segments
from torch import Tensor, nn


class CausalSelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.c_attn(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.wte = nn.Embedding(LETTERS, width)
        self.wpe = nn.Embedding(SEGMENT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, LETTERS)

    def forward(self, letters: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(letters) + self.wpe.weight[: letters.shape[1]]
        return F.cross_entropy(self.head(self.ln_f(self.blocks(x))).flatten(0, 1), targets.flatten())


def train(model: GPT, rows: int, steps: int) -> list[float]:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / 50))
    losses = []
    for letters, targets, _ in segments(rows, steps):
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
    losses = train(model, rows, steps)
    last = sum(losses[-48:]) / 48
    print(f"nats a letter, mean of the last 48 segments of {steps}: {last:.2f}")
    return last


if __name__ == "__main__":
    main()
