"""A `DSMRModel` among the models of Transformers: loaded by the Auto classes, it generates what it generates alone."""

import copy
import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.23")

from tiny_corpus import tiny_vocabulary
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, pipeline

from dsmr import DSMRConfig, DSMRModel
from dsmr.console.errors import UserError
from dsmr.generation.drawing import Sampling
from dsmr.integrations.huggingface import (
    DSMRForCausalLM,
    DSMRForCausalLMConfig,
    DSMRStateCache,
    from_run,
    to_run,
    tokenizer_of,
    wrap,
)

KINDS: dict[str, dict[str, Any]] = {
    "segments": {},
    "sliding": {"visibility": "sliding", "position": "alibi"},
    "recall": {"recall": 2, "position": "sinusoidal", "ffn": "swiglu"},
    "few KV heads": {"schedule": "fhcr(layers=2, length=40, kv_heads=2)", "tie_embeddings": False},
}
VOCABULARY = tiny_vocabulary().size


def network(kind: str = "segments", **changed: Any) -> DSMRModel:
    """Weights wide enough that the likeliest token changes from step to step."""
    torch.manual_seed(3)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "segment_length": 8}
    schedule = "two_scale(layers=3, long=24, short=7, n_long=1)"
    options = {"schedule": schedule, "tie_embeddings": False, "init_std": 0.4}
    return DSMRModel(DSMRConfig(**{**sizes, **options, **KINDS[kind], **changed})).eval()


def test_what_nobody_says_is_the_same_in_both_configurations() -> None:
    """Transformers wants the fields written out once more; a default that differed would make other models there."""
    theirs = DSMRForCausalLMConfig()
    for field in dataclasses.fields(DSMRConfig):
        if field.default is not dataclasses.MISSING:
            assert getattr(theirs, field.name) == field.default, field.name


def prompt(*lengths: int) -> tuple[Tensor, Tensor]:
    """Rows of these lengths, padded on the left, and their mask."""
    longest = max(lengths)
    ids = torch.randint(1, VOCABULARY, (len(lengths), longest), generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def greedy(model: DSMRForCausalLM, ids: Tensor, new: int, **options: Any) -> list[list[int]]:
    """The new tokens of every row."""
    out = model.generate(ids, **{"max_new_tokens": new, "do_sample": False, **options})
    return out[:, ids.shape[1] :].tolist()


def alone(model: DSMRModel, ids: Tensor, new: int) -> list[int]:
    return list(itertools.islice(model.generate(ids, sampling=Sampling(temperature=0)), new))


@pytest.mark.parametrize("kind", KINDS)
def test_generate_gives_the_tokens_of_the_model_alone(kind: str) -> None:
    """Past the point where every memory has wrapped."""
    model, (ids, _) = network(kind), prompt(13)
    expected = alone(model, ids[0], 70)
    assert len(set(expected)) > 3
    assert greedy(wrap(model), ids, 70) == [expected]


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_row_gives_what_it_gives_alone(kind: str) -> None:
    model, lengths = wrap(network(kind)).double(), (21, 5, 12)
    ids, mask = prompt(*lengths)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    rows = greedy(model, ids, 20, attention_mask=mask)
    for row, length in enumerate(lengths):
        own = ids[row : row + 1, -length:]
        with torch.no_grad():
            torch.testing.assert_close(logits[row, -length:], model(own).logits[0], rtol=0, atol=1e-12)
        assert [rows[row]] == greedy(model, own, 20)


def test_texts_that_begin_in_later_chunks_of_a_prompt_begin_a_segment() -> None:
    model, (ids, mask) = wrap(network()).double(), prompt(21, 5, 12)
    whole = greedy(model, ids, 20, attention_mask=mask)
    assert greedy(model, ids, 20, attention_mask=mask, prefill_chunk_size=6) == whole
    assert greedy(model, ids, 20, attention_mask=mask, use_cache=False) == whole


def test_beams_are_those_that_are_found_without_a_cache() -> None:
    model, (ids, mask) = wrap(network()).double(), prompt(11, 6)
    options = {"attention_mask": mask, "num_beams": 3}
    assert greedy(model, ids, 12, **options) == greedy(model, ids, 12, **options, use_cache=False)


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_change_nothing(kind: str) -> None:
    """A model that drafts, also over the edges of segments, and the prompt looked up."""
    model, (ids, _) = network(kind), prompt(13)
    draft = wrap(network(kind, schedule="uniform(layers=1, horizon=8)"))
    expected = [alone(model, ids[0], 40)]
    assert greedy(wrap(model), ids, 40, assistant_model=draft) == expected
    assert greedy(wrap(model), ids, 40, prompt_lookup_num_tokens=3) == expected


def test_a_cache_goes_on_is_copied_and_may_be_in_eight_bits() -> None:
    model, (ids, _) = wrap(network()), prompt(13)
    expected = greedy(model, ids, 30)
    cache = DSMRStateCache()
    first = torch.cat([ids, torch.tensor(greedy(model, ids, 10, past_key_values=cache))], 1)
    copied = copy.deepcopy(cache)
    for each in (cache, copied):
        assert greedy(model, first, 20, past_key_values=each) == [expected[0][10:]]
    small = DSMRStateCache(dtype=torch.int8)
    greedy(model, ids, 2, past_key_values=small)
    assert 0 < small.nbytes < cache.nbytes


def test_the_state_does_not_grow_and_a_long_prompt_is_read_in_parts() -> None:
    model, cache = wrap(network()), DSMRStateCache()
    ids, _ = prompt(300)
    longest = []
    model.model.embedding.register_forward_hook(lambda module, args, out: longest.append(args[0].shape[1]))
    greedy(model, ids, 1, past_key_values=cache)
    held = cache.nbytes
    assert held == model.model.new_state(1).nbytes
    assert max(longest) == model.config.segment_length
    greedy(model, ids[:, -1:], 300, past_key_values=DSMRStateCache())
    assert cache.nbytes == held


def test_tokens_are_taken_back_as_if_they_were_never_read_or_not_at_all() -> None:
    model, (ids, _) = wrap(network("recall")).double(), prompt(60)
    with torch.no_grad():
        for back, slack in ((3, 0), (9, 9)):  # 60 tokens are 4 into a segment
            cache = DSMRStateCache(slack=slack)
            model(ids, past_key_values=cache)
            cache.crop(-back)
            again = model(ids[:, -back:], past_key_values=cache).logits
            torch.testing.assert_close(again, model(ids).logits[:, -back:], rtol=0, atol=1e-12)
        cache = DSMRStateCache()
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match=r"5 tokens cannot be taken back.*slack=5"):
            cache.crop(-5)


def test_labels_give_the_loss_of_the_next_tokens() -> None:
    model, (ids, mask) = wrap(network()).double(), prompt(19, 7)
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected.to(out.loss.dtype), rtol=1e-5, atol=0)
    own = model.model(ids[:1], targets=ids[:1].roll(-1, 1))
    given = model(ids[:1], shift_labels=ids[:1].roll(-1, 1)).loss
    torch.testing.assert_close(given, own.loss.to(given.dtype), rtol=1e-5, atol=0)


def test_training_takes_padding_on_the_right_and_layers_are_computed_again() -> None:
    """As collators make it; the loss and the gradients are those of the rows alone."""
    lengths, gradients = (16, 9), []
    ids, mask = prompt(*lengths)
    for side in ("left", "right", "right, checkpointed"):
        model = wrap(network().train()).double()
        rows = [(ids if side == "left" else ids.roll(-7, 1))[1:], (mask if side == "left" else mask.roll(-7, 1))[1:]]
        if "checkpointed" in side:
            model.activation_checkpointing_enable()
        labels = rows[0].masked_fill(rows[1] == 0, -100)
        labels[0, 7 if side == "left" else 0] = -100  # else the padding before it would predict it
        model(rows[0], attention_mask=rows[1], labels=labels, use_cache=False).loss.backward()
        gradients.append(model.model.blocks[0].attention.qkv.weight.grad)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_back_the_same_model(kind: str, tmp_path: Path) -> None:
    model, (ids, _) = wrap(network(kind)), prompt(9)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, DSMRForCausalLM)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), DSMRForCausalLMConfig)
    assert loaded.config.network == model.model.config
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    assert greedy(loaded, ids, 10) == greedy(model, ids, 10)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(ids).logits.dtype == torch.bfloat16


def test_a_model_made_of_its_configuration_has_the_initial_weights_of_ours() -> None:
    config = DSMRForCausalLMConfig(**network().config.to_dict())
    torch.manual_seed(3)
    made = AutoModelForCausalLM.from_config(config)
    for name, weight in network().state_dict().items():
        assert torch.equal(made.model.state_dict()[name], weight), name


def test_a_push_sends_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into another folder here, where the hub would be."""
    sent = tmp_path / "sent"

    class Hub:
        """What Transformers asks of huggingface_hub when it pushes."""

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def create_commit(self, repo_id: str, operations: Any, **options: Any) -> None:
            sent.mkdir()
            for operation in operations:
                shutil.copy(operation.path_or_fileobj, sent / operation.path_in_repo)

    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **options: _NoCard())
    model = wrap(network(), tiny_vocabulary())
    model.push_to_hub("someone/two-scale")
    loaded = AutoModelForCausalLM.from_pretrained(sent)
    assert loaded.config.vocabulary == tiny_vocabulary().to_json()
    assert torch.equal(loaded.model.head.weight, model.model.head.weight)


class _NoCard:
    def save(self, path: str) -> None:
        Path(path).write_text("A model.")


def test_a_run_becomes_a_model_of_transformers_and_a_run_again(tmp_path: Path) -> None:
    run, folder, again = (tmp_path / name for name in ("run", "folder", "again"))
    network().save_pretrained(run)
    tiny_vocabulary().save(run / "tokenizer.json")
    model = from_run(run)
    assert not model.training
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)
    model.save_pretrained(folder)
    to_run(AutoModelForCausalLM.from_pretrained(folder), again)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (again / name).read_bytes() == (run / name).read_bytes(), name
    with pytest.raises(UserError, match=r"config\.json"):
        from_run(tmp_path)


def test_a_pipeline_continues_text_of_token_names(caplog: pytest.LogCaptureFixture) -> None:
    vocabulary = tiny_vocabulary()
    player = pipeline("text-generation", model=wrap(network(), vocabulary), tokenizer=tokenizer_of(vocabulary))
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    texts = player(["BOS_None Pitch_60", "BOS_None Pitch_60 Velocity_64 Duration_1.0.4"], **options, batch_size=2)
    for (text,) in texts:
        assert set(text["generated_text"].split()) <= set(vocabulary.tokens)
    assert "not supported" not in caplog.text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"past_key_values": DynamicCache()}, "DSMRStateCache as past_key_values, got DynamicCache"),
        ({"inputs_embeds": torch.zeros(1, 4, 32)}, "takes no inputs_embeds"),
        ({"position_ids": torch.arange(4)[None]}, "takes no position_ids"),
        ({"output_attentions": True}, "takes no output_attentions"),
        ({"output_hidden_states": True}, "takes no output_hidden_states"),
        ({"input_ids": torch.zeros(4, dtype=torch.int64)}, r"must have shape \(batch, tokens\), got \(4,\)"),
        ({"input_ids": None}, "got NoneType"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "padding on the left only"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]]), "use_cache": False}, "padding on the left only"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, r"shape \(batch, tokens seen\) = \(1, 4\)"),
        ({"attention_mask": torch.ones(1, 3)}, r"\(1, 4\), got \(1, 3\)"),
        (
            {"attention_mask": torch.tensor([[0, 1, 1, 1]]), "piece_start": torch.zeros(1, 4, dtype=torch.int32)},
            "one of it and attention_mask",
        ),
    ],
)
def test_what_a_memory_cannot_do_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        wrap(network())(**{"input_ids": torch.zeros(1, 4, dtype=torch.int64), **options})


def test_what_generation_cannot_have_is_refused(tmp_path: Path) -> None:
    model, (ids, mask) = wrap(network()), prompt(9, 4)
    with pytest.raises(ValueError, match=r'cache of its own.*cache_implementation="static"'):
        greedy(model, ids, 2, cache_implementation="static")
    with pytest.raises(ValueError, match="keeps the vocabulary that it was made for, 28 tokens"):
        model.resize_token_embeddings(40)
    spread = wrap(network(schedule="uniform(layers=2, horizon=16, retention='uniform')"))
    assert len(greedy(spread, ids[:1], 30)[0]) == 30
    with pytest.raises(ValueError, match="rows of equal length"):
        greedy(spread, ids, 2, attention_mask=mask)
    with pytest.raises(ValueError, match="taken back"):
        greedy(spread, ids[:1], 20, prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="28 tokens and the vocabulary"):
        wrap(network(vocab_size=28), tiny_vocabulary_of_other_size())
    with pytest.raises(ValueError, match="missing a required argument"):
        DSMRForCausalLMConfig(schedule="two_scale(layers=3)")


def tiny_vocabulary_of_other_size() -> Any:
    from dsmr.music.vocabulary import Vocabulary

    return Vocabulary("TSD", tiny_vocabulary().tokens[:-1], 8, {})


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    wrap(network()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.blocks.1.ffn.up.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of model\.blocks\.1\.ffn\.up\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
