"""Who sees whom: the definition, pair by pair, against `lowest_visible` and the runs that backends follow."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmr_kernels.visibility import lowest_visible, runs_of_row, segment_of


def picture(length: int, horizon: int, tokens: int, visibility: str = "segment", offset: int = 0) -> list[str]:
    """One line a query: memory, then the call; # = seen."""
    low = lowest_visible(
        torch.arange(tokens), horizon=horizon, segment_length=length, segment_offset=offset, visibility=visibility
    )[0]
    return ["".join("#" if low[p] <= j <= p else "." for j in range(-horizon, tokens)) for p in range(tokens)]


def test_picture_of_the_design() -> None:
    assert picture(4, 6, 8) == [
        "#######.......",
        "########......",
        "#########.....",
        "##########....",
        "....#######...",
        "....########..",
        "....#########.",
        "....##########",
    ]


def test_picture_of_sliding_visibility() -> None:
    assert picture(4, 3, 5, "sliding") == ["####....", ".####...", "..####..", "...####.", "....####"]


def test_picture_of_a_call_that_begins_within_a_segment() -> None:
    # memory -2 -1, call 0 1 2 3; query 0 ends a segment begun at -3, so it also sees two tokens before the picture
    low = lowest_visible(torch.arange(4), horizon=2, segment_length=4, segment_offset=3, visibility="segment")
    assert low.tolist() == [[-5, -1, -1, -1]]


@st.composite
def rows(draw: st.DrawFn) -> dict:
    """Arguments of one row, with the piece starts both as a tensor and as the list that `runs_of_row` takes."""
    tokens = draw(st.integers(0, 40))
    queries = draw(st.integers(0, tokens))
    length = draw(st.none() | st.integers(1, 15))
    start, starts, changes = draw(st.sampled_from([-1, 0])), [], []
    for token in range(tokens):
        if token and draw(st.integers(0, 7)) == 0:
            start = token
        if not starts or starts[-1] != start:
            changes.append((token, start))
        starts.append(start)
    return {
        "queries": range(tokens - queries, tokens),
        "starts": starts,
        "changes": changes or [(0, -1)],
        "held": draw(st.integers(0, 30)),
        "horizon": draw(st.integers(0, 30)),
        "segment_length": length,
        "segment_offset": draw(st.integers(0, (length or 15) - 1)),
        "visibility": draw(st.sampled_from(["segment", "sliding"])),
    }


def lowest_by_definition(row: dict, p: int) -> int:
    """The sentence of the design, for one token."""
    length, offset, horizon = row["segment_length"], row["segment_offset"], row["horizon"]
    if row["visibility"] == "sliding":
        low = p - horizon
    else:
        low = (0 if length is None else (p + offset) // length * length) - offset - horizon
    return max(low, row["starts"][p]) if row["starts"][p] >= 0 else low


@settings(max_examples=300, deadline=None, derandomize=True)
@given(row=rows())
def test_lowest_visible_is_the_definition_and_never_decreases(row: dict) -> None:
    p = torch.arange(row["queries"].start, row["queries"].stop)
    low = lowest_visible(
        p,
        piece_start=torch.tensor([row["starts"]], dtype=torch.int32)[:, row["queries"].start :],
        **{name: row[name] for name in ("horizon", "segment_length", "segment_offset", "visibility")},
    )
    assert low.shape == (1, len(p))
    assert low[0].tolist() == [lowest_by_definition(row, token) for token in p.tolist()]
    held = low[0].clamp(min=-row["held"]).tolist()
    assert held == sorted(held)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(row=rows())
def test_runs_show_every_query_exactly_the_keys_of_the_definition(row: dict) -> None:
    """Each query lies in one run; seen keys and those that take a gradient are the definition's, for all pairs."""
    options = {name: row[name] for name in ("horizon", "segment_length", "segment_offset", "visibility")}
    runs = runs_of_row(row["queries"], row["changes"], row["held"], **options)
    assert [p for run in runs for p in range(run.start, run.stop)] == list(row["queries"])
    for run in runs:
        assert run.start < run.stop
        for p in range(run.start, run.stop):
            low = max(lowest_by_definition(row, p), -row["held"])
            assert run.low(p) == low
            keys = torch.arange(low, p + 1)
            same = segment_of(keys, row["segment_length"], row["segment_offset"]) == segment_of(
                torch.tensor(p), row["segment_length"], row["segment_offset"]
            )
            takes_gradient = keys[same & (keys >= 0)].tolist()
            assert takes_gradient == list(range(max(run.own, low), p + 1))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(row=rows(), cut=st.integers(0, 40))
def test_cutting_a_call_in_two_changes_no_lower_bound(row: dict, cut: int) -> None:
    """The second call counts from its own first token and knows how far into its segment it begins."""
    tokens, length = len(row["starts"]), row["segment_length"]
    cut = min(cut, tokens)
    offset = row["segment_offset"] + cut if length is None else (row["segment_offset"] + cut) % length
    second = {**row, "starts": [start - cut for start in row["starts"][cut:]], "segment_offset": offset}
    for p in range(cut, tokens):
        whole, part = lowest_by_definition(row, p), lowest_by_definition(second, p - cut) + cut
        start = row["starts"][p]
        bound = start if start >= 0 else min(whole, part)  # what the memory holds of the piece; the rest is long gone
        assert max(whole, bound) == max(part, bound)


@pytest.mark.parametrize("visibility", ["segment", "sliding"])
def test_a_token_always_sees_itself(visibility: str) -> None:
    p = torch.arange(50)
    low = lowest_visible(p, horizon=0, segment_length=7, segment_offset=3, visibility=visibility, piece_start=p[None])
    assert torch.equal(low[0], p)
