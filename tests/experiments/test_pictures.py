"""Pictures of a report: every name belongs to a point that one can tell, and nothing is drawn that was not measured."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from made_up_rows import made_up

from dsmr.experiments import pictures
from dsmr.experiments.presets import PRESETS
from dsmr.experiments.rows import lines_of, read_rows

ROOT = Path(__file__).resolve().parents[2]
KEPT = sorted((ROOT / "experiments" / "results").glob("*.json"))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The figures that would be written, by name."""
    figures: dict[str, Any] = {}

    def keep(figure: Any, path: Path) -> None:
        figure.canvas.draw()
        figures[Path(path).stem] = figure

    monkeypatch.setattr(pictures, "save", keep)
    monkeypatch.setattr("dsmr.console.figures.save", keep)
    return figures


def nearly_equal() -> list[dict[str, Any]]:
    """Models of nearly equal bytes and losses, as a study has them."""
    names = [name for name in PRESETS if name != "full"]
    return [
        made_up(name, seed, 11.6 + 0.001 * place + 0.0001 * seed, kv_bytes=2**20 + place)
        for place, name in enumerate(names)
        for seed in (0, 1)
    ]


@pytest.mark.parametrize("path", [None, *KEPT], ids=lambda path: "made-up" if path is None else path.stem)
def test_no_name_covers_another_nor_a_legend_what_is_drawn(
    path: Path | None, tmp_path: Path, drawn: dict[str, Any]
) -> None:
    """And a name that does not stand beside its own point has a line to it."""
    from matplotlib.text import Text

    rows = nearly_equal() if path is None else read_rows(path)
    lines = lines_of(rows)
    pictures.draw(rows, lines, tmp_path)
    points = {line.model: line for line in lines}
    for axis, figure in zip(drawn["fronts"].axes, ("nats a note", "KRCU tail"), strict=False):
        assert sorted(text.get_text() for text in axis.texts) == sorted({row["model"] for row in rows})
        boxes = [Text.get_window_extent(text) for text in axis.texts]  # without its line
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        point = 1 / 72 * drawn["fronts"].dpi
        for text, box in zip(axis.texts, boxes, strict=True):
            line = points[text.get_text()]
            found = line.figures[figure]
            assert found is not None
            x, y = axis.transData.transform((line.kv_bytes / 2**20, found.mean))
            if text.arrow_patch is None:
                assert 0 < box.x0 - x < 10 * point, text
                assert box.y0 - 2 * point < y < box.y1 + 2 * point, text
            else:
                (begin, *_, end) = text.arrow_patch.get_transform().transform(text.arrow_patch.get_path().vertices)
                assert math.dist(end, (x, y)) < 4 * point, text
                assert math.dist(begin, (box.x0, (box.y0 + box.y1) / 2)) < 6 * point, text
    for name in {"krcu", "returns", "learning"}.intersection(drawn):
        (axis,) = drawn[name].axes
        assert not axis.get_legend().get_window_extent().overlaps(axis.get_window_extent().padded(-2))


def test_bars_show_all_of_a_spread_and_where_their_axis_begins(tmp_path: Path, drawn: dict[str, Any]) -> None:
    rows = [made_up("full", 0, 11.0), made_up("full", 1, 13.0), made_up("two_scale", 0, 11.9), made_up("none", 0, 12.1)]
    pictures.bars(lines_of(rows), tmp_path / "bars.png")
    (nats, *_) = drawn["bars"].axes
    low, high = nats.get_xlim()
    spreads = [path.vertices[:, 0] for lines in nats.collections for path in lines.get_paths()]
    assert low < 12 - 2**0.5 < 12 + 2**0.5 < high
    assert [sum(spread) / 2 for spread in spreads if not any(map(math.isnan, spread))] == [pytest.approx(12)]
    assert nats.get_xlabel() == "nats a note (axis from 10)"
    assert low == 10


@pytest.mark.parametrize("nats", [(12.0,), (12.0, 12.0), (0.004, 0.005), (1e5, 2e5)])
def test_an_axis_begins_at_a_short_number_below_all_bars(
    nats: tuple[float, ...], tmp_path: Path, drawn: dict[str, Any]
) -> None:
    names = list(PRESETS)
    pictures.bars(lines_of([made_up(names[n], 0, loss) for n, loss in enumerate(nats)]), tmp_path / "bars.png")
    axis = drawn["bars"].axes[0]
    low, high = axis.get_xlim()
    assert low < min(nats) <= max(nats) < high
    assert f"(axis from {low:g})" in axis.get_xlabel()
    assert float(f"{low:g}") == pytest.approx(low)


def test_who_was_not_measured_is_missing_in_that_picture_alone(tmp_path: Path, drawn: dict[str, Any]) -> None:
    """Those that are there keep their colours."""
    rows = [
        made_up("full", 0, 10.0, krcu=None),
        made_up("two_scale", 0, 11.0, returns=None),
        made_up("none", 0, 12.0),
    ]
    pictures.draw(rows, lines_of(rows), tmp_path)

    def shown(name: str) -> dict[str, str]:
        (axis,) = drawn[name].axes
        return {line.get_label(): line.get_color() for line in axis.lines if not line.get_label().startswith("_")}

    assert shown("krcu") == {"two_scale": "C1", "none": "C2"}
    assert shown("returns") == {"full": "C0", "none": "C2"}
    krcu = drawn["bars"].axes[1].patches
    assert [math.isnan(bar.get_width()) for bar in krcu] == [True, False, False]


def test_a_model_is_in_the_legend_once_whichever_of_its_seeds_has_a_curve(
    tmp_path: Path, drawn: dict[str, Any]
) -> None:
    rows = [made_up("full", 0, 10.0, learning=[]), made_up("full", 1, 10.0), made_up("full", 2, 10.0)]
    rows.append(made_up("none", 0, 10.0))
    pictures.learning(rows, tmp_path / "learning.png")
    (axis,) = drawn["learning"].axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["full", "none"]
