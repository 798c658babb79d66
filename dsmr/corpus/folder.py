"""Which MIDI files lie below a folder: links are followed, nothing is read twice or passed over unsaid."""

import os
from pathlib import Path

from dsmr.console.files import describe, is_temporary
from dsmr.corpus.layout import WORK

SUFFIXES = (".mid", ".midi")


def find_midi(root: Path) -> tuple[list[Path], list[tuple[str, str]]]:
    """The MIDI files at any depth below `root`, in order, and what has to be passed over: name and reason.

    Links to folders are followed, but a folder is read once however many ways lead to it, and a link that leads back
    to where `root` lies is passed over. What our own programs were writing when they were killed is no piece, and what
    they keep in hidden folders is not looked at.
    """
    found: list[Path] = []
    passed: list[tuple[str, str]] = []
    above = {_identity(folder) for folder in root.resolve().parents}
    read = {_identity(root)}
    waiting = [root]
    links: list[Path] = []  # last, so that a file goes by its own name where it has one below `root`
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        if folder is not root:
            place = _identity(folder)
            if place in above:
                passed.append((name_below(folder, root), "it is a link to a folder that holds this one"))
            if place in above or place in read:
                continue
            read.add(place)
        try:
            with os.scandir(folder) as entries:
                names = sorted(entries, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            passed.append((name_below(folder, root), f"it cannot be listed: {describe(error)}"))
            continue
        for entry in names:
            path = folder / entry.name
            if _is_folder(entry):
                if entry.name != WORK:
                    (links if entry.is_symlink() else waiting).append(path)
            elif path.suffix.lower() in SUFFIXES:
                if is_temporary(entry.name):
                    passed.append((name_below(path, root), "it is what a program was writing when it was killed"))
                elif path.is_file():
                    found.append(path)
                else:
                    what = "a link to nothing" if entry.is_symlink() else "not a file"
                    passed.append((name_below(path, root), f"it is {what}"))
    return sorted(found), sorted(passed)


def name_below(path: Path, root: Path) -> str:
    """The path below `root` as text: bytes that are not UTF-8 are written as \\xNN."""
    return os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace")


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in circles
        return False


def _identity(folder: Path) -> tuple[int, int]:
    try:
        status = folder.stat()
    except OSError:
        return (-1, hash(folder))
    return status.st_dev, status.st_ino
