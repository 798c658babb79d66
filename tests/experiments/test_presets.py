"""The presets: ten models of one size, equal budgets where the paper's memory figures say so, and honest labels."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dsmr.cli.app import app
from dsmr.console.errors import UserError
from dsmr.experiments.listing import listing
from dsmr.experiments.presets import CONTROLS, KNOWN, PRESETS, PROPOSED, Size, check, preset
from dsmr.model.schedule import MemorySchedule

SIZES = (Size(), Size(6, 4, 64, 4096, 512, 1), Size(2, 2, 16, 64, 8, 1), Size(1, 2, 8, 32, 4, 1))


def test_the_ten_models_of_the_papers_table_are_there() -> None:
    assert len(PRESETS) == 10
    assert [p.paper.perplexity for p in PRESETS.values() if p.paper] == [
        5.98, 6.54, 6.51, 6.52, 6.53, 6.15, 6.33, 6.01, 5.96, 6.01,
    ]  # fmt: skip
    for name, found in PRESETS.items():
        assert found.name == name
        assert found.origin.endswith(".")
        assert bool(found.ours) == (name not in ("full", "fhcr"))  # only these two are documented


@pytest.mark.parametrize("size", SIZES)
def test_partial_models_share_two_scales_budget(size: Size) -> None:
    two_scale = PRESETS["two_scale"].schedule(size)
    for name, found in {**PRESETS, **CONTROLS}.items():
        schedule = found.schedule(size)
        assert schedule.layers == size.layers
        assert MemorySchedule.parse(str(schedule)) == schedule
        check(schedule, size)
        if name not in ("full", "fhcr", "none"):
            # Even spreads round down, by less than a token a layer.
            assert 0 <= sum(two_scale.horizons) - sum(schedule.horizons) < size.layers
    assert size.bytes(CONTROLS["none"].schedule(size)) == 0
    full, few = (size.bytes(PRESETS[name].schedule(size)) for name in ("full", "fhcr"))
    assert few * size.n_heads == full * size.few_heads


@pytest.mark.parametrize("size", [*SIZES, Size(n_heads=5, few_heads=1), Size(n_heads=6), Size(n_heads=9, few_heads=3)])
def test_the_proposed_schedules_have_half_of_two_scales_bytes(size: Size) -> None:
    found, two_scale = PROPOSED["two_scale_half"].schedule(size), PRESETS["two_scale"].schedule(size)
    check(found, size)
    assert MemorySchedule.parse(str(found)) == found
    assert found.horizons == two_scale.horizons
    heads = {1: 1, 5: 1, 9: 3}.get(size.n_heads, size.n_heads // 2)
    assert set(found.heads(size.n_heads)) == {heads}
    assert size.bytes(found) * size.n_heads == size.bytes(two_scale) * heads
    assert preset("two_scale_half") is PROPOSED["two_scale_half"]
    lowest = PROPOSED["lowest_half"].schedule(size)
    check(lowest, size)
    assert MemorySchedule.parse(str(lowest)) == lowest
    assert lowest.horizons == (sum(two_scale.horizons) // 2, *[0] * (size.layers - 1))
    wide = PROPOSED["lowest_wide"].schedule(size)
    check(wide, size)
    assert MemorySchedule.parse(str(wide)) == wide
    assert wide.horizons == PRESETS["perceiver_ar"].schedule(size).horizons
    assert size.bytes(wide) * size.n_heads == size.bytes(PRESETS["perceiver_ar"].schedule(size)) * heads


def test_two_presets_keep_others_than_the_newest_tokens() -> None:
    assert [name for name, found in PRESETS.items() if not found.schedule(Size()).newest] == [
        "retain_uniform",
        "retain_random",
    ]


def test_bad_names_and_sizes_are_sentences() -> None:
    with pytest.raises(UserError, match="unknown preset 'two_scales': did you mean 'two_scale'"):
        preset("two_scales")
    with pytest.raises(UserError, match="use one of full, "):
        preset("xyzzy")
    with pytest.raises(UserError, match="smaller than a token a layer"):
        listing(Size(12, 8, 64, 4, 0, 1))
    with pytest.raises(UserError, match="n_long must lie between 0 and the 4 layers"):
        Size(layers=4, n_long=5)
    with pytest.raises(UserError, match="multiple of few_heads"):
        Size(n_heads=3)


def test_list_prints_every_preset_with_its_budget(tmp_path: Path) -> None:
    path = tmp_path / "presets.json"
    result = CliRunner().invoke(app, ["experiments", "list", "--json", str(path)])
    assert result.exit_code == 0
    for name in PRESETS:
        assert f"{name} (" in result.stdout
    assert "Our reading" in result.stdout
    rows = {row["name"]: row for row in json.loads(path.read_text())}
    assert rows["full"]["budget_bytes"] == 2 * 2 * 64 * 8 * 8192 * 12
    assert rows["full"]["of_full"] == 1


@pytest.mark.parametrize(("heads", "few"), [(1, 1), (2, 2), (3, 1), (8, 2), (9, 1)])
def test_list_takes_any_number_of_heads(heads: int, few: int, tmp_path: Path) -> None:
    """FHCR has the paper's two KV heads where these divide the heads, and as many as are asked for."""
    path, asked = tmp_path / "presets.json", ["experiments", "list", "--heads", str(heads)]
    result = CliRunner().invoke(app, [*asked, "--json", str(path)])
    assert result.exit_code == 0, result.stderr
    rows = {row["name"]: row for row in json.loads(path.read_text())}
    assert list(rows) == list(KNOWN)
    assert rows["fhcr"]["budget_bytes"] * heads == rows["full"]["budget_bytes"] * few
    result = CliRunner().invoke(app, [*asked, "--few-heads", str(heads), "--json", str(path)])
    assert result.exit_code == 0, result.stderr
    rows = {row["name"]: row for row in json.loads(path.read_text())}
    assert rows["fhcr"]["budget_bytes"] == rows["full"]["budget_bytes"]
    assert "few_heads" in CliRunner().invoke(app, [*asked, "--few-heads", str(heads + 1)]).stderr


def test_what_list_says_of_itself_is_true() -> None:
    for words in (["experiments", "--help"], ["experiments", "list", "--help"]):
        said = CliRunner().invoke(app, words, terminal_width=200).stdout
        assert "The paper's ten models and ours at one size" in " ".join(said.split())
