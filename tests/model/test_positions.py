"""Positions: rotary scores depend on distance alone, however long the stream has played; slopes are the paper's."""

import math

import pytest
import torch

from dsmr.model.positions import Rotary, alibi_slopes, sinusoids, token_positions

FAR = 10_000_000


def at(*positions: int) -> torch.Tensor:
    return torch.tensor([positions])


def rotary_scores(dim: int, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Scores of one query and one key, the same at every position: (T,)."""
    generator = torch.Generator().manual_seed(dim)
    q, k = (torch.randn(dim, generator=generator).expand(1, 1, queries.shape[1], dim) for _ in range(2))
    rotated_q, rotated_k = Rotary.at(queries, dim, 10000.0)(q), Rotary.at(keys, dim, 10000.0)(k)
    return (rotated_q.double() * rotated_k.double()).sum(-1)[0, 0]


@pytest.mark.parametrize("dim", [2, 6, 64, 128])
@pytest.mark.parametrize("distance", [0, 1, 7, 4096, 65_000])
def test_rotary_scores_depend_on_the_distance_alone(dim: int, distance: int) -> None:
    """Also after ten million tokens, where float32 angles would be off by half a radian."""
    starts = at(0, 1, 1000, 123_457, FAR, FAR + 1, 10 * FAR)
    scores = rotary_scores(dim, starts + distance, starts)
    assert float((scores - scores[0]).abs().max()) < 1e-5 * dim


def test_rotary_is_the_rotation_of_the_paper() -> None:
    x = torch.randn(1, 1, 3, 4, dtype=torch.float64)
    positions = at(0, 5, FAR)
    rotated = Rotary.at(positions, 4, 100.0)(x)
    for t, position in enumerate(positions[0].tolist()):
        for i, frequency in enumerate((1.0, 0.1)):
            angle = position * frequency
            first, second = float(x[0, 0, t, i]), float(x[0, 0, t, i + 2])
            assert float(rotated[0, 0, t, i]) == pytest.approx(
                first * math.cos(angle) - second * math.sin(angle), abs=1e-5
            )
            assert float(rotated[0, 0, t, i + 2]) == pytest.approx(
                first * math.sin(angle) + second * math.cos(angle), abs=1e-5
            )


def test_rotary_keeps_lengths_dtype_and_position_0() -> None:
    x = torch.randn(2, 3, 5, 8, dtype=torch.bfloat16)
    positions = torch.stack([torch.zeros(5, dtype=torch.int64), torch.arange(5) + FAR])
    rotated = Rotary.at(positions, 8, 10000.0)(x)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated[0], x[0])
    assert torch.allclose(rotated.float().norm(dim=-1), x.float().norm(dim=-1), rtol=0.02)


def test_rotary_rows_have_their_own_positions() -> None:
    x = torch.randn(1, 2, 3, 6).expand(2, -1, -1, -1)
    both = Rotary.at(torch.tensor([[0, 1, 2], [7, 8, 9]]), 6, 10000.0)(x)
    assert torch.equal(both[1:], Rotary.at(at(7, 8, 9), 6, 10000.0)(x[1:]))


@pytest.mark.parametrize("dim", [2, 10, 64])
def test_sinusoids_are_those_of_the_paper(dim: int) -> None:
    positions = at(0, 1, 77, FAR + 3)
    found = sinusoids(positions, dim)
    assert found.shape == (1, 4, dim)
    assert found.dtype == torch.float32
    for t, position in enumerate(positions[0].tolist()):
        for i in range(dim // 2):
            angle = position / 10000 ** (2 * i / dim)
            assert float(found[0, t, i]) == pytest.approx(math.sin(angle), abs=1e-6)
            assert float(found[0, t, dim // 2 + i]) == pytest.approx(math.cos(angle), abs=1e-6)


def test_slopes_of_8_heads_are_the_powers_of_one_half() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12, 16, 20])
def test_slopes_are_distinct_and_between_0_and_1(heads: int) -> None:
    slopes = alibi_slopes(heads)
    assert slopes.shape == (heads,)
    assert slopes.dtype == torch.float32
    assert len(set(slopes.tolist())) == heads
    assert float(slopes.min()) >= 2.0**-8
    assert float(slopes.max()) < 1


def test_slopes_of_12_heads_are_those_of_8_and_odd_ones_of_16() -> None:
    assert alibi_slopes(12).tolist() == pytest.approx(
        [2.0**-i for i in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    )


def test_positions_count_on_from_what_was_seen() -> None:
    found = token_positions(torch.tensor([5, FAR * 1000]), 3, None)
    assert found.dtype == torch.int64
    assert found.tolist() == [[5, 6, 7], [FAR * 1000, FAR * 1000 + 1, FAR * 1000 + 2]]


def test_positions_begin_anew_with_each_piece() -> None:
    starts = torch.tensor([[-1, -1, 2, 2, 4], [0, 0, 0, 0, 0], [-9, -9, -9, -9, -9]], dtype=torch.int32)
    assert token_positions(torch.tensor([5, 5, 5]), 5, starts).tolist() == [
        [5, 6, 0, 1, 0],
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
    ]


def test_no_tokens_have_no_positions() -> None:
    assert token_positions(torch.tensor([5]), 0, None).shape == (1, 0)
