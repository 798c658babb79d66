"""A `DSMRModel` as a model of Transformers: `AutoModelForCausalLM` loads it, `generate` and pipelines play it.

The network is a `DSMRModel` unchanged (`model`); here its arguments and its state are what Transformers expects of a
decoder. A row that is padded on the left gives what it gives alone. What a memory cannot do is refused in a sentence.
"""

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from dsmr.integrations.huggingface.attention import text_starts
from dsmr.integrations.huggingface.cache import piece_starts
from dsmr.integrations.huggingface.state_cache import DSMRStateCache
from dsmr.model.config import DSMRConfig
from dsmr.model.schedule import MemorySchedule
from dsmr.model.transformer import DSMRModel

WHO = "a DSMRForCausalLM"


class DSMRForCausalLMConfig(PreTrainedConfig):
    """The fields of `DSMRConfig` and those of Transformers; `model_type` is "dsmr".

    Attributes:
        schedule: as text, or a `MemorySchedule`; its length is the number of layers.
        vocabulary: of the tokeniser that the model was trained with, as its tokenizer.json holds it; None = unknown.
    """

    model_type = "dsmr"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (a name and a type that Transformers gives)
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "tie_word_embeddings": "tie_embeddings",
        "initializer_range": "init_std",
    }

    vocab_size: int = 1024
    schedule: str | MemorySchedule = "two_scale(layers=8, long=4096, short=512, n_long=2)"
    d_model: int = 512
    n_heads: int = 8
    segment_length: int = 1024
    visibility: str = "segment"
    position: str = "rope"
    ffn: str = "gelu"
    dropout: float = 0.0
    d_ff: int | None = None
    tie_embeddings: bool = True
    rope_base: float = 10000.0
    init_std: float = 0.02
    recall: int = 0
    vocabulary: dict | None = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.schedule = str(MemorySchedule.parse(self.schedule))
        super().__post_init__(**kwargs)
        _ = self.network  # refused now, if it means nothing

    @property
    def network(self) -> DSMRConfig:
        """Of the `DSMRModel` inside."""
        return DSMRConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(DSMRConfig)})

    @property
    def num_hidden_layers(self) -> int:
        return MemorySchedule.parse(self.schedule).layers


class DSMRForCausalLM(PreTrainedModel, GenerationMixin):
    """A `DSMRModel` in Transformers.

    Attributes:
        model: the `DSMRModel`.
    """

    config_class = DSMRForCausalLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: DSMRForCausalLMConfig) -> None:
        super().__init__(config)
        self.model = DSMRModel(config.network)
        self.gradient_checkpointing = False  # what gradient_checkpointing_enable() looks for and sets
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: DSMRStateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        piece_start: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Read the next tokens of every row.

        Args:
            input_ids: (B, T) int64, any T.
            attention_mask: (B, tokens seen and T), 0 where a row is padded: on the left; on the right too where
                nothing is kept (use_cache=False), as in training on whole rows.
            past_key_values: what the last call gave back, updated in place; None = the rows have seen nothing.
            labels: (B, T) int64, the tokens themselves, -100 = no target: shifted by one for the loss, as Transformers
                does it. With `shift_labels` beside them, targets of their own, which are not shifted.
            use_cache: give the state back, to read on from. None = as the configuration says.
            logits_to_keep: of the last so many tokens, or of those with these indices; 0 = of all.
            piece_start: (B, T) int32, see `DSMRModel.forward`: pieces may begin anywhere in a row, which then has no
                padding.

        Returns:
            logits (B, tokens kept, vocab_size), the loss if there were labels, and the state.

        Raises:
            ValueError: for what a memory cannot do: padding elsewhere, embeddings or positions from outside, weights of
                attention or hidden states to be given back, 4-dimensional masks, another cache.
        """
        tokens = self._checked(input_ids, past_key_values, kwargs)
        keep_state = self.config.use_cache if use_cache is None else use_cache
        cache = DSMRStateCache() if past_key_values is None else past_key_values
        batch, count = tokens.shape
        starts = self._starts(attention_mask, cache.get_seq_length(), count, keep_state or past_key_values is not None)
        if starts is not None:
            if piece_start is not None:
                raise ValueError(f"{WHO} takes piece_start for rows without padding: one of it and attention_mask")
            self._begin_texts(cache, starts, count, batch)
        self.model.checkpoint_layers = self.gradient_checkpointing and self.training
        logits = self._read(tokens, cache, starts, piece_start, logits_to_keep)
        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if keep_state else None)

    # --- what comes in ------------------------------------------------------------------------------------------------

    def _checked(self, input_ids: Tensor | None, cache: Any, more: dict[str, Any]) -> Tensor:
        if cache is not None and not isinstance(cache, DSMRStateCache):
            raise ValueError(f"{WHO} reads on from a DSMRStateCache as past_key_values, got {type(cache).__name__}")
        for name in ("inputs_embeds", "position_ids", "output_attentions", "output_hidden_states"):
            if more.get(name) is not None and more[name] is not False:
                raise ValueError(
                    f"{WHO} takes no {name}: it reads tokens, counts positions itself, from where each text begins, "
                    "and gives back logits and its state alone"
                )
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
            found = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
            raise ValueError(f"input_ids must have shape (batch, tokens), got {found}")
        return input_ids

    def _starts(self, mask: Tensor | None, past: int, count: int, kept: bool) -> Tensor | None:
        """Where in the call each row's text begins; None = with the call or before it."""
        if mask is None:
            return None
        if not kept and not past and mask.dim() == 2 and mask.shape[1] == count and mask.numel():
            seen = mask.bool()
            last = count - seen.flip(1).int().argmax(1)  # behind the text: nobody reads what comes there
            seen = seen | (torch.arange(count, device=mask.device) >= last[:, None])
            mask = torch.where(mask.bool().any(1, keepdim=True), seen, mask.bool())
        starts = text_starts(mask, past, count, WHO)
        if starts is not None and not self.model.config.schedule.newest:
            raise ValueError(
                f"{WHO} whose schedule keeps others than the newest tokens ({self.model.config.schedule}) takes rows "
                "of equal length, without padding"
            )
        return starts

    def _begin_texts(self, cache: DSMRStateCache, starts: Tensor, count: int, batch: int) -> None:
        """Rows whose text begins in this call begin a segment there."""
        length = self.model.config.segment_length
        state = cache.state_for(self.model, batch)
        now = torch.full_like(starts, state.offset) if cache.offset is None else cache.offset
        cache.offset = torch.where((starts >= 0) & (starts < count), -starts % length, now)

    # --- reading ------------------------------------------------------------------------------------------------------

    def _read(
        self,
        tokens: Tensor,
        cache: DSMRStateCache,
        starts: Tensor | None,
        piece_start: Tensor | None,
        logits_to_keep: int | Tensor,
    ) -> Tensor:
        """Logits of the tokens that are kept. Without gradients a long prompt is read segment by segment, so that it
        needs no more memory than a segment."""
        batch, count = tokens.shape
        chosen = isinstance(logits_to_keep, Tensor)
        first = 0 if chosen or not logits_to_keep else max(count - int(logits_to_keep), 0)
        state = cache.state_for(self.model, batch)
        length = count if torch.is_grad_enabled() else self.model.config.segment_length
        edges = [*range(0, count, length), count] if count else [0, 0]
        logits = []
        for begin, end in itertools.pairwise(edges):
            pieces = None if starts is None else piece_starts(starts - begin, end - begin)
            if piece_start is not None:
                pieces = piece_start[:, begin:end] - begin
            part = tokens[:, begin:end]
            out = self.model(part, state, piece_start=pieces, segment_offset=cache.offset).logits
            cache.note(part)
            if end > first or not count:
                logits.append(out[:, max(first - begin, 0) :])
        kept = torch.cat(logits, 1)
        return kept[:, logits_to_keep] if chosen else kept

    # --- what Transformers asks for -----------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: if the weights are not those of such a model: none is made up.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **options)
        model, found = loaded
        for kind, verb in (("missing_keys", "lacks"), ("unexpected_keys", "has")):
            if names := sorted(found[kind]):
                raise ValueError(
                    f"the checkpoint {verb} weights of {', '.join(map(str, names))}, against its config.json"
                )
        return (model, found) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: a `DSMRModel` has its initial weights when it is made."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the vocabulary is that of the tokeniser which the model was trained with."""
        raise ValueError(f"{WHO} keeps the vocabulary that it was made for, {self.config.vocab_size} tokens")

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """A `DSMRStateCache`, unless the caller gave one."""
        asked = generation_config.cache_implementation
        if asked not in (None, "dynamic"):
            raise ValueError(f'{WHO} has a cache of its own, but cache_implementation="{asked}" was asked for')
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = DSMRStateCache()
            if generation_config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()
