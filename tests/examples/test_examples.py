"""The examples run as they stand, and show what they say they show."""

import difflib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from soak import FULL

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch):
    """An example as a module, by its name; skipped where a package is missing that it is about."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str, *packages: str) -> ModuleType:
        for package in packages:
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"needs {package}, which is not installed")
        return importlib.import_module(name)

    yield load
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_every_example_is_on_the_page() -> None:
    page = (ROOT / "docs" / "into-my-model.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f"examples/{path.name}" in page


def test_the_diff_on_the_page_is_that_of_the_two_files_and_about_ten_lines() -> None:
    old, new = (
        (EXAMPLES / name).read_text(encoding="utf-8").splitlines() for name in ("nanogpt.py", "nanogpt_recurrent.py")
    )
    lines = [
        line for line in difflib.unified_diff(old, new, n=0, lineterm="") if not line.startswith(("---", "+++", "@"))
    ]
    written = [line for line in lines if line.startswith("+") and line[1:].strip()]
    assert len(written) <= 12  # two of them its docstring
    page = (ROOT / "docs" / "into-my-model.md").read_text(encoding="utf-8")
    shown = re.search(r"```diff\n(.*?)```", page, re.DOTALL)
    assert shown is not None
    for line in shown[1].splitlines():
        assert line in lines or line.startswith(" "), line
    code = [line for line in written if "returning_text" not in line and '"""' not in line]
    assert all(line in shown[1].splitlines() for line in code)


@pytest.mark.soak  # trains two small models, a quarter of a minute
def test_a_memory_knows_what_returns_beyond_the_segment(example) -> None:
    plain, recurrent = example("nanogpt").main(steps=600 if FULL else 300), example("nanogpt_recurrent").main()
    assert plain > 2.6  # the logarithm of 16 letters is 2.77: nothing can be known
    assert recurrent < plain - 0.2


@pytest.mark.slow  # trains a few steps
def test_a_stack_of_blocks_in_sequential(example) -> None:
    seen, nbytes = example("sequential").main()
    assert seen == 12 * 128
    assert nbytes == 2 * 2 * 16 * 4 * (512 + 64) * 2  # k and v, KV heads, head_dim, float32, both horizons, two rows


@pytest.mark.slow  # imports Transformers
def test_a_llama_generates_in_a_cache_that_does_not_grow(example) -> None:
    before, after = example("llama_two_scale", "transformers").main()
    assert before == after


@pytest.mark.slow  # trains a few steps, three times
def test_a_trainer_goes_on_with_the_memory_of_its_checkpoint(example) -> None:
    whole, parts, memory = example("hf_trainer", "transformers", "accelerate").main()
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))
    assert memory.phase == (30 - 24) * 32  # of the second epoch


@pytest.mark.slow  # trains a few steps, three times
def test_lightning_goes_on_with_the_memory_of_its_checkpoint(example) -> None:
    whole, parts = example("lightning_stream", "lightning").main()
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), parts.parameters(), strict=True))


@pytest.mark.slow  # trains a few steps
def test_accelerate_goes_back_to_the_memory_that_it_saved(example) -> None:
    first, again = example("accelerate_loop", "accelerate").main()
    assert all(map(torch.equal, first, again))


@pytest.mark.slow  # trains a few steps
def test_adapters_learn_are_heard_and_merge(example) -> None:
    losses, (alone, adapted, merged) = example("lora", "peft").main()
    assert losses[0] > 2.6  # of sixteen letters
    assert losses[-1] < 2.0  # of four 1.39
    assert alone != adapted == merged
