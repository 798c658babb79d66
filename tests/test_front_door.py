"""The front doors: what they offer, that they open at once, and that nothing a user typed before fails unexplained."""

import importlib
import importlib.metadata
import subprocess
import sys

import pytest

import dsmr
import dsmr.cli


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_the_front_door_offers_what_it_names() -> None:
    assert dsmr.__all__ == [
        "DSMRAttention",
        "DSMRConfig",
        "DSMRModel",
        "DSMRState",
        "MemorySchedule",
        "MemoryState",
        "RecurrentAttention",
        "replace_attention",
        "stream",
    ]
    for name in dsmr.__all__:
        assert getattr(dsmr, name).__name__ == name
    with pytest.raises(ImportError, match="cannot import name 'Nothing' from 'dsmr'"):
        exec("from dsmr import Nothing")


@pytest.mark.slow
def test_importing_dsmr_costs_nothing_beside_what_is_used() -> None:
    assert _run("import sys, dsmr; print([m for m in ('torch', 'numpy', 'dsmr_kernels') if m in sys.modules])") == "[]"
    code = "import torch, time; begin = time.perf_counter(); import dsmr; print(time.perf_counter() - begin)"
    assert min(float(_run(code)) for _ in range(3)) < 0.05


OLD_MODULES = [
    "attention",
    "positions",
    "schedule",
    "state",
    "data",
    "data.corpus",
    "data.tokenizer",
    "loader",
    "pianoroll",
    "sounding",
    "musical_progress",
    "errors",
    "files",
    "devices",
    "terminal",
    "progress",
    "stopping",
    "plots",
    "checkpoint",
    "settings",
    "sampling",
    "continuation",
    "saved_stream",
    "recorder",
    "stepping",
    "stepping.weights",
    "ngram",
    "play",
    "ports",
    "performance",
    "pacing",
    "side_by_side",
    "budget",
    "demo_corpus",
    "demo_figures",
    "cli_train",
    "cli_play",
    "cli_profile",
]


@pytest.mark.parametrize("name", OLD_MODULES)
def test_a_module_that_moved_says_where_it_is(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"^dsmr\.\w+ is now dsmr\.\w+") as caught:
        importlib.import_module(f"dsmr.{name}")
    assert caught.value.name is not None
    for word in str(caught.value).split(" is now ")[1].replace(",", " ").split():
        if word.startswith("dsmr."):
            importlib.import_module(word)


OLD_NAMES = {
    "dsmr.model": ["Block", "DSMRConfig", "DSMRModel", "DSMROutput"],
    "dsmr.generation": ["Limits", "Player", "Sampling", "stream"],
    "dsmr.evaluation": ["EvaluationReport", "evaluate", "evaluate_run", "piece_losses"],
    "dsmr.training": ["TrainResult", "train"],
    "dsmr.demo": ["DemoSize", "run_demo"],
    "dsmr.cli": ["main"],
    "dsmr.corpus": ["Corpus"],
    "dsmr.music": ["Vocabulary"],
}


@pytest.mark.parametrize("room", OLD_NAMES)
def test_a_room_named_like_a_former_module_offers_what_that_offered(room: str) -> None:
    for name in OLD_NAMES[room]:
        assert callable(getattr(importlib.import_module(room), name))


def test_a_command_that_moved_says_where_it_is() -> None:
    done = subprocess.run([sys.executable, "-m", "dsmr.play"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "dsmr.play is now dsmr.live.play" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_console_script_is_the_program() -> None:
    try:
        scripts = importlib.metadata.entry_points(group="console_scripts", name="dsmr")
        (script,) = {script.value: script for script in scripts}.values()
    except ValueError:
        pytest.skip("dsmr is not installed here")
    assert script.load() is dsmr.cli.main
