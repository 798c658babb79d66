"""`Recall`: labels by which a layer finds the like of what was just heard. Ours, and off by default."""

import torch
from torch import Tensor, nn


class Recall(nn.Module):
    """Labels that let a layer find what followed when the same was heard before.

    The label of a moment is a projection of the last few tokens. A query carries the label of its own moment, a key
    that of the moment before its token came; both are added to the normed inputs of the Q and K projections, not V.
    What a query matches is then a past like its own, and what it reads there is the token that followed. Without
    labels two layers have to learn to work together for this (induction heads; Olsson et al., 2022), which takes much
    longer. This is ours, not the paper's.
    """

    def __init__(self, tokens: int, d_model: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.project = nn.Linear(tokens * d_model, d_model, bias=False)
        self.norm = nn.LayerNorm(d_model, bias=False)

    def forward(self, embedded: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (B, T, d_model) of queries and of keys.

        Args:
            embedded: (B, recall + T, d_model), the embeddings of the call's tokens and of those just before it.
            positions: (B, T), positions in the piece; tokens of an earlier piece count as nothing.
        """
        count = positions.shape[1]
        if count == 0:
            return embedded[:, :0], embedded[:, :0]
        moments = torch.cat([positions[:, :1] - 1, positions], 1)  # (B, 1 + T): from the token before the call on
        heard = [
            embedded[:, self.tokens - 1 - back : self.tokens + count - back] * (moments >= back).unsqueeze(-1)
            for back in range(self.tokens)
        ]
        labels = self.norm(self.project(torch.cat(heard, -1)))
        return labels[:, 1:], labels[:, :-1] * (positions > 0).unsqueeze(-1)
