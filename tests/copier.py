"""A model made by hand, not trained, that copies what followed when the same was heard before: its truth is known.

Its keys are labelled with the tokens heard just before them (`Recall`). One layer attends by these labels alone and
adds the embedding that it finds to the residual stream; the others add nothing.
"""

import torch

from dsmr.model.config import DSMRConfig
from dsmr.model.schedule import MemorySchedule
from dsmr.model.transformer import DSMRModel

WIDTH = 64
SHARPNESS, STRENGTH, FAINT = 2.5, 40.0, 1e-3


def copier(
    horizons: list[int], copying: int, *, vocab_size: int = 28, segment_length: int = 8, heard: int = 3
) -> DSMRModel:
    """A model whose layer `copying` copies what followed the same `heard` tokens, as far back as it remembers."""
    config = DSMRConfig(
        vocab_size,
        MemorySchedule.explicit(horizons),
        d_model=WIDTH,
        n_heads=1,
        segment_length=segment_length,
        position="none",
        recall=heard,
    )
    model = DSMRModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        basis, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))
        model.embedding.weight.copy_(basis[:vocab_size])
        model.recall.project.weight.normal_(generator=generator)
        for layer, block in enumerate(model.blocks):
            block.ffn.down.weight.zero_()
            block.attention.out.weight.zero_()
            if layer == copying:
                eye = torch.eye(WIDTH)
                block.attention_norm.weight.fill_(FAINT)  # beside the labels, what a token is does not count
                block.attention.qkv.weight.copy_(torch.cat([SHARPNESS * eye, SHARPNESS * eye, eye]))
                block.attention.out.weight.copy_(STRENGTH / FAINT / WIDTH**0.5 * eye)
    return model
