"""From a run directory of `dsmr train` to Transformers and back: the same weights, the same vocabulary.

The vocabulary travels in the model's configuration, since a `tokenizer.json` of Transformers is another file than ours.
"""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from dsmr.integrations.huggingface.causal_lm import DSMRForCausalLM, DSMRForCausalLMConfig
from dsmr.model.transformer import DSMRModel
from dsmr.music.vocabulary import Vocabulary


def wrap(model: DSMRModel, vocabulary: Vocabulary | None = None) -> DSMRForCausalLM:
    """The model in Transformers: not a copy, the weights are shared.

    Raises:
        ValueError: if the vocabulary has another number of tokens.
    """
    if vocabulary is not None and vocabulary.size != model.config.vocab_size:
        raise ValueError(f"the model has {model.config.vocab_size} tokens and the vocabulary {vocabulary.size}")
    known: dict[str, Any] = {}
    if vocabulary is not None:
        known = _tokens_of(vocabulary) | {"vocabulary": vocabulary.to_json()}
    with torch.device("meta"):
        wrapped = DSMRForCausalLM(DSMRForCausalLMConfig(**model.config.to_dict(), **known))
    wrapped.model = model
    return wrapped.train(model.training)


def from_run(directory: str | os.PathLike[str]) -> DSMRForCausalLM:
    """The best weights of a run, in evaluation, with the vocabulary that lies beside them, if one does.

    Raises:
        UserError: if the directory holds no model, or one that is damaged.
    """
    tokenizer = Path(directory) / "tokenizer.json"
    vocabulary = Vocabulary.load(tokenizer) if tokenizer.is_file() else None
    return wrap(DSMRModel.from_pretrained(directory).eval(), vocabulary)


def to_run(model: DSMRForCausalLM, directory: str | os.PathLike[str]) -> None:
    """Write what `dsmr generate`, `dsmr eval` and `DSMRModel.from_pretrained` read: `config.json`, `model.safetensors`
    and, if the model knows its vocabulary, `tokenizer.json`."""
    model.model.save_pretrained(directory)
    if model.config.vocabulary is not None:
        Vocabulary.from_json(model.config.vocabulary).save(Path(directory) / "tokenizer.json")


def tokenizer_of(vocabulary: Vocabulary) -> PreTrainedTokenizerFast:
    """A tokeniser of Transformers whose text is the tokens' names, "BOS_None Pitch_60 Velocity_64": for pipelines.
    MIDI is read and written by `dsmr.music.tokenizer`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel(vocabulary.ids, unk_token=vocabulary.tokens[vocabulary.pad_id]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {kind: vocabulary.tokens[index] for kind, index in _tokens_of(vocabulary).items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=words, padding_side="left", **{kind.removesuffix("_id"): name for kind, name in names.items()}
    )


def _tokens_of(vocabulary: Vocabulary) -> dict[str, Any]:
    ids = {"bos": vocabulary.bos_id, "eos": vocabulary.eos_id, "pad": vocabulary.pad_id}
    return {f"{name}_token_id": index for name, index in ids.items()}
