"""Blocks as people write them, small, with attention that knows no memory."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalSelfAttention(nn.Module):
    """With the names of nanoGPT."""

    def __init__(self, width: int = 32, heads: int = 4, bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.n_head = heads
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)
        self.attn_dropout = nn.Dropout(0.0)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


class NanoBlock(nn.Module):
    """Pre-norm, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.attn = CausalSelfAttention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


class MultiheadBlock(nn.Module):
    """A block of one's own around `nn.MultiheadAttention`."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.attn = nn.MultiheadAttention(32, 4, batch_first=batch_first)
        self.first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.first else x.transpose(0, 1)
        tokens, h = x.shape[1 if self.first else 0], self.norm(x)
        mask = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x if self.first else x.transpose(0, 1)


class Encoder(nn.Module):
    """`nn.TransformerEncoder` with a causal mask."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=batch_first, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        if self.first:
            return self.layers(x, mask=mask, is_causal=True)
        return self.layers(x.transpose(0, 1), mask=mask).transpose(0, 1)
