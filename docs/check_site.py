"""Read the built site as a browser would: does it ask another host for anything, and is every page there?

    python docs/check_site.py site

A link that a reader clicks may lead anywhere; what a page takes in by itself (scripts, styles, fonts, pictures) may
come from beside it only.
"""

import argparse
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlparse

FETCHED = {"src", "srcset", "poster", "data"}  # attributes whose address a browser asks for by itself
LINKED = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "manifest", "modulepreload"}
IN_STYLES = re.compile(r"""url\(\s*['"]?([^'")]+)|@import\s+['"]([^'"]+)""")


class Page(HTMLParser):
    """What a page takes in by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[str] = []
        self.diagrams = False  # which the theme would draw with a script from another host

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.taken += [value for name, value in given.items() if name in FETCHED and tag != "a"]
        if tag == "link" and LINKED & set(given.get("rel", "").split()):
            self.taken.append(given.get("href", ""))
        self.taken += [one or two for one, two in IN_STYLES.findall(given.get("style", ""))]
        self.diagrams |= "mermaid" in given.get("class", "").split()


def elsewhere(address: str) -> bool:
    """Whether an address leads to another host."""
    parts = urlparse(address.strip())
    return parts.scheme in ("http", "https", "ws", "wss", "ftp") or bool(parts.netloc)


def faults(site: Path) -> list[str]:
    """A sentence for everything in the site that asks another host, or is not there."""
    found = []
    pages = sorted(site.rglob("*.html"))
    if not (site / "index.html").is_file():
        found.append(f"{site} holds no index.html: it is no built site")
    for page in pages:
        parser = Page()
        parser.feed(page.read_text(encoding="utf-8"))
        name = page.relative_to(site)
        found += [f"{name} takes {address} from another host" for address in parser.taken if elsewhere(address)]
        if parser.diagrams:
            found.append(f"{name} has a diagram that a script from another host would draw")
        for address in parser.taken:
            path = address.split("?")[0].split("#")[0]
            beside = not elsewhere(address) and not address.startswith("data:")
            if path and beside and not any((folder / path.lstrip("/")).exists() for folder in (page.parent, site)):
                found.append(f"{name} takes {address}, which is not there")
    for style in sorted(site.rglob("*.css")):
        text = re.sub(r"/\*.*?\*/", "", style.read_text(encoding="utf-8"), flags=re.DOTALL)
        taken = [one or two for one, two in IN_STYLES.findall(text)]
        found += [
            f"{style.relative_to(site)} takes {address} from another host" for address in taken if elsewhere(address)
        ]
    return found


def main() -> int:
    """Say what is wrong, and fail if anything is."""
    parser = argparse.ArgumentParser(description="Does the built site ask another host for anything?")
    parser.add_argument("site", type=Path)
    found = faults(parser.parse_args().site)
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
