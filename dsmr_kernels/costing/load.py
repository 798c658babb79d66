"""Whether others use the machine while it is measured: the load average against the cores, and how far rounds of one
call lie apart. Both are only signs, so that figures taken under load are marked and measured again, never dropped.
"""

import os

# Tasks of others for each core, and the distance between the quartiles over the median, above which a measurement
# counts as disturbed. A quiet machine stays below both (docs/schedules.md).
BUSY_LOAD = 0.4
BUSY_SPREAD = 0.2


def load_average() -> float | None:
    """Tasks that ran or wanted to, over the last minute; None where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def cores() -> int:
    """Of the whole machine, which is what the load average counts over."""
    return os.cpu_count() or 1


def load_of_others(before: float | None, after: float | None, ours: int) -> float | None:
    """The load that was not ours: as it was before we began, or more if it ended higher than our `ours` threads
    explain."""
    if before is None or after is None:
        return before
    return max(before, after - ours)


def is_busy(load: float | None, cores: int) -> bool:
    """Whether so much load of others disturbs a measurement; an unknown load does not."""
    return load is not None and cores > 0 and load > BUSY_LOAD * cores


def in_words(load: float, cores: int) -> str:
    """ "a load average of 3.1 on 2 cores" """
    return f"a load average of {load:.1f} on {cores} {'core' if cores == 1 else 'cores'}"
