"""The tokens of a stream are a sequence however many they are, and take no memory that grows."""

import tempfile

import numpy as np
import pytest

from dsmr.generation.heard import CHUNK, Heard


@pytest.mark.parametrize("count", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_all_tokens_are_there_in_their_order(count: int) -> None:
    tokens = np.random.default_rng(count).integers(0, 2**31 - 1, count).tolist()
    kept = Heard(tokens[: count // 2])
    for token in tokens[count // 2 :]:
        kept.append(token)
    assert len(kept) == count
    assert list(kept) == tokens
    assert np.array(kept).dtype == np.int32
    assert np.array(kept, dtype=np.int64).tolist() == tokens
    kept.append(5)  # having been read does not disturb the writing
    assert list(kept) == [*tokens, 5]


@pytest.mark.parametrize("read", [5, 3 * CHUNK + 5])
def test_what_is_read_while_it_grows_is_whole_as_of_a_list(read: int) -> None:
    kept = Heard(range(3 * CHUNK + 10))  # so that reading stops in the file, or in what is not written yet
    reading = iter(kept)
    first = [next(reading) for _ in range(read)]
    for token in range(2 * CHUNK):
        kept.append(token)
    assert [*first, *reading] == list(kept) == [*range(3 * CHUNK + 10), *range(2 * CHUNK)]


def test_memory_does_not_grow_with_the_stream_and_the_file_is_written_a_chunk_at_a_time() -> None:
    kept = Heard()
    stored = set()
    for token in range(50 * CHUNK):
        kept.append(token)
        assert len(kept._newest) < CHUNK
        stored.add(kept._stored)
    assert len(kept) == 50 * CHUNK
    assert stored == {CHUNK * number for number in range(51)}


def test_it_is_an_array_only_by_copying() -> None:
    assert np.array(Heard(range(5)), dtype=np.int64).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="only by copying"):
        np.array(Heard(range(5)), copy=False)


def test_where_no_file_can_be_made_nothing_is_lost_and_it_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def full(*_, **__):
        tried.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert list(Heard(range(3 * CHUNK))) == list(range(3 * CHUNK))
    assert tried == [1]


@pytest.mark.parametrize("fails", ["write", "flush"])
def test_where_the_disk_fills_up_nothing_is_lost(fails: str) -> None:
    kept = Heard(range(2 * CHUNK + 3))

    class Full:
        """A disk that fills up, and tears what it writes, at once or when it is written out of the buffer."""

        def __init__(self, file) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            if fails == "flush":
                return len(data)
            self.file.write(data[:5])
            raise OSError(28, "No space left on device")

        def flush(self) -> None:
            raise OSError(28, "No space left on device")

        def __getattr__(self, name: str):
            return getattr(self.file, name)

    kept._file = Full(kept._file)
    for token in range(2 * CHUNK):
        kept.append(token)
    assert list(kept) == [*range(2 * CHUNK + 3), *range(2 * CHUNK)]
