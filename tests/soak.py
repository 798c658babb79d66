"""How much of the longest tests is run: a sample that has each thing once, or, by hand, all of it.

DSMR_SOAK=full python -m pytest tests -n auto --dist worksteal -q
"""

import os

import pytest

FULL = os.environ.get("DSMR_SOAK") == "full"
BY_HAND = pytest.mark.skipif(not FULL, reason="takes minutes: DSMR_SOAK=full")
