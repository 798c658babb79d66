"""Damage: what disks, wires, editors and malice do to the bytes of a file, and to the values inside a JSON one.

Shared by the tests of what is promised of damaged files and by the programs that go on damaging for an hour. What is
drawn comes from a seed or from hypothesis, so that every case can be made again.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from dsmr.console.errors import UserError

WRONG: tuple[Any, ...] = (None, True, -1, 1.5, 1e400, 10**30, "", "x", [], [[]], {}, {"a": 1})
"""What may stand inside a JSON file where something else is expected."""
HOSTILE: tuple[Any, ...] = (
    *WRONG,
    0,
    1,
    2**31,
    2**63,
    -(2**63),
    1e-300,
    float("nan"),
    "\x1b[2J",
    "../x",
    "\ud800",
    [0],
)

Edit = Callable[[bytes], bytes]


def flipped(whole: bytes, place: int, bit: int) -> bytes:
    """`whole` with one bit changed."""
    data = bytearray(whole)
    data[place] ^= 1 << bit
    return bytes(data)


def damaged(rng: random.Random, whole: bytes, keep: int = 20) -> bytes:
    """`whole` with bits flipped, bytes inserted, deleted or replaced, or cut short (to no fewer than `keep` bytes)."""
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data))
        kind = rng.random()
        if kind < 0.7:
            data[at] ^= 1 << rng.randrange(8)
        elif kind < 0.8:
            del data[at : at + rng.randrange(1, 9)]
        elif kind < 0.9:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        else:
            del data[max(at, keep) :]
    return bytes(data)


def edits(length: int) -> st.SearchStrategy[list[tuple[str, int, int, bytes]]]:
    """One to four edits of a file of `length` bytes, for `edited`."""
    place, few = st.integers(0, max(length - 1, 0)), st.integers(0, 64)
    one = st.one_of(
        st.tuples(st.just("flip"), place, st.integers(0, 7), st.just(b"")),
        st.tuples(st.just("cut"), place, st.just(0), st.just(b"")),
        st.tuples(st.just("delete"), place, few, st.just(b"")),
        st.tuples(st.just("insert"), place, st.just(0), st.binary(min_size=1, max_size=16)),
        st.tuples(st.just("replace"), place, st.just(0), st.binary(min_size=1, max_size=16)),
        st.tuples(st.just("splice"), place, place, st.just(b"")),
        st.tuples(st.just("repeat"), place, few, st.just(b"")),
    )
    return st.lists(one, min_size=1, max_size=4)


def edited(whole: bytes, asked: list[tuple[str, int, int, bytes]]) -> bytes:
    """`whole` after these edits, in their order."""
    data = bytearray(whole)
    for kind, place, number, content in asked:
        at = min(place, len(data))
        if kind == "flip" and data:
            data[min(at, len(data) - 1)] ^= 1 << number
        elif kind == "cut":
            del data[at:]
        elif kind == "delete":
            del data[at : at + number]
        elif kind == "insert":
            data[at:at] = content
        elif kind == "replace":
            data[at : at + len(content)] = content
        elif kind == "splice":  # what stands elsewhere in the file takes the place of what stands here
            data[at : at + 32] = whole[number : number + 32]
        elif kind == "repeat":
            data[at:at] = data[at : at + number] * 3
    return bytes(data)


def places_to_flip(whole: bytes, flips: int, rng: random.Random) -> Iterator[tuple[int, int]]:
    """So many places and bits anywhere, and a bit of every byte of the seal and of what stands around it."""
    for _ in range(flips):
        yield rng.randrange(len(whole)), rng.randrange(8)
    for sign in (b'"seal"', b'"sum"', b'"crc"'):
        if (seal := whole.rfind(sign)) >= 0:
            for place in range(max(0, seal - 4), min(seal + 90, len(whole))):
                yield place, rng.randrange(8)


@dataclass
class Flips:
    """How many bits of a file were flipped, how many of the flips were found, and how often the file was named."""

    flips: int = 0
    found: int = 0
    named: int = 0
    first_missed: str = ""


def flip(path: Path, door: Callable[[], Any], name: str, flips: int, rng: random.Random) -> Flips:
    """Flip bits of the file at `path`, one at a time, and open it by `door`; it is whole again afterwards.

    A flip is found where a `UserError` or `ValueError` of one line says so; `name` must stand in it."""
    whole, counts = path.read_bytes(), Flips()
    door()
    try:
        for place, bit in places_to_flip(whole, flips, rng):
            path.write_bytes(flipped(whole, place, bit))
            counts.flips += 1
            try:
                door()
            except (UserError, ValueError) as error:
                counts.found += 1
                counts.named += name in str(error) and "\n" not in str(error)
            except Exception as error:
                counts.first_missed = counts.first_missed or f"byte {place}, bit {bit}: {type(error).__name__} {error}"
            else:
                counts.first_missed = counts.first_missed or f"byte {place}, bit {bit}: in silence"
    finally:
        path.write_bytes(whole)
    return counts


# Values inside JSON.


def places(value: Any, path: tuple[Any, ...] = (), most: int = 2) -> Iterator[tuple[Any, ...]]:
    """Every place in a nested value, but no more than the first `most` elements of a long list."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key), most)
    elif isinstance(value, list):
        for i in range(min(len(value), most)):
            yield from places(value[i], (*path, i), most)


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """`value` with `new` at a place."""
    if not path:
        return new
    out = dict(value) if isinstance(value, dict) else list(value)
    out[path[0]] = changed(value[path[0]], path[1:], new)
    return out


def without(value: Any, path: tuple[Any, ...]) -> Any:
    """`value` with nothing at a place (the whole of it: null)."""
    if not path:
        return None
    out = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1:
        del out[path[0]]
    else:
        out[path[0]] = without(value[path[0]], path[1:])
    return out


def spoiled(value: Any, others: st.SearchStrategy[Any] | None = None) -> st.SearchStrategy[Any]:
    """`value` with something else, or nothing, at one or two of its places; `others` are drawn among what is put."""
    where = list(places(value))
    new = st.one_of(st.sampled_from(HOSTILE), st.just(_GONE), _values(), *([] if others is None else [others]))
    one = st.tuples(st.sampled_from(where), new)
    return st.lists(one, min_size=1, max_size=2).map(lambda asked: _apply(value, asked))


_GONE = object()


def _values() -> st.SearchStrategy[Any]:
    plain = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
    return st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))


def _apply(value: Any, asked: list[tuple[tuple[Any, ...], Any]]) -> Any:
    for path, new in asked:
        try:
            value = without(value, path) if new is _GONE else changed(value, path, new)
        except (LookupError, TypeError):  # the first change took the second one's place away
            continue
    return value


def as_json(value: Any) -> bytes:
    """As a file has it that whoever wants to writes by hand: without a seal."""
    return json.dumps(value).encode()
