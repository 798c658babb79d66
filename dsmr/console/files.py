"""Files that are either whole or absent: every file that the programs write goes through a temporary sibling."""

import contextlib
import hashlib
import json
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsmr.console import seal
from dsmr.console.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def describe(error: OSError) -> str:
    """The reason of an `OSError` in words, without its number and file name."""
    return (error.strerror or str(error)).lower()


LARGEST_JSON = 1 << 29  # bytes; a million pieces' names take a tenth of it


def _mark(process: int | str) -> str:
    """What the name of a temporary file says of who is writing it: the machine and the process."""
    return f"{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]}-{process}"


_TEMPORARY = re.compile(r"\..*-[a-z0-9_]{8}(\.part)?(\.[^.]*)?", re.DOTALL)
_swept: set[Path] = set()  # what this process has swept behind


def is_temporary(name: str) -> bool:
    """Whether a file of this name is what `atomic_path` (of this version or an earlier one) was writing."""
    return _TEMPORARY.fullmatch(name) is not None


def sweep(path: str | os.PathLike[str]) -> None:
    """Delete what killed processes of this machine had not finished writing beside `path`; never an error."""
    target = Path(path)
    if sys.platform == "win32":  # no harmless way to ask whether a process lives
        return
    begins, ends = re.escape(f".{target.stem[:40]}-{_mark('')}"), re.escape(target.suffix)
    ours = re.compile(rf"{begins}(\d+)-[a-z0-9_]{{8}}\.part{ends}")
    with contextlib.suppress(OSError):
        for name in os.listdir(target.parent):
            if (found := ours.fullmatch(name)) and not _lives(int(found[1])):
                (target.parent / name).unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path` in one step, on any error it disappears.

    A reader therefore sees the old file or the new one, never half of one, also when the process is killed or the
    disk fills up. A symbolic link stays one: what it points to is replaced. Raises `UserError` naming `path` if the
    folder cannot be written or the disk is full. What an earlier process was writing to `path` when it was killed is
    deleted on the way.
    """
    target = Path(path)
    temporary: Path | None = None
    try:
        if target.is_symlink():
            target = Path(os.path.realpath(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        if target not in _swept:
            _swept.add(target)
            sweep(target)
        # Cut, because a name as long as the file system allows could not be made longer.
        prefix = f".{target.stem[:40]}-{_mark(os.getpid())}-"
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=prefix, suffix=f".part{target.suffix}")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {describe(error)}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """`UserError` if no file can be written at `path`: to be asked before long work. Leaves nothing behind."""
    target = Path(path)
    try:
        if target.is_dir():
            raise UserError(f"cannot write {target}: it is a folder, not a file name")
        folder = target.parent
        while not folder.exists():  # missing folders are made when the file is written
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"?")
            probe.flush()
    except OSError as error:
        raise UserError(f"cannot write {target}: {describe(error)}") from error


def check_apart(
    outputs: Iterable[str | os.PathLike[str] | None], inputs: Mapping[str, str | os.PathLike[str] | None]
) -> None:
    """`UserError` if an output is an input or another output, whatever their names: to be asked before any work.

    `inputs` are named as a sentence calls them: "the prompt".
    """
    named = [Path(path) for path in outputs if path is not None]
    for place, path in enumerate(named):
        for what, given in inputs.items():
            if given is not None and _same(path, Path(given)):
                raise UserError(f"{path} is {what} itself, which would be overwritten: choose another file")
        for other in named[:place]:
            if _same(path, other):
                raise UserError(f"{path} is named for two results ({other} is the same file): choose another file")


def check_replaceable(path: str | os.PathLike[str] | None, what: str = "JSON") -> None:
    """`UserError` if something else than `what` lies at `path`, where the user has a result written: before any work.

    A slip of the hand (`--json song.mid`) would otherwise cost what cannot be made again. How a file begins tells what
    it is: a damaged result can be written anew. `what` is one of `BEGINNINGS`; an empty file is nobody's.
    """
    if path is None:
        return
    target = Path(path)
    try:
        if not target.exists() or target.is_dir():  # of a folder `check_writable` and the writing say more
            return
        if not target.is_file():
            raise UserError(f"cannot write {target}: it is no ordinary file")
        with open(target, "rb") as file:
            head = file.read(256)
    except OSError as error:
        raise UserError(f"cannot read {target}, which would be replaced: {describe(error)}") from error
    if head and not BEGINNINGS[what].match(head):
        raise UserError(f"{target} is there already and is not {what}: choose another file, or delete it first")


BEGINNINGS = {
    "JSON": re.compile(rb"(\xef\xbb\xbf)?\s*([{\[]|$)"),
    "a Chrome trace": re.compile(rb"\s*[{\[]|\x1f\x8b"),  # also packed by gzip, as `*.gz`
    "a packed corpus": re.compile(rb"PK\x03\x04.{26}manifest\.json", re.DOTALL),  # its first member
}
"""What files of a kind begin with, for `check_replaceable`."""


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them is not there yet
        return os.path.realpath(one) == os.path.realpath(other)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any, *, sealed: bool = False) -> None:
    """Write `value` to `path` as indented JSON, whole or not at all.

    A `sealed` object, or the first of a list of them, carries the sum of the file, which `read_json` checks.
    """
    if sealed and isinstance(value, list):
        value = [{seal.NAME: seal.BLANK, **one} if place == 0 else one for place, one in enumerate(value)]
        sealed = bool(value)
    elif sealed:
        value = {seal.NAME: seal.BLANK, **value}
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        text = json.dumps(value, indent=2)  # a file name that is not UTF-8: it comes back from its escapes
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
        if sealed:
            seal.seal(temporary)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file, its seal checked and taken away; `UserError` if it is missing, damaged or not JSON."""
    try:
        if Path(path).stat().st_size > LARGEST_JSON:
            raise UserError(f"{path} is too large: more than {LARGEST_JSON >> 20} MiB of JSON")
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if seal.check_seal(path):
            holder = value[0] if isinstance(value, list) and value else value
            if isinstance(holder, dict):
                holder.pop(seal.NAME, None)
        return value
    except OSError as error:
        raise UserError(f"cannot read {path}: {describe(error)}") from error
    except ValueError as error:
        raise UserError(f"{path} is not a JSON file: {error}") from error
    except RecursionError as error:
        raise UserError(f"{path} is not a JSON file of ours: it is nested too deeply") from error


def save_tensors(path: str | os.PathLike[str], tensors: "dict[str, Tensor]", metadata: dict[str, str]) -> None:
    """Write tensors to `path` (safetensors, sealed), whole or not at all; `UserError` if the disk is full."""
    from safetensors.torch import save_file

    _save(path, save_file, tensors, metadata)


def save_arrays(path: str | os.PathLike[str], arrays: "Mapping[str, Any]", metadata: dict[str, str]) -> None:
    """`save_tensors` for numpy arrays, among which there may be tensors; without any, PyTorch is not needed."""
    import numpy as np

    if all(isinstance(array, np.ndarray) for array in arrays.values()):
        from safetensors.numpy import save_file

        _save(path, save_file, {name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata)
        return
    import torch

    tensors = {name: x if isinstance(x, torch.Tensor) else torch.from_numpy(x.copy()) for name, x in arrays.items()}
    save_tensors(path, tensors, metadata)


def _save(path: str | os.PathLike[str], write: Any, values: Any, metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError

    with atomic_path(path) as temporary:
        try:
            write(values, temporary, {**metadata, seal.NAME: seal.BLANK})
            _order_metadata(temporary)
            seal.seal(temporary)
        except SafetensorError as error:  # its own kind of error, also for a full disk
            raise UserError(f"cannot write {path}: {error}") from error


def _order_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order, in place: the library writes them in another one every time."""
    begin = b'{"__metadata__":'
    with open(path, "rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        if not header.startswith(begin):
            return
        text = header[len(begin) :].decode()
        metadata, end = json.JSONDecoder().raw_decode(text)
        ordered = json.dumps(metadata, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
        if len(ordered) == len(text[:end].encode()):
            file.seek(8 + len(begin))
            file.write(ordered)
