"""What `prepare` did: how much music there is in each split, what was skipped or altered, and why."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

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
        )

    def lines(self) -> list[str]:
        """Everything beside the counts, a sentence each."""
        lines = [f"{count:,} notes left out: {why}." for why, count in self.dropped.items()]
        lines += [f"{count:,} notes changed by the tokeniser: {what}." for what, count in self.changed.items()]
        if not self.dropped:
            lines.insert(0, "Every note of these pieces is in the corpus.")
        return lines + self.remarks

    def table(self) -> "RenderableType":
        """Pieces, notes, tokens, hours and tokens a note of each split, then every skipped file and altered note."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        counts = Table(title=f"{self.name}: {self.out} ({self.tokenizer})", title_justify="left")
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
                skipped.add_row(Text(source), Text(reason))
            if len(self.skipped) > SHOWN:
                skipped.add_row("…", f"and {len(self.skipped) - SHOWN:,} more: see manifest.json")
            parts.append(skipped)
        else:
            parts.append(Text("No file was skipped."))
        parts += [Text(line) for line in self.lines()]
        return Group(*parts)


def _cells(row: SplitCounts) -> tuple[str, ...]:
    hours = f"{row.seconds / 3600:.1f}" if row.seconds >= 36_000 else f"{row.seconds / 3600:.2f}"
    return f"{row.pieces:,}", f"{row.notes:,}", f"{row.tokens:,}", hours, f"{row.tokens_per_note:.2f}"
