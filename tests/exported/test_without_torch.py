"""An exported model plays where PyTorch cannot be imported, and says what is missing where something is."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from small_export import small_run

import dsmr.export
from dsmr.cli.app import app
from dsmr.console.errors import UserError
from dsmr.console.files import read_json, write_json
from dsmr.export.write import export_run
from dsmr.exported.about import sum_of
from dsmr.exported.model import ExportedModel

ROOT = Path(__file__).resolve().parents[2]

# The beginning of a program whose Python finds none of some packages.
WITHOUT = "import sys\nsys.modules |= dict.fromkeys({missing!r})\n"
TORCH = ("torch", "dsmr_kernels", "onnx", "triton")


def python(code: str, missing: tuple[str, ...] = TORCH) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", WITHOUT.format(missing=missing) + code]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def program(*arguments: object, missing: tuple[str, ...] = TORCH) -> subprocess.CompletedProcess[str]:
    """`dsmr` with these arguments."""
    return python(f"sys.argv = {['dsmr', *map(str, arguments)]!r}\nfrom dsmr.cli import main\nmain()", missing)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("without")
    small_run(out / "run")
    export_run(out / "run", out / "export")
    return out


@pytest.mark.slow
def test_a_player_needs_no_torch(folder):
    code = f"""
from dsmr.generation import Player, Sampling
from dsmr.generation.engines import load_run
from dsmr.generation.saved_stream import load_player, save_player

model, words = load_run({str(folder / "export")!r})
player = Player.begin(model, [words.bos_id], Sampling(seed=1), words)
print([token for (token,) in player.play(30)])
save_player({str(folder / "stream")!r}, player)
print([token for (token,) in load_player({str(folder / "stream")!r}, model, words).play(30)])
import dsmr.live.performance, dsmr.live.ports, dsmr.generation.continuation, dsmr.music.pianoroll
print(sys.modules["torch"])
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    first, then, loaded = done.stdout.splitlines()
    assert len(json.loads(first)) == len(json.loads(then)) == 30
    assert loaded == "None"


@pytest.mark.slow
def test_the_programs_need_no_torch(tmp_path):
    """From a MIDI file to MIDI files, and the same notes as with PyTorch."""
    pytest.importorskip("miditok")
    from dsmr.composer.compose import compose
    from dsmr.generation.continuation import continue_piece
    from dsmr.generation.drawing import Sampling
    from dsmr.music.tokenizer import vocabulary_of

    words = vocabulary_of("tsd")
    small_run(tmp_path / "run", vocab_size=words.size)
    words.save(tmp_path / "run" / "tokenizer.json")
    made = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--out", str(tmp_path / "export")])
    assert made.exit_code == 0, made.output
    assert "weights in float32, memory in float32" in made.stdout
    compose(3, minutes=1.0).write_midi(tmp_path / "piece.mid")
    how = ("--prompt", tmp_path / "piece.mid", "--prompt-seconds", 8, "--tokens", 60, "--seed", 1, "--realtime")
    done = program("generate", tmp_path / "export", *how, "--out", tmp_path / "a.mid", "--stream")
    assert done.returncode == 0, done.stderr
    assert "weights in float32" in done.stdout
    sampling = Sampling(seed=1, top_p=0.98)
    continue_piece(
        tmp_path / "run", tmp_path / "piece.mid", tmp_path / "b.mid", prompt_seconds=8, tokens=60, sampling=sampling
    )
    assert (tmp_path / "a.mid").read_bytes() == (tmp_path / "b.mid").read_bytes()
    refused = program("generate", tmp_path / "run", *how, "--out", tmp_path / "c.mid")
    assert refused.returncode == 1
    assert re.fullmatch(r"dsmr: .*run is played by PyTorch, which is not installed: .*dsmr export.*\n", refused.stderr)


@pytest.mark.slow
def test_what_is_missing_is_a_sentence(folder, monkeypatch):
    done = program("play", folder / "export", "--virtual", "--tokens", 5, missing=(*TORCH, "onnxruntime"))
    assert done.returncode == 1
    assert re.fullmatch(r"dsmr: playing an exported model needs ONNX Runtime.*dsmr\[onnx\]'\n", done.stderr)
    done = program("export", folder / "run", "--out", folder / "other")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("dsmr: this command needs PyTorch, which is not installed")
    monkeypatch.delitem(sys.modules, "dsmr.export.build")
    monkeypatch.delattr(dsmr.export, "build")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"exporting needs onnx, which is not installed: pip install 'dsmr\[onnx\]'"):
        export_run(folder / "run", folder / "other")
    assert not (folder / "other").exists()


def test_a_runtime_that_computes_otherwise_is_a_sentence(folder, tmp_path, capfd):
    """Whatever a graph does where an operator means something else: it is tried before it plays."""
    export_run(folder / "run", tmp_path)
    about = read_json(tmp_path / "export.json")
    about["trial"]["logits"][3] += 0.1
    write_json(tmp_path / "export.json", about, sealed=True)
    with pytest.raises(UserError, match=r"model\.onnx gives other numbers here .* again, if need be with --portable"):
        ExportedModel.load(tmp_path)
    about["made_with"]["onnxruntime"] = "1.2.3"
    write_json(tmp_path / "export.json", about, sealed=True)
    with pytest.raises(UserError, match=r"tried with ONNX Runtime 1\.2\.3, this is .*: install that one, or export it"):
        ExportedModel.load(tmp_path)
    graph = (tmp_path / "model.onnx").read_bytes()
    for other in (b"GroupQueryAttentiom", b"GroupQueryAttentio\xe4"):
        (tmp_path / "model.onnx").write_bytes(graph.replace(b"GroupQueryAttention", other))
        write_json(tmp_path / "export.json", {**about, "file": sum_of(tmp_path / "model.onnx")}, sealed=True)
        with pytest.raises(UserError, match=r"model\.onnx cannot be opened: .* --portable"):
            ExportedModel.load(tmp_path)
    (tmp_path / "model.onnx").write_bytes(graph)
    about |= {"file": sum_of(tmp_path / "model.onnx"), "head_dim": about["head_dim"] * 2}
    write_json(tmp_path / "export.json", about, sealed=True)
    with pytest.raises(
        UserError, match=r"its layer 0 remembers \S+ \[1, \d+, \d+, (\d+)\], by the latter \S+ \[1, "
    ) as caught:
        ExportedModel.load(tmp_path)
    found, told = re.findall(r"(\d+)\]", str(caught.value))
    assert int(told) == 2 * int(found)
    # The second name makes the runtime's own sentence no UTF-8: it would print that, and try the same once more.
    assert capfd.readouterr().out == ""


def test_what_a_player_needs_is_what_the_package_names():
    """`requirements-player.txt` asks for nothing that `setup.py` does not, and for no PyTorch."""
    known = (ROOT / "setup.py").read_text(encoding="utf-8")
    lines = (ROOT / "requirements-player.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert all(f'"{name}>=' in known for name in wanted)
    assert "onnxruntime" in wanted
    assert not {"torch", "onnx", "triton"} & set(wanted)
