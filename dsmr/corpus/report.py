"""What `prepare` did: how much music there is in each split, what was skipped or altered, and why."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from dsmr.console.shown import shown
from dsmr.music.tokenizer import pedals_left_out

if TYPE_CHECKING:
    from rich.console import RenderableType

SHOWN = 40  # skipped files in the table; all of them are in the manifest


@dataclass
class SplitCounts:
    """The contents of one split."""

    pieces: int = 0
    notes: int = 0
    tokens: int = 0  # BOS and EOS of each piece included
    seconds: float = 0.0

    def __add__(self, other: "SplitCounts") -> "SplitCounts":
        return SplitCounts(
            self.pieces + other.pieces,
            self.notes + other.notes,
            self.tokens + other.tokens,
            self.seconds + other.seconds,
        )

    @property
    def tokens_per_note(self) -> float:
        return self.tokens / self.notes if self.notes else 0.0


@dataclass
class PrepareReport:
    """The outcome of one `prepare`; kept in the corpus's manifest and shown by `table()`."""

    name: str
    out: str
    tokenizer: str  # scheme and hash
    splits: dict[str, SplitCounts]
    skipped: list[tuple[str, str]] = field(default_factory=list)  # source, reason
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> notes that are not in the corpus
    changed: Counter[str] = field(default_factory=Counter)  # what -> notes that the tokens tell otherwise
    remarks: list[str] = field(default_factory=list)
    n_begun: int = 0  # note-ons counted in the bytes of the files that became pieces
    counted: str = "in the bytes of their files"  # where the note-ons were counted
    n_skipped: int = 0  # those in skipped files, as far as their bytes can be read
    n_copies: int = 0  # pieces that play the notes of another one
    n_apart: int = 0  # pieces whose copies lie in other splits, where a given list puts them
    n_pedals: int = 0  # times that the pedal is held in the files and the tokens say nothing of it

    @property
    def total(self) -> SplitCounts:
        return sum(self.splits.values(), SplitCounts())

    def to_json(self) -> dict[str, Any]:
        # Counters become plain dictionaries: `asdict` cannot copy them.
        return {**vars(self), "splits": {split: asdict(counts) for split, counts in self.splits.items()}}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "PrepareReport":
        return cls(
            value["name"],
            value["out"],
            value["tokenizer"],
            {split: SplitCounts(**counts) for split, counts in value["splits"].items()},
            [(source, reason) for source, reason in value["skipped"]],
            Counter(value["dropped"]),
            Counter(value["changed"]),
            list(value["remarks"]),
            # Reports of earlier versions did not count these.
            n_begun=value.get("n_begun", 0),
            counted=value.get("counted", cls.counted),
            n_skipped=value.get("n_skipped", 0),
            n_copies=value.get("n_copies", 0),
            n_apart=value.get("n_apart", 0),
            n_pedals=value.get("n_pedals", 0),
        )

    def count_copies(self, groups: Sequence[int], splits: Sequence[str]) -> None:
        """Note how many pieces are copies, given the group and the split of each piece."""
        where: dict[int, set[str]] = {}
        for group, split in zip(groups, splits, strict=True):
            where.setdefault(group, set()).add(split)
        self.n_copies = len(groups) - len(where)
        self.n_apart = sum(len(found) > 1 for found in where.values())
        if len(groups) > 1 and len(set(splits)) == 1:
            reason = "all pieces are copies of one" if len(where) == 1 else "no other split has a share"
            self.remarks.append(f"All pieces are in the split '{splits[0]}': {reason}.")

    def check(self) -> None:
        """`AssertionError` unless every note-on is either in the corpus or left out for a reason."""
        left_out = sum(self.dropped.values())
        if self.total.notes + left_out != self.n_begun:
            raise AssertionError(f"{self.n_begun} notes begun, {self.total.notes} kept, {left_out} left out")

    def lines(self) -> list[str]:
        """Everything beside the counts, a sentence each."""
        left_out = sum(self.dropped.values())
        lines = [
            f"{self.n_begun:,} notes begin in these pieces, counted {self.counted}: all of them are in the corpus."
        ]
        if left_out:
            kept = f"{self.total.notes:,} are in the corpus, {left_out:,} are left out."
            lines = [f"{self.n_begun:,} notes begin in these pieces, counted {self.counted}: {kept}"]
        lines += [f"{count:,} notes left out: {why}." for why, count in self.dropped.items()]
        lines += [f"{count:,} notes changed: {what}." for what, count in self.changed.items()]
        if self.n_pedals:
            lines.append(pedals_left_out(self.n_pedals))
        if self.n_skipped:
            lines.append(f"{self.n_skipped:,} notes begin in the skipped files, as far as these can be read.")
        if self.n_copies:
            place = f"of {self.n_apart:,} some lie in another split" if self.n_apart else "each lies in its split"
            lines.append(f"{self.n_copies:,} pieces play the notes of another one (copies, performances): {place}.")
        return lines + self.remarks

    def table(self) -> "RenderableType":
        """Pieces, notes, tokens, hours and tokens a note of each split, then every skipped file and altered note."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        # As `Text`, which is never taken for markup, whoever prints it.
        title = Text(f"{shown(self.name)}: {shown(self.out)} ({self.tokenizer})")
        counts = Table(title=title, title_justify="left")
        counts.add_column("split")
        for heading in ("pieces", "notes", "tokens", "hours", "tokens/note"):
            counts.add_column(heading, justify="right")
        for split, row in self.splits.items():
            counts.add_row(split, *_cells(row))
        counts.add_section()
        counts.add_row("all", *_cells(self.total))
        parts: list[RenderableType] = [counts]
        if self.skipped:
            skipped = Table(title=f"{len(self.skipped):,} files skipped", title_justify="left")
            skipped.add_column("file", overflow="fold")
            skipped.add_column("reason", overflow="fold")
            for source, reason in self.skipped[:SHOWN]:
                skipped.add_row(Text(shown(source)), Text(shown(reason)))
            if len(self.skipped) > SHOWN:
                skipped.add_row("…", f"and {len(self.skipped) - SHOWN:,} more: see manifest.json")
            parts.append(skipped)
        else:
            parts.append(Text("No file was skipped."))
        parts += [Text(shown(line)) for line in self.lines()]
        return Group(*parts)


def _cells(row: SplitCounts) -> tuple[str, ...]:
    hours = f"{row.seconds / 3600:.1f}" if row.seconds >= 36_000 else f"{row.seconds / 3600:.2f}"
    return f"{row.pieces:,}", f"{row.notes:,}", f"{row.tokens:,}", hours, f"{row.tokens_per_note:.2f}"
