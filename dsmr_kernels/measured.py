"""Files of what was measured on one machine: read by whoever it concerns, and refused in one sentence elsewhere.

`dsmr_kernels.tools.tune` writes them. A file says in plain JSON of which format it is and what it was made on; only
what agrees with the present machine is used.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

Read = TypeVar("Read")
SUM = "sum"


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` with the sum of all of it, which `is_whole` checks: for what a program must not misread."""
    rest = {key: value for key, value in content.items() if key != SUM}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return {**rest, SUM: f"sha256:{digest}"}


def is_whole(content: Any) -> bool:
    """Whether what was read is what was `sealed`; also what earlier versions wrote, without a sum."""
    if not isinstance(content, dict):
        return False
    if not any(key == SUM or (isinstance(text, str) and text.startswith("sha256:")) for key, text in content.items()):
        return True
    try:
        return sealed(content).get(SUM) == content.get(SUM)
    except (ValueError, RecursionError):  # text that no file can hold
        return False


def read_measured(
    path: str | os.PathLike[str],
    what: str,
    version: int,
    machine: Mapping[str, str],
    words: Mapping[str, str],
    again: str,
    entries: Callable[[dict[str, Any]], Read],
) -> Read:
    """What `entries` makes of a file's content, once it is known to fit.

    Args:
        path: the file.
        what: it holds, in the plural, for errors.
        version: the format that it must be of.
        machine: what it must agree with, by key.
        words: for each key that must agree, how an error goes on after "made".
        again: the command that makes a new one.
        entries: raises KeyError, TypeError or ValueError where the content is damaged.

    Raises:
        ValueError: in one sentence, if the file is missing, damaged, or was made for something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"{what} {path} cannot be read: {reason}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} {path} are damaged: not JSON, {error}") from error
    if not isinstance(content, dict) or content.get("format") != version:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{what} {path} must be of format {version}, got {found!r}")
    if not is_whole(content):
        raise ValueError(f"{what} {path} are damaged: they are not what was written (SHA-256); run `{again}` again")
    for key, said in words.items():
        if content.get(key) != machine[key]:
            raise ValueError(
                f"{what} {path} are stale: made {said} {content.get(key)!r}, here is {machine[key]!r}; "
                f"run `{again}` again"
            )
    try:
        return entries(content)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{what} {path} are damaged: {said}") from error
