"""Draw the concepts from the code that keeps them: who sees whom, the ring, the whole-piece pass, the schedules.

python docs/draw_concepts.py            # writes docs/images/concept-*.svg
python docs/draw_concepts.py --check    # fails if a committed drawing is not what the code says
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import torch

from dsmr.model.schedule import MemorySchedule
from dsmr_kernels.ring import ring_slices
from dsmr_kernels.visibility import VISIBILITIES, lowest_visible

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "images"
INK, FAINT, GRID, PAPER = "#1f2933", "#66788a", "#d5dbe1", "#f4f1ea"
MEMORY, SEGMENT, EARLIER = "#d98c3f", "#3f6f8f", "#8fb3c7"
CELL = 22


def text(x: float, y: float, words: str, *, size: int = 12, colour: str = INK, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = GRID) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{stroke}" '
        'stroke-width="0.7"/>'
    )


def picture(width: float, height: float, body: Sequence[str], says: str) -> str:
    """The SVG; `says` is read to those who do not see it."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
            f'aria-label="{escape(says)}" font-family="Helvetica, Arial, sans-serif">',
            '<rect width="100%" height="100%" fill="white"/>',
            *body,
            "</svg>\n",
        ]
    )


def legend(x: float, y: float, entries: dict[str, str]) -> list[str]:
    drawn = []
    for colour, words in entries.items():
        drawn += [box(x, y - 10, 12, 12, colour), text(x + 18, y, words, size=11, colour=FAINT)]
        x += 34 + 6.1 * len(words)
    return drawn


def band(x: float, y: float, horizon: int, length: int, tokens: int, visibility: str) -> list[str]:
    """Queries downwards, keys to the right: memory first, then the call. Coloured: what a query sees."""
    low = lowest_visible(
        torch.arange(tokens), horizon=horizon, segment_length=length, segment_offset=0, visibility=visibility
    )[0].tolist()
    drawn = []
    for query in range(tokens):
        for key in range(-horizon, tokens):
            fill = "white"
            if low[query] <= key <= query:
                own = key // length == query // length
                fill = MEMORY if key < 0 else SEGMENT if own else EARLIER
            drawn.append(box(x + (key + horizon) * CELL, y + query * CELL, CELL, CELL, fill))
    for edge in range(0, tokens + 1, length):
        across, down = x + (edge + horizon) * CELL, y + edge * CELL
        drawn.append(f'<path d="M{across:g} {y:g}V{y + tokens * CELL:g}" stroke="{INK}" stroke-width="1.4"/>')
        if edge:
            end = x + (tokens + horizon) * CELL
            drawn.append(f'<path d="M{x:g} {down:g}H{end:g}" stroke="{INK}" stroke-width="1.4"/>')
    return drawn


def visibility() -> str:
    """Both rules, side by side."""
    horizon, length, tokens = 6, 4, 8
    side = (horizon + tokens) * CELL
    body = []
    for number, rule in enumerate(VISIBILITIES):
        x, y = 70 + number * (side + 90), 66
        said = {"segment": "every query of a segment sees the same past", "sliding": "each sees its own past"}[rule]
        body += [text(x, 26, f'visibility="{rule}"', size=15), text(x, 44, said, size=11, colour=FAINT)]
        body.append(text(x + horizon * CELL / 2, 60, f"memory ({horizon} tokens)", size=10, anchor="middle"))
        for segment in range(tokens // length):
            middle = x + (horizon + (segment + 0.5) * length) * CELL
            body.append(text(middle, 60, f"segment {segment}", size=10, anchor="middle"))
        body += [text(x - 8, y + (q + 0.7) * CELL, f"query {q}", size=10, anchor="end") for q in range(tokens)]
        body += band(x, y, horizon, length, tokens, rule)
    foot = 66 + tokens * CELL + 26
    body += legend(70, foot, {MEMORY: "in the memory", EARLIER: "in an earlier segment", SEGMENT: "in its own segment"})
    return picture(2 * side + 250, foot + 16, body, "Who sees whom, by segments and in a sliding window")


def ring() -> str:
    """A ring of six slots after 4, 6, 9 and 14 tokens of a piece: where each token lies."""
    capacity, seen = 6, (4, 6, 9, 14)
    body = [text(30, 26, f"A ring of {capacity} slots", size=15)]
    said = "token t lies in slot t mod 6; the newest overwrites the oldest, and nothing moves"
    body.append(text(30, 44, said, size=11, colour=FAINT))
    for row, position in enumerate(seen):
        y, held = 66 + row * 58, min(position, capacity)
        body.append(text(30, y + 24, f"{position} tokens seen", size=11))
        inside: dict[int, int] = {}
        token = position - held
        for start, stop in ring_slices(position, capacity, -held, held):
            for slot in range(start, stop):
                inside[slot], token = token, token + 1
        for slot in range(capacity):
            x = 150 + slot * 58
            newest = inside.get(slot) == position - 1
            body.append(box(x, y, 54, 36, SEGMENT if newest else MEMORY if slot in inside else PAPER, INK))
            if slot in inside:
                body.append(text(x + 27, y + 23, str(inside[slot]), colour="white", size=14, anchor="middle"))
    body += [text(177 + slot * 58, 66 + 4 * 58, f"slot {slot}", size=10, anchor="middle") for slot in range(capacity)]
    body += legend(30, 66 + 4 * 58 + 28, {SEGMENT: "the newest token", MEMORY: "held", PAPER: "empty"})
    return picture(520, 66 + 4 * 58 + 44, body, "Where the tokens of a piece lie in a ring")


def whole_piece() -> str:
    """Three calls of a segment each, and one call of three segments: the same band."""
    horizon, length, segments = 6, 4, 3
    side = (horizon + segments * length) * CELL
    body = [text(40, 26, "Segment by segment: three calls, the memory carried", size=14)]
    for number in range(segments):
        x, y = 40, 44 + number * (length * CELL + 10)
        low = -horizon
        for query in range(length):
            for key in range(low, length):
                fill = MEMORY if key < 0 else SEGMENT if key <= query else "white"
                across = x + (key + horizon + number * length) * CELL
                body.append(box(across, y + query * CELL, CELL, CELL, fill))
        body.append(text(x + (horizon + (number + 1) * length) * CELL + 8, y + 24, f"call {number}", size=11))
    right = side + 130
    body.append(text(right, 26, "The whole-piece pass: one call", size=14))
    body += band(right, 44, horizon, length, segments * length, "segment")
    foot = 44 + segments * (length * CELL + 10) + 20
    body += legend(40, foot, {MEMORY: "memory: no gradient", EARLIER: "detached all the same", SEGMENT: "own segment"})
    said = "the same outputs and the same gradients, in one call"
    body.append(text(right, foot, said, size=11, colour=FAINT))
    return picture(right + side + 40, foot + 16, body, "Three calls of one segment each equal one call of three")


def schedules() -> str:
    """What each layer of eight remembers, for schedules of which most spend the same budget."""
    shown = (
        "full(layers=8, length=4096)",
        "uniform(layers=8, horizon=1024)",
        "two_scale(layers=8, long=2560, short=512, n_long=2)",
        "reverse_two_scale(layers=8, long=2560, short=512, n_long=2)",
        "ascending(layers=8, shortest=256, longest=1792)",
        "fhcr(layers=8, length=4096, kv_heads=2)",
    )
    heads, width, head_dim, body = 8, 250, 64, []
    for number, line in enumerate(shown):
        schedule = MemorySchedule.parse(line)
        x, y = 30 + (number % 3) * (width + 40), 30 + (number // 3) * 190
        name, _, arguments = line.partition("(")
        bytes_ = schedule.budget_bytes(n_heads=heads, head_dim=head_dim, bytes_per_element=2)
        body += [text(x, y, name, size=14), text(x, y + 16, f"({arguments}", size=10, colour=FAINT)]
        for layer, horizon in enumerate(schedule.horizons):
            thick = 13 * schedule.heads(heads)[layer] / heads
            below = y + 26 + (schedule.layers - 1 - layer) * 15
            body.append(box(x, below + (13 - thick) / 2, width * horizon / 4096, thick, MEMORY, "none"))
            body.append(box(x, below, width, 13, "none"))
        body.append(text(x, y + 26 + schedule.layers * 15 + 12, f"{bytes_ / 2**20:g} MiB a stream", size=11))
    said = "layers from the bottom up; a bar's length is the horizon (4,096 tokens wide), its thickness its KV heads"
    body.append(text(30, 412, f"{said}; 8 heads of 64, bfloat16", size=11, colour=FAINT))
    return picture(3 * (width + 40) + 20, 428, body, "The horizon of each layer in six schedules")


DRAWINGS = {"visibility": visibility, "ring": ring, "whole-piece": whole_piece, "schedules": schedules}


def main() -> int:
    """Draw, or check what is drawn."""
    parser = argparse.ArgumentParser(description="Draw the concepts from the code that keeps them.")
    parser.add_argument("--check", action="store_true", help="fail if a committed drawing is another one")
    check, stale = parser.parse_args().check, []
    for name, draw in DRAWINGS.items():
        path, made = FOLDER / f"concept-{name}.svg", draw()
        if not check:
            path.write_text(made, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != made:
            stale.append(str(path.relative_to(ROOT)))
    if stale:
        print(f"stale: {', '.join(stale)}; run `python docs/draw_concepts.py`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
