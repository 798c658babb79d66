"""Draw the rooms of both packages and who imports whom, from the code's own imports.

    python docs/draw_architecture.py            # writes docs/images/architecture.svg
    python docs/draw_architecture.py --check    # fails if the committed drawing is not what the code says

Floors are the layers of the import contracts in pyproject.toml. An arrow is left out where a longer way of arrows says
the same; a dashed one is an import that waits until it is needed.
"""

import argparse
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import grimp

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN, TOP = 156, 60, 24, 36, 30, 64
NOTE = 30  # letters of a line below a room's name
INK, FAINT, PAPER, LINE = "#1f2933", "#66788a", "#f4f1ea", "#8d99a6"


@dataclass(frozen=True)
class Room:
    """A box: where it stands and what it says."""

    name: str
    x: float
    y: float


def floors(package: str) -> tuple[list[list[str]], set[tuple[str, str]]]:
    """The rooms of a package from the top floor down, and the imports that its contract lets pass upwards."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for contract in settings["tool"]["importlinter"]["contracts"]:
        if contract["type"] == "layers" and contract["containers"] == [package]:
            upward = {tuple(entry.split(" -> ")) for entry in contract.get("ignore_imports", ())}
            return [[name.strip() for name in layer.split("|")] for layer in contract["layers"]], upward
    raise SystemExit(f"pyproject.toml has no layers of {package}")


def room_of(module: str, package: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == package and len(parts) > 1 else None


def arrows(graph: grimp.ImportGraph, package: str, names: set[str], upward: set[tuple[str, str]]) -> dict[
    tuple[str, str], bool
]:  # fmt: skip
    """(importing room, imported room) -> whether it waits; without those that a longer way says too."""
    found: dict[tuple[str, str], bool] = {}
    for module in graph.modules:
        for target in graph.find_modules_directly_imported_by(module):
            pair = (room_of(module, package), room_of(target, package))
            if pair[0] and pair[1] and pair[0] != pair[1] and set(pair) <= names:
                waits = (module, target) in upward
                found[pair[0], pair[1]] = found.get((pair[0], pair[1]), True) and waits
    straight = {pair for pair, waits in found.items() if not waits}

    def reaches(start: str, end: str, without: tuple[str, str]) -> bool:
        seen, open_rooms = set(), [start]
        while open_rooms:
            here = open_rooms.pop()
            for source, target in straight:
                if source == here and (source, target) != without and target not in seen:
                    seen.add(target)
                    open_rooms.append(target)
        return end in seen

    return {pair: waits for pair, waits in found.items() if waits or not reaches(*pair, without=pair)}


def kernels_used(graph: grimp.ImportGraph, room: str) -> list[str]:
    """What a room of dsmr takes from dsmr_kernels."""
    found = set()
    for module in graph.modules:
        if room_of(module, "dsmr") == room:
            for target in graph.find_modules_directly_imported_by(module):
                if target.split(".")[0] == "dsmr_kernels":
                    found.add(room_of(target, "dsmr_kernels") or "api")
    return sorted(found)


def placed(package: str, layers: list[list[str]], left: float, width: float) -> dict[str, Room]:
    """Each floor's rooms side by side, centred."""
    rooms = {}
    for floor, names in enumerate(layers):
        used = len(names) * WIDTH + (len(names) - 1) * GAP_X
        for index, name in enumerate(names):
            x = left + (width - used) / 2 + index * (WIDTH + GAP_X) + (floor % 2 - 0.5) * 44
            rooms[name] = Room(name, x, TOP + floor * (HEIGHT + GAP_Y))
    return rooms


def box(room: Room, note: str) -> str:
    middle, below = room.x + WIDTH / 2, textwrap.wrap(note, NOTE)
    first = room.y + HEIGHT / 2 + 5 - 6 * len(below)
    rows = [
        f'<rect x="{room.x:g}" y="{room.y:g}" width="{WIDTH}" height="{HEIGHT}" rx="5" fill="{PAPER}" stroke="{INK}"/>',
        f'<text x="{middle:g}" y="{first:g}" font-size="14" fill="{INK}" text-anchor="middle">'
        f"{escape(room.name)}</text>",
    ]
    for number, line in enumerate(below, 1):
        rows.append(
            f'<text x="{middle:g}" y="{first + 1 + 11 * number:g}" font-size="9.5" fill="{FAINT}" '
            f'text-anchor="middle">{escape(line)}</text>'
        )
    return "\n".join(rows)


def arrow(source: Room, target: Room, waits: bool) -> str:
    """From the bottom of one box to the top of a lower one; the other way round where it goes up."""
    down = source.y < target.y
    lean = max(-40.0, min(40.0, (target.x - source.x) / 6))
    x1, y1 = source.x + WIDTH / 2 + lean, source.y + (HEIGHT if down else 0)
    x2, y2 = target.x + WIDTH / 2 - lean, target.y + (0 if down else HEIGHT)
    bend = (y2 - y1) / 2
    dashes = ' stroke-dasharray="5 4"' if waits else ""
    return (
        f'<path d="M{x1:g} {y1:g} C{x1:g} {y1 + bend:g} {x2:g} {y2 - bend:g} {x2:g} {y2:g}" fill="none" '
        f'stroke="{LINE}" stroke-width="1.3" marker-end="url(#tip)"{dashes}/>'
    )


def drawing() -> str:
    """The SVG."""
    graph = grimp.build_graph("dsmr", "dsmr_kernels", cache_dir=None)
    body, left, height = [], float(MARGIN), 0.0
    for package in ("dsmr", "dsmr_kernels"):
        layers, upward = floors(package)
        width = max(len(names) for names in layers) * (WIDTH + GAP_X) + 60
        rooms = placed(package, layers, left, width)
        body.append(
            f'<text x="{left + width / 2:g}" y="34" font-size="18" fill="{INK}" text-anchor="middle">{package}</text>'
        )
        for (source, target), waits in sorted(arrows(graph, package, set(rooms), upward).items()):
            body.append(arrow(rooms[source], rooms[target], waits))
        for room in rooms.values():
            used = kernels_used(graph, room.name) if package == "dsmr" else []
            body.append(box(room, f"of the kernels: {', '.join(used)}" if used else ""))
        left += width + MARGIN
        height = max(height, *(room.y + HEIGHT for room in rooms.values()))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left:g} {height + MARGIN:g}" '
            'font-family="Helvetica, Arial, sans-serif">',
            f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker></defs>',
            '<rect width="100%" height="100%" fill="white"/>',
            *body,
            "</svg>\n",
        ]
    )


def main() -> int:
    """Draw, or check what is drawn."""
    parser = argparse.ArgumentParser(description="Draw the rooms of both packages, from the code's own imports.")
    parser.add_argument("--check", action="store_true", help="fail if the committed drawing is another one")
    made = drawing()
    if not parser.parse_args().check:
        PICTURE.write_text(made, encoding="utf-8")
        return 0
    if PICTURE.exists() and PICTURE.read_text(encoding="utf-8") == made:
        return 0
    print(f"{PICTURE.relative_to(ROOT)} is stale: run `python docs/draw_architecture.py`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
