"""Configurations and weights come back from disk as they were, or a sentence says what is wrong with the file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsmr.console.errors import UserError
from dsmr.console.files import read_json, write_json
from dsmr.model.config import DSMRConfig
from dsmr.model.schedule import MemorySchedule
from dsmr.model.transformer import DSMRModel

SCHEDULE = "two_scale(layers=3, long=20, short=4, n_long=1, kv_heads=[2, 1, 4])"


def config(**changes: Any) -> DSMRConfig:
    return DSMRConfig(**({"vocab_size": 11, "schedule": SCHEDULE, "d_model": 16, "n_heads": 4, "d_ff": 20} | changes))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    DSMRModel(config()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"visibility": "sliding", "position": "alibi", "ffn": "swiglu", "d_ff": None},
        {"dropout": 0.25, "tie_embeddings": False, "rope_base": 500.0, "init_std": 0.1, "segment_length": 3},
        {"schedule": MemorySchedule.explicit([1, 2], kv_heads=[None, 2])},
    ],
)
def test_a_configuration_goes_to_json_and_back(changes: dict) -> None:
    one = config(**changes)
    values = json.loads(json.dumps(one.to_dict()))
    assert isinstance(values["schedule"], str)
    assert DSMRConfig.from_dict(values) == one


def test_a_schedule_may_be_given_as_text_and_fixes_layers_and_heads() -> None:
    one = config()
    assert one.schedule == MemorySchedule.parse(SCHEDULE)
    model = DSMRModel(one)
    assert len(model.blocks) == 3
    assert [block.attention.n_kv_heads for block in model.blocks] == [2, 1, 4]
    assert [block.attention.horizon for block in model.blocks] == [20, 4, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be an integer >= 1, got 0"),
        ({"d_model": 16.0}, "d_model must be an integer >= 1, got 16.0"),
        ({"n_heads": -4}, "n_heads must be an integer >= 1, got -4"),
        ({"segment_length": True}, "segment_length must be an integer >= 1, got True"),
        ({"d_ff": 0}, "d_ff must be >= 1, got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": -0.1}, "dropout must be at least 0 and below 1, got -0.1"),
        ({"visibility": "all"}, "visibility must be one of segment, sliding, got 'all'"),
        ({"position": "learned"}, "position must be one of rope, sinusoidal, alibi, none, got 'learned'"),
        ({"ffn": "relu"}, "ffn must be one of gelu, swiglu, got 'relu'"),
        ({"d_model": 18}, "d_model must be a multiple of n_heads, got 18 and 4"),
        ({"schedule": "none(layers=0)"}, "a schedule needs at least 1 layer, got layers=0"),
        ({"schedule": "explicit(horizons=[1, 1], kv_heads=[4, 3])"}, "but layer 1 has 3"),
        ({"schedule": None}, "a schedule must be a MemorySchedule or its text, got None"),
    ],
)
def test_an_impossible_configuration_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_fields_that_are_unknown_or_missing_are_named() -> None:
    values = config().to_dict()
    del values["vocab_size"]
    with pytest.raises(ValueError, match=r"has unknown fields \['widht'\] and lacks \['vocab_size'\]"):
        DSMRConfig.from_dict(values | {"widht": 3})


# Weights


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_a_saved_model_comes_back_the_same(tmp_path: Path, tied: bool, position: str) -> None:
    model = DSMRModel(config(tie_embeddings=tied, position=position))
    model.save_pretrained(tmp_path / "new" / "folder")
    again = DSMRModel.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == model.config
    tokens = torch.randint(11, (2, 50))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    for one, other in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert (again.head.weight is again.embedding.weight) == tied


def test_weights_that_share_storage_are_stored_once(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    assert "head.weight" not in weights
    assert set(weights) == {name for name, _ in DSMRModel(config()).named_parameters()}


def test_saving_leaves_nothing_but_the_two_files_and_replaces_older_ones(saved: Path) -> None:
    model = DSMRModel(config(d_ff=24))
    model.save_pretrained(saved)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    assert DSMRModel.from_pretrained(saved).config == model.config


def spoil(folder: Path, how: str) -> None:
    weights, described = folder / "model.safetensors", folder / "config.json"
    tensors, values = load_file(weights), json.loads(described.read_text())
    del values["seal"]  # as who edits it by hand must
    match how:
        case "no config":
            described.unlink()
        case "no weights":
            weights.unlink()
        case "config is not JSON":
            described.write_text("{")
        case "config is a list":
            described.write_text("[1, 2]")
        case "config is null":
            described.write_text("null")
        case "config has an unknown field":
            described.write_text(json.dumps(values | {"depth": 3}))
        case "config has a bad schedule":
            described.write_text(json.dumps(values | {"schedule": "two_scale(layers=3)"}))
        case "config has a word for a number":
            described.write_text(json.dumps(values | {"dropout": "much"}))
        case "weights cut short":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "weights are text":
            weights.write_text("not weights at all")
        case "weights empty":
            weights.write_bytes(b"")
        case "weights of another width":
            described.write_text(json.dumps(values | {"d_ff": 21}))
        case "a weight is missing":
            del tensors["norm.weight"]
            save_file(tensors, weights)
        case "a weight too many":
            save_file(tensors | {"other.weight": torch.zeros(2)}, weights)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", r"cannot read .*config\.json: no such file"),
        ("no weights", r"model\.safetensors cannot be read as a model's weights"),
        ("config is not JSON", r"config\.json is not a JSON file"),
        ("config is a list", r"config\.json does not describe a DSMR model"),
        ("config is null", r"config\.json does not describe a DSMR model"),
        ("config has an unknown field", r"config\.json does not describe a DSMR model: .*\['depth'\]"),
        ("config has a bad schedule", r"config\.json does not describe a DSMR model: .* missing .* 'long'"),
        ("config has a word for a number", r"config\.json is damaged: its dropout is 'much', expected float"),
        ("weights cut short", r"model\.safetensors cannot be read as a model's weights"),
        ("weights are text", r"model\.safetensors cannot be read as a model's weights"),
        ("weights empty", r"model\.safetensors cannot be read as a model's weights"),
        (
            "weights of another width",
            r"does not fit its config\.json: blocks\.0\.ffn\.down\.weight has \(16, 20\), expected \(16, 21\)",
        ),
        ("a weight is missing", r"does not fit its config\.json: norm\.weight has nothing, expected \(16,\)"),
        ("a weight too many", r"does not fit its config\.json: other\.weight has \(2,\), expected nothing"),
    ],
)
def test_a_damaged_model_is_refused_in_one_sentence(saved: Path, how: str, message: str) -> None:
    spoil(saved, how)
    with pytest.raises(UserError, match=message) as caught:
        DSMRModel.from_pretrained(saved)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*model\.safetensors"):
        DSMRModel(config()).save_pretrained(tmp_path / "file")


@pytest.mark.parametrize(
    "absurd",
    [
        {"schedule": "uniform(layers=10000, horizon=8)"},
        {"schedule": "uniform(layers=1000000000, horizon=8)"},
        *({name: 2**exponent} for name in ("d_model", "n_heads") for exponent in (18, 20, 40, 62)),
        *({name: 2**exponent} for name in ("vocab_size", "d_ff", "recall") for exponent in (24, 31, 62)),
        {"segment_length": 2**62},
        {"rope_base": 1e-320, "d_model": 2**20, "d_ff": 2**24},
    ],
    ids=str,
)
def test_an_absurd_configuration_is_refused_before_memory_is_taken(
    absurd: dict[str, Any], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = saved / "config.json"
    values = json.loads(described.read_text())
    del values["seal"]
    described.write_text(json.dumps(values | absurd))
    monkeypatch.setattr(torch.nn.init, "normal_", lambda *given, **options: pytest.fail("memory was taken"))
    with pytest.raises(UserError, match=r"config\.json"):
        DSMRModel.from_pretrained(saved)


@pytest.mark.parametrize("schedule", ["uniform(layers=3, horizon=8)", "fhcr(layers=2, length=8, kv_heads=2)"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("more", [{}, {"ffn": "swiglu"}, {"d_ff": 24}, {"recall": 3}], ids=str)
def test_the_parameters_are_counted_without_making_them(schedule: str, tied: bool, more: dict[str, Any]) -> None:
    described = DSMRConfig(29, schedule, d_model=16, n_heads=4, tie_embeddings=tied, **more)
    assert described.parameters == sum(one.numel() for one in DSMRModel(described).parameters())


def test_a_number_that_no_integer_of_a_tensor_holds_may_stand_for_a_real_one(saved: Path) -> None:
    about = read_json(saved / "config.json") | {"rope_base": 10**30}
    write_json(saved / "config.json", about, sealed=True)
    model, tokens = DSMRModel.from_pretrained(saved), torch.arange(9)[None]
    same = DSMRModel(config(rope_base=1e30))
    same.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(tokens).logits, same.eval()(tokens).logits)


def test_a_model_beyond_any_machine_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="at most 1,099,511,627,776 parameters"):
        DSMRConfig(29, "uniform(layers=10000, horizon=8)", d_model=2**17)
    with pytest.raises(ValueError, match="rope_base must be above 0 and finite"):
        DSMRConfig(29, "uniform(layers=2, horizon=8)", rope_base=float("inf"))
