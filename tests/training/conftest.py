"""What the tests of training read."""

from pathlib import Path

import pytest
from tiny_corpus import tiny_corpus


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny corpus."""
    path = tmp_path_factory.mktemp("data") / "corpus"
    tiny_corpus(path, train=9)
    return path
