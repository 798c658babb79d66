"""`dsmr generate` from the outside: what it prints of the prompt, of odd names, and of what could not be written."""

import pytest
import torch
from small_scores import score_of
from typer.testing import CliRunner

pytest.importorskip("miditok")

from dsmr.cli.app import app
from dsmr.generation.pieces import Pieces
from dsmr.model.config import DSMRConfig
from dsmr.model.transformer import DSMRModel
from dsmr.music.tokenizer import vocabulary_of, write_midi


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    torch.manual_seed(0)
    words = vocabulary_of("tsd")
    config = DSMRConfig(words.size, "uniform(layers=1, horizon=16)", d_model=16, n_heads=1, segment_length=16)
    DSMRModel(config).save_pretrained(folder / "run")
    words.save(folder / "run" / "tokenizer.json")
    write_midi(folder / "long\nnotes.mid", score_of([(0.25 * at, 30.0, 60 + at % 12) for at in range(24)]))
    return folder


def generate(place, *options):
    prompt = place / "long\nnotes.mid"
    given = [str(place / "run"), "--prompt", str(prompt), "--tokens", "20", "--seed", "1", "--device", "cpu", *options]
    return CliRunner().invoke(app, ["generate", *map(str, given)])


def test_what_became_of_the_prompt_is_printed_and_names_stay_on_their_lines(place, tmp_path):
    result = generate(place, "--out", tmp_path / "odd\nname \udcff.mid", "--save-state", tmp_path / "kept\nstream")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 6
    assert lines[0].endswith(r"long\nnotes.mid: 24 notes changed: longer than 10 s (cut to it).")
    assert r"odd\nname \xff.mid: 5.8 s of prompt (24 notes), then " in lines[1]
    assert lines[2].endswith(r"odd\nname \xff-continuation.mid: the continuation alone")
    assert lines[3].endswith(r"odd\nname \xff.png: piano roll")
    assert r"kept\nstream: the stream, to be played on" in lines[5]
    assert "Warning" not in result.stderr
    assert len(list(tmp_path.iterdir())) == 4


def test_a_picture_that_cannot_be_drawn_costs_its_line_of_the_report_alone(place, tmp_path, monkeypatch):
    def fail(self, out):
        raise RuntimeError("no such font")

    monkeypatch.setattr(Pieces, "draw", fail)
    result = generate(place, "--out", tmp_path / "on.mid")
    assert result.exit_code == 1
    assert "on.mid: 5.8 s of prompt (24 notes), then " in result.stdout
    assert "on-continuation.mid: the continuation alone" in result.stdout
    assert "piano roll" not in result.stdout
    said = result.stderr.strip().splitlines()[-1]
    assert said.startswith(f"dsmr: cannot write {tmp_path / 'on.png'}: RuntimeError: no such font; not written: ")


def test_more_variations_than_anybody_hears_are_refused_at_once(place, tmp_path):
    """A milliard ran without a word until memory was full."""
    for count in ("1025", "1000000000"):
        result = generate(place, "--out", tmp_path / "on.mid", "--variations", count)
        assert result.exit_code == 2
        assert "1024" in result.stderr
    assert list(tmp_path.iterdir()) == []
