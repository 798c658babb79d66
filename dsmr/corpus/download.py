"""Fetching one large file: resumed where it broke off, checked, and there only when it is whole."""

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dsmr.console.errors import UserError
from dsmr.console.files import describe

CHUNK = 1 << 18
TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 5  # in a row that bring nothing new
PAUSE = 1.0  # seconds before the second attempt, doubled each time


def fetch(url: str, target: Path, sha256: str, progress: bool = True) -> Path:
    """Fetch `url` to `target` and check its digest; returns `target`.

    Bytes are collected in `target` + ".part". A connection that breaks is taken up again at the byte where it broke,
    now and in a later call. A `target` with the right digest is kept as it is. Raises `UserError` if the server cannot
    be reached (the part stays), if the digest is wrong (the part is removed), or if `target` is another file.
    """
    if target.is_file():
        if _digest(target) == sha256:
            return target
        raise UserError(f"{target} is not the file at {url}, which would overwrite it: move it, or name another")
    part = target.with_name(target.name + ".part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with _Bar(target.name) if progress else nullcontext(lambda done, total: None) as show:
            _collect(url, part, show)
        found = _digest(part)
        if found != sha256:
            part.unlink()
            raise UserError(f"{url} is not what it should be: its SHA-256 is {found}, expected {sha256}")
        os.replace(part, target)
    except OSError as error:
        raise UserError(f"cannot write {part}: {describe(error)}") from error
    return target


def _collect(url: str, part: Path, show: Any) -> None:
    """Append to `part` until it is complete, through broken connections."""
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        reason = _attempt(url, part, show)
        if reason is None:
            return
        gained = part.exists() and part.stat().st_size > before
        failures = 1 if gained else failures + 1
        if failures >= ATTEMPTS:
            size = part.stat().st_size if part.exists() else 0
            raise UserError(f"cannot fetch {url}: {reason}; {size:,} bytes are kept, the next try goes on from there")
        time.sleep(PAUSE * 2 ** (failures - 1))


def _attempt(url: str, part: Path, show: Any) -> str | None:
    """One connection; returns None when the file is complete, else why it is not."""
    have = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            if have and response.status != 206:  # the server does not resume: from the beginning
                have = 0
            elif have and not str(response.headers.get("Content-Range", "")).startswith(f"bytes {have}-"):
                part.unlink()
                return "the server resumed at another byte"
            length = response.headers.get("Content-Length")
            total = have + int(length) if length is not None else None
            with open(part, "ab" if have else "wb") as file:
                while chunk := _read(response):
                    file.write(chunk)
                    have += len(chunk)
                    show(have, total)
            if total is not None and have < total:
                return f"the connection broke after {have:,} of {total:,} bytes"
            return None
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing after what we have: complete, or not this file (the digest will tell)
            return None
        if error.code < 500 and error.code not in (408, 429):
            raise UserError(f"cannot fetch {url}: the server answers {error.code} {error.reason}") from error
        return f"the server answers {error.code} {error.reason}"
    except urllib.error.URLError as error:
        return str(error.reason)
    except (_BrokenError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        return str(error) or type(error).__name__
    except ValueError as error:
        raise UserError(f"cannot fetch {url}: {error}") from error


class _BrokenError(Exception):
    """The connection failed, as against the disk."""


def _read(response: Any) -> bytes:
    try:
        return bytes(response.read1(CHUNK))
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenError(str(error) or type(error).__name__) from error


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Bar:
    """A progress bar in bytes on stderr: a context manager that yields `show(done, total)`."""

    def __init__(self, name: str) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

        from dsmr.console.screen import Screen, described

        columns = (described(), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Screen(stderr=True))
        self._task = self._progress.add_task(f"fetching {name}", total=None)

    def __enter__(self) -> Any:
        self._progress.start()
        return lambda done, total: self._progress.update(self._task, completed=done, total=total)

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
