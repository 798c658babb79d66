"""`dsmr profile`: predictions from counts, parts that add up, bytes that are allocated, failures a row at a time."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from known_ceilings import KNOWN
from typer.testing import CliRunner

from dsmr.cli.app import app
from dsmr.cli.profile import DEFAULTS
from dsmr.console.errors import UserError
from dsmr.console.files import read_json
from dsmr.model.config import DSMRConfig
from dsmr.model.schedule import CONSTRUCTORS, MemorySchedule
from dsmr.model.transformer import DSMRModel
from dsmr.profiling import profile as profile_module
from dsmr.profiling import row as row_module
from dsmr.profiling.budget import families, parse_bytes, propose, solve
from dsmr.profiling.cost import held_bytes, keys_at, parameters_of, predict_piece, predict_step, predict_token
from dsmr.profiling.job import Job, Sizes
from dsmr.profiling.plots import curve_label, pareto_front
from dsmr.profiling.profile import Profile, length_curves, measured_row, predicted_row, profile
from dsmr.profiling.sheets import labels, milliseconds
from dsmr_kernels.costing.cost import human_bytes, visible_pairs

TWO = MemorySchedule.two_scale(3, 64, 16, 1)
SIZES = Sizes(
    d_model=32, heads=4, segment_length=16, batch=2, vocab_size=50, piece_tokens=48, positions=(0, 100), rounds=2
)
GROUPED = MemorySchedule.explicit([40, 0, 7], kv_heads=[2, 1, 4])


# --- What should be -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [TWO, GROUPED])
def test_parameters_and_bytes_are_those_of_the_model(schedule: MemorySchedule) -> None:
    model = DSMRModel(SIZES.config(schedule))
    assert parameters_of(SIZES, schedule) == sum(p.numel() for p in model.parameters())
    for kind, batch, aligned in (("train", 2, True), ("piece", 1, True), ("decode", 1, False)):
        state = model.new_state(batch, aligned=aligned)
        assert held_bytes(SIZES, schedule, kind) == tuple(memory.nbytes for memory in state.memories)
        for memory in state.memories:
            assert memory.nbytes == memory.k.untyped_storage().nbytes() + memory.v.untyped_storage().nbytes()


def test_a_step_is_the_sum_of_its_parts_and_longer_memory_costs_more() -> None:
    step = predict_step(SIZES, TWO, "train", KNOWN)
    for direction in ("forward", "backward"):
        parts = [seconds for layer in step.layers for seconds in getattr(layer, direction).values()]
        assert step.seconds(direction) == pytest.approx(sum(parts) + sum(step.around[direction].values()))
    longer = predict_step(SIZES, MemorySchedule.two_scale(3, 128, 16, 1), "train", KNOWN)
    assert longer.attention > step.attention
    assert longer.layers[1] == step.layers[1]
    assert longer.seconds("step") == step.seconds("step")
    bfloat16 = predict_step(replace(SIZES, dtype="bfloat16"), TWO, "train", KNOWN)
    assert bfloat16.attention < step.attention


def test_a_long_piece_costs_full_memory_the_square_of_its_length() -> None:
    """With rates under which only attention counts, cost follows the pairs that are seen."""
    swift = replace(
        KNOWN,
        copy_bytes=1e30,
        operator_seconds=0.0,
        attention_seconds={"forward": 0.0, "backward": 0.0},
        matrix_flops={"float32": 1e30},
    )
    lengths = (64, 640)
    full, none = (
        [predict_piece(SIZES, schedule, n, swift) for n in lengths]
        for schedule in (MemorySchedule.full(1, 640), MemorySchedule.none(1))
    )
    pairs = [visible_pairs(n, horizon=640, segment_length=16) for n in lengths]
    assert full[1] / full[0] == pytest.approx(pairs[1] / pairs[0])
    assert none[1] / none[0] == pytest.approx(10)
    curves = length_curves([TWO], SIZES, swift, lengths)
    assert [length for length, _ in curves["full"]] == list(lengths)
    assert curves["none"][1][1] < curves[str(TWO)][1][1] < curves["full"][1][1]


@pytest.mark.parametrize("visibility", ["segment", "sliding"])
def test_keys_at_a_position_are_those_of_the_mask(visibility: str) -> None:
    sizes = replace(SIZES, visibility=visibility)
    options = {"horizon": 20, "segment_length": 16, "visibility": visibility}
    for position in range(60):
        seen = visible_pairs(position + 1, **options) - visible_pairs(position, **options)
        assert keys_at(position, 20, sizes) == seen
    early, late = (predict_token(sizes, TWO, position, KNOWN)[0] for position in (0, 200))
    assert early < late


# --- Budgets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"), [("64MiB", 64 * 2**20), ("1.5 GB", 1_500_000_000), ("4096", 4096), ("2kib", 2048)]
)
def test_a_budget_is_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "much", "-3MiB", "0", "5 parsecs", "9" * 30])
def test_a_budget_that_is_none_is_a_sentence(text: str) -> None:
    with pytest.raises(UserError, match="budget"):
        parse_bytes(text)


@pytest.mark.parametrize("budget", [3_000, 100_000, 7_654_321])
def test_every_proposal_fits_and_one_token_more_would_not(budget: int) -> None:
    held = {"n_heads": 4, "head_dim": 8, "bytes_per_element": 4, "batch": 2}
    proposals = propose(budget, 6, SIZES, KNOWN)
    assert {p.schedule.partition("(")[0] for p in proposals} >= {"none"}
    if budget > 3_000:
        assert {p.schedule.partition("(")[0] for p in proposals} == set(families(6, 4))
    assert [p.control for p in proposals] == [False] * (len(proposals) - 1) + [True]  # what remembers nothing is last
    assert proposals[-1].bytes == 0
    speeds = [p.tokens_per_second for p in proposals[:-1]]
    assert speeds == sorted(speeds, reverse=True)
    for p in proposals:
        schedule = MemorySchedule.parse(p.schedule)
        assert schedule.budget_bytes(**held) == p.bytes <= budget
    for name, family in families(6, 4).items():
        found = solve(family, budget, SIZES)
        if name != "none" and found is not None:
            assert family(max(found.horizons) + 1).budget_bytes(**held) > budget


def test_a_budget_below_one_token_is_a_sentence() -> None:
    with pytest.raises(UserError, match="holds no memory at all"):
        propose(10, 4, SIZES, KNOWN)


def test_the_pareto_front_is_what_nothing_with_as_much_memory_outruns() -> None:
    assert pareto_front([(1, 12), (2, 4), (2, 9), (3, 9), (4, 5)]) == [(1, 12), (3, 9), (4, 5)]


def test_schedules_of_one_family_are_told_apart() -> None:
    names = ["full(layers=2, length=4)", "none(layers=2)", "full(layers=2, length=8)"]
    assert list(labels(names).values()) == ["full 1", "none", "full 2"]


def test_what_a_reader_could_not_guess_is_spelt_out() -> None:
    assert "unlimited" in curve_label("full")
    assert curve_label(str(TWO)) == f"{TWO}, predicted"


# --- Whether others used the machine ------------------------------------------------------------------------------


def timed(spread: float) -> dict:
    return {"timings": {"all": {"median": 1.0, "fastest": 1.0, "spread": spread, "rounds": 7}}}


def test_a_quiet_machine_is_not_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_module, "cores", lambda: 2)
    found = Profile(
        replace(SIZES, threads=2), KNOWN, {str(TWO): {"train": timed(0.1)}}, load_before=0.3, load_after=2.2
    )
    assert found.warnings == found.to_json()["warnings"] == []


@pytest.mark.parametrize(("before", "after"), [(1.5, 2.0), (0.1, 3.5)])
def test_load_of_others_is_a_warning(monkeypatch: pytest.MonkeyPatch, before: float, after: float) -> None:
    monkeypatch.setattr(profile_module, "cores", lambda: 2)
    rows = {str(TWO): {"train": timed(0.1)}}
    found = Profile(replace(SIZES, threads=2), KNOWN, rows, load_before=before, load_after=after)
    (sentence,) = found.to_json()["warnings"]
    assert "a load average of 1.5 on 2 cores" in sentence
    assert found.to_json()["machine"] == {"cores": 2, "load_before": before, "load_after": after}


def test_rounds_far_apart_are_a_warning() -> None:
    positions = [{"position": 64, "timing": {"median": 1.0, "fastest": 1.0, "spread": 0.9, "rounds": 7}}]
    rows = {str(TWO): {"train": timed(0.45), "piece": timed(0.1), "decode": {"positions": positions}}}
    (sentence,) = Profile(SIZES, KNOWN, rows, load_before=0.0).warnings
    for words in ("a training step 45 %", "playing after 64 tokens 90 %", str(TWO)):
        assert words in sentence
    assert "whole piece" not in sentence


def test_ceilings_measured_under_load_are_a_warning() -> None:
    (sentence,) = Profile(SIZES, replace(KNOWN, load=3.0, cores=2), load_before=0.0).warnings
    assert "ceilings" in sentence
    assert "3.0 on 2 cores" in sentence


# --- What is --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["train", "piece"])
def test_the_parts_of_a_measured_step_add_up_to_it(kind: str) -> None:
    row = row_module.measure(Job(str(GROUPED), kind, SIZES))
    assert row["tokens"] == (2 * 16 if kind == "train" else 48)
    assert row["checked"] == 3
    assert row["kv_bytes"] == list(held_bytes(SIZES, GROUPED, kind))
    keys = {(part["direction"], part["layer"], part["part"]) for part in row["parts"]}
    predicted = predicted_row(SIZES, GROUPED, kind, KNOWN)
    assert keys == {(part["direction"], part["layer"], part["part"]) for part in predicted["parts"]}
    assert all(part["seconds"] > 0 for part in row["parts"])
    whole = row["timings"]["all"]["median"]
    assert sum(row["timings"][name]["median"] for name in ("forward", "backward", "step")) == pytest.approx(
        whole, rel=0.5
    )
    assert len(row["activation_bytes"]) == 4
    rows = row["tokens"]
    assert all(kept >= rows * (4 * 32 + 4 * 32) * 4 for kept in row["activation_bytes"][1:])  # the inner ffn alone


def test_the_recorder_leaves_the_model_as_it_was() -> None:
    import dsmr.model.attention

    steps = row_module.Steps(Job(str(TWO), "train", SIZES))
    before = dsmr.model.attention.memory_attention
    with steps.recorder.recording():
        first = steps.recorded()
        assert dsmr.model.attention.memory_attention is not before
    assert dsmr.model.attention.memory_attention is before
    assert not any(block.attention_norm._forward_pre_hooks for block in steps.model.blocks)
    attention = [first["forward", layer, "attention"] for layer in range(3)]
    assert all(0 < seconds < 10 for seconds in attention)


def test_what_is_kept_grows_with_the_tokens_and_leaves_out_the_weights() -> None:
    def kept(tokens: int) -> int:
        sizes = replace(SIZES, segment_length=tokens)
        steps = row_module.Steps(Job(str(TWO), "train", sizes))
        with steps.recorder.recording(), steps.recorder.counting():
            steps.forward()
        return sum(steps.recorder.saved.values())

    short, long = kept(16), kept(32)
    assert long == pytest.approx(2 * short, rel=0.1)


def test_decoding_is_timed_at_every_position_with_memories_as_full_as_they_would_be() -> None:
    row = row_module.measure(Job(str(TWO), "decode", SIZES))
    assert [entry["position"] for entry in row["positions"]] == [0, 100]
    assert row["kv_bytes"] == list(held_bytes(SIZES, TWO, "decode"))
    model = DSMRModel(DSMRConfig(50, TWO, d_model=32, n_heads=4, segment_length=16))
    state = row_module.filled_state(model, SIZES, 1, 100, aligned=False)
    assert [int(memory.length) for memory in state.memories] == [80, 32, 32]
    assert (int(state.position), state.offset) == (100, 100 % 16)


def test_wrong_attention_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsmr_kernels.backends import sdpa

    right = sdpa.memory_attention

    def wrong(*arguments: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, lse = right(*arguments)
        return 1.01 * out, lse

    monkeypatch.setattr(sdpa, "memory_attention", wrong)
    with pytest.raises(AssertionError, match="errs by"):
        row_module.measure(Job(str(TWO), "train", SIZES))


def test_peak_memory_sees_what_was_taken_and_given_back() -> None:
    if not row_module.resident_bytes("VmHWM"):
        pytest.skip("this system does not tell a process its peak resident size")
    peak = row_module.Peak(torch.device("cpu"))
    with peak:
        torch.ones(32 * 2**20)  # 128 MiB, touched, freed
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not let a process begin its peak anew")
    assert 120 * 2**20 <= peak.bytes <= 160 * 2**20


# --- The whole ------------------------------------------------------------------------------------------------------


def test_a_row_that_fails_is_reported_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(job: Job) -> dict:
        return {"error": "out of memory"} if "uniform" in job.schedule else row_module.measure(job)

    monkeypatch.setattr(profile_module, "measured_row", row)
    said: list[str] = []
    schedules = [MemorySchedule.uniform(3, 8), TWO]
    found = profile(
        schedules, SIZES, KNOWN, kinds=["train", "decode"], json_path=tmp_path / "p.json", progress=said.append
    )
    assert [line.partition(":")[0] for line in said] == [f"row {i} of 4" for i in range(1, 5)]
    assert "to go" in said[-1]
    assert found.failures == [f"{schedules[0]}, {kind}: out of memory" for kind in ("train", "decode")]
    kept = read_json(tmp_path / "p.json")
    assert [entry["schedule"] for entry in kept["schedules"]] == [str(schedule) for schedule in schedules]
    assert kept["schedules"][1]["rows"]["train"]["predicted"]["seconds"]["all"] > 0


def test_what_was_measured_outlives_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(job: Job) -> dict:
        if job.schedule == str(TWO):
            raise KeyboardInterrupt
        return row_module.measure(job)

    monkeypatch.setattr(profile_module, "measured_row", row)
    with pytest.raises(KeyboardInterrupt):
        profile([GROUPED, TWO], SIZES, KNOWN, kinds=["train"], json_path=tmp_path / "p.json")
    assert [entry["schedule"] for entry in read_json(tmp_path / "p.json")["schedules"]] == [str(GROUPED)]


def test_a_model_that_cannot_fit_is_not_begun() -> None:
    row = measured_row(Job("full(layers=4, length=1000000000000)", "train", SIZES))
    assert row["error"].startswith("out of memory: it needs at least")


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "error"), [(SIZES, None), (replace(SIZES, heads=5), "ValueError")])
def test_a_row_is_measured_in_a_process_of_its_own(sizes: Sizes, error: str | None) -> None:
    row = measured_row(Job(str(TWO), "decode", sizes))
    if error is None:
        assert row["peak_bytes"] > 0
        assert len(row["positions"]) == 2
    else:
        assert "d_model must be a multiple of n_heads" in row["error"]


def run(*arguments: str | Path):
    return CliRunner().invoke(app, ["profile", *map(str, arguments)])


SMALL = ["--d-model", "32", "--heads", "4", "--segment-length", "16", "--piece-tokens", "48", "--device", "cpu"]

SMALL_SIZES = Sizes(d_model=32, heads=4, segment_length=16, piece_tokens=48)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known ceilings, and rows measured in this process."""
    from dsmr_kernels.costing import ceilings

    monkeypatch.setattr(ceilings, "ceilings_of", lambda device, **options: KNOWN)
    monkeypatch.setattr(profile_module, "measured_row", row_module.measure)


@pytest.mark.slow
def test_the_program_prints_tables_and_writes_json_pictures_and_a_trace(quick: None, tmp_path: Path) -> None:
    arguments = ["--schedule", TWO, "--schedule", "none(layers=3)", "--budget", "20kB", "--dtype", "float32"]
    result = run(*arguments, *SMALL, "--out", tmp_path / "out", "--trace", tmp_path / "trace.json")
    assert result.exit_code == 0, result.output
    for words in ("One training step", "A whole piece", "one token at a time", "fit the budget", "two_scale"):
        assert words in result.stdout
    kept = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert {row for entry in kept["schedules"] for row in entry["rows"]} == {"train", "piece", "decode"}
    assert len(kept["proposals"]) >= 5
    text = (tmp_path / "out" / "profile.html").read_text(encoding="utf-8")
    assert text.count('<img alt="') == 3
    assert result.stdout.index("Preliminary") < result.stdout.index("One training step")
    for name in ("layers.png", "budget.png", "length.png"):
        picture = (tmp_path / "out" / name).read_bytes()
        assert picture[:4] == b"\x89PNG"
        assert len(picture) <= 200_000
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any("dsmr" in str(event.get("name", "")) or "mm" in str(event.get("name", "")) for event in events)


def test_a_first_table_stands_there_before_anything_is_measured(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(job: Job) -> dict:
        raise KeyboardInterrupt

    monkeypatch.setattr(profile_module, "measured_row", stopped)
    result = run("--schedule", TWO, *SMALL, "--dtype", "float32", "--out", tmp_path)
    assert result.exit_code != 0
    assert "Preliminary: predicted, not measured" in result.stdout
    seconds = sum(predict_step(SMALL_SIZES, TWO, "train", KNOWN).seconds(d) for d in ("forward", "backward", "step"))
    for words in (milliseconds(seconds), "(ms)", "(tokens/s)", human_bytes(sum(held_bytes(SMALL_SIZES, TWO, "train")))):
        assert words in result.stdout


def test_a_budget_alone_measures_nothing(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_module, "measured_row", lambda job: pytest.fail("measured"))
    result = run("--budget", "1MiB", "--layers", "4", *SMALL, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "fhcr(layers=4" in result.stdout.replace("\n", "")
    assert (tmp_path / "budget.png").exists()


def test_a_budget_alone_measures_the_ceilings_and_the_help_says_so(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fits is ranked by predicted cost, which nobody knows of a machine without its ceilings."""
    from dsmr_kernels.costing import ceilings

    asked: list[bool] = []
    monkeypatch.setattr(ceilings, "ceilings_of", lambda _, rough=False, **options: (asked.append(rough), KNOWN)[1])
    monkeypatch.setattr(profile_module, "measured_row", lambda job: pytest.fail("measured"))
    assert run("--budget", "1MiB", "--layers", "2", *SMALL, "--out", tmp_path).exit_code == 0
    assert asked == [True, False]
    said = " ".join(run("--help").stdout.replace("│", " ").split())
    assert "Predictions use the machine's ceilings, measured once" in said
    assert "With --budget and no --schedule nothing but these is measured." in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--schedule", "three_scale(layers=2)"], ["three_scale", "unknown"]),
        (["--schedule", "fhcr(layers=2, length=8, kv_heads=3)"], ["kv_heads", "3"]),
        (["--heads", "5"], ["d-model", "heads", "5"]),
        (["--measure", "sleep"], ["sleep", "decode"]),
        (["--budget", "plenty"], ["budget", "plenty"]),
        (["--dtype", "int8"], ["int8"]),
        (["--device", "abacus"], ["abacus"]),
        (["--visibility", "none"], ["visibility"]),
        (["--measure", "decode", "--trace", "trace.json"], ["trace"]),
        (["--out", "/proc/nowhere"], ["/proc/nowhere"]),
    ],
)
def test_what_cannot_be_is_one_sentence(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*SMALL, *arguments)
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 1
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines
    assert list(tmp_path.iterdir()) == []


def test_rows_that_failed_end_in_a_sentence(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_module, "measured_row", lambda job: {"error": "out of memory"})
    result = run("--schedule", TWO, *SMALL, "--out", tmp_path)
    assert result.exit_code == 1
    assert "out of memory" in result.stdout
    assert "not everything could be measured" in result.stderr.strip().splitlines()[-1]
    assert (tmp_path / "profile.json").exists()


@pytest.mark.parametrize("device", DEFAULTS)
def test_the_defaults_go_together(device: str) -> None:
    chosen = {name: value for name, value in DEFAULTS[device].items() if name != "schedules"}
    for text in DEFAULTS[device]["schedules"]:
        Sizes(**chosen).config(MemorySchedule.parse(text))


def test_a_budget_is_proposed_to_every_schedule_that_there_is() -> None:
    assert set(families(8, 8)) | {"explicit"} == set(CONSTRUCTORS)


def test_only_memories_of_the_newest_tokens_are_profiled() -> None:
    with pytest.raises(UserError, match="dsmr profile measures memories that keep the newest tokens only"):
        SIZES.config(MemorySchedule.uniform(2, 8, retention="random"))
