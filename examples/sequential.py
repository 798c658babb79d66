"""A plain PyTorch stack: blocks in `nn.Sequential`, each with a memory of its own horizon, on streams of any pieces."""

import torch
from torch import Tensor, nn

from dsmr import RecurrentAttention, stream


class Block(nn.Module):
    def __init__(self, width: int, horizon: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(
            nn.LayerNorm(width), RecurrentAttention(width, n_heads=4, n_kv_heads=2, horizon=horizon, dropout=0.1)
        )
        self.ffn = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.ffn(x)


def main(segments: int = 12) -> tuple[int, int]:
    torch.manual_seed(0)
    model = nn.Sequential(Block(64, horizon=512), Block(64, horizon=64), nn.Linear(64, 64))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with stream(model, batch=2) as memory:
        for number in range(segments):
            if number == 8:  # a new piece begins in the second row
                memory.reset(torch.tensor([False, True]))
            x = torch.randn(2, 128, 64)
            loss = (model(x) - x.roll(1, 1)).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
        seen, held = memory.position.tolist(), [layer.length.tolist() for layer in memory.memories]
    print(f"tokens of each row's piece {seen}, of which the layers hold {held}, in {memory.nbytes:,} bytes")
    return seen[0], memory.nbytes


if __name__ == "__main__":
    main()
