"""What the composed corpus promises: the same piece everywhere, true returns, nothing that a tokeniser would lose."""

import hashlib
from functools import cache

import numpy as np
import pytest

from dsmr.composer.compose import FORMS, GAP_NOTES, Composition, Section, compose
from dsmr.composer.dice import Dice
from dsmr.composer.harmony import Key
from dsmr.composer.themes import METRES, THEMES, Theme

SEEDS = range(40)
CHECKSUM_OF_SEED_7 = "86d9125e49407743"


@cache
def piece(seed: int) -> Composition:
    return compose(seed)


def hundredths(times: np.ndarray) -> np.ndarray:
    return np.rint(np.asarray(times) * 100).astype(np.int64)


def rows(notes: np.ndarray) -> np.ndarray:
    """(n, 4) integers: onset and duration in hundredths, pitch, velocity."""
    return np.stack([hundredths(notes["onset"]), hundredths(notes["duration"]), notes["pitch"], notes["velocity"]], 1)


def inside(composition: Composition, section: Section) -> np.ndarray:
    """The rows of a section's notes, onsets from the section's beginning."""
    table = rows(composition.notes)
    start, end = hundredths(np.array([section.start_s, section.end_s]))
    part = table[(table[:, 0] >= start) & (table[:, 0] < end)]
    return part - np.array([start, 0, 0, 0])


def refrains(composition: Composition) -> list[Section]:
    return [section for section in composition.sections if section.is_refrain]


def test_a_seed_gives_the_same_notes_on_every_machine():
    composition = compose(7)
    digest = hashlib.sha256(rows(composition.notes).astype("<i4").tobytes()).hexdigest()[:16]
    assert digest == CHECKSUM_OF_SEED_7
    assert rows(compose(7).notes).tolist() == rows(composition.notes).tolist()
    assert compose(7).sections == composition.sections


def test_dice_forks_do_not_depend_on_earlier_throws():
    fresh, used = Dice(5), Dice(5)
    for _ in range(3000):
        used.unit()
    assert [fresh.fork(2).unit() for _ in range(2)] == [used.fork(2).unit()] * 2
    throws = [Dice(1, 2).bell() for _ in range(3)] + [Dice(1, 3).bell()]
    assert len(set(throws)) == 2
    assert all(-2 < throw < 2 for throw in throws)
    assert sorted(Dice(9).shuffled(range(20))) == list(range(20))


@pytest.mark.slow
def test_pieces_last_three_to_eight_minutes_at_a_playable_density():
    for seed in SEEDS:
        composition = piece(seed)
        assert 180 <= composition.seconds <= 480
        assert 5 <= len(composition.notes) / composition.seconds <= 10
        assert composition.form in FORMS
        assert composition.title


@pytest.mark.parametrize("minutes", [1.0, 2.0, 5.0, 9.0])
def test_a_piece_is_as_long_as_asked(minutes):
    for seed in range(4):
        assert compose(seed, minutes=minutes).seconds == pytest.approx(60 * minutes, abs=0.12 * 60 * minutes + 25)


@pytest.mark.slow
def test_exact_returns_repeat_the_performance_and_others_differ_as_they_say():
    kinds = {"exact": 0, "transposed": 0, "varied": 0}
    for seed in SEEDS:
        composition = piece(seed)
        first, *returns = refrains(composition)
        assert (first.kind, first.return_index, first.transposition, first.start_s) == ("statement", 0, 0, 0.0)
        assert [section.return_index for section in returns] == list(range(1, len(returns) + 1))
        assert returns
        original = inside(composition, first)
        for section in returns:
            kinds[section.kind] += 1
            again = inside(composition, section)
            if section.kind == "varied":
                same = {tuple(row) for row in original.tolist()} & {tuple(row) for row in again.tolist()}
                assert 0.1 * len(original) < len(same) < len(original)
                continue
            assert (section.transposition != 0) == (section.kind == "transposed")
            assert (again == original + np.array([0, 0, section.transposition, 0])).all()
    assert kinds["exact"] > kinds["transposed"] + kinds["varied"]
    assert all(kinds.values())


def test_refrains_are_far_apart_and_some_much_farther_than_others():
    gaps = []
    for seed in SEEDS:
        composition, since = piece(seed), None
        for section in composition.sections:
            if section.is_refrain:
                gaps += [] if since is None else [since]
                since = 0
            elif since is not None:
                since += len(inside(composition, section))
    assert min(gaps) >= GAP_NOTES
    assert max(gaps) >= 2 * GAP_NOTES


def test_refrains_belong_to_their_piece_and_episodes_to_themselves():
    def turns(part: np.ndarray) -> set[tuple[int, ...]]:
        pitches = part[:, 2].tolist()
        return {tuple(pitches[i : i + 8]) for i in range(len(pitches) - 7)}

    firsts = [turns(inside(piece(seed), refrains(piece(seed))[0])) for seed in SEEDS]
    for i, one in enumerate(firsts):
        others = set().union(*firsts[:i], *firsts[i + 1 :])
        assert len(one & others) < 0.1 * len(one)
    for seed in SEEDS[:10]:
        fresh = [turns(inside(piece(seed), s)) for s in piece(seed).sections if not s.is_refrain]
        for i, one in enumerate(fresh[1:], 1):
            assert len(one & set().union(*fresh[:i])) < 0.2 * len(one) + 2


def test_notes_lie_on_the_keyboard_and_on_the_tokenisers_grid():
    for seed in SEEDS:
        notes = piece(seed).notes
        table = rows(notes)
        assert table[:, 2].min() >= 21
        assert table[:, 2].max() <= 108
        assert set(table[:, 3].tolist()) <= {4 * k + 3 for k in range(32)}
        assert len(set(table[:, 3].tolist())) >= 10
        assert np.allclose(notes["onset"] * 100, table[:, 0], atol=1e-6)
        assert np.allclose(notes["duration"] * 100, table[:, 1], atol=1e-6)
        assert (table[:, 1] > 0).all()
        assert (table[table[:, 1] > 100][:, 1] % 5 == 0).all()
        assert (np.lexsort((table[:, 2], table[:, 0])) == np.arange(len(table))).all()


def test_a_note_ends_before_its_pitch_restarts():
    for seed in SEEDS:
        table = rows(piece(seed).notes)
        for pitch in np.unique(table[:, 2]):
            line = table[table[:, 2] == pitch]
            assert (line[:-1, 0] + line[:-1, 1] < line[1:, 0]).all()


def test_the_pedal_is_lifted_between_pushes():
    for seed in SEEDS:
        composition = piece(seed)
        down, length = hundredths(composition.pedals["time"]), hundredths(composition.pedals["duration"])
        assert len(down) > 50
        assert (length >= 10).all()
        assert down[0] >= 0
        assert (down[:-1] + length[:-1] < down[1:]).all()
        assert down[-1] + length[-1] <= hundredths(composition.seconds)


def test_sections_tile_the_piece_and_labels_follow_them():
    for seed in SEEDS:
        composition = piece(seed)
        sections = composition.sections
        assert [s.start_s for s in sections] == [0.0, *(s.end_s for s in sections[:-1])]
        assert (
            composition.seconds
            == sections[-1].end_s
            >= (composition.notes["onset"] + composition.notes["duration"]).max()
        )
        labels = composition.labels_for(composition.notes["onset"])
        assert labels.dtype == np.uint8
        assert labels.shape == composition.notes.shape
        counted = [
            sum(len(inside(composition, s)) for s in sections if min(s.return_index, 1) == k) for k in (-1, 0, 1)
        ]
        assert np.bincount(labels, minlength=3).tolist() == counted
    assert composition.labels_for([-1.0, 0.0, 1e6]).tolist() == [0, 1, 0]
    assert composition.labels_for([]).shape == (0,)


def test_a_piece_closes_with_a_tonic_chord():
    for seed in SEEDS:
        composition = piece(seed)
        table, coda = rows(composition.notes), composition.sections[-1]
        assert coda.label == "coda"
        ends = table[:, 0] + table[:, 1]
        final = table[ends > ends.max() - 30]
        name, mode = composition.title.split(" in ")[1].split(" after ")[0].rsplit(" ", 1)
        key = next(Key(t, mode == "minor") for t in range(12) if Key(t, mode == "minor").name == f"{name} {mode}")
        triad = {key.pitch(step) % 12 for step in (0, 2, 4, 6)}
        assert {pitch % 12 for pitch in final[:, 2].tolist()} <= triad
        assert final[:, 2].min() % 12 == key.tonic % 12


def test_midi_is_written_and_read_back_without_a_difference(tmp_path):
    symusic = pytest.importorskip("symusic")
    composition = piece(3)
    composition.write_midi(tmp_path / "piece.mid")
    score = symusic.Score(tmp_path / "piece.mid")
    (track,) = score.tracks
    assert score.ticks_per_quarter == 500
    assert [tempo.qpm for tempo in score.tempos] == [120.0]
    read = sorted([n.time, n.duration, n.pitch, n.velocity] for n in track.notes)
    assert read == sorted((rows(composition.notes) * np.array([10, 10, 1, 1])).tolist())
    pedals = [(hundredths(p["time"]) * 10, hundredths(p["duration"]) * 10) for p in composition.pedals]
    assert [(pedal.time, pedal.duration) for pedal in track.pedals] == pedals
    assert [path.name for path in tmp_path.iterdir()] == ["piece.mid"]


def test_the_default_tokeniser_loses_nothing():
    miditok = pytest.importorskip("miditok")
    config = miditok.TokenizerConfig(
        pitch_range=(21, 109), beat_res={(0, 2): 50, (2, 20): 10}, num_velocities=32, use_time_signatures=False
    )
    tokenizer = miditok.TSD(config)
    for seed in range(3):
        ids = tokenizer(piece(seed).to_score())[0].ids
        (track,) = tokenizer.decode([ids]).tracks  # at 50 ticks a quarter, a tick is a hundredth
        read = sorted([n.time, n.duration, n.pitch, n.velocity] for n in track.notes)
        assert read == sorted(rows(piece(seed).notes).tolist())
        assert 3.5 < len(ids) / len(read) < 4.1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seed": -1}, "seed must be an integer ≥ 0, not -1"),
        ({"seed": 1.5}, "not 1.5"),
        ({"seed": 1, "form": "sonata"}, "rondo, variations, not 'sonata'"),
        ({"seed": 1, "minutes": 0.2}, "between 1 and 30, not 0.2"),
        ({"seed": 1, "minutes": float("nan")}, "not nan"),
    ],
)
def test_what_cannot_be_composed_is_refused_by_name(arguments, words):
    with pytest.raises(ValueError, match=words):
        compose(**arguments)


@pytest.mark.parametrize("form", FORMS)
def test_the_form_can_be_chosen(form):
    assert {compose(seed, minutes=2, form=form).form for seed in range(3)} == {form}


def test_every_theme_adds_up():
    assert len(THEMES) >= 12
    for theme in THEMES:
        assert len(theme.bars()) == len(theme.roots())
        assert 8 <= len(theme.bars()) <= 16
        assert theme.source
        assert all(t.tick + t.length <= METRES[theme.metre].bar for bar in theme.bars() for t in bar)
    with pytest.raises(ValueError, match="bar 1 lasts 72 ticks, but 4/4 has 96"):
        Theme("short", "us", "4/4", False, "1q 2 3", "1").bars()
    with pytest.raises(ValueError, match="bar 1 has 'x', which is not a note"):
        Theme("odd", "us", "4/4", False, "1q x", "1").bars()
    with pytest.raises(ValueError, match="2 bars of harmony for 1"):
        Theme("odd", "us", "4/4", False, "1w", "1 | 5").roots()
