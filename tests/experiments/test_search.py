"""The search finds what is known: which layer copies, how far back, and the cheapest schedule by trying them all."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from copier import copier
from tiny_corpus import TOKENS, tiny_vocabulary
from typer.testing import CliRunner

from dsmr.cli.app import app
from dsmr.console.errors import UserError
from dsmr.corpus.store import Corpus, PieceRecord, write_corpus
from dsmr.experiments.search import (
    HORIZON,
    KV_HEADS,
    Cost,
    Loss,
    best_schedules,
    divisors,
    ladder,
    parse_budget,
    parse_distance,
    search,
)
from dsmr.experiments.table import Table
from dsmr.model.config import DSMRConfig
from dsmr.model.reshaped import with_schedule
from dsmr.model.schedule import MemorySchedule
from dsmr.model.transformer import DSMRModel


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Fresh tokens in which nothing returns but what is planted."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(4):
        body = [rng.integers(low, high, 700) for low, high in ((3, 16), (16, 20), (20, 24), (24, 28))]
        records.append(
            PieceRecord(np.stack(body, 1).flatten()[:-1].astype(np.uint16), "validation", str(number), 700, 300.0)
        )
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", records, tiny_vocabulary(), "fresh notes")


def saved(model: DSMRModel, path: Path) -> Path:
    model.save_pretrained(path)
    tiny_vocabulary().save(path / "tokenizer.json")
    return path


@pytest.mark.slow
def test_the_layer_that_copies_is_found_and_how_far_back(corpus: Corpus, tmp_path: Path) -> None:
    """Slow for its passages of 5 seconds and more. Returns lie 300 to 480 tokens back: layer 1 needs 512, layer 0
    nothing."""
    run = saved(copier([512, 512], 1, heard=6, segment_length=64), tmp_path / "run")
    told: list[tuple[int, int]] = []
    found = search(
        run, corpus.path, on="returns", distance=(300, 480), budget=0.5, progress=lambda *now: told.append(now)
    )
    cost = {(c.layer, c.what, c.value): c.more.on("returns") for c in found.costs}
    assert max(abs(more) for (layer, *_), more in cost.items() if layer == 0) < 1e-6
    assert cost[1, HORIZON, 256] > 2  # nats a token: what it copied it must guess
    assert found.best.horizons == (0, 512)
    assert found.best.bytes == found.bytes // 2 == found.budget
    assert found.best.measured is not None
    assert abs(found.best.measured.on("returns")) < 1e-6
    assert found.front[0].horizons == (0, 0)
    assert told == sorted(told)
    assert told[-1][0] <= told[-1][1]


def test_the_front_is_what_trying_all_schedules_gives() -> None:
    """A small case, all combinations by hand: no schedule on the front is beaten, none is missing."""
    own = MemorySchedule.explicit([64, 64, 32], [4, 4, 4])
    rng = np.random.default_rng(1)
    costs = []
    for layer, horizon in enumerate(own.horizons):
        for shorter in ladder(horizon, 16)[1:]:
            costs.append(Cost(layer, HORIZON, shorter, Loss(float(rng.normal(0.3, 0.4)), None)))
        for fewer in divisors(4)[1:]:
            costs.append(Cost(layer, KV_HEADS, fewer, Loss(float(rng.normal(0.3, 0.4)), None)))
    price = {(c.layer, c.what, c.value): max(0.0, c.more.tokens) for c in costs}
    tried = []
    for horizons in itertools.product(*(ladder(h, 16) for h in own.horizons)):
        for heads in itertools.product(divisors(4), repeat=3):
            schedule = MemorySchedule.explicit(horizons, heads)
            sums = [
                price.get((n, HORIZON, h), 0.0) + price.get((n, KV_HEADS, w), 0.0)
                for n, (h, w) in enumerate(zip(horizons, heads, strict=True))
            ]
            tried.append((schedule.budget_bytes(n_heads=4, head_dim=8), sum(sums)))
    front = best_schedules(own, costs, n_heads=4, head_dim=8)
    assert len(front) > 4
    for point in front:
        assert point.bytes == point.schedule.budget_bytes(n_heads=4, head_dim=8)
        assert point.predicted == pytest.approx(min(cost for size, cost in tried if size <= point.bytes))
    assert front[-1].predicted == pytest.approx(min(cost for _, cost in tried))
    assert front[0].bytes == 0


def test_merged_heads_that_were_equal_change_nothing() -> None:
    torch.manual_seed(0)
    config = DSMRConfig(len(TOKENS), "full(layers=2, length=32)", d_model=32, n_heads=4, segment_length=8)
    model = DSMRModel(config).double().eval()
    with torch.no_grad():
        for block in model.blocks:
            k, v = (part.unflatten(0, (4, 8)) for part in block.attention.qkv.weight[32:].split(32))
            for part in (k, v):
                part[1], part[3] = part[0], part[2]  # query heads 0, 1 and 2, 3 share keys and values already
    tokens = torch.randint(len(TOKENS), (2, 24))
    merged = with_schedule(model, "full(layers=2, length=32, kv_heads=2)")
    assert merged.blocks[0].attention.qkv.weight.shape[0] == 32 + 2 * 16
    torch.testing.assert_close(merged(tokens).logits, model(tokens).logits, rtol=0, atol=1e-12)
    other = with_schedule(model, "explicit(horizons=[32, 32], kv_heads=[4, 1])")
    assert (other(tokens).logits - model(tokens).logits).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ("full(layers=3, length=8)", "3 layers, but the model has 2"),
        ("full(layers=2, length=8, kv_heads=4)", "2 KV heads, which cannot be merged into 4"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(schedule: str, said: str) -> None:
    model = DSMRModel(
        DSMRConfig(len(TOKENS), "full(layers=2, length=8, kv_heads=2)", d_model=16, n_heads=4, segment_length=8)
    )
    with pytest.raises(ValueError, match=said):
        with_schedule(model, schedule)


@pytest.mark.slow
def test_the_command_writes_a_page_a_picture_and_lines_of_a_table(corpus: Corpus, tmp_path: Path) -> None:
    """Slow: a model of two layers over two pieces, some twenty times."""
    torch.manual_seed(0)
    config = DSMRConfig(len(TOKENS), "full(layers=2, length=128)", d_model=16, n_heads=2, segment_length=64)
    run = saved(DSMRModel(config), tmp_path / "run")
    words = ["experiments", "search", str(run), "--data", str(corpus.path), "--tokens", "3000", "--budget", "25%"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    folder = run / "search"
    written = json.loads((folder / "search.json").read_text())
    assert written["best"]["bytes"] <= written["budget"] == written["bytes"] // 4
    assert "layer" in (folder / "search.md").read_text()
    assert (folder / "search.png").stat().st_size > 10_000
    lines = (folder / "found.toml").read_text()
    whole = (
        f'name = "again"\n[data]\npath = "{corpus.path}"\n[size]\nlayers = 2\nn_heads = 2\nhead_dim = 8\nn_long = 1\n'
        + lines
    )
    (tmp_path / "again.toml").write_text(whole)
    (cell,) = Table.load(tmp_path / "again.toml").cells
    assert list(cell.model.schedule.horizons) == written["best"]["horizons"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": "0%"}, "between 0% and 100%"),
        ({"budget": "much"}, "cannot be read"),
        ({"distance": "8000"}, "two numbers of tokens"),
        ({"distance": "9,3"}, "two numbers of tokens"),
        ({"on": "everything"}, "'tokens' or 'returns'"),
    ],
)
def test_options_that_say_nothing_are_refused(options: dict[str, str], said: str, tmp_path: Path) -> None:
    words = [part for name, value in options.items() for part in (f"--{name}", value)]
    result = CliRunner().invoke(app, ["experiments", "search", str(tmp_path), *words], terminal_width=200)
    assert result.exit_code != 0
    assert said in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ("none(layers=1)", "has no memory"),
        ("uniform(layers=1, horizon=16, retention=random)", "other tokens than the newest"),
    ],
)
def test_a_run_with_nothing_to_cut_is_refused(schedule: str, said: str, corpus: Corpus, tmp_path: Path) -> None:
    config = DSMRConfig(len(TOKENS), schedule, d_model=16, n_heads=2, segment_length=8)
    run = saved(DSMRModel(config), tmp_path / "run")
    with pytest.raises(UserError, match=said):
        search(run, corpus.path)


def test_budgets_and_distances_as_they_are_written() -> None:
    assert parse_budget("25 %") == 0.25
    assert parse_budget("2MiB") == 2 << 20
    assert parse_distance(" 500, 8000") == (500, 8000)
