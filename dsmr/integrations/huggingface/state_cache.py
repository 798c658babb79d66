"""A `DSMRState` in the shape of a cache of Transformers: what `DSMRForCausalLM` reads on from, call by call.

It grows with nothing: its bytes are the schedule's budget and the segments in progress, after a million tokens too.
Rows that were padded on the left are each at a place of their own in a segment, which it remembers for them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from dsmr.integrations.huggingface.cache import TAKEN_BACK
from dsmr.model.state import DSMRState
from dsmr.model.transformer import DSMRModel
from dsmr_kernels import KVMemory


class DSMRStateCache(Cache):
    """What `DSMRForCausalLM` takes and gives back as `past_key_values`.

    Args:
        slack: tokens that can be taken back (`crop`) wherever a segment begins. Assisted decoding sets aside 64.
        dtype: of keys and values: what the model's projections come out in, or torch.int8 for about half the bytes of
            bfloat16.

    Attributes:
        state: the model's, once it has read something.
        offset: (B,) int64, how far each row is into its segment, where rows were padded; None = as far as the state.

    Raises:
        ValueError: if `slack` is negative, or `dtype` another.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, *, slack: int = 0, dtype: torch.dtype | None = None) -> None:
        if isinstance(slack, bool) or not isinstance(slack, int) or slack < 0:
            raise ValueError(f"slack must be an integer >= 0, got {slack!r}")
        if dtype not in (None, torch.int8):
            raise ValueError(f"dtype must be None, for the model's own, or torch.int8, got {dtype}")
        super().__init__(layers=[])
        self.slack, self.dtype = slack, dtype
        self.state: DSMRState | None = None
        self.offset: Tensor | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.get_seq_length()} tokens seen, {self.nbytes:,} bytes)"

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, and their scales, in all layers; 0 before the first token."""
        return 0 if self.state is None else self.state.nbytes

    # --- what the model asks for --------------------------------------------------------------------------------------

    def state_for(self, model: DSMRModel, batch: int) -> DSMRState:
        """The state, made now if nothing was read yet.

        Raises:
            ValueError: if tokens shall be taken back that the schedule cannot give back.
        """
        if self.state is None:
            state = model.new_state(batch, dtype=self.dtype)
            if self.slack:
                if not model.config.schedule.newest:
                    raise ValueError(
                        "tokens can be taken back, as assisted decoding does, where the newest are kept, but the "
                        f"schedule is {model.config.schedule}"
                    )
                state = DSMRState([_roomier(memory, self.slack) for memory in state.memories], state.recent)
            self.state, self._visibility = state, model.config.visibility
            self._segment_length, self._heard = model.config.segment_length, state.recent
        return self.state

    def note(self, tokens: Tensor) -> None:
        """The model has read `tokens` (B, T)."""
        if self.offset is not None:
            self.offset = (self.offset + tokens.shape[1]) % self._segment_length
        assert self.state is not None
        if kept := self.state.recent.shape[1]:
            longest = max(self.slack, self._segment_length)  # that can be taken back
            self._heard = torch.cat([self._heard, tokens], 1)[:, -(kept + longest) :]

    # --- what generation asks for -------------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included, not tokens held."""
        if self.state is None:
            return 0
        seen = self.state.memories[0].seen
        assert isinstance(seen, int)
        return seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # plays on forever

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Of the keys of a call: how many, and how many came before."""
        return query_length, self.get_seq_length()

    @property
    def batch_size(self) -> int:
        if self.state is None:
            raise AttributeError("a state that has read nothing yet has no batch size")
        return self.state.batch

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    def activate_past_recording(self) -> None:
        """Drafts will be taken back: room for them, if nothing is held yet."""
        if self.state is None:
            self.slack = max(self.slack, TAKEN_BACK)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest `-tokens_to_remove` tokens.

        Raises:
            ValueError: if tokens that would then be seen gave way to them already.
        """
        count, state = -tokens_to_remove, self.state
        if count < 0:
            raise ValueError(f"crop takes how many tokens to remove, as a negative number, got {tokens_to_remove}")
        if count == 0 or state is None:
            return
        seen = self.get_seq_length()
        within = self._visibility == "segment" and self.offset is None and count <= state.offset
        if count > self.slack and not within and any(seen > memory.capacity for memory in state.memories):
            raise ValueError(
                f"{count} tokens cannot be taken back, since what they pushed out of the memory is gone: with "
                f"DSMRStateCache(slack={count}) they could (slack={self.slack})"
            )
        for memory in state.memories:
            memory.crop(count)
        state.offset = (state.offset - count) % self._segment_length
        if self.offset is not None:
            self.offset = (self.offset - count) % self._segment_length
        if kept := state.recent.shape[1]:
            self._heard = self._heard[:, :-count]
            state.recent = self._heard[:, -kept:]

    def reset(self) -> None:
        """Forget everything: the next call may be of another batch."""
        self.state = self.offset = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rearrange(lambda memory: memory.select(beam_idx), lambda x: x[beam_idx.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rearrange(lambda memory: memory.repeat(repeats), lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        chosen = indices if isinstance(indices, Tensor) else torch.tensor(indices, device="cpu")
        self.reorder_cache(chosen.nonzero().flatten() if chosen.dtype == torch.bool else chosen)

    def _rearrange(self, memories: Callable[[KVMemory], KVMemory], rows: Callable[[Tensor], Tensor]) -> None:
        if self.state is None:
            return
        state = self.state
        self.state = DSMRState([memories(memory) for memory in state.memories], rows(state.recent), offset=state.offset)
        self._heard = rows(self._heard)
        self.offset = None if self.offset is None else rows(self.offset)

    # --- what it is not -----------------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Refused: the state belongs to a `DSMRForCausalLM`."""
        raise RuntimeError("a DSMRStateCache serves a DSMRForCausalLM; for other models there is DSMRCache")


def _roomier(memory: KVMemory, slack: int) -> KVMemory:
    """An empty memory such as this one, with room for more tokens."""
    sizes = (memory.batch, memory.kv_heads, memory.capacity + slack, memory.head_dim)
    return KVMemory.empty(*sizes, dtype=memory.dtype, device=memory.k.device)
