"""What is rendered is what stands in the score: pitch, moments, pedal; nothing clipped, nothing half written."""

import wave
from pathlib import Path

import numpy as np
import pytest
from small_soundfont import HERTZ, write_soundfont
from typer.testing import CliRunner

from dsmr.cli.app import app
from dsmr.console.errors import UserError
from dsmr.music.sound import find_soundfont, render

pytest.importorskip("tinysoundfont")
symusic = pytest.importorskip("symusic")

A_SECOND = 960  # ticks at 120 quarters a minute


@pytest.fixture(scope="module")
def font(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_soundfont(tmp_path_factory.mktemp("font") / "sine.sf2")


def score(*notes: tuple[float, float, int, int], pedals: tuple[tuple[float, float], ...] = ()):
    """Of (second, seconds, pitch, velocity)."""
    made = symusic.Score(A_SECOND // 2)
    track = symusic.Track()
    for begin, length, pitch, velocity in notes:
        track.notes.append(symusic.Note(round(begin * A_SECOND), round(length * A_SECOND), pitch, velocity))
    for begin, length in pedals:
        track.pedals.append(symusic.Pedal(round(begin * A_SECOND), round(length * A_SECOND)))
    made.tracks.append(track)
    return made


def heard(path: Path) -> tuple[np.ndarray, int]:
    """Samples of the left channel in -1 … 1, and their rate."""
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth()) == (2, 2)
        data = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").reshape(-1, 2)
        return data[:, 0] / 32768, file.getframerate()


def loudness(samples: np.ndarray, rate: int, begin: float, end: float) -> float:
    return float(np.sqrt(np.mean(samples[round(begin * rate) : round(end * rate)] ** 2)))


@pytest.mark.parametrize(("pitch", "hertz"), [(60, HERTZ), (72, 2 * HERTZ)])
def test_a_note_sounds_at_its_pitch_and_its_moment(pitch: int, hertz: float, font: Path, tmp_path: Path) -> None:
    done = render(score((0.5, 1.0, pitch, 100)), tmp_path / "note.wav", font, rate=22050)
    samples, rate = heard(done.path)
    assert done.seconds == pytest.approx(len(samples) / rate)
    assert loudness(samples, rate, 0, 0.49) == 0
    sounding = samples[round(0.6 * rate) : round(1.4 * rate)]
    found = np.abs(np.fft.rfft(sounding * np.hanning(len(sounding)))).argmax() * rate / len(sounding)
    assert found == pytest.approx(hertz, rel=0.01)
    assert loudness(samples, rate, len(samples) / rate - 0.1, len(samples) / rate) < 1e-3  # it has died away


def test_the_pedal_holds_what_the_hand_lets_go(font: Path, tmp_path: Path) -> None:
    held = render(score((0, 0.5, 60, 100), pedals=((0.1, 2.0),)), tmp_path / "held.wav", font)
    dry = render(score((0, 0.5, 60, 100)), tmp_path / "dry.wav", font)
    (with_pedal, rate), (without, _) = heard(held.path), heard(dry.path)
    assert loudness(with_pedal, rate, 1.0, 2.0) > 0.01
    assert loudness(without, rate, 0.75, 1.0) == 0
    assert loudness(with_pedal, rate, 0.1, 0.4) == pytest.approx(loudness(without, rate, 0.1, 0.4), rel=1e-3)


def test_a_key_struck_again_sounds_on_to_the_second_end(font: Path, tmp_path: Path) -> None:
    done = render(score((0, 1.0, 60, 90), (0.5, 2.0, 60, 90)), tmp_path / "again.wav", font)
    samples, rate = heard(done.path)
    assert loudness(samples, rate, 1.5, 2.4) > 0.01


def test_what_is_too_loud_is_turned_down_and_not_clipped(tmp_path: Path) -> None:
    loud = write_soundfont(tmp_path / "loud.sf2", loudness=1.0)
    chord = [(0.0, 1.0, pitch, 127) for pitch in range(40, 90)]
    done = render(score(*chord), tmp_path / "chord.wav", loud)
    samples, _ = heard(done.path)
    assert done.gain < -3
    assert 0.9 < np.abs(samples).max() < 0.99
    assert "turned down by" in done.sentence


def test_a_piece_without_notes_is_silence(font: Path, tmp_path: Path) -> None:
    samples, _ = heard(render(score(), tmp_path / "none.wav", font).path)
    assert not samples.any()


def test_the_command_writes_beside_the_file_and_refuses_in_a_sentence(
    font: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    midi = tmp_path / "piece.mid"
    score((0, 1.0, 60, 100)).dump_midi(midi)
    result = CliRunner().invoke(app, ["render", str(midi), "--soundfont", str(font)])
    assert result.exit_code == 0, result.output
    assert heard(tmp_path / "piece.wav")[0].any()
    no_font = tmp_path / "no.sf2"
    no_font.write_bytes(b"RIFF none")
    for words, said in (
        (["--soundfont", str(no_font)], "is no SoundFont"),
        (["--soundfont", str(tmp_path / "missing.sf2")], "there is no SoundFont"),
        (["--soundfont", str(font), "--rate", "7"], "sampling rate"),
        (["--soundfont", str(font), "--out", str(midi)], "would be overwritten"),
        (["--soundfont", str(font), "--out", str(font)], "would be overwritten"),
        (["--soundfont", str(font), "--program", "5"], "instrument 5"),
    ):
        (tmp_path / "piece.wav").unlink(missing_ok=True)
        result = CliRunner().invoke(app, ["render", str(midi), *words])
        assert result.exit_code == 1, (words, result.output)
        assert isinstance(result.exception, SystemExit)
        assert said in " ".join(result.output.replace("│", " ").split())
        assert not (tmp_path / "piece.wav").exists()
    monkeypatch.setenv("DSMR_SOUNDFONT", str(font))
    assert find_soundfont() == font
    monkeypatch.delenv("DSMR_SOUNDFONT")
    monkeypatch.setattr("dsmr.music.sound.PLACES", ())
    with pytest.raises(UserError, match="timgm6mb-soundfont"):
        find_soundfont()


def test_music_longer_than_a_wav_file_can_hold_is_refused_before_it_is_played(font: Path, tmp_path: Path) -> None:
    """The format counts bytes in 32 bits: six and three quarter hours at 44,100 samples a second."""
    told: list[float] = []
    long = score((0, 1.0, 60, 90), (30_000.0, 1.0, 60, 90))
    with pytest.raises(UserError, match=r"30,001 seconds long, and .* 44,100 samples a second holds 24,336: .* rate"):
        render(long, tmp_path / "long.wav", font, progress=lambda done, total: told.append(done))
    assert not told
    assert not list(tmp_path.iterdir())
