"""What the pages say that one may type: their Python runs as it stands, and their links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
EXAMPLES = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
]


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("block", EXAMPLES)
def test_an_example_runs_as_it_stands(block: str) -> None:
    exec(compile(block, "<example>", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            found = (page.parent / path).resolve() if path else page
            assert found.exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
                names = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
                assert anchor in names, target


def test_every_extra_stands_in_the_table_of_extras() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8").split("extras_require={", 1)[1].split("\n    },", 1)[0]
    extras = re.findall(r'^        "(\w+)":', setup, re.MULTILINE)
    table = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/install.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(extras) > 5
    assert sorted(table) == sorted(extras)


def test_the_map_of_the_rooms_names_every_file_of_them() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)/` \| [^|]* \| ([^|]*) \| [^|]* \|$", text, re.MULTILINE))
    rooms = {path.parent.name: path.parent for path in ROOT.glob("dsmr/*/__init__.py")}
    assert set(rows) == set(rooms)
    for name, files in rows.items():
        named = set(re.findall(r"`(\w+)/?`", files))
        there = {path.stem for path in rooms[name].glob("*.py")} - {"__init__"}
        folders = {path.parent.name for path in rooms[name].glob("*/__init__.py")}
        inside = {path.stem for path in rooms[name].glob("*/*.py")}
        assert named <= there | folders | inside, name
        if name != "cli":  # a file for each command
            assert there | folders <= named, name
