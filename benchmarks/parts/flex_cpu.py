"""FlexAttention on a CPU, where it needs a C++ compiler and has no backward."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.parts.peers import Concatenating, Missing
from dsmr_kernels.cases import Case


class FlexOnCPU(Concatenating):
    """FlexAttention, compiled when it is made, with the block mask of a full memory and a causal segment."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        past = self.past

        def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return key <= query + past

        torch._dynamo.reset()
        try:
            self.blocks = create_block_mask(seen, None, None, self.queries, past + self.queries, device="cpu")
            self.attention: Any = torch.compile(flex_attention, dynamic=False)
            with torch.no_grad():
                self(case)
        except Exception as error:  # whatever the compiler says
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise Missing(f"FlexAttention on a CPU needs a C++ compiler that works: {said[0][:200]}") from error

    def __call__(self, case: Case) -> Tensor:
        k, v = self.keys(case)
        return self.attention(case.q, k, v, block_mask=self.blocks, enable_gqa=self.grouped)
