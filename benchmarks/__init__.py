"""One question a file, for pytest or as a program; `parts` is what they share. Checked first, then timed."""

import sys

from dsmr.doors import Moved

_PARTS = (
    "caches",
    "contenders",
    "decoders",
    "flex_cpu",
    "goals",
    "gpu_report",
    "gpu_worker",
    "machine",
    "models",
    "peers",
    "predictions",
    "rows",
)
sys.meta_path.append(Moved({f"{__name__}.{part}": f"{__name__}.parts.{part}" for part in _PARTS}))
