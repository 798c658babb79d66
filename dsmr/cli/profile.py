"""`dsmr profile`: what memory schedules cost on this machine, predicted and measured."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dsmr.cli.options import parse_schedule
from dsmr.console.errors import UserError
from dsmr.console.terminal import command, console

Whole = int | None
# What is profiled where nothing is said, by kind of device: a minute on two CPU cores for two schedules.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "d_model": 256,
        "heads": 4,
        "segment_length": 256,
        "batch": 1,
        "piece_tokens": 2048,
        "schedules": ("two_scale(layers=4, long=2048, short=256, n_long=1)", "full(layers=4, length=2048)"),
    },
    "cuda": {
        "d_model": 1024,
        "heads": 16,
        "segment_length": 1024,
        "batch": 8,
        "piece_tokens": 16384,
        "schedules": ("two_scale(layers=12, long=8192, short=1024, n_long=3)", "full(layers=12, length=8192)"),
    },
}
THOROUGH: dict[str, Any] = {"rounds": 31, "seconds": 20.0}


@command
def profile(
    schedule: Annotated[
        list[str] | None,
        typer.Option(
            help="Memory of every layer; may be given several times.", show_default="a two-scale and a full one"
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for profile.json, the page and the pictures.")
    ] = Path("profile"),
    measure: Annotated[
        str, typer.Option(help="What to measure: train (a step), piece (one call over a whole piece), decode.")
    ] = "train,piece,decode",
    budget: Annotated[
        str | None,
        typer.Option(help="Such as 64MiB: propose schedules that fit, ranked by predicted cost.", show_default="no"),
    ] = None,
    layers: Annotated[Whole, typer.Option(min=1, help="Layers of the proposals.", show_default="as --schedule")] = None,
    d_model: Annotated[Whole, typer.Option(min=1, help="Width of the model.", show_default="by device")] = None,
    heads: Annotated[Whole, typer.Option(min=1, help="Query heads.", show_default="by device")] = None,
    segment_length: Annotated[Whole, typer.Option(min=1, help="Tokens of a segment.", show_default="by device")] = None,
    batch: Annotated[Whole, typer.Option(min=1, help="Streams of a training step.", show_default="by device")] = None,
    piece_tokens: Annotated[
        Whole, typer.Option(min=1, help="Tokens of the whole piece.", show_default="by device")
    ] = None,
    vocab_size: Annotated[int, typer.Option(min=1, help="Token ids.")] = 746,
    visibility: Annotated[str, typer.Option(help="segment (the paper) or sliding.")] = "segment",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto (bfloat16 where the hardware has it).")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto (the GPU where there is one), cpu, cuda, or cuda:N.")] = "auto",
    thorough: Annotated[bool, typer.Option("--thorough", help="More rounds: minutes instead of one.")] = False,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write a Chrome trace (ui.perfetto.dev) of the first schedule's step.", show_default="no"),
    ] = None,
) -> None:
    """Time and memory of schedules on this machine: by layer and in total, predicted and measured, with pictures.

    Predictions use the machine's ceilings, measured once (see python -m dsmr_kernels.costing.ceilings). With --budget
    and no --schedule nothing but these is measured.
    """
    from dsmr.console.files import check_apart, check_replaceable, check_writable

    schedules = [parse_schedule(text) for text in schedule or ()]
    kinds = [kind.strip() for kind in measure.split(",") if kind.strip()]
    for path in (out / "profile.json", out / "profile.html", trace):
        if path is not None:
            check_writable(path)
    check_apart([out / "profile.json", out / "profile.html", trace], {})
    check_replaceable(trace, "a Chrome trace")
    sizes, defaults = _sizes(locals(), dtype, device, thorough)
    if not schedules and budget is None:
        schedules = [parse_schedule(text) for text in defaults["schedules"]]
    _run(schedules, sizes, kinds, out, trace, budget, layers)


def _sizes(given: dict[str, Any], dtype: str, device: str, thorough: bool) -> tuple[Any, dict[str, Any]]:
    """The sizes asked for, the others by device; and that device's defaults."""
    import torch

    from dsmr.console.devices import resolve_device, resolve_dtype
    from dsmr.profiling.job import Sizes

    place = resolve_device(device)
    defaults = DEFAULTS[place.type]
    names = ("d_model", "heads", "segment_length", "batch", "piece_tokens")
    chosen = {name: defaults[name] if given[name] is None else given[name] for name in names}
    if chosen["d_model"] % chosen["heads"]:
        raise UserError(f"d-model must be a multiple of heads, got {chosen['d_model']} and {chosen['heads']}")
    longest = max((max(s.horizons) for s in given["schedules"]), default=0) or 4 * chosen["segment_length"]
    sizes = Sizes(
        **chosen,
        vocab_size=given["vocab_size"],
        visibility=given["visibility"],
        positions=tuple(sorted({0, chosen["segment_length"], longest, 4 * longest})),
        dtype=str(resolve_dtype(dtype, place)).removeprefix("torch."),
        device=str(place),
        threads=torch.get_num_threads(),
        **(THOROUGH if thorough else {}),
    )
    return sizes, defaults


def _run(
    schedules: list[Any],
    sizes: Any,
    kinds: list[str],
    out: Path,
    trace: Path | None,
    budget: str | None,
    layers: int | None,
) -> None:
    """What to expect, printed at once; then measure, propose, print, draw."""
    import torch

    from dsmr.console.files import write_json
    from dsmr.console.progress import ProgressLine
    from dsmr.profiling.budget import parse_bytes, propose
    from dsmr.profiling.job import KINDS
    from dsmr.profiling.profile import Profile
    from dsmr.profiling.profile import profile as work
    from dsmr.profiling.report import tables
    from dsmr_kernels.costing.ceilings import ceilings_of, load

    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise UserError(
            f"--measure takes {', '.join(KINDS)}, separated by commas, got {', '.join(unknown) or 'nothing'}"
        )
    if trace is not None and (not schedules or not {"train", "piece"} & set(kinds)):
        raise UserError("--trace needs a schedule, and train or piece among what is measured")
    most = None if budget is None else parse_bytes(budget)
    depth = layers or (schedules[0].layers if schedules else 8)
    for schedule in schedules:
        sizes.config(schedule)
    screen, device = console(), torch.device(sizes.device)
    found = Profile(sizes, ceilings_of(device, rough=True))
    screen.print(
        f"{found.ceilings.device}, {sizes.threads} threads, {sizes.dtype}; width {sizes.d_model}, {sizes.heads} heads, "
        f"segments of {sizes.segment_length:,} tokens",
        soft_wrap=True,
    )
    if most is not None and load(device) is None:  # else the table comes at once
        found.proposals = propose(most, depth, sizes, found.ceilings)
    _first(screen, schedules, kinds, found)
    load_before = found.load_before
    with ProgressLine() as line:
        line.update("the machine's ceilings (measured once, then cached)")
        ceilings = ceilings_of(device, say=line.say)
        found = Profile(sizes, ceilings, load_before=load_before)
        if schedules:
            found = work(
                schedules,
                sizes,
                ceilings,
                kinds=kinds,
                json_path=out / "profile.json",
                trace=trace,
                progress=line.update,
            )
            found.load_before = load_before
        if most is not None:
            found.proposals = propose(most, depth, sizes, ceilings)
        line.update("writing")
        write_json(out / "profile.json", found.to_json(), sealed=True)
        written = _drawn(found, out, line)
    for sentence in found.warnings:
        screen.print(f"Warning: {sentence}.", style="yellow", soft_wrap=True)
    for table in tables(found):
        screen.print(table)
    for path in [out / "profile.json", *written, *([trace] if trace and trace.exists() else [])]:
        screen.print(str(path), soft_wrap=True)
    if found.failures:
        raise UserError("not everything could be measured: " + "; ".join(found.failures))


def _first(screen: Any, schedules: list[Any], kinds: list[str], found: Any) -> None:
    """A first table, before anything is measured: predictions, from ceilings that may be rough still."""
    from dsmr.profiling.profile import predicted_row
    from dsmr.profiling.report import table
    from dsmr.profiling.sheets import first_sheet, proposals

    if found.proposals:
        sheet = proposals(found)
        sheet.title = f"Preliminary, from a measurement of a second or two: {sheet.title}"
        screen.print(table(sheet))
    if not schedules:
        return
    expected = {
        str(schedule): {kind: predicted_row(found.sizes, schedule, kind, found.ceilings) for kind in kinds}
        for schedule in schedules
    }
    screen.print(table(first_sheet(schedules, found, expected)))


def _drawn(found: Any, out: Path, line: Any) -> list[Path]:
    """The pictures, where they can be drawn, and the page that holds them."""
    from dsmr.console.figures import available
    from dsmr.profiling.page import write_page
    from dsmr.profiling.plots import pictures

    drawn: list[Path] = []
    if available():
        drawn = pictures(found, out)
    else:
        line.say("the pictures are not drawn, because Matplotlib is not installed")
    return [write_page(found, out / "profile.html", drawn), *drawn]
