"""Schedules: what each name means, that texts read back, that costs are those of a real state, errors as sentences."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmr.model.config import DSMRConfig
from dsmr.model.schedule import CONSTRUCTORS, MemorySchedule
from dsmr.model.transformer import DSMRModel
from dsmr_kernels.costing.cost import visible_pairs

MEANINGS = {
    "full(layers=3, length=64)": (64, 64, 64),
    "uniform(layers=2, horizon=0)": (0, 0),
    "two_scale(layers=5, long=64, short=8, n_long=2)": (64, 64, 8, 8, 8),
    "two_scale(layers=2, long=64, short=8, n_long=0)": (8, 8),
    "two_scale(layers=2, long=64, short=8, n_long=2)": (64, 64),
    "reverse_two_scale(layers=5, long=64, short=8, n_long=2)": (8, 8, 8, 64, 64),
    "ascending(layers=4, shortest=10, longest=40)": (10, 20, 30, 40),
    "descending(layers=4, shortest=10, longest=40)": (40, 30, 20, 10),
    "ascending(layers=1, shortest=10, longest=40)": (10,),
    "alternating(layers=5, long=64, short=8)": (64, 8, 64, 8, 64),
    "binary(layers=4, horizon=64, carriers=[0, 3])": (64, 0, 0, 64),
    "binary(layers=2, horizon=64, carriers=[])": (0, 0),
    "none(layers=3)": (0, 0, 0),
    "fhcr(layers=2, length=64, kv_heads=2)": (64, 64),
    "explicit(horizons=[1, 0, 7])": (1, 0, 7),
}


@pytest.mark.parametrize("text", MEANINGS)
def test_every_name_means_what_it_says_and_reads_back(text: str) -> None:
    schedule = MemorySchedule.parse(text)
    assert schedule.horizons == MEANINGS[text]
    assert schedule.layers == len(MEANINGS[text])
    assert str(schedule) == text
    assert MemorySchedule.parse(str(schedule)) == schedule


def test_every_constructor_is_tested_and_known_to_parse() -> None:
    names = "full uniform two_scale reverse_two_scale ascending descending alternating binary none fhcr explicit"
    assert tuple(CONSTRUCTORS) == tuple(names.split())
    assert {text.split("(")[0] for text in MEANINGS} == set(CONSTRUCTORS)


@pytest.mark.parametrize(
    ("kv_heads", "expected"), [(None, (None, None)), (2, (2, 2)), ([1, 4], (1, 4)), ((None, 4), (None, 4))]
)
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_kv_heads_go_with_every_name_and_read_back(name: str, kv_heads: object, expected: tuple) -> None:
    arguments = {
        "full": {"length": 6},
        "uniform": {"horizon": 6},
        "two_scale": {"long": 6, "short": 2, "n_long": 1},
        "reverse_two_scale": {"long": 6, "short": 2, "n_long": 1},
        "ascending": {"shortest": 2, "longest": 6},
        "descending": {"shortest": 2, "longest": 6},
        "alternating": {"long": 6, "short": 2},
        "binary": {"horizon": 6, "carriers": [1]},
        "none": {},
        "fhcr": {"length": 6},
        "explicit": {"horizons": [3, 4]},
    }[name]
    layers = {} if name == "explicit" else {"layers": 2}
    schedule = CONSTRUCTORS[name](**layers, **arguments, kv_heads=kv_heads)
    assert schedule.kv_heads == expected
    assert MemorySchedule.parse(str(schedule)) == schedule
    for retention in ("uniform", ["random", "newest"], ("newest", "newest")):
        kept = CONSTRUCTORS[name](**layers, **arguments, kv_heads=kv_heads, retention=retention)
        assert kept.retention == ((retention,) * 2 if isinstance(retention, str) else tuple(retention))
        assert MemorySchedule.parse(str(kept)) == kept != schedule
        assert (kept.horizons, kept.kv_heads) == (schedule.horizons, schedule.kv_heads)


def test_retention_is_written_with_quotes_or_without() -> None:
    text = "explicit(horizons=[4, 5], retention=['random', 'newest'])"
    assert str(MemorySchedule.parse("explicit(horizons=[4, 5], retention=[random, newest])")) == text
    assert str(MemorySchedule.parse(text)) == text
    assert not MemorySchedule.parse(text).newest
    for text in ("uniform(layers=2, horizon=4)", "explicit(horizons=[0, 5], retention=[random, newest])"):
        assert MemorySchedule.parse(text).newest
    assert "2 x 4, kept by retention random;" in MemorySchedule.uniform(2, 4, retention="random").describe()


def test_fhcr_keeps_two_kv_heads_unless_told() -> None:
    assert MemorySchedule.fhcr(3, 8).kv_heads == (2, 2, 2)


def test_positional_arguments_spaces_and_schedules_are_read_too() -> None:
    schedule = MemorySchedule.parse("  two_scale( 5,64,\n 8, n_long = 2 ) ")
    assert schedule == MemorySchedule.two_scale(5, 64, 8, 2)
    assert MemorySchedule.parse(schedule) is schedule


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    horizons=st.lists(st.integers(0, 10**6), min_size=1, max_size=12),
    data=st.data(),
)
def test_any_explicit_schedule_reads_back(horizons: list[int], data: st.DataObject) -> None:
    heads = data.draw(
        st.none()
        | st.integers(1, 64)
        | st.lists(st.none() | st.integers(1, 64), min_size=len(horizons), max_size=len(horizons))
    )
    schedule = MemorySchedule.explicit(horizons, kv_heads=heads)
    again = MemorySchedule.parse(str(schedule))
    assert again == schedule
    assert again.horizons == tuple(horizons)


# Costs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("visibility", ["segment", "sliding"])
@pytest.mark.parametrize(
    "text",
    [
        "two_scale(layers=3, long=24, short=5, n_long=1)",
        "explicit(horizons=[7, 0, 30], kv_heads=[1, 2, 4])",
        "fhcr(layers=2, length=50)",
        "none(layers=2)",
    ],
)
def test_the_budget_is_the_bytes_of_an_aligned_state(text: str, visibility: str, dtype: torch.dtype) -> None:
    model = DSMRModel(DSMRConfig(11, text, d_model=24, n_heads=4, segment_length=6, visibility=visibility))
    state = model.new_state(3, dtype=dtype, aligned=True)
    sizes = {"n_heads": 4, "head_dim": 6, "bytes_per_element": dtype.itemsize, "batch": 3}
    schedule = model.config.schedule
    assert schedule.budget_bytes(**sizes) == state.nbytes == sum(m.nbytes for m in state.memories)
    assert schedule.layer_bytes(**sizes) == tuple(memory.nbytes for memory in state.memories)


def test_the_budget_is_the_formula_of_the_design() -> None:
    schedule = MemorySchedule.explicit([100, 50], kv_heads=[2, None])
    assert schedule.budget_bytes(n_heads=8, head_dim=64) == 2 * 1 * 64 * 2 * (100 * 2 + 50 * 8)


def test_kv_heads_must_divide_the_heads() -> None:
    schedule = MemorySchedule.explicit([1, 2], kv_heads=[None, 3])
    assert schedule.heads(6) == (6, 3)
    with pytest.raises(ValueError, match="the 8 heads must be a multiple of kv_heads, but layer 1 has 3"):
        schedule.heads(8)


@pytest.mark.parametrize("visibility", ["segment", "sliding"])
def test_attention_flops_are_counted_pairs(visibility: str) -> None:
    schedule = MemorySchedule.parse("explicit(horizons=[9, 0, 40])")
    found = schedule.attention_flops(n_heads=2, head_dim=8, segment_length=7, visibility=visibility, tokens=100)
    pairs = [visible_pairs(100, horizon=h, segment_length=7, visibility=visibility) for h in (9, 0, 40)]
    assert found == 4 * 2 * 8 * sum(pairs)
    steady = schedule.attention_flops(n_heads=2, head_dim=8, segment_length=7, visibility=visibility)
    more = schedule.attention_flops(n_heads=2, head_dim=8, segment_length=7, visibility=visibility, tokens=170)
    assert steady == pytest.approx((more - found) / 70)


def test_description_tells_text_depth_and_budget() -> None:
    schedule = MemorySchedule.parse("two_scale(layers=12, long=4096, short=512, n_long=3)")
    assert schedule.describe() == (
        "two_scale(layers=12, long=4096, short=512, n_long=3): 12 layers, horizons from the bottom 3 x 4096, 9 x 512; "
        "33.0 MiB a stream"
    )


# Errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read: expected a call such as"),
        ("two_scale", "cannot be read: expected a call such as"),
        ("two_scale(layers=12", "cannot be read: expected a call such as"),
        ("two scale(layers=12)", "cannot be read: expected a call such as"),
        ("uniform(layers=2, horizon=3); none(2)", "cannot be read: expected a call such as"),
        ("uniform(2, 3)(4)", "cannot be read: expected a call such as"),
        ("a\0b", "cannot be read: expected a call such as"),
        ("3", "cannot be read: expected a call such as"),
        # Too deep for the parser of Python 3.11; that of 3.13 reads it, and then it is no number.
        ("uniform(" + "-" * 5000 + "1, 2)", "cannot be read: (expected a call such as|its arguments must be numbers)"),
        ("three_scale(layers=12)", "schedule 'three_scale' is unknown: expected one of full, uniform, two_scale"),
        ("parse('none(layers=2)')", "schedule 'parse' is unknown"),
        ("_make(layers=2)", "schedule '_make' is unknown"),
        ("uniform(layers=2)", r"does not fit uniform\(layers, horizon, kv_heads, retention\): missing .* 'horizon'"),
        ("uniform(layers=2, horizn=3)", r"does not fit uniform\(layers, horizon, kv_heads, retention\): .*'horiz"),
        ("uniform(1, 2, 3, 4)", "too many positional arguments"),
        ("uniform(2, layers=2, horizon=1)", "multiple values for argument 'layers'"),
        ("uniform(layers=2, horizon=3, horizon=4)", "gives an argument twice|cannot be read"),
        ("uniform(**{'layers': 2, 'horizon': 3})", "does not fit uniform"),
        ("uniform(*[2, 3])", "its arguments must be numbers or lists"),
        ("uniform(layers=n, horizon=3)", "its arguments must be numbers or lists"),
        ("uniform(layers=2, horizon=2**9)", "its arguments must be numbers or lists"),
        ("uniform(layers={[]: 1}, horizon=2)", "its arguments must be numbers or lists"),
        ("uniform(layers=0, horizon=3)", "a schedule needs at least 1 layer, got layers=0"),
        ("uniform(layers=2.0, horizon=3)", "a schedule needs at least 1 layer, got layers=2.0"),
        ("explicit(horizons=[])", "a schedule needs at least 1 layer, got layers=0"),
        ("uniform(layers=2, horizon=-1)", "horizon must be an integer >= 0, got -1"),
        ("uniform(layers=2, horizon='8')", "horizon must be an integer >= 0, got '8'"),
        ("uniform(layers=2, horizon=8.5)", "horizon must be an integer >= 0, got 8.5"),
        ("uniform(layers=2, horizon=True)", "horizon must be an integer >= 0, got True"),
        ("full(layers=2, length=-4)", "length must be an integer >= 0, got -4"),
        ("explicit(horizons=[3, -1])", "a horizon must be an integer >= 0, but layer 1 has -1"),
        ("explicit(horizons=3)", r"has an argument of the wrong kind for explicit\(horizons, kv_heads, retention\)"),
        ("two_scale(layers=2, long=-5, short=1, n_long=0)", "long must be an integer >= 0, got -5"),
        ("two_scale(layers=2, long=9, short=1, n_long=3)", "n_long must be an integer from 0 to the 2 layers, got 3"),
        ("reverse_two_scale(layers=2, long=9, short=1, n_long=-1)", "n_long must be an integer from 0 to the 2 layers"),
        ("ascending(layers=3, shortest=0, longest=10.5)", "longest must be an integer >= 0, got 10.5"),
        ("ascending(layers=3, shortest=-1, longest=10)", "shortest must be an integer >= 0, got -1"),
        ("descending(layers=3, shortest=11, longest=10)", "shortest <= longest, got shortest=11 and longest=10"),
        ("binary(layers=2, horizon=3, carriers=[2])", "carriers must name layers from 0 to 1, got 2"),
        ("binary(layers=2, horizon=3, carriers=[-1])", "carriers must name layers from 0 to 1, got -1"),
        ("binary(layers=2, horizon=-3, carriers=[])", "horizon must be an integer >= 0, got -3"),
        ("binary(layers=2, horizon=3, carriers=1)", "has an argument of the wrong kind for binary"),
        ("uniform(layers=2, horizon=3, kv_heads=0)", "kv_heads must be an integer >= 1 or None, but layer 0 has 0"),
        ("uniform(layers=2, horizon=3, kv_heads=[1])", "kv_heads must have one entry for each of the 2 layers, got 1"),
        ("uniform(layers=2, horizon=3, retention=oldest)", "its arguments must be numbers or lists"),
        ("uniform(layers=2, horizon=3, retention='old')", "one of newest, uniform, random, but layer 0 has 'old'"),
        ("uniform(layers=2, horizon=3, retention=[random])", "retention must have one entry for each of the 2 layers"),
        ("uniform(layers=2, horizon=3, retention=3)", "has an argument of the wrong kind for uniform"),
        ("uniform(layers=2, horizon=3, retention=[3, []])", "retention must be one of newest, uniform, random, but"),
        ("none(layers=9000000000000)", "at most 10,000 layers, got layers=9000000000000"),
        ("uniform(layers=2, horizon=100000000000000)", "at most 1,099,511,627,776 tokens, but layer 0 has 1000000"),
        ("uniform(layers=2, horizon=3, kv_heads=1.5)", "has an argument of the wrong kind for uniform"),
    ],
)
def test_what_cannot_be_a_schedule_is_refused_in_a_sentence(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemorySchedule.parse(text)


@pytest.mark.parametrize("thing", [None, 12, ["none(layers=2)"]])
def test_only_text_is_read(thing: object) -> None:
    with pytest.raises(ValueError, match="a schedule must be a MemorySchedule or its text, got"):
        MemorySchedule.parse(thing)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch {0}')",
        "uniform(layers=open('{0}', 'w').write('x'), horizon=1)",
        "explicit(horizons=[open('{0}', 'w')])",
        "explicit(horizons=[1 for f in [open('{0}', 'w')]])",
        "uniform.__globals__['ast'](open('{0}', 'w'))",
        "(lambda: open('{0}', 'w'))()",
    ],
)
def test_text_is_never_run(text: str, tmp_path: Path) -> None:
    path = tmp_path / "written"
    with pytest.raises(ValueError, match=r"cannot be read|is unknown"):
        MemorySchedule.parse(text.format(path))
    assert not path.exists()
