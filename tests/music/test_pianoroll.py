"""The piano roll: what it draws, where it wraps, and what it refuses."""

import numpy as np
import pytest

from dsmr.console.errors import UserError
from dsmr.music.pianoroll import CONTINUATION_COLOUR, NOTE, PROMPT_COLOUR, Shading, _rows, draw_pianoroll, pitch_name


def some_notes(seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    onsets = np.arange(0.0, seconds, 0.4)
    notes = np.zeros(len(onsets), dtype=NOTE)
    notes["onset"], notes["duration"] = onsets, 0.3
    notes["pitch"], notes["velocity"] = rng.integers(40, 80, len(onsets)), 110
    return notes


def pixels(path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)[:, :, :3]


def has_colour(image: np.ndarray, colour: str) -> bool:
    wanted = np.array([int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)])
    return bool((np.abs(image - wanted).max(-1) < 0.02).any())


@pytest.mark.slow
def test_prompt_and_continuation_have_two_colours(tmp_path):
    draw_pianoroll(tmp_path / "both.png", some_notes(20), continuation_from=8.0, title="both")
    image = pixels(tmp_path / "both.png")
    assert has_colour(image, PROMPT_COLOUR)
    assert has_colour(image, CONTINUATION_COLOUR)
    draw_pianoroll(tmp_path / "one.png", some_notes(20))
    assert not has_colour(pixels(tmp_path / "one.png"), CONTINUATION_COLOUR)


def test_long_pieces_wrap_into_rows_of_equal_length():
    assert _rows(30.0, None) == (30, 1)
    assert _rows(140.0, None) == (35, 4)
    seconds, rows = _rows(3600.0, None)
    assert rows == 8
    assert seconds * rows >= 3600
    draw_seconds, draw_rows = _rows(0.5, None)
    assert draw_rows == 1
    assert draw_seconds >= 0.5


def test_sections_are_shaded(tmp_path):
    sections = [Shading("A", 0.0, 5.0), Shading("B", 5.0, 60.0), Shading("A", 60.0, 90.0)]
    draw_pianoroll(tmp_path / "plain.png", some_notes(90))
    draw_pianoroll(tmp_path / "shaded.png", some_notes(90), sections=sections)
    assert pixels(tmp_path / "shaded.png").mean() < pixels(tmp_path / "plain.png").mean()


def test_a_title_may_be_any_name_of_a_file(tmp_path, recwarn):
    """A byte that is no text ended in a traceback, a formula in another, and a letter without a glyph in a warning."""
    for title in ("bad\udcff", "日本 \x01\n", r"$\frac$ a$b$"):
        draw_pianoroll(tmp_path / "named.png", some_notes(1), title=title)
        assert (tmp_path / "named.png").stat().st_size > 1000
    assert [str(one.message) for one in recwarn] == []


def test_one_note_is_enough_and_none_is_an_error(tmp_path):
    draw_pianoroll(tmp_path / "one.png", some_notes(0.1))
    assert (tmp_path / "one.png").stat().st_size > 1000
    with pytest.raises(UserError, match=r"no note to draw in .*none\.png"):
        draw_pianoroll(tmp_path / "none.png", np.zeros(0, dtype=NOTE))
    assert not (tmp_path / "none.png").exists()


def test_pitch_names():
    assert [pitch_name(pitch) for pitch in (21, 60, 61, 108)] == ["A0", "C4", "C♯4", "C8"]
