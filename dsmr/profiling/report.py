"""The tables of `dsmr profile` (`sheets`) for a terminal (rich): predicted beside measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dsmr.profiling.profile import Profile
from dsmr.profiling.sheets import Sheet, sheets

if TYPE_CHECKING:
    from rich.table import Table


def tables(found: Profile) -> Iterator[Table]:
    """All that there is to show, in order."""
    return map(table, sheets(found))


def table(sheet: Sheet) -> Table:
    """One of them; the unit of a column stands below its name, and what a user wrote is never read as markup."""
    from rich.table import Table
    from rich.text import Text

    made = Table(
        title=Text(sheet.title, "italic"),
        caption=Text(sheet.caption, "dim italic"),
        title_justify="left",
        caption_justify="left",
        padding=(0, 0),
    )
    for column in sheet.columns:
        head = f"{column.name}\n({column.unit})" if column.unit else column.name
        made.add_column(Text(head), justify="left" if column.left else "right", overflow="fold")
    for row in sheet.rows:
        made.add_row(*(Text(cell.text) for cell in row))
    return made
